"""Rules against plain Python, alone and together; and which forwards reach the kernel without a dense mask.

B batch, T queries, S keys.
"""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from hanok.contracts import Batch
from hanok.nn.attention import attend, attention_weights
from hanok.nn.masks import Causal, Documents, Keep, Span, Window, blocks, frame_of, span_after, span_of
from hanok.nn.position import Position, RelativeBias
from zoo import BY_NAME, V

CPU = torch.device("cpu")


@st.composite
def spans(draw):
    """What a step can be: rows of any past, each with some real tokens, at least one in all."""
    n_rows, n_queries = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    past = draw(st.one_of(st.lists(st.integers(0, 7), min_size=n_rows, max_size=n_rows), st.integers(0, 7).map(lambda n: [n] * n_rows)))
    counts = draw(st.one_of(st.none(), st.lists(st.integers(0, n_queries), min_size=n_rows, max_size=n_rows)))
    if counts is not None and max(p + n for p, n in zip(past, counts)) == 0:
        counts[0] = 1
    return past, counts, span_after(past, n_queries, counts, CPU)


@st.composite
def forwards(draw):
    """A step under rules that a state knows, or a packed or padded forward without a state: (span, rules, oracle(b, t, s), rows, real tokens)."""
    rules, tests = [], []
    if draw(st.booleans()):
        rules.append(Causal())
        tests.append(lambda b, query, key: key <= query)
    if draw(st.booleans()):
        size = draw(st.integers(1, 9))
        rules.append(Window(size))
        tests.append(lambda b, query, key, size=size: query - key < size)
    if draw(st.booleans()):
        past, counts, span = draw(spans())
        counts = counts or [span.n_queries] * len(past)
    else:
        n_rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
        span, past, counts = span_of(Batch(torch.zeros(n_rows, length, dtype=torch.long))), [0] * n_rows, [length] * n_rows
        if draw(st.booleans()):
            ids = draw(st.lists(st.lists(st.integers(0, 2), min_size=length, max_size=length), min_size=n_rows, max_size=n_rows))
            rules.append(Documents(torch.tensor(ids)))
            tests.append(lambda b, query, key: ids[b][query] == ids[b][key])
        if draw(st.booleans()):
            keep = draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=n_rows, max_size=n_rows))
            rules.append(Keep(torch.tensor(keep)))
            tests.append(lambda b, query, key: keep[b][key])
    order = draw(st.permutations(range(len(rules))))
    return span, tuple(rules[i] for i in order), lambda b, t, s: all(test(b, past[b] + t, s) for test in tests), len(past), counts


def looks(frame, n_rows, span):
    """(B,T,S) who may look at whom, as the kernel will understand the frame."""
    shape = (n_rows, 1, span.n_queries, span.n_keys)
    if frame.is_causal:
        assert frame.mask is None
        return torch.ones(shape, dtype=torch.bool).tril()[:, 0]
    if frame.mask is None:
        return torch.ones(shape, dtype=torch.bool)[:, 0]
    return (frame.mask if frame.mask.dtype == torch.bool else frame.mask[:, :1].isfinite()).expand(shape)[:, 0]


@settings(max_examples=200, deadline=None)
@given(forwards(), st.booleans())
def test_a_frame_says_what_its_rules_say(forward, with_bias):
    span, rules, may_look, n_rows, counts = forward
    position = RelativeBias(2, 8, 16, True) if with_bias else Position()
    frame = frame_of(position, span, rules)
    got = looks(frame, n_rows, span)
    for b in range(n_rows):
        for t in range(counts[b]):
            assert got[b, t].tolist() == [may_look(b, t, s) for s in range(span.n_keys)]
    if with_bias:
        bias = position.bias(span.positions, span.k_positions)
        expected = bias.expand(n_rows, -1, -1, -1).masked_fill(~got[:, None], float("-inf"))
        assert torch.equal(frame.mask.expand_as(expected), expected)


@settings(max_examples=200, deadline=None)
@given(forwards())
def test_a_rule_that_calls_itself_free_forbids_nothing(forward):
    span, rules, _, n_rows, counts = forward
    for rule in rules:
        if rule.free(span):
            dense = rule.dense(span).expand(n_rows, 1, span.n_queries, span.n_keys)
            assert all(dense[b, 0, :n].all() for b, n in enumerate(counts))           # what a pad sees means nothing


@settings(max_examples=100, deadline=None)
@given(forwards())
def test_a_rule_says_place_by_place_what_it_says_at_once(forward):
    span, rules, _, n_rows, _ = forward
    if not span.fresh:
        return
    places = [torch.arange(n).view([-1 if i == j else 1 for j in range(3)]) for i, n in enumerate((n_rows, span.n_queries, span.n_keys))]
    for rule in rules:
        one_by_one = rule.allows()(places[0], torch.tensor(0), *places[1:]).expand(n_rows, span.n_queries, span.n_keys)
        assert torch.equal(one_by_one, rule.dense(span).expand(n_rows, 1, span.n_queries, span.n_keys)[:, 0])


# ---- blocks, for flex attention: forward only, since torch has no backward for it on CPUs (tests/train/test_gpu.py has the rest)
SEQ_LEN = 300                                # two blocks of 128 and a part of one


def packed(n_rows: int = 3) -> torch.Tensor:
    """(B,T): rows of a few documents each, and a last row of one."""
    numbers = (torch.rand(n_rows, SEQ_LEN, generator=torch.Generator().manual_seed(0)) < 0.02).cumsum(1)
    numbers[-1] = 7
    return numbers


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("width, dropout", [(16, 0.0), (8, 0.0), (16, 1e-9)])         # the last two it does not know
@pytest.mark.parametrize("more", [(), (Window(50),), (Keep(torch.arange(SEQ_LEN) < torch.tensor([[300], [290], [17]])),)])
def test_blocks_answer_what_a_dense_mask_answers(more, width, dropout):
    rules = (Causal(), *more, Documents(packed()))
    mask = blocks(rules, span_of(Batch(packed())), 3)
    q, k, v = (torch.randn(3, heads, SEQ_LEN, width, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    whole = mask.dense()
    torch.testing.assert_close(attend(q, k, v, mask, dropout=dropout), attend(q, k, v, whole, dropout=dropout), rtol=1e-4, atol=1e-5)
    assert torch.equal(attention_weights(q, k, mask), attention_weights(q, k, whole))


def test_blocks_leave_out_what_nobody_may_look_at():
    numbers = (torch.arange(512) // 128).expand(2, 512)                               # each document a block of its own
    mask = blocks((Causal(), Documents(numbers)), span_of(Batch(numbers)), 2)
    assert mask.block_mask.to_dense()[:, 0].tolist() == [torch.eye(4).tolist()] * 2
    row = torch.zeros(2, 512, dtype=torch.long)
    assert blocks((Causal(), Documents(row)), span_of(Batch(row)), 2).block_mask.to_dense()[0, 0].tolist() == torch.ones(4, 4).tril().tolist()


@settings(max_examples=200, deadline=None)
@given(spans())
def test_a_span_knows_where_its_tokens_go(drawn):
    past, counts, span = drawn
    real = counts or [span.n_queries] * len(past)
    assert span.ends == tuple(p + n for p, n in zip(past, real))
    assert span.k_positions.tolist() == [list(range(max(span.ends)))]
    positions = span.positions.expand(len(past), -1)
    for b, (start, n) in enumerate(zip(past, real)):
        assert positions[b, :n].tolist() == list(range(start, start + n))
        assert positions[b].max() <= max(0, span.ends[b] - 1)                         # pads stand on a position that the row has read
    if span.even:
        assert span.write is None and len(set(past)) == 1 and real == [span.n_queries] * len(past)
    else:
        assert list(zip(*(index.tolist() for index in span.write))) == [(b, t, p + t) for b, (p, n) in enumerate(zip(past, real)) for t in range(n)]


def test_packed_positions_are_the_batchs_own():
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    span = span_of(Batch(torch.zeros(1, 5, dtype=torch.long), positions=positions))
    assert span.positions is positions and span.k_positions is positions and span.fresh
    assert Causal().dense(span)[0, 0, 3].tolist() == [True, True, True, True, False]  # causality speaks of slots, not of positions


def test_a_rule_is_free_where_it_can_be():
    """The tests above would pass if nothing were ever free; these are the paths that must be fast."""
    one_token = span_after([5, 5], 1, None, CPU)
    assert Causal().free(one_token) and Window(6).free(one_token) and not Window(5).free(one_token)
    assert not Causal().free(span_after([5, 4], 1, None, CPU))                        # a shorter row must not see the longer one's slots
    assert not Causal().free(span_after([5], 2, None, CPU))
    assert not Causal().free(Span(torch.tensor([[3]]), torch.arange(6)[None], (3,)))  # slots behind the query are there


class Watch(TorchFunctionMode):
    """Notes what reaches the attention kernel: "plain", "causal" or "dense"."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            mask = args[3] if len(args) > 3 else (kwargs or {}).get("attn_mask")
            self.seen.append("dense" if mask is not None else "causal" if (kwargs or {}).get("is_causal") else "plain")
        return function(*args, **(kwargs or {}))


def kernel_of(call) -> str:
    with Watch() as watch, torch.no_grad():
        call()
    kinds = set(watch.seen)
    assert len(kinds) == 1, kinds
    return kinds.pop()


def ids(*shape):
    return torch.randint(V, shape)


def prefilled(model, lengths, capacity=32):
    state = model.start(None, len(lengths), capacity)
    with torch.no_grad():
        model.step(ids(len(lengths), max(lengths)), state, lengths)
    return state


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-relu", "qwen3"])
def test_which_forwards_need_no_dense_mask(name):
    model = BY_NAME[name].build()
    assert kernel_of(lambda: model(Batch(ids(2, 7)))) == "causal"
    assert kernel_of(lambda: model(Batch(ids(2, 7), keep=torch.ones(2, 7, dtype=torch.bool)))) == "causal"
    assert kernel_of(lambda: model.step(ids(3, 9), model.start(None, 3, 16))) == "causal"
    assert kernel_of(lambda: model.step(ids(3, 9), model.start(None, 3, 16), [4, 9, 1])) == "causal"   # a ragged prefill
    even = prefilled(model, [6, 6])
    for _ in range(3):
        assert kernel_of(lambda: model.step(ids(2, 1), even)) == "plain"
    single = prefilled(model, [4, 7]).select([1])
    assert kernel_of(lambda: model.step(ids(1, 1), single)) == "plain"                # one row is always even


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_which_forwards_do(name):
    model = BY_NAME[name].build()
    assert kernel_of(lambda: model(Batch(ids(1, 7), document_ids=torch.tensor([[0, 0, 0, 1, 1, 1, 1]])))) == "dense"
    even, ragged = prefilled(model, [6, 6]), prefilled(model, [6, 3])
    assert kernel_of(lambda: model.step(ids(2, 3), even)) == "dense"                  # a chunk onto a past
    assert kernel_of(lambda: model.step(ids(2, 1), ragged)) == "dense"                # rows of two lengths
    model.rules = (Causal(), Window(4))
    assert kernel_of(lambda: model(Batch(ids(1, 4)))) == "causal"                                      # the window covers all
    assert kernel_of(lambda: model(Batch(ids(1, 5)))) == "dense"
    state = prefilled(model, [3, 3])
    assert kernel_of(lambda: model.step(ids(2, 1), state)) == "plain"
    assert kernel_of(lambda: model.step(ids(2, 1), state)) == "dense"


def test_an_encoder_is_masked_only_where_it_is_padded():
    model = BY_NAME["bert"].build()
    assert kernel_of(lambda: model(Batch(ids(2, 7)))) == "plain"
    assert kernel_of(lambda: model(Batch(ids(2, 7), keep=torch.arange(7) < torch.tensor([[3], [7]])))) == "dense"


def test_a_score_bias_is_always_dense():
    model = BY_NAME["t5-1.1"].build()
    with Watch() as watch, torch.no_grad():
        model(Batch(ids(1, 3), source_ids=ids(1, 4)))
    assert watch.seen == ["dense"] * 3 + ["dense", "plain"] * 2                       # three encoder blocks; self- and cross-attention


def test_a_window_forgets_and_the_cache_forgets_alike():
    """Two layers reach twice as far as a window: what lies further cannot matter, and decoding equals the full forward."""
    model = BY_NAME["llama"].build()
    model.stack.blocks = model.stack.blocks[:2]
    model.rules = (Causal(), Window(4))
    tokens, changed = ids(1, 14), ids(1, 14)
    changed[0, 7:] = tokens[0, 7:]
    with torch.no_grad():
        full = model(Batch(tokens))[0]
        torch.testing.assert_close(model(Batch(changed))[0, 13], full[13], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(model(Batch(changed))[0, 12], full[12], atol=1e-4)  # 12 reaches 6
        state = model.start(None, 2, 16)
        model.step(tokens[:, :9].repeat(2, 1), state, [9, 5])
        one = model.head(model.step(torch.stack([tokens[0, 9:11], tokens[0, 5:7]]), state))
        torch.testing.assert_close(one[0], full[9:11], atol=1e-4, rtol=0)
        torch.testing.assert_close(one[1], full[5:7], atol=1e-4, rtol=0)
        alone = state.select([0])
        for t in range(11, 14):
            torch.testing.assert_close(model.head(model.step(tokens[:, t:t + 1], alone))[0], full[t:t + 1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["bert", "t5-1.0", "transformer"])
def test_a_row_of_pads_alone_gives_no_nan(name):
    """A batch's last rows can be padding throughout; neither they nor the gradients of their neighbours may become NaN."""
    model = BY_NAME[name].build()
    keep = torch.tensor([[True] * 5, [False] * 5])
    batch = Batch(ids(2, 5), keep=keep) if name == "bert" else Batch(ids(2, 4), source_ids=ids(2, 5), source_keep=keep)
    hidden = model.hidden(batch)
    assert hidden.isfinite().all()
    hidden[0].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
