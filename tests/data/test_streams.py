"""Rows that go on from batch to batch, every token once an epoch, resumed anywhere."""
from __future__ import annotations

import itertools
import json
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbers_as_text import Numbers

from hanok.contracts import IGNORE_INDEX
from hanok.data.corpus import build_corpus
from hanok.data.sources import Document
from hanok.data.streams import Streams, stream_windows
from hanok.errors import ConfigError, DataError

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=8).filter(lambda parts: sum(parts) > 8)


@contextmanager
def line(*lengths: int):
    """A corpus of documents of these lengths whose token i is i."""
    ends = list(itertools.accumulate(lengths))
    documents = [Document(str(end), " ".join(map(str, range(end - length, end)))) for length, end in zip(lengths, ends)]
    with tempfile.TemporaryDirectory() as folder:
        yield build_corpus(documents, Numbers(), Path(folder) / "corpus", shard_tokens=7)


def real(batch, row: int) -> int:
    return batch.token_ids.size(1) if batch.keep is None else int(batch.keep[row].sum())


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 9), st.integers(1, 5), st.integers(0, 3))
def test_every_token_is_a_target_once_an_epoch_and_rows_go_on(document_lengths, seq_len, batch_size, seed):
    n, starts = sum(document_lengths), {0, *itertools.accumulate(document_lengths)}
    with line(*document_lengths) as corpus:
        streams = Streams(corpus, seq_len=seq_len, batch_size=batch_size, seed=seed)
        last: list[tuple[int, int] | None] = [None] * batch_size                          # each row's last token, and its document's number
        for epoch in range(3):
            asked = []
            while streams.state()["epoch"] == epoch:
                batch = next(streams)
                assert batch.token_ids.shape == (batch_size, seq_len)
                for row in range(batch_size):
                    tokens, numbers = batch.token_ids[row, :real(batch, row)].tolist(), batch.document_ids[row].tolist()
                    for place, (token, number) in enumerate(zip(tokens, numbers)):
                        target, before = batch.targets[row, place].item(), last[row]
                        if before is not None:
                            assert token == (before[0] + 1) % (n - 1), "a row goes on where it ended; the last token is a target only"
                            assert (number == before[1]) == (token not in starts), "a document that begins has a number of its own"
                        assert target == (IGNORE_INDEX if token + 1 in starts else token + 1)
                        last[row] = token, number
                    asked += [target for target in batch.targets[row].tolist() if target != IGNORE_INDEX]
                    assert (batch.targets[row, len(tokens):] == IGNORE_INDEX).all()
            assert sorted(asked) == sorted(set(range(1, n)) - starts)


@settings(max_examples=30, deadline=None)
@given(lengths, st.integers(1, 9), st.integers(1, 3), st.integers(1, 2), st.integers(0, 30))
def test_streams_resume_and_are_dealt_to_ranks(document_lengths, seq_len, batch_size, n_ranks, steps):
    with line(*document_lengths) as corpus:
        alone = Streams(corpus, seq_len=seq_len, batch_size=batch_size * n_ranks, seed=1)
        for _ in range(steps):
            next(alone)
        state = json.loads(json.dumps(alone.state()))
        ranks = [Streams(corpus, seq_len=seq_len, batch_size=batch_size, seed=1, rank=rank, n_ranks=n_ranks) for rank in range(n_ranks)]
        for streams in ranks:
            streams.restore(state)
        for _ in range(2 * sum(document_lengths) // (seq_len * batch_size) + 2):
            whole = next(alone)
            for rank, streams in enumerate(ranks):
                batch = next(streams)
                for name in ("token_ids", "targets", "document_ids", "positions"):
                    assert torch.equal(getattr(batch, name), getattr(whole, name)[rank::n_ranks])
                assert streams.state() == alone.state()


@settings(max_examples=30, deadline=None)
@given(lengths, st.integers(1, 9), st.integers(1, 2), st.integers(1, 2), st.integers(1, 3))
def test_parts_of_a_step_are_its_rows(document_lengths, seq_len, batch_size, n_ranks, n_parts):
    """However an update is split, its streams are the same, and a part goes on from itself one step ago."""
    if sum(document_lengths) <= batch_size * n_ranks * n_parts:
        return
    with line(*document_lengths) as corpus:
        whole = Streams(corpus, seq_len=seq_len, batch_size=batch_size * n_ranks * n_parts, seed=1)
        ranks = [Streams(corpus, seq_len=seq_len, batch_size=batch_size, seed=1, n_parts=n_parts, rank=rank, n_ranks=n_ranks)
                 for rank in range(n_ranks)]
        for _ in range(2 * whole.n_steps + 1):
            one, n = next(whole), batch_size * n_ranks
            for part in range(n_parts):
                for rank, streams in enumerate(ranks):
                    batch = next(streams)
                    for name in ("token_ids", "targets", "document_ids", "positions"):
                        assert torch.equal(getattr(batch, name), getattr(one, name)[part * n:(part + 1) * n][rank::n_ranks])
            assert all(streams.state() == whole.state() for streams in ranks)
        state = ranks[0].state()
        next(ranks[0])
        again = Streams(corpus, seq_len=seq_len, batch_size=batch_size, seed=1, n_parts=n_parts, n_ranks=n_ranks)
        again.restore(ranks[0].state())
        assert torch.equal(next(again).token_ids, next(ranks[0]).token_ids)
        if n_parts > 1:
            with pytest.raises(ConfigError, match="is at part 1 of a step, this loader has 1; resume with the train.grad_accum_steps"):
                whole.restore({**state, "part": 1})


@settings(max_examples=30, deadline=None)
@given(lengths, st.integers(1, 9), st.integers(1, 5), st.one_of(st.none(), st.integers(1, 60)))
def test_windows_of_streams_ask_for_each_token_once(document_lengths, seq_len, batch_size, max_tokens):
    starts = {0, *itertools.accumulate(document_lengths)}
    n = sum(document_lengths) - 1
    with line(*document_lengths) as corpus:
        batches = list(stream_windows(corpus, seq_len, max_tokens, batch_size=batch_size))
        everything = list(stream_windows(corpus, seq_len, batch_size=batch_size))
    n_rows = len(batches[0].token_ids)
    assert n_rows == max(1, min(batch_size, n // seq_len)) and all(len(batch.token_ids) == n_rows for batch in everything)
    asked = sorted(token for batch in everything for token in batch.targets[batch.targets != IGNORE_INDEX].tolist())
    assert asked == sorted(set(range(1, n + 1)) - starts)
    assert len(batches) == min(len(everything), -(-max_tokens // (n_rows * seq_len)) if max_tokens else len(everything))
    assert all(torch.equal(some.token_ids, one.token_ids) for some, one in zip(batches, everything))


def test_what_streams_refuse():
    with line(9) as corpus:
        with pytest.raises(DataError, match="the corpus has 9 tokens, 9 rows side by side need 10 at least; give more text or fewer rows"):
            Streams(corpus, seq_len=2, batch_size=3, n_ranks=3)
        streams = Streams(corpus, seq_len=2, batch_size=3)
        with pytest.raises(ConfigError, match="the saved loader state has seq_len 2, this loader has 3"):
            Streams(corpus, seq_len=3, batch_size=3).restore(streams.state())
        with pytest.raises(ConfigError, match="names no epoch and step"):
            streams.restore({**streams.state(), "step": -1})
