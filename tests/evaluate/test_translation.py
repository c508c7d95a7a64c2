"""BLEU and chrF are sacrebleu's own, whole and by the words of the source; each pair is in one bucket; what is missing is named."""
from __future__ import annotations

import sys

import pytest
import sacrebleu

from hanok.errors import ConfigError, DataError
from hanok.evaluate.translation import WORDS, score_translations, scorers

REFERENCES = ["the cat sat on the mat .", "there is a small house behind the old hill", "rain", "clouds look at the naïve roof and at its stone"]
HYPOTHESES = ["the cat sat on a mat .", "there is a house behind the old hill", "rain", "clouds looked at the roof and at a stone"]
SOURCES = ["one two three", "w " * 10, "w", "w " * 11]


def test_scores_are_sacrebleus():
    told = score_translations(SOURCES, HYPOTHESES, REFERENCES)
    assert told.quality.bleu == pytest.approx(sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES]).score)
    assert told.quality.chrf == pytest.approx(sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES]).score) and told.quality.pairs == 4
    assert told.signatures.keys() == {"bleu", "chrf"} and f"version:{sacrebleu.__version__}" in told.signatures["bleu"]
    assert "tok:13a" in told.signatures["bleu"] and "nc:6" in told.signatures["chrf"]
    assert told.quality.bleu != pytest.approx(sacrebleu.corpus_bleu(REFERENCES, [HYPOTHESES]).score)      # not the other way round


def test_a_bucket_holds_the_sources_of_its_length():
    told = score_translations(SOURCES, HYPOTHESES, REFERENCES)
    assert [(bucket.first, bucket.last, bucket.quality.pairs) for bucket in told.by_length] == [(1, 5, 2), (6, 10, 1), (11, 20, 1)]
    assert told.by_length[1].quality.chrf == pytest.approx(sacrebleu.corpus_chrf(HYPOTHESES[1:2], [REFERENCES[1:2]]).score)
    both = [HYPOTHESES[0], HYPOTHESES[2]], [[REFERENCES[0], REFERENCES[2]]]
    assert told.by_length[0].quality.bleu == pytest.approx(sacrebleu.corpus_bleu(*both).score)


@pytest.mark.parametrize("n_words", [0, 1, *WORDS, *(n + 1 for n in WORDS), 500])
def test_every_length_has_a_bucket(n_words: int):
    [bucket] = score_translations(["w " * n_words], ["a"], ["a"]).by_length
    assert bucket.first <= max(1, n_words) and (bucket.last is None or n_words <= bucket.last)
    assert (bucket.last is None) == (n_words > WORDS[-1])


@pytest.mark.parametrize("lists", [([], [], []), (["a"], [], ["a"]), (["a"], ["a"], ["a", "b"])])
def test_lists_that_do_not_fit(lists):
    with pytest.raises(DataError, match=f"got {len(lists[0])} sources, {len(lists[1])} translations and {len(lists[2])} references"):
        score_translations(*lists)


def test_without_sacrebleu_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ConfigError, match=r"pip install 'hanok\[eval\]'"):
        scorers()
