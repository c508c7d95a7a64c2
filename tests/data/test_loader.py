"""Every token once an epoch, in an order that only the seed decides, on any number of ranks, resumed anywhere."""
from __future__ import annotations

import itertools
import json
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbers_as_text import Numbers

from hanok.contracts import IGNORE_INDEX, Batch
from hanok.data.corpus import build_corpus
from hanok.data.loader import Loader, windows
from hanok.data.objectives import Rows, causal
from hanok.data.sources import Document
from hanok.errors import ConfigError, DataError

plain = partial(causal, separate=False)


@contextmanager
def line(*lengths: int, shard_tokens: int = 7):
    """A corpus of documents of these lengths whose token i is i."""
    ends = list(itertools.accumulate(lengths))
    documents = [Document(str(end), " ".join(map(str, range(end - length, end)))) for length, end in zip(lengths, ends)]
    with tempfile.TemporaryDirectory() as folder:
        yield build_corpus(documents, Numbers(), Path(folder) / "corpus", shard_tokens=shard_tokens)


def rows(loader: Loader, steps: int) -> list[list[int]]:
    return [row for batch in itertools.islice(loader, steps) for row in batch.token_ids.tolist()]


def same(left, right) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(vars(left).values(), vars(right).values()))


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 12), st.integers(0, 5), st.sampled_from([1, 5, 1000]))
def test_every_token_is_a_target_once_an_epoch(document_lengths, seq_len, seed, shard_tokens):
    n = sum(document_lengths)
    with line(*document_lengths, shard_tokens=shard_tokens) as corpus:
        if n <= seq_len:
            with pytest.raises(DataError) as error:
                Loader(corpus, seq_len=seq_len, batch_size=1)
            assert f"{n} tokens" in str(error.value) and str(seq_len + 1) in str(error.value)
            return
        loader = Loader(corpus, seq_len=seq_len, batch_size=1, seed=seed, objective=plain)
        epochs: dict[int, list[list[int]]] = {}
        while loader.state()["epoch"] < 4:
            batch = next(loader)
            assert batch.token_ids.shape == batch.targets.shape == (1, seq_len) and batch.token_ids.dtype == torch.int64 and batch.keep is None
            asked = batch.targets != IGNORE_INDEX
            assert torch.equal(batch.targets[asked], batch.token_ids[asked] + 1) and asked.sum() == asked.long().cumprod(1).sum() > 0
            epochs.setdefault(loader.state()["epoch"], []).append(batch.targets[asked].tolist())
        for epoch in range(4):
            assert sorted(token for row in epochs[epoch] for token in row) == list(range(1, n)), "a token was missed or seen twice"
            assert sum(len(row) < seq_len for row in epochs[epoch]) <= 2, "only an epoch's two ends are shorter"


@settings(max_examples=40, deadline=None)
@given(lengths, st.integers(1, 12), st.integers(0, 5))
def test_without_a_look_ahead_every_token_is_in_one_row(document_lengths, seq_len, seed):
    n = sum(document_lengths)
    with line(*document_lengths) as corpus:
        if n < seq_len:
            with pytest.raises(DataError, match=f"has {n} tokens, one window needs seq_len = {seq_len}"):
                Loader(corpus, seq_len=seq_len, batch_size=1, ahead=0)
            return
        seen: list[Rows] = []

        def look(rows: Rows) -> Batch:
            seen.append(rows)
            return Batch(rows.token_ids)

        loader = Loader(corpus, seq_len=seq_len, batch_size=1, seed=seed, objective=look, ahead=0)
        while loader.state()["epoch"] == 0:
            next(loader)
        tokens = [token for rows in seen[:-1] for token in rows.token_ids[0, :seq_len if rows.lengths is None else rows.lengths[0]].tolist()]
        assert sorted(tokens) == list(range(n)) and all(rows.token_ids.shape == (1, seq_len) for rows in seen)
        assert all(rows.keys == ((seed, 0, rows.token_ids[0, 0].item()),) for rows in seen[:-1])
        assert sorted(token for batch in windows(corpus, seq_len, objective=look, ahead=0) for token in (
            batch.token_ids if batch.keep is None else batch.token_ids[batch.keep]).flatten().tolist()) == list(range(n))


def test_epochs_and_seeds_differ_and_runs_do_not():
    with line(400) as corpus:
        runs = [rows(Loader(corpus, seq_len=8, batch_size=7, seed=seed), 28) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
    starts = [row[0] for row in runs[0]]
    assert starts[:49] != starts[49:98] and {start % 8 for start in starts[:49]} != {start % 8 for start in starts[60:90]}
    assert starts[:49] != sorted(starts[:49])


@settings(max_examples=40, deadline=None)
@given(lengths.filter(lambda parts: sum(parts) > 6), st.integers(1, 6), st.integers(1, 7), st.integers(0, 30), st.booleans())
def test_resuming_equals_going_on(document_lengths, seq_len, batch_size, steps, separate):
    with line(*document_lengths) as corpus:
        make = partial(Loader, corpus, seq_len=seq_len, batch_size=batch_size, seed=9, objective=partial(causal, separate=separate))
        loader, resumed = make(), make()
        for _ in range(steps):
            next(loader)
        state = json.loads(json.dumps(loader.state()))
        assert all(type(value) is int for value in state.values())
        next(resumed)
        resumed.restore(state)
        for _ in range(2 * sum(document_lengths) // (seq_len * batch_size) + 2):
            assert same(next(loader), next(resumed))
            assert loader.state() == resumed.state()


@settings(max_examples=40, deadline=None)
@given(st.integers(20, 200), st.integers(1, 6), st.integers(1, 3), st.integers(1, 4), st.integers(0, 6))
def test_ranks_share_the_order_of_one(n, seq_len, batch_size, n_ranks, before):
    with line(n) as corpus:
        alone = Loader(corpus, seq_len=seq_len, batch_size=batch_size * n_ranks, seed=2)
        ranks = [Loader(corpus, seq_len=seq_len, batch_size=batch_size, seed=2, rank=rank, n_ranks=n_ranks) for rank in range(n_ranks)]
        for _ in range(before):
            whole = next(alone).token_ids
            for rank, loader in enumerate(ranks):
                assert torch.equal(next(loader).token_ids, whole[rank::n_ranks])
        assert {tuple(loader.state().items()) for loader in ranks} == {tuple(alone.state().items())}
        other = Loader(corpus, seq_len=seq_len, batch_size=batch_size * n_ranks, seed=2)
        other.restore(ranks[-1].state())
        assert same(next(other), next(alone)), "a run goes on with other ranks if a step takes as many windows"


def test_a_state_of_other_sizes_is_refused_by_name():
    with line(100) as corpus, line(101) as longer:
        state = Loader(corpus, seq_len=8, batch_size=2, seed=1).state()
        others = {"seed 1, this loader has 2": {"seed": 2}, "seq_len 8, this loader has 9": {"seq_len": 9},
                  "global_batch_size 2, this loader has 3": {"batch_size": 3}, "global_batch_size 2, this loader has 4": {"n_ranks": 2},
                  "corpus_tokens 100, this loader has 101": {"corpus": longer}}
        for message, other in others.items():
            loader = Loader(**({"corpus": corpus, "seq_len": 8, "batch_size": 2, "seed": 1} | other))
            first = loader.state()
            with pytest.raises(ConfigError) as error:
                loader.restore(state)
            assert message in str(error.value) and "\n" not in str(error.value)
            assert loader.state() == first
        loader = Loader(corpus, seq_len=8, batch_size=2, seed=1)
        for part in ({}, {name: value for name, value in state.items() if name != "window"}, state | {"epoch": -1}):
            with pytest.raises(ConfigError):
                loader.restore(part)


def test_sizes_that_cannot_be_are_refused():
    with line(100) as corpus:
        good = {"seq_len": 8, "batch_size": 2}
        for bad in ({"seq_len": 0}, {"batch_size": 0}, {"n_ranks": 0}, {"rank": 2, "n_ranks": 2}, {"rank": -1}, {"seed": -1}):
            with pytest.raises(ConfigError, match="expected"):
                Loader(corpus, **(good | bad))
        with pytest.raises(DataError, match="has 100 tokens, one window needs seq_len . 1 = 101"):
            Loader(corpus, seq_len=100, batch_size=1)
        assert rows(Loader(corpus, seq_len=99, batch_size=1), 2) == [list(range(99))] * 2


@settings(max_examples=40, deadline=None)
@given(lengths.filter(lambda parts: sum(parts) > 6 and len(parts) > 1), st.integers(1, 6))
def test_documents_never_leak_into_each_other(document_lengths, seq_len):
    document_of = [number for number, length in enumerate(document_lengths) for _ in range(length)]
    seen: list[Rows] = []

    def look(rows: Rows) -> Batch:
        seen.append(rows)
        return causal(rows)

    with line(*document_lengths) as corpus:
        for batch in itertools.islice(Loader(corpus, seq_len=seq_len, batch_size=3, objective=look), 20):
            known = seen[-1].document_ids[:, :-1]
            assert (batch.document_ids is not None) == (batch.positions is not None) == bool((known != known[:, :1]).any()), "only where they matter"
            if batch.document_ids is None:
                batch = replace(batch, document_ids=known, positions=torch.arange(seq_len).expand_as(known))
            ends = [length - 1 for length in seen[-1].lengths or [seq_len + 1] * 3]                 # an epoch's first and last window may be short
            for ids, targets, numbers, positions, end in zip(*(value.tolist() for value in (batch.token_ids, batch.targets, batch.document_ids,
                                                                                            batch.positions)), ends):
                assert numbers[:end] == [document_of[token] for token in ids[:end]] and set(targets[end:]) <= {IGNORE_INDEX}
                for token, target, position in zip(ids[:end], targets, positions):
                    assert target == (token + 1 if document_of[token + 1] == document_of[token] else IGNORE_INDEX)
                    assert position == token - max(ids[0], document_of.index(document_of[token]))
        assert next(Loader(corpus, seq_len=seq_len, batch_size=3, objective=plain)).document_ids is None


def test_one_document_needs_no_mask():
    with line(50) as corpus:
        batch = next(Loader(corpus, seq_len=8, batch_size=2))
        assert batch.document_ids is None and batch.positions is None and (batch.targets != IGNORE_INDEX).all()


@settings(max_examples=60, deadline=None)
@given(lengths.filter(lambda parts: sum(parts) > 1), st.integers(1, 12), st.one_of(st.none(), st.integers(1, 80)), st.integers(1, 4), st.booleans())
def test_windows_ask_for_each_token_once_in_order(document_lengths, seq_len, max_tokens, batch_size, separate):
    n = sum(document_lengths)
    first_tokens = set(itertools.accumulate(document_lengths)) if separate else set()
    with line(*document_lengths) as corpus:
        batches = list(windows(corpus, seq_len, max_tokens, batch_size=batch_size, objective=partial(causal, separate=separate)))
    n_windows = -(-(n - 1) // seq_len)
    wanted = n_windows if max_tokens is None else min(n_windows, -(-max_tokens // seq_len))
    starts = [0] if wanted == 1 else [batch.token_ids[row, 0].item() for batch in batches for row in range(len(batch.token_ids))]
    assert len(starts) == wanted and starts == sorted(set(starts)) and all(start % seq_len == 0 for start in starts)
    gaps = [after - before for before, after in zip(starts, [*starts[1:], n_windows * seq_len])]
    assert wanted == n_windows or max(gaps) - min(gaps) <= 2 * seq_len, "the windows are spread over all of the text"
    asked = [target for batch in batches for target in batch.targets.flatten().tolist() if target != IGNORE_INDEX]
    expected = [token for start in starts for token in range(start, min(start + seq_len, n - 1))]
    assert asked == [token + 1 for token in expected if token + 1 not in first_tokens]
    assert all(batch.token_ids.shape[1] == seq_len for batch in batches) and all(len(batch.token_ids) == batch_size for batch in batches[:-1])
    kept = [token for batch in batches for token in
            (batch.token_ids if batch.keep is None else batch.token_ids[batch.keep]).flatten().tolist()]
    assert kept == expected
    assert all(batch.keep is None for batch in batches[:-1]) and (batches[-1].keep is None) == (len(expected) % seq_len == 0)
    if batches[-1].keep is not None:
        assert (batches[-1].targets[~batches[-1].keep] == IGNORE_INDEX).all()


def test_windows_refuse_at_once():
    with line(1) as corpus, pytest.raises(DataError, match="has 1 token"):
        windows(corpus, 8)
    with line(5) as corpus:
        for bad in ({"seq_len": 0}, {"seq_len": 4, "max_tokens": 0}, {"seq_len": 4, "batch_size": 0}):
            with pytest.raises(ConfigError, match="expected 1 or more"):
                windows(corpus, **bad)
