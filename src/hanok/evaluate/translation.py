"""BLEU and chrF as papers quote them: sacrebleu's, each with the signature that says how it was counted (arXiv:1804.08771, 2015.wmt-1.49).

A bucket holds the pairs whose source has so many words, so that what length costs can be seen (as in arXiv:1409.1259 and 1409.0473, figure 2).
"""
from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hanok.errors import ConfigError, DataError

WORDS = (5, 10, 20, 30, 40)
"""The most words that a source of each bucket but the last has."""


@dataclass(frozen=True)
class Quality:
    """How near translations came to their references, 0 to 100."""
    pairs: int
    bleu: float
    chrf: float


@dataclass(frozen=True)
class Bucket:
    """The quality of the pairs whose source has `first` to `last` words (None: or more)."""
    first: int
    last: int | None
    quality: Quality


@dataclass(frozen=True)
class Translation:
    """A test set's quality, whole and by the length of the source; buckets without a pair are left out."""
    quality: Quality
    by_length: tuple[Bucket, ...]
    signatures: dict[str, str]               # bleu, chrf


def scorers() -> dict[str, Any]:
    """sacrebleu's own metrics, as they are where nobody changes them. ConfigError where it is not installed."""
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise ConfigError("translations are scored by sacrebleu, which is not installed; pip install 'hanok[eval]'") from None
    return {"bleu": BLEU(force=True), "chrf": CHRF()}    # force: text is what a tokenizer decoded, so nothing warns of spaces before a full stop


def score_translations(sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str], words: Sequence[int] = WORDS) -> Translation:
    """BLEU and chrF of all pairs together, and of each bucket by the words of the source. DataError: none, or not equally many."""
    if not sources or not len(sources) == len(hypotheses) == len(references):
        raise DataError(f"got {len(sources)} sources, {len(hypotheses)} translations and {len(references)} references; one of each for every pair, "
                        "and at least one pair, was expected")
    score = scorers()

    def quality(pairs: Sequence[int]) -> Quality:
        told, wanted = [hypotheses[i] for i in pairs], [[references[i] for i in pairs]]
        return Quality(len(pairs), *(score[name].corpus_score(told, wanted).score for name in ("bleu", "chrf")))

    bounds: list[int | None] = [*words, None]
    places = [bisect.bisect_left(words, max(1, len(source.split()))) for source in sources]
    buckets, first = [], 1
    for place, last in enumerate(bounds):
        pairs = [i for i, at in enumerate(places) if at == place]
        if pairs:
            buckets.append(Bucket(first, last, quality(pairs)))
        first = (last or 0) + 1
    whole = quality(range(len(sources)))                 # last: a signature knows the number of references only after a score
    return Translation(whole, tuple(buckets), {name: str(scorer.get_signature()) for name, scorer in score.items()})
