"""Recurrent layers, convolutions and alignments against the papers' equations in plain loops and torch.nn's own; and the state that they carry."""
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hanok.errors import RequestError
from hanok.nn.convolution import GatedConvolution, GatedConvolutions
from hanok.nn.recurrent import (
    GRU,
    LSTM,
    RNN,
    AdditiveAlignment,
    Alignment,
    ConcatAlignment,
    DotAlignment,
    GeneralAlignment,
    GRUCell,
    LSTMCell,
    RecurrentState,
    Source,
)
from repeatable import close

pytestmark = pytest.mark.usefixtures("repeatable")
LAYERS = {"rnn": (RNN, nn.RNN), "gru": (GRU, nn.GRU), "lstm": (LSTM, nn.LSTM)}
kinds = pytest.mark.parametrize("kind", LAYERS)
D_IN, D = 5, 7


def layers(kind, n_layers=2, **more):
    return LAYERS[kind][0](D_IN, D, n_layers, batch_first=True, **more).eval()


def readers():
    """All that reads from left to right, by name."""
    return {**{kind: layers(kind) for kind in LAYERS}, "convolutions": GatedConvolutions(D_IN, 3, 3).eval(),
            "pointwise": GatedConvolutions(D_IN, 2, 1).eval()}


all_readers = pytest.mark.parametrize("name", ["rnn", "gru", "lstm", "convolutions", "pointwise"])


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def product(matrix, vector):
    return [sum(w * x for w, x in zip(row, vector)) for row in matrix]


def added(*vectors):
    return [sum(parts) for parts in zip(*vectors)]


def in_plain_loops(kind, weights, x, h, c):
    """One layer over a row of vectors, as the papers write it, gate by gate."""
    w, u, b, b_own = (weights[name].tolist() for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"))
    out = []
    for x_t in x.tolist():
        theirs, own = added(product(w, x_t), b), added(product(u, h), b_own)

        def gate(i, theirs=theirs, own=own):
            return theirs[i * D:(i + 1) * D], own[i * D:(i + 1) * D]

        match kind:
            case "rnn":
                h = [math.tanh(a) for a in added(*gate(0))]
            case "gru":
                reset, update = ([sigmoid(a) for a in added(*gate(i))] for i in (0, 1))
                new = [math.tanh(a + r * o) for r, a, o in zip(reset, *gate(2))]
                h = [z * old + (1 - z) * n for z, old, n in zip(update, h, new)]
            case "lstm":
                enter, forget, leave = ([sigmoid(a) for a in added(*gate(i))] for i in (0, 1, 3))
                c = [f * old + i * math.tanh(a) for f, old, i, a in zip(forget, c, enter, added(*gate(2)))]
                h = [o * math.tanh(a) for o, a in zip(leave, c)]
        out.append(h)
    return torch.tensor(out), torch.tensor(h), torch.tensor(c)


# ---- layers and cells

@kinds
def test_a_layer_is_the_papers_equations(kind):
    layer, x = layers(kind, 1), torch.randn(1, 6, D_IN)
    before = tuple(torch.randn(1, 1, D) for _ in range(layer.n_cells))
    out, after = layer.read(x, before)
    c = before[-1][0, 0].tolist()
    expected, h, c = in_plain_loops(kind, layer.state_dict(), x[0], before[0][0, 0].tolist(), c)
    close(out[0], expected)
    close(after[0][0, 0], h)
    if kind == "lstm":
        close(after[1][0, 0], c)


@kinds
def test_layers_are_torchs(kind):
    ours = layers(kind)
    theirs = LAYERS[kind][1](D_IN, D, 2, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 6, D_IN)
    before = tuple(torch.randn(2, 3, D) for _ in range(ours.n_cells))
    (out, after), (expected, last) = ours.read(x, before), theirs(x, before if kind == "lstm" else before[0])
    close(out, expected)
    for got, wanted in zip(after, last if kind == "lstm" else (last,), strict=True):
        close(got, wanted)
    close(ours.whole(x), theirs(x)[0])


@pytest.mark.parametrize(("kind", "cell"), [("gru", GRUCell(D)), ("lstm", LSTMCell(D))], ids=["gru", "lstm"])
def test_a_cell_is_a_layer_of_one_step(kind, cell):
    layer, x = layers(kind, 1), torch.randn(3, 1, D_IN)
    cell.h_proj.weight.copy_(layer.weight_hh_l0)
    cell.h_proj.bias.copy_(layer.bias_hh_l0)
    before = tuple(torch.randn(1, 3, D) for _ in range(layer.n_cells))
    got = cell(F.linear(x[:, 0], layer.weight_ih_l0, layer.bias_ih_l0), *(part[0] for part in before))
    _, after = layer.read(x, before)
    for one, other in zip(got if kind == "lstm" else (got,), after, strict=True):
        close(one, other[0])


def test_forget_gates_begin_open():
    layer = LSTM(D_IN, D, 2, batch_first=True)
    for bias in (layer.bias_ih_l0, layer.bias_ih_l1):
        assert (bias[D:2 * D] == 1).all() and (bias[:D].abs() < 0.5).all() and (bias[2 * D:].abs() < 0.5).all()


def test_a_backward_direction_begins_at_each_rows_end():
    layer, x, counts = layers("gru", 2, bidirectional=True), torch.randn(3, 6, D_IN), [4, 6, 1]
    out, (last,) = layer.read(x, None, counts)
    assert last.shape == (4, 3, D)
    for b, n in enumerate(counts):
        alone, (end,) = layer.read(x[b:b + 1, :n])
        close(out[b, :n], alone[0])
        close(last[:, b], end[:, 0])


@all_readers
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_ragged_pieces_are_the_row_in_one_piece(name, data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    reader, n_rows = readers()[name], data.draw(st.integers(1, 3))
    x, at, cells = torch.randn(n_rows, 9, D_IN), [0] * n_rows, None
    expected = reader.whole(x)
    for _ in range(data.draw(st.integers(1, 4))):
        width = data.draw(st.integers(1, 3))
        counts = data.draw(st.one_of(st.none(), st.lists(st.integers(0, width), min_size=n_rows, max_size=n_rows)))
        real = [width] * n_rows if counts is None else counts
        if max(n + more for n, more in zip(at, real)) > 9:
            break
        piece = torch.stack([F.pad(row, (0, 0, 0, width))[n:n + width] for row, n in zip(x, at)])
        out, cells = reader.read(piece, cells, counts)
        for b, n in enumerate(real):
            close(out[b, :n], expected[b, at[b]:at[b] + n])
        at = [n + more for n, more in zip(at, real)]


@all_readers
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_packed_documents_are_each_read_alone(name, data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    reader, width = readers()[name], data.draw(st.integers(1, 10))
    rows = [data.draw(st.lists(st.integers(1, 4), min_size=width, max_size=width)) for _ in range(data.draw(st.integers(1, 3)))]
    ids = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)][:width] for row in rows])
    x = torch.randn(*ids.shape, D_IN)
    packed = reader.whole(x, ids)
    for row, numbers, got in zip(x, ids, packed):
        for number in numbers.unique():
            close(got[numbers == number], reader.whole(row[numbers == number][None])[0])


@all_readers
def test_a_document_learns_nothing_from_its_neighbour(name):
    reader, ids = readers()[name], torch.tensor([[0, 0, 0, 1, 1, 1]])
    with torch.enable_grad():
        x = torch.randn(1, 6, D_IN, requires_grad=True)
        gradient, = torch.autograd.grad(reader.whole(x, ids)[0, 4].sum(), x)
    assert not gradient[0, :3].any() and gradient[0, 4].any() and not gradient[0, 5].any()


# ---- gated convolutions

def test_a_gated_convolution_is_the_papers_equation():
    layer, x = GatedConvolution(3, 4), torch.randn(2, 5, 3)
    value, gate = layer.proj.weight.unflatten(1, (4, 3)).chunk(2)                     # each (3,k,3)
    value_bias, gate_bias = layer.proj.bias.chunk(2)
    padded = F.pad(x, (0, 0, 3, 0))
    out = layer(padded)
    for b in range(2):
        for t in range(5):
            a, g = value_bias.clone(), gate_bias.clone()
            for j in range(4):
                a, g = a + value[:, j] @ padded[b, t + j], g + gate[:, j] @ padded[b, t + j]
            close(out[b, t], a * torch.sigmoid(g))


def test_a_gated_convolution_is_torchs():
    layer, padded = GatedConvolution(3, 4), torch.randn(2, 9, 3)
    weight = layer.proj.weight.unflatten(1, (4, 3)).transpose(1, 2)                   # (2D,D,k), as conv1d has it
    close(layer(padded), F.glu(F.conv1d(padded.transpose(1, 2), weight, layer.proj.bias), 1).transpose(1, 2))


def test_each_convolution_is_added_to_its_input():
    reader, x = GatedConvolutions(D_IN, 2, 3), torch.randn(2, 6, D_IN)
    first = x + reader.layers[0](F.pad(x, (0, 0, 2, 0)))
    close(reader.whole(x), first + reader.layers[1](F.pad(first, (0, 0, 2, 0))))


def test_convolutions_see_just_so_far():
    reader = GatedConvolutions(D_IN, 3, 3)
    with torch.enable_grad():
        x = torch.randn(1, 12, D_IN, requires_grad=True)
        gradient, = torch.autograd.grad(reader.whole(x)[0, 10].sum(), x)
    assert gradient[0].any(-1).tolist() == [False] * 4 + [True] * 7 + [False]         # 3 layers x 2 tokens, and itself


# ---- alignments

def alignments():
    return {"dot": DotAlignment(), "general": GeneralAlignment(D, D), "concat": ConcatAlignment(D, D, 3), "additive": AdditiveAlignment(D, 6, 4)}


@pytest.mark.parametrize("name", ["dot", "general", "concat", "additive"])
def test_an_alignment_is_the_papers_equation(name):
    alignment = alignments()[name]
    assert isinstance(alignment, Alignment)
    query, memory, keep = torch.randn(2, D), torch.randn(2, 5, 6 if name == "additive" else D), torch.arange(5) < torch.tensor([[5], [3]])
    keys = alignment.keys(memory)
    weights = alignment.weights(query, keys, keep)
    for b, n in enumerate((5, 3)):
        scores = []
        for m in memory[b, :n]:
            match name:
                case "dot":
                    scores.append(query[b] @ m)
                case "general":
                    scores.append(query[b] @ alignment.k_proj.weight @ m)
                case "concat":
                    whole = torch.cat([alignment.q_proj.weight, alignment.k_proj.weight], 1)
                    scores.append(alignment.v.weight[0] @ torch.tanh(whole @ torch.cat([query[b], m])))
                case "additive":
                    scores.append(alignment.v.weight[0] @ torch.tanh(alignment.q_proj.weight @ query[b] + alignment.k_proj.weight @ m))
        raised = [math.exp(score) for score in scores]
        expected = [value / sum(raised) for value in raised]
        close(weights[b], torch.tensor(expected + [0.0] * (5 - n)))
        close(alignment(query, keys, memory, keep)[b], sum(w * m for w, m in zip(expected, memory[b])))
    close(alignment(query, keys, memory), (alignment.weights(query, keys)[..., None] * memory).sum(1))


# ---- the state

class Twin:
    """A RecurrentState whose cells count what was read, and what its rows hold, as Python numbers."""

    def __init__(self, totals):
        self.totals = list(totals)
        numbers = torch.tensor(self.totals, dtype=torch.float)
        self.state = RecurrentState((numbers.expand(2, -1)[..., None].clone(), -numbers[None, :, None]), [0] * len(self.totals))
        self.lengths = [0] * len(self.totals)

    def step(self, counts):
        ends = self.state.ends(3, counts)
        more = torch.tensor([3] * len(self.totals) if counts is None else counts)[None, :, None]
        self.state.cells, self.state.lengths = (self.state.cells[0] + more, self.state.cells[1] - more), ends
        self.totals = [total + n for total, n in zip(self.totals, more.flatten().tolist())]
        self.lengths = [n + m for n, m in zip(self.lengths, more.flatten().tolist())]

    def check(self):
        first, second = self.state.cells
        assert first[..., 0].tolist() == [self.totals] * 2 and second[..., 0].tolist() == [[-total for total in self.totals]]
        assert self.state.lengths == self.lengths


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_order_of_operations_keeps_what_was_read(data):
    twin, marks = Twin(data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=3))), []
    for _ in range(data.draw(st.integers(1, 12))):
        n_rows = len(twin.totals)
        match data.draw(st.sampled_from(["step", "ragged", "select", "join", "truncate", "snapshot", "restore"])):
            case "step":
                twin.step(None)
            case "ragged":
                twin.step(data.draw(st.lists(st.integers(0, 3), min_size=n_rows, max_size=n_rows)))
            case "select":
                rows = data.draw(st.lists(st.integers(0, n_rows - 1), max_size=3)) if n_rows else []
                twin.state, marks = twin.state.select(rows), []
                twin.totals, twin.lengths = [twin.totals[i] for i in rows], [twin.lengths[i] for i in rows]
            case "join":
                other = Twin(data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=2)))
                other.step(None)
                twin.state, twin.totals, twin.lengths, marks = (
                    twin.state.join(other.state), twin.totals + other.totals, twin.lengths + other.lengths, [])
            case "truncate":
                twin.state.truncate(twin.lengths)
                for lengths in ([n - 1 for n in twin.lengths], [n + 1 for n in twin.lengths], [*twin.lengths, 1]):
                    if lengths:
                        with pytest.raises(RequestError):
                            twin.state.truncate(lengths)
            case "snapshot":
                marks.append((twin.state.snapshot(), list(twin.totals), list(twin.lengths)))
            case "restore" if marks:
                mark, totals, lengths = data.draw(st.sampled_from(marks))
                twin.state.restore(mark)
                twin.totals, twin.lengths = list(totals), list(lengths)
        twin.check()


def test_sources_of_two_lengths_join_with_their_pads():
    short = Source(torch.randn(1, 3, 4), torch.randn(1, 3, 2), None)
    long = Source(torch.randn(2, 5, 4), torch.randn(2, 5, 2), torch.arange(5) < torch.tensor([[5], [2]]))
    both = short.join(long)
    assert both.keep.tolist() == [[True, True, True, False, False], [True] * 5, [True, True, False, False, False]]
    assert torch.equal(both.memory[:1, :3], short.memory) and not both.memory[0, 3:].any() and torch.equal(both.keys[1:], long.keys)
    again = both.select(torch.tensor([2, 0]))
    assert torch.equal(again.memory, both.memory[[2, 0]]) and torch.equal(again.keep, both.keep[[2, 0]])
    nobody = short.select(torch.tensor([], dtype=torch.long))
    assert nobody.join(long).memory.shape == (2, 5, 4) and short.select(torch.tensor([0, 0])).keep is None
