"""A corpus as batches: shuffled, endless, resumable and dealt to ranks for training (`Loader`), in order and complete for evaluation (`windows`).

An epoch is a seeded offset and a seeded permutation of the windows around it (NumPy's PCG64, keyed by seed and epoch). Epochs follow one another
without a gap into one global order of windows; a step takes the next batch_size x n_ranks of it, so its place in that order is all there is to save.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from hanok.contracts import Batch
from hanok.data.corpus import Corpus
from hanok.data.objectives import Objective, Rows, causal
from hanok.errors import ConfigError, DataError


class Window(NamedTuple):
    """The tokens from `start` to `stop` of a corpus, and what their random numbers follow from."""
    start: int
    stop: int
    key: tuple[int, ...]


class Loader:
    """An endless iterator of batches of `batch_size` rows of `seq_len` positions.

    The corpus is cut into windows of `seq_len` tokens, from a new offset each epoch, so that what stands before the offset and at the end makes two
    shorter ones, padded on the right: every token is in one window an epoch. `ahead` more tokens go along with each: 1 where each token is asked
    for the next, so that all but the corpus's first are targets once an epoch; 0 for other objectives. Rank r takes every n_ranks-th window of the
    global order, from the r-th on. ConfigError: sizes that cannot be. DataError: a corpus shorter than one window.
    """

    def __init__(self, corpus: Corpus, *, seq_len: int, batch_size: int, seed: int = 0, objective: Objective = causal, ahead: int = 1,
                 rank: int = 0, n_ranks: int = 1):
        at_least_one(seq_len=seq_len, batch_size=batch_size, n_ranks=n_ranks)
        check_rank(rank, n_ranks, seed)
        if len(corpus) < seq_len + ahead:
            needed = f"seq_len + {ahead} = {seq_len + ahead}" if ahead else f"seq_len = {seq_len}"
            raise DataError(f"the corpus has {len(corpus)} tokens, one window needs {needed}; give more text or a smaller seq_len")
        self.corpus, self.seq_len, self.batch_size, self.seed, self.objective, self.ahead = corpus, seq_len, batch_size, seed, objective, ahead
        self.rank, self.n_ranks = rank, n_ranks
        self._enter(epoch=0, window=0)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.objective(rows_of(self.corpus, self._take(), self.seq_len + self.ahead))

    def state(self) -> dict[str, int]:
        """The next step's place in the global order, the same on every rank: plain integers for a checkpoint."""
        return {"epoch": self._epoch, "window": self._window, **self._sizes()}

    def restore(self, state: Mapping[str, int]) -> None:
        """Goes on exactly where `state` was taken, on any number of ranks whose steps take as many windows. ConfigError: a state of other sizes."""
        check_state(state, self._sizes(), ("epoch", "window"))
        self._enter(state["epoch"], state["window"])

    def _sizes(self) -> dict[str, int]:
        return {"seed": self.seed, "seq_len": self.seq_len, "global_batch_size": self.batch_size * self.n_ranks, "corpus_tokens": len(self.corpus),
                "ahead": self.ahead}

    def _enter(self, epoch: int, window: int) -> None:
        """Lays out an epoch, at the window-th of its order. The offset always leaves room for one whole window."""
        random = np.random.Generator(np.random.PCG64((self.seed, epoch)))
        n = len(self.corpus) - self.ahead
        offset = int(random.integers(min(self.seq_len, n - self.seq_len + 1)))
        bounds = np.arange(offset, n + self.seq_len, self.seq_len).clip(max=n)
        self._bounds = bounds if not offset else np.concatenate([[0], bounds])
        self._order = random.permutation(len(self._bounds) - 1)
        self._epoch, self._window = epoch, window

    def _take(self) -> list[Window]:
        """This rank's share of the step's windows."""
        taken: list[Window] = []
        for number in range(self.batch_size * self.n_ranks):
            if self._window >= len(self._order):
                self._enter(self._epoch + 1, 0)
            if number % self.n_ranks == self.rank:
                place = self._order[self._window]
                start, stop = int(self._bounds[place]), int(self._bounds[place + 1])
                taken.append(Window(start, stop + self.ahead, (self.seed, self._epoch, start)))
            self._window += 1
        return taken


def windows(corpus: Corpus, seq_len: int, max_tokens: int | None = None, *, batch_size: int = 1, objective: Objective = causal,
            ahead: int = 1) -> Iterator[Batch]:
    """The corpus in order, for evaluation: each token is in one window; with `ahead` each but the first is a target.

    `max_tokens`, where it is less than all: so many whole windows, always the same, spread evenly over the corpus. What the last window lacks is
    padded on the right (keep False, targets IGNORE_INDEX), so totals over all targets are exact; the last batch may have fewer rows. `objective` may
    ignore more (the first token of a document, where documents are kept separate).
    """
    at_least_one(seq_len=seq_len, batch_size=batch_size, max_tokens=1 if max_tokens is None else max_tokens)
    if len(corpus) <= ahead:
        raise DataError(f"the corpus has {len(corpus)} token, at least 2 are needed to predict one from another; give more text")
    n_tokens = len(corpus) - ahead
    n_windows = -(-n_tokens // seq_len)
    wanted = n_windows if max_tokens is None else -(-max_tokens // seq_len)
    places = range(n_windows) if wanted >= n_windows else [i * (n_tokens // seq_len) // wanted for i in range(wanted)]
    some = [Window(place * seq_len, min((place + 1) * seq_len, n_tokens) + ahead, (0, 0, place * seq_len)) for place in places]
    return _windows(corpus, some, seq_len + ahead, batch_size, objective, ahead)


def _windows(corpus: Corpus, some: Sequence[Window], length: int, batch_size: int, objective: Objective, ahead: int) -> Iterator[Batch]:
    for first in range(0, len(some), batch_size):
        rows = rows_of(corpus, some[first:first + batch_size], length)
        batch, keep = objective(rows), rows.keep()
        if keep is not None and batch.keep is None and batch.source_ids is None:
            batch = replace(batch, keep=keep[:, ahead:])
        yield batch


def rows_of(corpus: Corpus, some: Sequence[Window], length: int) -> Rows:
    """Rows of `length` tokens; what a window lacks is zeros, which belong to its last document. No document numbers where the corpus is one."""
    token_ids = np.zeros((len(some), length), np.int64)
    document_ids = None if corpus.n_documents == 1 else np.zeros((len(some), length), np.int64)
    lengths = tuple(stop - start for start, stop, _ in some)
    for row, (start, stop, _) in enumerate(some):
        token_ids[row, :stop - start] = corpus.slice(start, stop)
        if document_ids is not None:
            numbers = corpus.document_ids(start, stop)
            document_ids[row] = numbers[-1]
            document_ids[row, :stop - start] = numbers
    return Rows(torch.from_numpy(token_ids), None if document_ids is None else torch.from_numpy(document_ids), tuple(key for _, _, key in some),
                None if min(lengths) == length else lengths)


# ---- what all loaders check ----------------------------------------------------------------------------------
def at_least_one(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name} {size}: expected 1 or more")


def check_rank(rank: int, n_ranks: int, seed: int) -> None:
    if not 0 <= rank < n_ranks:
        raise ConfigError(f"rank {rank} of {n_ranks}: expected 0 to {n_ranks - 1}")
    if seed < 0:
        raise ConfigError(f"seed {seed}: expected 0 or more")


def check_state(state: Mapping[str, int], sizes: Mapping[str, int], places: Sequence[str]) -> None:
    """ConfigError for a loader's state of other sizes, or without a place."""
    for name, mine in sizes.items():
        if state.get(name) != mine:
            raise ConfigError(f"the saved loader state has {name} {state.get(name)}, this loader has {mine}; "
                              "resume with the settings and data that it was saved with")
    if min(state.get(name, -1) for name in places) < 0:
        raise ConfigError(f"the saved loader state names no {' and '.join(places)}; it is not one, or was cut short")
