"""Pairs as batches: bucketed by length, seeded, endless, resumable and dealt to ranks (`PairLoader`), or once and in order (`pair_windows`).

An epoch is a seeded permutation, sorted by length within pools, so that rows of a batch pad each other little; what is trained on together is
shuffled as a whole. NumPy's PCG64, keyed by seed and epoch. B rows, S source positions, T target positions.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from hanok.contracts import Batch
from hanok.data.loader import at_least_one, check_rank, check_state
from hanok.data.objectives import Pair
from hanok.data.pairs import PairCorpus
from hanok.errors import DataError

PairObjective = Callable[[Sequence[Pair]], Batch]
POOL_PAIRS = 4096
"""Pairs that are sorted by length together."""


class PairLoader:
    """An endless iterator of batches of `batch_size` pairs, or of as many as `batch_tokens` padded tokens of both sides hold.

    Each pair comes once an epoch. `rows_per_update` pairs (batch_size times accumulation steps times ranks) are of like length and stay together, so
    that how an update is split changes nothing; by tokens, a batch does. Rank r takes every n_ranks-th pair, or batch. Pairs with a side of more than
    `max_len` tokens (0: any) are left out. ConfigError: sizes that cannot be. DataError: no pair is short enough.
    """

    def __init__(self, corpus: PairCorpus, *, batch_size: int, objective: PairObjective, seed: int = 0, batch_tokens: int = 0, max_len: int = 0,
                 rows_per_update: int | None = None, rank: int = 0, n_ranks: int = 1):
        at_least_one(batch_size=batch_size, n_ranks=n_ranks, rows_per_update=rows_per_update or 1)
        check_rank(rank, n_ranks, seed)
        self.corpus, self.batch_size, self.objective, self.seed, self.batch_tokens = corpus, batch_size, objective, seed, batch_tokens
        self.rank, self.n_ranks, self.together = rank, n_ranks, rows_per_update or batch_size * n_ranks
        self.pairs = fitting(corpus, max_len)
        self._enter(epoch=0, pair=0)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.objective([self.corpus[int(index)] for index in self._take()])

    def state(self) -> dict[str, int]:
        """The next step's place in the global order, the same on every rank: plain integers for a checkpoint."""
        return {"epoch": self._epoch, "pair": self._pair, **self._sizes()}

    def restore(self, state: Mapping[str, int]) -> None:
        """Goes on exactly where `state` was taken. ConfigError: a state of other sizes."""
        check_state(state, self._sizes(), ("epoch", "pair"))
        self._enter(state["epoch"], state["pair"])

    def _sizes(self) -> dict[str, int]:
        return {"seed": self.seed, "rows_per_update": self.together, "batch_tokens": self.batch_tokens, "pairs": len(self.pairs)}

    def _enter(self, epoch: int, pair: int) -> None:
        """Lays out an epoch: its order and, by tokens, where its batches end."""
        random = np.random.Generator(np.random.PCG64((self.seed, epoch)))
        total = self.corpus.lengths.sum(1)
        order = random.permutation(self.pairs)
        pools = [order[start:start + POOL_PAIRS] for start in range(0, len(order), POOL_PAIRS)]
        order = np.concatenate([pool[total[pool].argsort(kind="stable")] for pool in pools])
        if self.batch_tokens:
            parts = np.split(order, budgeted(self.corpus.lengths[order], self.batch_tokens))
            first, last = [], []
        else:
            begin = min(-epoch * len(order) % self.together, len(order))                  # what the last epoch's last update lacks
            end = begin + (len(order) - begin) // self.together * self.together
            parts = np.split(order[begin:end], range(self.together, end - begin, self.together)) if end > begin else []
            first, last = [order[:begin]], [order[end:]]
        parts = [*first, *(parts[place] for place in random.permutation(len(parts))), *last]
        self._order, self._stops = np.concatenate(parts), np.cumsum([len(part) for part in parts])
        self._epoch, self._pair = epoch, pair

    def _take(self) -> np.ndarray:
        """This rank's share of the step's pairs: (B,)."""
        if not self.batch_tokens:
            return np.concatenate([self._next(1) for _ in range(self.batch_size * self.n_ranks)])[self.rank::self.n_ranks]
        return [self._next(0) for _ in range(self.n_ranks)][self.rank]

    def _next(self, n: int) -> np.ndarray:
        """The next n pairs of the global order; 0: the next batch."""
        if self._pair >= len(self._order):
            self._enter(self._epoch + 1, 0)
        stop = self._pair + n if n else int(self._stops[np.searchsorted(self._stops, self._pair, "right")])
        taken, self._pair = self._order[self._pair:stop], stop
        return taken


def budgeted(lengths: np.ndarray, batch_tokens: int) -> list[int]:
    """Where batches of at most `batch_tokens` padded tokens begin, but for the first, in the order of `lengths` (N,2). A pair that is more than that
    is a batch of its own."""
    begins, first = [], 0
    source = target = 0
    for place, (s, t) in enumerate(lengths.tolist()):
        source, target = max(source, s), max(target, t + 1)
        if place > first and (place + 1 - first) * (source + target) > batch_tokens:
            begins.append(place)
            first, source, target = place, s, t + 1
    return begins


def fitting(corpus: PairCorpus, max_len: int) -> np.ndarray:
    """The pairs whose source, and target with its end, have at most `max_len` tokens (0: any). DataError where there is none."""
    fits = np.flatnonzero((corpus.lengths[:, 0] <= max_len) & (corpus.lengths[:, 1] < max_len)) if max_len else np.arange(len(corpus))
    if not len(fits):
        raise DataError(f"no pair has sides of at most {max_len} tokens, the shortest has {int((corpus.lengths + [0, 1]).max(1).min())}; raise "
                        "data.seq_len or shorten the texts")
    return fits


def pair_windows(corpus: PairCorpus, max_tokens: int | None = None, *, batch_size: int = 1, objective: PairObjective,
                 max_len: int = 0) -> Iterator[Batch]:
    """Each pair once, for evaluation, the longest last. `max_tokens`, where there are more targets: a random part, always the same, with so many."""
    at_least_one(batch_size=batch_size, max_tokens=1 if max_tokens is None else max_tokens)
    pairs = fitting(corpus, max_len)
    if max_tokens is not None:
        pairs = np.random.Generator(np.random.PCG64(0)).permutation(pairs)
        asked = (corpus.lengths[pairs, 1] + 1).cumsum()
        pairs = pairs[:int(np.searchsorted(asked, max_tokens)) + 1]
    pairs = pairs[corpus.lengths[pairs].sum(1).argsort(kind="stable")]
    return (objective([corpus[int(index)] for index in pairs[first:first + batch_size]]) for first in range(0, len(pairs), batch_size))
