"""Documents that share a row learn as if each stood alone, in every family that reads one text; no token is dropped on the way from the corpus."""
from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from hanok.contracts import IGNORE_INDEX, Batch
from hanok.data.corpus import build_corpus
from hanok.data.loader import Loader
from hanok.data.objectives import Rows, causal, masked
from hanok.data.sources import Document
from hanok.models import catalog
from hanok.nn.loss import token_cross_entropy
from zoo import CASES, V

ONE_TEXT = [case for case in CASES if not case.reads_source and getattr(case.config, "mlm_head", True)]
everyone = pytest.mark.parametrize("case", ONE_TEXT, ids=lambda case: case.name)
DOCUMENTS = torch.tensor([[0] * 9 + [1] + [2] * 15, [3] * 25, [4] * 3 + [5] * 10 + [6] * 12])


def objective_of(case):
    if catalog.FAMILIES[case.family].objective == "causal":
        return causal
    return partial(masked, mask_id=V - 1, ordinary=np.arange(V) < V - 4, rate=0.3, around=(V - 2, V - 3))


def loss_of(model, batch: Batch) -> tuple[float, int]:
    with torch.no_grad():
        total, n = token_cross_entropy(model.hidden(batch), batch.targets, model.head)
    return total.item(), n


def documents_of(batch: Batch) -> list[Batch]:
    """Each row's each document as a batch of its own, without marks of any kind."""
    alone = []
    for ids, targets, numbers in zip(batch.token_ids, batch.targets, batch.document_ids):
        alone += [Batch(ids[numbers == number][None], targets=targets[numbers == number][None]) for number in numbers.unique()]
    return alone


@everyone
def test_the_packed_loss_is_the_loss_of_each_document_alone(case):
    model = case.build()
    rows = Rows(torch.randint(V - 4, (3, 25), generator=torch.Generator().manual_seed(1)), DOCUMENTS, ((0, 0, 0), (0, 0, 1), (0, 0, 2)))
    batch = objective_of(case)(rows)
    packed, alone = loss_of(model, batch), [loss_of(model, part) for part in documents_of(batch)]
    assert packed == (pytest.approx(sum(loss for loss, _ in alone), rel=1e-5), sum(n for _, n in alone)) and len(alone) == 7
    with torch.no_grad():
        leaking = model.hidden(Batch(batch.token_ids)) - model.hidden(batch)
    assert leaking.abs().max() > 1e-2, "the masks matter, or this tests nothing"


@everyone
@pytest.mark.parametrize("seq_len", [7, 16])
def test_an_epoch_asks_for_every_token_of_every_document(case, seq_len, tmp_path):
    """At odd lengths too: the corpus, its rows and what is asked of them."""
    class Words:
        vocab_size, specials = V, {"<|endoftext|>": 0}

        def encode_batch(self, texts):
            return [[int(word) for word in text.split()] for text in texts]

    draw = np.random.default_rng(0)
    texts = [draw.integers(1, V - 4, n).tolist() for n in (1, 13, 30, 2, 55)]
    corpus = build_corpus([Document("", " ".join(map(str, text))) for text in texts], Words(), tmp_path / "corpus")
    line = [token for text in texts for token in (*text, 0)]
    told = objective_of(case)
    loader = Loader(corpus, seq_len=seq_len, batch_size=1, objective=told, ahead=int(told is causal))
    seen, asked = [], []
    while True:
        batch = next(loader)
        if loader.state()["epoch"]:
            break
        original = torch.where(batch.targets == IGNORE_INDEX, batch.token_ids, batch.targets)
        seen += original[batch.keep if batch.keep is not None else torch.ones_like(batch.token_ids, dtype=torch.bool)].tolist()
        asked += batch.targets[batch.targets != IGNORE_INDEX].tolist()
    if told is causal:
        assert sorted(asked) == sorted([*[token for text in texts for token in text[1:]], *[0] * len(texts)]), "all but the first of each document"
    else:
        assert sorted(token for token in seen if token < V - 4) == sorted(line) and len(asked) >= 0.3 * len(line) * 0.9
