"""The notes' own example on real weights: what ties 'novel' to 'idea' and to 'book', in a model of both directions and in a causal one.

Skipped, and said, where no package index is reached and nothing was fetched before.
"""
from __future__ import annotations

import pytest
import torch
import transformers

import hanok
from hanok.bundle.imports import export_folder
from hanok.bundle.pull import pull
from hanok.errors import HubError
from hanok.word_study import study

pytestmark = pytest.mark.index
ONE, OTHER = "Attention is a novel idea", "I read a novel book"


def model(name: str) -> hanok.LoadedModel:
    try:
        return hanok.load(pull(name))
    except HubError as error:
        if "reach" in str(error) or "offline" in str(error):
            pytest.skip(f"{name}: {error}")
        raise


def test_minilm_looks_as_transformers_says(tmp_path):
    m = model("all-minilm-l6-v2")
    export_folder(m.bundle, tmp_path / "theirs")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "theirs", attn_implementation="eager").eval()
    seen = m.attention(ONE)
    ids = torch.tensor([m.tokenizer.encode(ONE, add_special=True)])
    with torch.no_grad():
        told = theirs(input_ids=ids, output_attentions=True, output_hidden_states=True)
    assert (seen.weights - torch.cat(told.attentions)).abs().max() < 1e-5
    assert (seen.hidden - torch.cat(told.hidden_states)).abs().max() < 1e-4


def test_minilm_ties_novel_to_what_follows_and_keeps_its_meaning():
    """A finding, not a wish: head 2.9 looks at the next word wherever it is; on average 'idea' gets no more than 'book'; 'fiction' stays nearest."""
    seen = study(model("all-minilm-l6-v2").attention, [ONE, OTHER], "novel", ["new", "innovative", "fiction"])
    one, other = seen.sentences
    assert one.link == ("novel", "idea") and other.link == ("novel", "book")
    assert [one.tie("idea")[1][:2], other.tie("book")[1][:2]] == [(2, 9), (2, 9)] and one.tie("idea")[1][2] > other.tie("book")[1][2] > 0.4
    assert one.tie("idea")[0] < other.tie("book")[0]
    assert one.attention.to_specials("novel") > 0.6
    assert all(max(s.meanings, key=lambda name: s.meanings[name][-1]) == "fiction" for s in seen.sentences)
    assert one.meanings["innovative"][-1] > other.meanings["innovative"][-1] + 0.1
    assert [line.split(" ")[0] for line in seen.verdicts()] == ["Does", "Holds", "Does"]


def test_smollm2_cannot_see_what_stands_behind():
    m = model("smollm2-135m-instruct")
    seen = study(m.attention, [ONE, OTHER], "novel")
    for sentence, behind in zip(seen.sentences, ("idea", "book")):
        assert sentence.behind == (behind,) and sentence.attention.between("novel", behind).max() == 0 and sentence.cut_difference < 1e-5
        assert sentence.attention.between(behind, "novel").max() > 0.5
    shared, also = m.attention("Attention is a novel idea"), m.attention("Attention is a novel house by the sea")
    assert torch.allclose(shared.vectors("novel"), also.vectors("novel"), rtol=1e-4, atol=1e-3)
    assert seen.alike[0] > 0.999 > 0.95 > seen.alike[-1]
