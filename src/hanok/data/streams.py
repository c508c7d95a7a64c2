"""A corpus as parallel streams, for what carries a state: row b of each batch goes on where row b of the last one ended (arXiv:1409.2329, 4.1).

The line is cut into as many equal streams as an update has rows, on all ranks and in all its micro-batches; a micro-batch reads its share of them,
so that how an update is split changes nothing. After a stream a row goes on with the next one, and after the last with the first,
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
from hanok.data.objectives import causal, positions_in
from hanok.errors import ConfigError, DataError


class Streams:
    """An endless iterator of batches of `batch_size` rows of `seq_len` positions, for the next token; `n_parts` of them are one step of all streams.

    Every token but the corpus's first, and the first of each document, is a target once an epoch. Document numbers always go along (a second reading
    of the corpus numbers them anew), so that who carries a state knows where to forget it; the epoch's last rows may be shorter (keep False). The
    seed decides where stream 0 begins. Part p holds the p-th batch_size x n_ranks streams, and of these rank r every n_ranks-th, from the r-th on.
    ConfigError: sizes that cannot be. DataError: a corpus with less than a token for each stream to predict.
    """

    def __init__(self, corpus: Corpus, *, seq_len: int, batch_size: int, seed: int = 0, n_parts: int = 1, rank: int = 0, n_ranks: int = 1):
        at_least_one(seq_len=seq_len, batch_size=batch_size, n_parts=n_parts, n_ranks=n_ranks)
        check_rank(rank, n_ranks, seed)
        self.n_streams, self.n_parts = batch_size * n_parts * n_ranks, n_parts
        if len(corpus) <= self.n_streams:
            raise DataError(f"the corpus has {len(corpus)} tokens, {self.n_streams} rows side by side need {self.n_streams + 1} at least; give more "
                            "text or fewer rows")
        self.corpus, self.seq_len, self.batch_size, self.seed, self.rank, self.n_ranks = corpus, seq_len, batch_size, seed, rank, n_ranks
        self.bounds = [(len(corpus) - 1) * part // self.n_streams for part in range(self.n_streams + 1)]
        self.n_steps = -(-int(np.diff(self.bounds).max()) // seq_len)
        self.first = int(np.random.Generator(np.random.PCG64(seed)).integers(self.n_streams))
        self.epoch, self.step, self.part = 0, 0, 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        n = self.n_streams // self.n_parts
        places = [self.first + self.epoch + stream for stream in range(self.part * n + self.rank, (self.part + 1) * n, self.n_ranks)]
        some = []
        for place in places:
            begin, end = self.bounds[place % self.n_streams], self.bounds[place % self.n_streams + 1]
            start = min(begin + self.step * self.seq_len, end)                            # a part that is a token shorter may be through
            some.append(Window(start, min(start + self.seq_len, end) + 1, ()))
        rows = rows_of(self.corpus, some, self.seq_len + 1)
        turns = rows.token_ids.new_tensor([place // self.n_streams * self.corpus.n_documents for place in places])
        known = turns[:, None].expand_as(rows.token_ids) if rows.document_ids is None else rows.document_ids + turns[:, None]
        keep, here = rows.keep(), known[:, :-1].contiguous()
        batch = replace(causal(replace(rows, document_ids=known)), keep=None if keep is None else keep[:, 1:], document_ids=here,
                        positions=positions_in(here))
        self.part = (self.part + 1) % self.n_parts
        self.step += self.part == 0
        if self.step == self.n_steps:
            self.epoch, self.step = self.epoch + 1, 0
        return batch

    def state(self) -> dict[str, int]:
        """The next batch's place, the same on every rank: plain integers for a checkpoint."""
        return {"epoch": self.epoch, "step": self.step, "part": self.part, **self._sizes()}

    def restore(self, state: Mapping[str, int]) -> None:
        """Goes on exactly where `state` was taken, between two steps in any number of parts. ConfigError: a state of other sizes."""
        check_state(state, self._sizes(), ("epoch", "step"))
        self.epoch, self.step, self.part = state["epoch"], state["step"], state.get("part", 0)
        if self.part >= self.n_parts:
            raise ConfigError(f"the saved loader state is at part {self.part} of a step, this loader has {self.n_parts}; resume with the "
                              "train.grad_accum_steps that it was saved with")

    def _sizes(self) -> dict[str, int]:
        return {"seed": self.seed, "seq_len": self.seq_len, "global_batch_size": self.n_streams, "corpus_tokens": len(self.corpus)}


def stream_windows(corpus: Corpus, seq_len: int, max_tokens: int | None = None, *, batch_size: int = 1) -> Iterator[Batch]:
    """The corpus read once in `batch_size` streams, for evaluation with a carried state; short texts in fewer. `max_tokens`, where there are more: so
    many, in whole batches, from the beginning of each stream."""
    n_rows = max(1, min(batch_size, (len(corpus) - 1) // seq_len))
    streams = Streams(corpus, seq_len=seq_len, batch_size=n_rows)
    return islice(streams, streams.n_steps if max_tokens is None else min(streams.n_steps, -(-max_tokens // (n_rows * seq_len))))
