"""A corpus as batches: shuffled, endless, resumable and dealt to ranks for training (`Loader`), in order and complete for evaluation (`windows`).

An epoch is a seeded offset and a seeded permutation of the windows behind it (NumPy's PCG64, keyed by seed and epoch). Epochs follow one another
without a gap into one global order of windows; a step takes the next batch_size x n_ranks of it, so its place in that order is all there is to save.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from hanok.contracts import IGNORE_INDEX, Batch
from hanok.data.corpus import Corpus
from hanok.data.objectives import Objective, causal
from hanok.errors import ConfigError, DataError


class Loader:
    """An endless iterator of batches of `batch_size` rows of `seq_len` positions (int64).

    The corpus is cut into windows of seq_len + 1 tokens, seq_len apart, from a new offset each epoch: every token behind the offset, but for a tail
    shorter than a window, is a target once an epoch. Rank r takes every n_ranks-th window of the global order, from the r-th on.
    ConfigError: sizes that cannot be. DataError: a corpus shorter than one window.
    """

    def __init__(self, corpus: Corpus, *, seq_len: int, batch_size: int, seed: int = 0, objective: Objective = causal,
                 rank: int = 0, n_ranks: int = 1):
        _at_least_one(seq_len=seq_len, batch_size=batch_size, n_ranks=n_ranks)
        if not 0 <= rank < n_ranks:
            raise ConfigError(f"rank {rank} of {n_ranks}: expected 0 to {n_ranks - 1}")
        if seed < 0:
            raise ConfigError(f"seed {seed}: expected 0 or more")
        if len(corpus) <= seq_len:
            raise DataError(f"the corpus has {len(corpus)} tokens, one window needs seq_len + 1 = {seq_len + 1}; give more text or a smaller seq_len")
        self.corpus, self.seq_len, self.batch_size, self.seed, self.objective = corpus, seq_len, batch_size, seed, objective
        self.rank, self.n_ranks = rank, n_ranks
        self._enter(epoch=0, window=0)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        starts = self._take(self.batch_size * self.n_ranks)[self.rank::self.n_ranks]
        return self.objective(*_rows(self.corpus, starts.tolist(), self.seq_len + 1))

    def state(self) -> dict[str, int]:
        """The next step's place in the global order, the same on every rank: plain integers for a checkpoint."""
        return {"epoch": self._epoch, "window": self._window, **self._sizes()}

    def restore(self, state: Mapping[str, int]) -> None:
        """Goes on exactly where `state` was taken, on any number of ranks whose steps take as many windows. ConfigError: a state of other sizes."""
        for name, mine in self._sizes().items():
            if state.get(name) != mine:
                raise ConfigError(f"the saved loader state has {name} {state.get(name)}, this loader has {mine}; "
                                  "resume with the settings and data that it was saved with")
        if min(state.get("epoch", -1), state.get("window", -1)) < 0:
            raise ConfigError("the saved loader state names no epoch and window; it is not one, or was cut short")
        self._enter(state["epoch"], state["window"])

    def _sizes(self) -> dict[str, int]:
        return {"seed": self.seed, "seq_len": self.seq_len, "global_batch_size": self.batch_size * self.n_ranks, "corpus_tokens": len(self.corpus)}

    def _enter(self, epoch: int, window: int) -> None:
        """Lays out an epoch, at the window-th of its order. The offset always leaves room for one window."""
        random = np.random.Generator(np.random.PCG64((self.seed, epoch)))
        offset = int(random.integers(min(self.seq_len, len(self.corpus) - self.seq_len)))
        order = random.permutation((len(self.corpus) - 1 - offset) // self.seq_len)
        self._epoch, self._window, self._offset, self._order = epoch, window, offset, order

    def _take(self, n: int) -> np.ndarray:
        """First tokens (n,) of the next n windows of the global order."""
        taken: list[np.ndarray] = []
        while n:
            if self._window >= len(self._order):
                self._enter(self._epoch + 1, 0)
            part = self._order[self._window:self._window + n] * self.seq_len + self._offset
            self._window += len(part)
            n -= len(part)
            taken.append(part)
        return np.concatenate(taken)


def windows(corpus: Corpus, seq_len: int, max_tokens: int | None = None, *, batch_size: int = 1, objective: Objective = causal) -> Iterator[Batch]:
    """The corpus in order, for evaluation: each token but the first is a target exactly once, or the first `max_tokens` of them.

    What the last window lacks is padded on the right (keep False, targets IGNORE_INDEX), so totals over all targets are exact; the last batch may
    have fewer rows. `objective` may ignore more (the first token of a document, where documents are kept separate).
    """
    _at_least_one(seq_len=seq_len, batch_size=batch_size, max_tokens=1 if max_tokens is None else max_tokens)
    if len(corpus) < 2:
        raise DataError(f"the corpus has {len(corpus)} token, at least 2 are needed to predict one from another; give more text")
    return _windows(corpus, seq_len, min(len(corpus) - 1, max_tokens or len(corpus)), batch_size, objective)


def _windows(corpus: Corpus, seq_len: int, n_targets: int, batch_size: int, objective: Objective) -> Iterator[Batch]:
    starts = range(0, n_targets, seq_len)
    for first in range(0, len(starts), batch_size):
        some = starts[first:first + batch_size]
        batch = objective(*_rows(corpus, some, seq_len + 1, n_targets + 1))
        left = n_targets - some[-1]
        if left < seq_len:
            assert batch.targets is not None
            keep = torch.ones_like(batch.targets, dtype=torch.bool)
            keep[-1, left:] = False
            batch = replace(batch, keep=keep, targets=batch.targets.masked_fill(~keep, IGNORE_INDEX))
        yield batch


def _rows(corpus: Corpus, starts: list[int] | range, length: int, end: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Token ids (B,length) and document numbers (None where the corpus is one document); tokens from `end` on are zeros of the last document."""
    end = len(corpus) if end is None else end
    token_ids = np.zeros((len(starts), length), np.int64)
    document_ids = None if corpus.n_documents == 1 else np.zeros((len(starts), length), np.int64)
    for row, start in enumerate(starts):
        stop = min(start + length, end)
        token_ids[row, :stop - start] = corpus.slice(start, stop)
        if document_ids is not None:
            numbers = corpus.document_ids(start, stop)
            document_ids[row] = numbers[-1]
            document_ids[row, :stop - start] = numbers
    return torch.from_numpy(token_ids), None if document_ids is None else torch.from_numpy(document_ids)


def _at_least_one(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name} {size}: expected 1 or more")
