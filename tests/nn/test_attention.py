"""`attend` and `attention_weights` against each other and against eq. 1 of arXiv:1706.03762 in plain loops; errors that name what to try.

B batch, T query positions, S key positions, H query heads, G key/value heads, K d_head.
"""
from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hanok.errors import ConfigError
from hanok.nn.attention import Attention, CrossAttention, SelfAttention, attend, attention_weights
from hanok.nn.layers import activation
from hanok.nn.masks import Frame
from hanok.nn.position import Rotary, inverse_frequencies, rotate


def loops(q, k, v, allowed, bias, scale):
    """softmax(q k^T * scale + bias) v, one number at a time, in Python's floats; `allowed(b, h, t, s)`."""
    n_rows, n_heads, n_queries, width = q.shape
    group = n_heads // k.size(1)
    out = torch.zeros(n_rows, n_heads, n_queries, v.size(-1))
    for b in range(n_rows):
        for h in range(n_heads):
            keys, values = k[b, h // group].tolist(), v[b, h // group].tolist()
            for t in range(n_queries):
                query = q[b, h, t].tolist()
                scores = {s: sum(x * y for x, y in zip(query, key)) * scale + bias(b, h, t, s) for s, key in enumerate(keys) if allowed(b, h, t, s)}
                parts = {s: math.exp(score) for s, score in scores.items()}
                for i in range(v.size(-1)):
                    out[b, h, t, i] = sum(part * values[s][i] for s, part in parts.items()) / sum(parts.values())
    return out


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 3), (4, 1)]), st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 2, 5]),
       st.sampled_from(["none", "bool", "float", "causal", "nowhere"]), st.sampled_from([None, 1.0, 0.3]), st.integers(0, 2 ** 16))
def test_attend_is_its_weights_times_the_values(n_rows, heads, n_queries, n_keys, width, kind, scale, seed):
    torch.manual_seed(seed)
    n_heads, n_kv_heads = heads
    q = torch.randn(n_rows, n_heads, n_queries, width)
    k, v = torch.randn(2, n_rows, n_kv_heads, n_keys, width).unbind(0)
    mask = None
    if kind in ("bool", "nowhere"):
        mask = torch.rand(n_rows, 1, n_queries, n_keys) < 0.5
        mask[..., 0] = True
        mask[0, 0, 0] &= kind != "nowhere"                                            # a query that may look nowhere
    elif kind == "float":
        mask = torch.randn(1, n_heads, n_queries, n_keys).masked_fill(torch.rand(n_queries, n_keys).triu(1) > 0.7, float("-inf"))
    weights = attention_weights(q, k, mask, kind == "causal", scale)
    got = attend(q, k, v, mask, kind == "causal", scale)
    assert weights.shape == (n_rows, n_heads, n_queries, n_keys)
    torch.testing.assert_close(got, weights @ v.repeat_interleave(n_heads // n_kv_heads, 1), atol=1e-5, rtol=1e-4)
    sums = torch.ones(n_rows, n_heads, n_queries)
    sums[0, :, 0] = float(kind != "nowhere")
    torch.testing.assert_close(weights.sum(-1), sums)
    assert (weights >= 0).all()


def test_attention_is_the_papers_equation():
    torch.manual_seed(0)
    q, (k, v) = torch.randn(2, 4, 5, 3), torch.randn(2, 2, 2, 5, 3).unbind(0)         # two heads share one of keys and values
    mask, bias = torch.rand(2, 1, 5, 5) < 0.6, torch.randn(1, 4, 5, 5)
    mask |= torch.eye(5, dtype=torch.bool)
    for is_causal, given_mask, allowed, added, scale in (
        (False, None, lambda b, h, t, s: True, lambda b, h, t, s: 0.0, None),
        (True, None, lambda b, h, t, s: s <= t, lambda b, h, t, s: 0.0, None),
        (False, mask, lambda b, h, t, s: bool(mask[b, 0, t, s]), lambda b, h, t, s: 0.0, 0.7),
        (False, bias, lambda b, h, t, s: True, lambda b, h, t, s: float(bias[0, h, t, s]), 1.0),
    ):
        expected = loops(q, k, v, allowed, added, 3 ** -0.5 if scale is None else scale)
        torch.testing.assert_close(attend(q, k, v, given_mask, is_causal, scale), expected, atol=1e-5, rtol=1e-4)


def test_a_query_that_may_look_nowhere_gives_zero_and_no_nan():
    q, k = torch.randn(1, 2, 3, 4, requires_grad=True), torch.randn(1, 2, 5, 4)
    mask = torch.zeros(1, 1, 3, 5, dtype=torch.bool)
    mask[..., 2, 1] = True
    out = attend(q, k, k, mask)
    assert (out[:, :, :2] == 0).all() and torch.equal(out[:, :, 2], k[:, :, 1])
    out.sum().backward()
    assert q.grad.isfinite().all()
    weights = attention_weights(q, k, mask)
    assert (weights[:, :, :2] == 0).all() and (weights[:, :, 2, 1] == 1).all()


def test_self_attention_norms_turns_scales_and_appends_in_that_order():
    torch.manual_seed(1)
    norms = [nn.RMSNorm(6), nn.RMSNorm(6)]
    attention = SelfAttention(8, 4, n_kv_heads=2, d_head=6, q_norm=norms[0], k_norm=norms[1], scale=0.9)
    for norm in norms:
        nn.init.normal_(norm.weight)
    x, past = torch.randn(2, 3, 8), torch.randn(2, 2, 2, 4, 6)
    rotation = Rotary(inverse_frequencies(6, 100.0)).rotation(torch.arange(4, 7)[None])
    seen = []

    def append(k, v):
        seen.append((k, v))
        return torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)

    mask = torch.ones(3, 7, dtype=torch.bool).tril(4)[None, None]
    got = attention(x, Frame(rotation, mask), append)
    q = rotate(norms[0](attention.q_proj(x).view(2, 3, 4, 6).transpose(1, 2)), rotation)
    k = rotate(norms[1](attention.k_proj(x).view(2, 3, 2, 6).transpose(1, 2)), rotation)
    v = attention.v_proj(x).view(2, 3, 2, 6).transpose(1, 2)
    torch.testing.assert_close(seen[0], (k, v))
    weights = attention_weights(q, torch.cat([past[0], k], 2), mask, scale=0.9)
    mixed = weights @ torch.cat([past[1], v], 2).repeat_interleave(2, 1)              # (B,H,T,K)
    torch.testing.assert_close(got, attention.out_proj(mixed.transpose(1, 2).reshape(2, 3, 24)))


def test_cross_attention_reads_only_what_its_mask_keeps():
    torch.manual_seed(2)
    cross = CrossAttention(8, 2)
    x, memory = torch.randn(1, 3, 8), torch.randn(1, 5, 8)
    k, v = cross.keys_values(memory)
    keep = torch.tensor([[True, True, True, False, False]])
    short = cross(x, *cross.keys_values(memory[:, :3]), None)
    torch.testing.assert_close(cross(x, k, v, keep[:, None, None]), short)
    assert not torch.allclose(cross(x, k, v, None), short)


def test_dropout_acts_on_weights_in_training_alone():
    torch.manual_seed(3)
    attention = SelfAttention(8, 2, dropout=0.5)
    x, frame = torch.randn(1, 6, 8), Frame(None, None, is_causal=True)
    assert not torch.equal(attention(x, frame), attention(x, frame))
    attention.eval()
    assert torch.equal(attention(x, frame), attention(x, frame))


@given(st.integers(1, 200), st.integers(1, 24))
def test_a_width_that_does_not_divide_names_head_counts_that_do(d_model, n_heads):
    if d_model % n_heads == 0:
        assert Attention(d_model, n_heads).d_head * n_heads == d_model
        return
    with pytest.raises(ConfigError) as refused:
        Attention(d_model, n_heads)
    message = str(refused.value)
    assert f"d_model {d_model}" in message and f"n_heads {n_heads}" in message and "\n" not in message
    suggested = [int(n) for n in re.findall(r"\d+", message.partition("try")[2])]
    assert suggested and all(d_model % n == 0 for n in suggested)


@given(st.integers(1, 24), st.integers(1, 30))
def test_groups_that_do_not_divide_name_those_that_do(n_heads, n_kv_heads):
    if n_heads % n_kv_heads == 0:
        assert Attention(n_heads * 2, n_heads, n_kv_heads=n_kv_heads).k_proj.out_features == 2 * n_kv_heads
        return
    with pytest.raises(ConfigError) as refused:
        Attention(n_heads * 2, n_heads, n_kv_heads=n_kv_heads)
    message = str(refused.value)
    assert f"n_heads {n_heads}" in message and f"n_kv_heads {n_kv_heads}" in message
    suggested = [int(n) for n in re.findall(r"\d+", message.partition("try")[2])]
    assert suggested and all(n_heads % n == 0 for n in suggested)


def test_a_head_width_of_its_own_needs_no_division():
    attention = Attention(10, 4, d_head=7)
    assert attention.q_proj.weight.shape == (28, 10) and attention.out_proj.weight.shape == (10, 28)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(0, None), (-2, None), (4, -2)])
def test_no_heads_at_all_are_refused(n_heads, n_kv_heads):
    with pytest.raises(ConfigError, match="heads"):
        Attention(8, n_heads, n_kv_heads=n_kv_heads)


def test_an_unknown_activation_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"'swish'.*relu.*silu"):
        activation("swish")
