"""A corpus as parallel streams, for what carries a state: row b of each batch goes on where row b of the last one ended (arXiv:1409.2329, 4.1).

The line is cut into as many equal parts as there are rows. After its part a row goes on with the next one, and after the last with the first,
anew, so that a row's text never breaks but at a document's end.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice

import numpy as np

from hanok.contracts import Batch
from hanok.data.corpus import Corpus
from hanok.data.loader import Window, at_least_one, check_rank, check_state, rows_of
from hanok.data.objectives import causal
from hanok.errors import DataError


class Streams:
    """An endless iterator of batches of `batch_size` rows of `seq_len` positions, for the next token.

    Every token but the corpus's first, and the first of each document, is a target once an epoch. Document numbers always go along (a second reading
    of the corpus numbers them anew), so that who carries a state knows where to forget it; the epoch's last rows may be shorter (keep False). The
    seed decides which part row 0 begins with. Rank r holds every n_ranks-th row, from the r-th on. ConfigError: sizes that cannot be. DataError: a
    corpus with less than a token for each row to predict.
    """

    def __init__(self, corpus: Corpus, *, seq_len: int, batch_size: int, seed: int = 0, rank: int = 0, n_ranks: int = 1):
        at_least_one(seq_len=seq_len, batch_size=batch_size, n_ranks=n_ranks)
        check_rank(rank, n_ranks, seed)
        self.n_streams = batch_size * n_ranks
        if len(corpus) <= self.n_streams:
            raise DataError(f"the corpus has {len(corpus)} tokens, {self.n_streams} rows side by side need {self.n_streams + 1} at least; give more "
                            "text or fewer rows")
        self.corpus, self.seq_len, self.batch_size, self.seed, self.rank, self.n_ranks = corpus, seq_len, batch_size, seed, rank, n_ranks
        self.bounds = [(len(corpus) - 1) * part // self.n_streams for part in range(self.n_streams + 1)]
        self.n_steps = -(-int(np.diff(self.bounds).max()) // seq_len)
        self.first = int(np.random.Generator(np.random.PCG64(seed)).integers(self.n_streams))
        self.epoch, self.step = 0, 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        places = [self.first + self.epoch + stream for stream in range(self.rank, self.n_streams, self.n_ranks)]
        some = []
        for place in places:
            begin, end = self.bounds[place % self.n_streams], self.bounds[place % self.n_streams + 1]
            start = min(begin + self.step * self.seq_len, end)                            # a part that is a token shorter may be through
            some.append(Window(start, min(start + self.seq_len, end) + 1, ()))
        rows = rows_of(self.corpus, some, self.seq_len + 1)
        turns = rows.token_ids.new_tensor([place // self.n_streams * self.corpus.n_documents for place in places])
        known = turns[:, None].expand_as(rows.token_ids) if rows.document_ids is None else rows.document_ids + turns[:, None]
        keep = rows.keep()
        batch = replace(causal(replace(rows, document_ids=known)), keep=None if keep is None else keep[:, 1:])
        self.step += 1
        if self.step == self.n_steps:
            self.epoch, self.step = self.epoch + 1, 0
        return batch

    def state(self) -> dict[str, int]:
        """The next step's place, the same on every rank: plain integers for a checkpoint."""
        return {"epoch": self.epoch, "step": self.step, **self._sizes()}

    def restore(self, state: Mapping[str, int]) -> None:
        """Goes on exactly where `state` was taken. ConfigError: a state of other sizes."""
        check_state(state, self._sizes(), ("epoch", "step"))
        self.epoch, self.step = state["epoch"], state["step"]

    def _sizes(self) -> dict[str, int]:
        return {"seed": self.seed, "seq_len": self.seq_len, "global_batch_size": self.n_streams, "corpus_tokens": len(self.corpus)}


def stream_windows(corpus: Corpus, seq_len: int, max_tokens: int | None = None, *, batch_size: int = 1) -> Iterator[Batch]:
    """The corpus read once in `batch_size` streams, for evaluation with a carried state; short texts in fewer. `max_tokens`, where there are more: so
    many, in whole batches, from the beginning of each stream."""
    n_rows = max(1, min(batch_size, (len(corpus) - 1) // seq_len))
    streams = Streams(corpus, seq_len=seq_len, batch_size=n_rows)
    return islice(streams, streams.n_steps if max_tokens is None else min(streams.n_steps, -(-max_tokens // (n_rows * seq_len))))
