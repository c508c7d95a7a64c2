"""Which spans of a row are cut out, as T5 does it (arXiv:1910.10683, 3.1.4): its random_spans_noise_mask, in numbers of tokens exactly."""
from __future__ import annotations

import numpy as np


def noise_counts(n_tokens: int, rate: float, mean_span_length: float) -> tuple[int, int]:
    """Tokens that are cut out of `n_tokens` (2 or more), and in how many spans: at least one of each, and something stays before every span."""
    n_noise = min(max(round(n_tokens * rate), 1), n_tokens - 1)
    return n_noise, min(max(round(n_noise / mean_span_length), 1), n_tokens - n_noise)


def noise_spans(n_tokens: int, rate: float, mean_span_length: float, random: np.random.Generator) -> list[tuple[int, int]]:
    """The spans as (start, stop), from the left. What stays and what goes are each cut at random places and take turns: the first stays, the last
    goes. Fewer than two tokens: none."""
    if n_tokens < 2:
        return []
    n_noise, n_spans = noise_counts(n_tokens, rate, mean_span_length)
    gone, stays = segments(n_noise, n_spans, random), segments(n_tokens - n_noise, n_spans, random)
    stops = np.cumsum(gone + stays)
    return [(int(stop - length), int(stop)) for stop, length in zip(stops, gone)]


def segments(n: int, n_parts: int, random: np.random.Generator) -> np.ndarray:
    """The lengths (n_parts,), 1 or more each, of n things cut into so many parts, all ways being as likely."""
    cuts = np.sort(random.permutation(n - 1)[:n_parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [n]]))


def tokens_for(seq_len: int, rate: float, mean_span_length: float, n_ends: int = 1) -> int:
    """The tokens of a row whose corrupted source, with `n_ends` end tokens, fills `seq_len` (T5's random_spans_helper); its target is shorter where
    `rate` is below a half. A `seq_len` too short for anything gives 2."""
    def source(n_tokens: int) -> int:
        n_noise, n_spans = noise_counts(n_tokens, rate, mean_span_length)
        return n_tokens - n_noise + n_spans + n_ends

    def target(n_tokens: int) -> int:
        return sum(noise_counts(n_tokens, rate, mean_span_length)) + 1

    n_tokens = 2
    while max(source(n_tokens + 1), target(n_tokens + 1)) <= seq_len:
        n_tokens += 1
    return n_tokens
