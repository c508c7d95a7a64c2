"""Positions against the papers' formulas in plain loops and complex numbers, and against what transformers computes."""
from __future__ import annotations

import math

import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.t5.modeling_t5 import T5Attention

from hanok.errors import ConfigError
from hanok.nn.position import Learned, Position, RelativeBias, Rotary, Sinusoidal, angles, inverse_frequencies, linear_scaling, llama3_scaling, rotate


@pytest.mark.parametrize("d_model", [2, 8, 30])
def test_sines_and_cosines_are_the_papers(d_model):
    positions = torch.tensor([[0, 1, 2, 7, 100, 511]])
    got = Sinusoidal(d_model).embed(torch.zeros(1, 6, d_model), positions)[0]
    for row, position in zip(got, positions[0].tolist()):
        for i in range(d_model // 2):
            angle = position / 10_000 ** (2 * i / d_model)
            assert row[i].item() == pytest.approx(math.sin(angle), abs=1e-4)          # PE(pos, 2i)
            assert row[d_model // 2 + i].item() == pytest.approx(math.cos(angle), abs=1e-4)     # PE(pos, 2i+1)


def test_what_is_embedded_is_added_and_keeps_its_precision():
    x = torch.randn(2, 3, 8)
    positions = torch.tensor([[0, 1, 2], [5, 6, 7]])
    torch.testing.assert_close(Sinusoidal(8).embed(x, positions) - x, Sinusoidal(8).embed(torch.zeros(2, 3, 8), positions), atol=1e-6, rtol=1e-5)
    assert Sinusoidal(8).embed(x.bfloat16(), positions).dtype == torch.bfloat16
    learned = Learned(9, 8)
    assert learned.max_positions == 9
    torch.testing.assert_close(learned.embed(x, positions), x + torch.stack([learned.table.weight[:3], learned.table.weight[5:8]]))


def test_no_scheme_opens_a_door_that_it_does_not_need():
    q, x = torch.arange(3)[None], torch.randn(1, 3, 4)
    assert Position().embed(x, q) is x and Position().rotation(q) is None and Position().bias(q, q) is None
    assert Rotary((1.0, 0.1)).embed(x, q) is x and Rotary((1.0, 0.1)).bias(q, q) is None
    assert RelativeBias(2, 8, 16, True).rotation(q) is None and Sinusoidal(4).bias(q, q) is None


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([2, 4, 6, 16]), st.lists(st.integers(0, 3000), min_size=1, max_size=5), st.sampled_from([100.0, 10_000.0, 1_000_000.0]))
def test_rotation_is_multiplication_by_a_complex_number(width, places, theta):
    torch.manual_seed(0)
    x = torch.randn(2, 3, len(places), width)
    frequencies = inverse_frequencies(width, theta)
    got = rotate(x, Rotary(frequencies).rotation(torch.tensor([places])))
    pairs = torch.complex(x[..., :width // 2].double(), x[..., width // 2:].double())
    angle = torch.tensor(places, dtype=torch.float64)[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(got.double(), torch.cat([turned.real, turned.imag], -1), atol=2e-3, rtol=0)
    torch.testing.assert_close(got.norm(dim=-1), x.norm(dim=-1))


def test_scores_of_rotated_vectors_know_only_the_distance():
    torch.manual_seed(1)
    q, k = torch.randn(2, 1, 1, 1, 32).unbind(0)
    rotary = Rotary(inverse_frequencies(32, 10_000.0))

    def score(m, n):
        return (rotate(q, rotary.rotation(torch.tensor([[m]]))) * rotate(k, rotary.rotation(torch.tensor([[n]])))).sum().item()

    assert score(3, 0) == pytest.approx(score(503, 500), abs=1e-3)
    assert score(3, 0) != pytest.approx(score(0, 3), abs=1e-3)


def test_half_precision_tells_far_positions_apart():
    rotary = Rotary(inverse_frequencies(8, 10_000.0))
    x = torch.ones(1, 1, 2, 8, dtype=torch.bfloat16)
    turned = rotate(x, rotary.rotation(torch.tensor([[3000, 3001]], dtype=torch.int32)))
    assert turned.dtype == torch.bfloat16
    assert not torch.equal(turned[:, :, 0], turned[:, :, 1])


def test_angles_are_fp32_whatever_the_default_is():
    frequencies, positions = inverse_frequencies(16, 10_000.0), torch.tensor([[2047]])
    expected = angles(positions, frequencies)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = angles(positions, frequencies)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32 and torch.equal(got, expected)


@settings(max_examples=80, deadline=None)
@given(st.booleans(), st.sampled_from([4, 8, 16, 32, 64]), st.sampled_from([17, 20, 64, 128, 1000]))
def test_buckets_are_t5s(bidirectional, n_buckets, max_distance):
    assume(max_distance > n_buckets // (4 if bidirectional else 2))
    distance = torch.arange(-1500, 1501)
    expected = T5Attention._relative_position_bucket(distance, bidirectional, n_buckets, max_distance)
    got = RelativeBias(2, n_buckets, max_distance, bidirectional).bucket(distance)
    assert torch.equal(got, expected)
    assert got.min() >= 0 and got.max() == n_buckets - 1


def test_the_bias_is_the_bucket_of_key_minus_query():
    scheme = RelativeBias(3, 8, 20, True)
    q_positions, k_positions = torch.tensor([[4, 5], [0, 1]]), torch.tensor([[0, 1, 2, 3, 4, 5]])
    bias = scheme.bias(q_positions, k_positions)
    assert bias.shape == (2, 3, 2, 6)
    for b in range(2):
        for t in range(2):
            for s in range(6):
                bucket = scheme.bucket(k_positions[0, s] - q_positions[b, t])
                assert torch.equal(bias[b, :, t, s], scheme.table.weight[bucket])


def rope_of_transformers(kind, width, **parameters):
    config = transformers.LlamaConfig(hidden_size=4 * width, num_attention_heads=4, head_dim=width, max_position_embeddings=8192,
                                      rope_parameters={"rope_type": kind, **parameters})
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    assert attention_factor == 1.0
    return frequencies


widths, thetas = st.sampled_from([8, 64, 128]), st.sampled_from([10_000.0, 100_000.0, 500_000.0, 1_000_000.0])


@settings(max_examples=25, deadline=None)
@given(widths, thetas, st.floats(1.0, 64.0))
def test_linear_scaling_is_transformers(width, theta, factor):
    got = torch.tensor(linear_scaling(inverse_frequencies(width, theta), factor))
    torch.testing.assert_close(got, rope_of_transformers("linear", width, rope_theta=theta, factor=factor), rtol=1e-5, atol=0)


@settings(max_examples=40, deadline=None)
@given(widths, thetas, st.floats(1.0, 64.0), st.sampled_from([(1.0, 4.0), (1.0, 2.0), (2.0, 8.0)]), st.sampled_from([64, 2048, 8192]))
def test_llama3_scaling_is_transformers(width, theta, factor, waves, original):
    low, high = waves
    plain = inverse_frequencies(width, theta)
    got = torch.tensor(llama3_scaling(plain, factor, low, high, original))
    expected = rope_of_transformers("llama3", width, rope_theta=theta, factor=factor, low_freq_factor=low, high_freq_factor=high,
                                    original_max_position_embeddings=original)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)


def test_llama3_scaling_has_all_three_zones():
    plain = inverse_frequencies(128, 500_000.0)
    ratios = [f / g for f, g in zip(plain, llama3_scaling(plain, 8.0, 1.0, 4.0, 8192))]
    assert ratios[0] == 1.0 and ratios[-1] == pytest.approx(8.0) and any(1.01 < ratio < 7.99 for ratio in ratios)


@pytest.mark.parametrize("make", [lambda: Sinusoidal(7), lambda: inverse_frequencies(63, 10_000.0)])
def test_an_odd_width_is_refused(make):
    with pytest.raises(ConfigError, match=r"(7|63) is odd; choose an even one"):
        make()


def test_no_scheme_holds_a_buffer():
    for scheme in (Sinusoidal(8), Rotary((1.0,)), Learned(4, 8), RelativeBias(2, 8, 16, False)):
        assert not list(scheme.buffers())
