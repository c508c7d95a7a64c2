"""Scores against plain loops: one token at a time, everything recomputed; each token counted once, over the bytes that it stands for."""
from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hanok.contracts import IGNORE_INDEX, Batch
from hanok.errors import ConfigError, DataError
from hanok.evaluate.score import Score, byte_lengths, score_batches, score_text, strided
from hanok.text.tokenizer import Tokenizer
from tiny import model, prose, tokenizer
from zoo import CASES, C

decoders = pytest.mark.parametrize("case", [case for case in CASES if case.generates and not case.reads_source], ids=lambda case: case.name)


def by_hand(net, ids: list[int], window: int) -> float:
    """Nats: token i after the beginning of the first window that holds it, all of its context read anew."""
    nats = 0.0
    for i in range(1, len(ids)):
        start = 0
        while i > start + window - 1:
            start += window // 2
        with torch.no_grad():
            logits = net(Batch(torch.tensor([ids[start:i]])))[0, -1]
        nats -= logits.log_softmax(-1)[ids[i]].item()
    return nats


@decoders
@pytest.mark.parametrize("n_words", [2, 14, 60])
def test_a_text_is_scored_as_by_hand(case, n_words):
    """Shorter than the context, about as long, and several windows."""
    words, text = tokenizer(), prose(n_words, seed=n_words)
    net = model(replace(case.config, vocab_size=words.vocab_size + 5), case.family)
    ids = words.encode(text)
    assert (len(ids) > C) == (n_words > 14) and len(ids) > 1
    got = score_text(net, words, text, C)
    assert got.tokens == len(ids) - 1
    assert got.nats == pytest.approx(by_hand(net, ids, C), rel=1e-5)
    assert got.n_bytes == len(text.encode()) - len(words.token_bytes(ids[0]))
    assert got.loss == got.nats / got.tokens and got.perplexity == math.exp(got.loss)
    assert got.bits_per_byte == pytest.approx(got.nats / math.log(2) / got.n_bytes)


@pytest.mark.parametrize("window", [2, 3, 7, 64])
def test_any_window_is_scored_as_by_hand(window):
    words, net = tokenizer(), model()
    text = prose(12, seed=1)
    assert score_text(net, words, text, window).nats == pytest.approx(by_hand(net, words.encode(text), window), rel=1e-5)


@given(st.integers(2, 90), st.integers(2, 30))
def test_every_token_but_the_first_is_asked_for_once(length, window):
    ids = list(range(100, 100 + length))
    asked: list[int] = []
    for batch in strided(ids, window):
        row, targets = batch.token_ids[0].tolist(), batch.targets[0].tolist()
        assert len(row) == len(targets) <= window and row == list(range(row[0], row[0] + len(row)))
        for place, target in enumerate(targets):
            if target != IGNORE_INDEX:
                assert target == row[place] + 1                                       # it follows what was read
                assert place + 1 >= min(target - 100, window // 2)                    # with half a window before it, or all there is
                assert target in row
                asked.append(target)
    assert asked == ids[1:]


@pytest.mark.parametrize("window", [1, 0, -5])
def test_a_context_that_predicts_nothing_is_refused(window):
    with pytest.raises(ConfigError, match=f"a context of {window} cannot predict one token from another"):
        list(strided([1, 2, 3], window))


# ---- bytes

@given(st.text(st.sampled_from("a돌é🏠 \n\x00"), min_size=2, max_size=30))
def test_bytes_are_those_of_the_scored_tokens_even_within_a_character(text):
    """Characters that the tokenizer has not seen fall apart into tokens of one byte each."""
    words = tokenizer()
    ids = words.encode(text)
    lengths = byte_lengths(words)
    assert lengths[ids].sum() == len(text.encode()) and len(lengths) == words.vocab_size
    if len(ids) < 2:
        return
    flat = Flat(words.vocab_size)
    score = score_text(flat, words, text, 8)
    assert score.n_bytes == lengths[ids[1:]].sum()
    assert score.bits_per_byte == pytest.approx((len(ids) - 1) * math.log2(words.vocab_size) / (len(text.encode()) - lengths[ids[0]]))


class Flat(torch.nn.Module):
    """Knows nothing: every token is as likely as every other."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.head = torch.nn.Linear(1, vocab_size, bias=False)
        torch.nn.init.zeros_(self.head.weight)

    def hidden(self, batch: Batch) -> torch.Tensor:
        return torch.ones(*batch.token_ids.shape, 1)


def test_a_house_is_four_tokens_of_a_byte():
    words = tokenizer()
    ids = words.encode("\N{DERELICT HOUSE BUILDING}")
    assert len(ids) > 1
    score = score_text(Flat(words.vocab_size), words, "\N{DERELICT HOUSE BUILDING}", 8)
    assert (score.tokens, score.n_bytes) == (len(ids) - 1, 4 - len(words.token_bytes(ids[0])))


def test_specials_stand_for_no_bytes_and_their_spelling_is_text():
    words = tokenizer()
    assert byte_lengths(words)[words.id_of("<|endoftext|>")] == 0
    score = score_text(Flat(words.vocab_size), words, "a<|endoftext|>", 64)
    assert score.n_bytes == len("<|endoftext|>")


def test_ids_that_a_tokenizer_leaves_out_stand_for_nothing():
    """Vocabularies of the world have gaps."""
    data = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "post_processor": None, "decoder": None,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": {"type": "WordLevel", "vocab": {"a": 0, "bcd": 5, "?": 2}, "unk_token": "?"}}
    words = Tokenizer.from_json(json.dumps(data))
    assert byte_lengths(words).tolist() == [1, 0, 1, 0, 0, 3]
    assert score_text(Flat(6), words, "a bcd a", 8).n_bytes == 4


# ---- what cannot be scored, and what is not there

@pytest.mark.parametrize(("text", "told"), [("", "0 tokens"), ("a", "1 token")])
def test_a_text_without_anything_to_predict_is_refused(text, told):
    with pytest.raises(DataError, match=f"the text has {told}; at least 2 are needed"):
        score_text(model(), tokenizer(), text, C)


def test_batches_add_up_and_ignored_targets_count_for_nothing():
    words, net = tokenizer(), model()
    ids = torch.randint(words.vocab_size, (3, 9))
    targets = torch.randint(words.vocab_size, (3, 9))
    targets[0, 3:] = targets[2, :] = IGNORE_INDEX
    lengths = byte_lengths(words)
    batches = [Batch(ids[:2], targets=targets[:2]), Batch(ids[2:], targets=targets[2:])]
    score = score_batches(net, batches, lengths)
    counted = targets != IGNORE_INDEX
    with torch.no_grad():
        nats = -net(Batch(ids)).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    assert score.tokens == 12 and score.nats == pytest.approx(nats[counted].sum().item(), rel=1e-5)
    assert score.n_bytes == lengths[targets[counted].numpy()].sum()
    assert all(p.grad is None for p in net.parameters())


def test_a_score_in_numbers():
    score = Score(4, 4 * math.log(8), 6)
    assert score.to_dict() == {"tokens": 4, "loss": pytest.approx(math.log(8)), "perplexity": pytest.approx(8), "bits_per_byte": pytest.approx(2),
                               "bytes": 6}
    nothing, endless = Score(0, 0.0, 0), Score(1, 1e6, 1)
    assert nothing.loss == nothing.bits_per_byte == 0 and np.isfinite(endless.perplexity)
