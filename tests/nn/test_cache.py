"""The state of decoding against lists of Python numbers, under any order of operations; and the steps that stand at an edge."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanok.contracts import Batch
from hanok.errors import RequestError
from hanok.nn.cache import KVCache, Memory, pad_to
from zoo import BY_NAME, C, V


class Twin:
    """A KVCache of one layer, and what its rows hold, as lists. Every token is a number of its own."""

    def __init__(self, n_rows, capacity):
        self.cache, self.rows, self.next = KVCache(torch.zeros(1, 2, n_rows, 1, capacity, 1), [0] * n_rows), [[] for _ in range(n_rows)], 1.0

    def step(self, n_queries, counts):
        """Appends as a forward does, and checks what attention would see."""
        numbers = torch.arange(self.next, self.next + len(self.rows) * n_queries).view(len(self.rows), 1, n_queries, 1)
        real = counts or [n_queries] * len(self.rows)
        if max(len(row) + n for row, n in zip(self.rows, real)) > self.cache.capacity:
            with pytest.raises(RequestError, match=f"its state has {self.cache.capacity}"):
                self.cache.span(n_queries, counts)
            return
        span = self.cache.span(n_queries, counts)
        self.next += numbers.numel()
        keys, values = self.cache.append(0, span, numbers, -numbers)
        self.cache.lengths = list(span.ends)
        for row, fresh, n in zip(self.rows, numbers, real):
            row += fresh[0, :n, 0].tolist()
        for b, row in enumerate(self.rows):
            assert keys[b, 0, :len(row), 0].tolist() == row
            assert values[b, 0, :len(row), 0].tolist() == [-x for x in row]

    def check(self):
        assert self.cache.lengths == [len(row) for row in self.rows]
        for b, row in enumerate(self.rows):
            assert self.cache.kv[0, 0, b, 0, :len(row), 0].tolist() == row
            assert self.cache.kv[0, 1, b, 0, :len(row), 0].tolist() == [-x for x in row]
        assert self.cache.kv.isfinite().all()


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_order_of_operations_keeps_what_was_written(data):
    twin = Twin(data.draw(st.integers(1, 3)), data.draw(st.integers(4, 10)))
    marks = []                                                                        # (mark, rows then, still good)
    for _ in range(data.draw(st.integers(1, 12))):
        n_rows = len(twin.rows)
        match data.draw(st.sampled_from(["step", "ragged", "select", "join", "truncate", "snapshot", "restore"])):
            case "step":
                twin.step(data.draw(st.integers(1, 3)), None)
            case "ragged":
                n_queries = data.draw(st.integers(1, 3))
                twin.step(n_queries, data.draw(st.lists(st.integers(0, n_queries), min_size=n_rows, max_size=n_rows)))
            case "select":
                chosen = data.draw(st.lists(st.integers(0, n_rows - 1), min_size=1, max_size=3))
                twin.cache, twin.rows, marks = twin.cache.select(chosen), [list(twin.rows[i]) for i in chosen], []
            case "join":
                other = Twin(data.draw(st.integers(1, 2)), data.draw(st.integers(4, 12)))
                other.next = twin.next
                other.step(data.draw(st.integers(1, 4)), None)
                twin.cache, twin.rows, twin.next, marks = twin.cache.join(other.cache), twin.rows + other.rows, other.next, []
            case "truncate":
                lengths = [data.draw(st.integers(0, len(row))) for row in twin.rows]
                twin.cache.truncate(lengths)
                twin.rows = [row[:n] for row, n in zip(twin.rows, lengths)]
                marks = [(mark, then, good and all(n >= len(row) for n, row in zip(lengths, then))) for mark, then, good in marks]
            case "snapshot":
                marks.append((twin.cache.snapshot(), [list(row) for row in twin.rows], True))
            case "restore" if marks:
                mark, then, good = marks[data.draw(st.integers(0, len(marks) - 1))]
                if not good:
                    with pytest.raises(RequestError) as stale:
                        twin.cache.restore(mark)
                    assert stale.value.kind == "stale"
                else:
                    twin.cache.restore(mark)
                    twin.rows = [list(row) for row in then]
                    marks = [(m, t, g and all(len(a) >= len(b) for a, b in zip(then, t))) for m, t, g in marks]
        twin.check()


def test_a_mark_belongs_to_one_state():
    twin = Twin(2, 4)
    mark = twin.cache.snapshot()
    with pytest.raises(RequestError) as refused:
        twin.cache.select([0, 1]).restore(mark)
    assert refused.value.kind == "stale"


def test_a_mark_is_stale_once_any_of_its_rows_was_cut():
    twin = Twin(2, 6)
    twin.step(3, None)
    kept, lost = twin.cache.snapshot(), twin.cache.snapshot()
    twin.cache.restore(kept)
    twin.cache.truncate([3, 2])
    twin.rows[1].pop()
    twin.step(2, None)                                                                # slot 2 of row 1 is overwritten
    with pytest.raises(RequestError) as refused:
        twin.cache.restore(lost)
    assert refused.value.kind == "stale"
    twin.check()


def test_a_selection_owns_its_memory():
    twin = Twin(1, 4)
    twin.step(2, None)
    copy = twin.cache.select([0, 0])
    copy.kv.fill_(9.0)
    twin.check()


def test_capacity_names_the_row_and_leaves_the_state():
    twin = Twin(3, 5)
    twin.step(3, [1, 3, 2])
    with pytest.raises(RequestError, match="row 1 needs 6 slots, its state has 5") as refused:
        twin.cache.span(3, [1, 3, 3])
    assert refused.value.kind == "too_long"
    twin.check()


def test_a_state_of_no_rows_waits_for_arrivals():
    """All requests of a running batch may end at once; the next one joins what is left."""
    twin = Twin(2, 4)
    twin.step(2, None)
    nobody = twin.cache.select([])
    assert nobody.lengths == [] and nobody.kv.size(2) == 0
    twin.cache = nobody.join(twin.cache.select([1]))
    twin.rows = twin.rows[1:]
    twin.step(1, None)
    twin.check()


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5-1.0"])
def test_a_step_in_which_all_rows_wait_changes_nothing(name):
    torch.manual_seed(0)
    model = BY_NAME[name].build()
    source = Batch(torch.randint(V, (2, 4))) if model.reads_source else None
    tokens = torch.randint(V, (2, 6))
    still, moved = model.start(source, 2, 8), model.start(source, 2, 8)
    assert model.step(tokens[:, :2], still, [0, 0]).shape == (2, 2, model.stack.blocks[0].attention.q_proj.in_features)
    assert still.lengths == [0, 0] and not still.kv.any()
    for state in (still, moved):
        model.step(tokens[:, :5], state, [5, 3])
    model.step(tokens[:, :2], still, [0, 0])
    assert still.lengths == [5, 3] and torch.equal(still.kv, moved.kv)
    assert torch.equal(model.step(tokens[:, 5:], still), model.step(tokens[:, 5:], moved))


@pytest.mark.parametrize("name", ["rnn", "lstm", "gru", "cnn", "rnn-encoder-decoder", "bahdanau", "luong-general"])
def test_a_recurrent_step_in_which_all_rows_wait_changes_nothing(name):
    torch.manual_seed(0)
    model = BY_NAME[name].build()
    source = Batch(torch.randint(V, (2, 4))) if model.reads_source else None
    tokens = torch.randint(V, (2, 6))
    still, moved = model.start(source, 2, 8), model.start(source, 2, 8)
    before = still.cells
    assert model.step(tokens[:, :2], still, [0, 0]).shape == (2, 2, model.head.in_features)
    assert still.lengths == [0, 0] and all(torch.equal(*pair) for pair in zip(still.cells, before, strict=True))
    for state in (still, moved):
        model.step(tokens[:, :5], state, [5, 3])
    model.step(tokens[:, :2], still, [0, 0])
    assert still.lengths == [5, 3] and all(torch.equal(*pair) for pair in zip(still.cells, moved.cells, strict=True))
    assert torch.equal(model.step(tokens[:, 5:], still), model.step(tokens[:, 5:], moved))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_row_that_fills_the_context_can_wait_for_the_others(name):
    torch.manual_seed(0)
    model = BY_NAME[name].build()
    tokens = torch.randint(V, (2, C))
    state, alone = model.start(None, 2, C), model.start(None, 1, C)
    model.step(tokens, state, [C, 3])
    model.step(tokens[1:, :3], alone)
    for t in range(3, 6):
        got = model.step(tokens[:, t:t + 1], state, [0, 1])
        torch.testing.assert_close(got[1], model.step(tokens[1:, t:t + 1], alone)[0], atol=1e-4, rtol=0)
    assert state.lengths == [C, 6]


def test_memories_of_two_lengths_join_with_their_pads():
    kv = torch.randn(2, 2, 1, 1, 3, 4)
    short, long = Memory(kv, None), Memory(torch.randn(2, 2, 2, 1, 5, 4), torch.arange(5) < torch.tensor([[5], [2]]))
    both = short.join(long)
    assert both.keep.tolist() == [[True, True, True, False, False], [True] * 5, [True, True, False, False, False]]
    assert torch.equal(both.kv[:, :, :1, :, :3], kv) and not both.kv[:, :, 0, :, 3:].any() and torch.equal(both.kv[:, :, 1:], long.kv)
    assert both.mask.shape == (3, 1, 1, 5) and short.mask is None
    again = both.select(torch.tensor([2, 0]))
    assert torch.equal(again.kv, both.kv[:, :, [2, 0]]) and torch.equal(again.keep, both.keep[[2, 0]])


def test_padding_leaves_what_is_long_enough():
    x = torch.ones(2, 3)
    assert pad_to(x, 3, 1) is x
    assert pad_to(x, 5, 1).tolist() == [[1.0, 1.0, 1.0, 0.0, 0.0]] * 2
