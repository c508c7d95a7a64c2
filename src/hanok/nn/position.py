"""Order enters a Transformer through one of three doors: embed (added to the embedding), rotate (queries and keys), bias (scores).

A scheme opens the door that it needs; each door is opened once a forward, never once a layer. No scheme holds a buffer, so that a model can
be built without memory and filled from a file. B batch, T query positions, S key positions, D d_model, H heads, K d_head.
"1|B": one row where all agree.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hanok.errors import ConfigError, RequestError


class Position(nn.Module):
    """No order at all; the base of every scheme."""
    max_positions: int | None = None
    """Positions that exist; None where a formula gives them all."""

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:                          # (B,T,D), (1|B,T) -> (B,T,D)
        return x

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:            # (1|B,T) -> 2 x (1|B,1,T,K)
        return None

    def bias(self, q_positions: Tensor, k_positions: Tensor) -> Tensor | None:        # (1|B,T), (1|B,S) -> (1|B,H,T,S)
        return None


class Learned(Position):
    """A learned vector a position (BERT, GPT-2): there is nothing behind the last one."""

    def __init__(self, max_seq_len: int, d_model: int):
        super().__init__()
        self.table = nn.Embedding(max_seq_len, d_model)
        self.max_positions = max_seq_len

    def embed(self, x, positions):
        if positions.size(-1) > self.table.num_embeddings:
            raise RequestError(f"{positions.size(-1)} tokens in a row, the model has {self.table.num_embeddings} positions; shorten it", "too_long")
        return x + self.table(positions)


class Sinusoidal(Position):
    """PE(pos, i) of "Attention Is All You Need" (arXiv:1706.03762, 3.5), sines first and cosines second, as Marian stores them."""

    def __init__(self, d_model: int):
        super().__init__()
        self.frequencies = inverse_frequencies(d_model, 10_000.0)

    def embed(self, x, positions):
        angle = angles(positions, self.frequencies)                                   # (1|B,T,D/2)
        return x + torch.cat([angle.sin(), angle.cos()], -1).to(x.dtype)


class Rotary(Position):
    """Queries and keys turn by angles that grow with position (RoFormer, arXiv:2104.09864), in the halves layout of Llama.

    The sign of the rotation lives in the sine, so that rotating is a roll. `frequencies` are K/2 angles a position, in radians.
    """

    def __init__(self, frequencies: Sequence[float]):
        super().__init__()
        self.frequencies = tuple(frequencies)

    def rotation(self, positions):
        angle = angles(positions, self.frequencies)                                   # (1|B,T,K/2)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None]


class RelativeBias(Position):
    """A learned score bias a head and distance bucket (T5, arXiv:1910.10683, 2.1): near distances exactly, far ones in logarithmic steps."""

    def __init__(self, n_heads: int, n_buckets: int, max_distance: int, bidirectional: bool):
        super().__init__()
        self.table = nn.Embedding(n_buckets, n_heads)
        self.n_buckets, self.max_distance, self.bidirectional = n_buckets, max_distance, bidirectional

    def bias(self, q_positions, k_positions):
        distance = k_positions[:, None, :] - q_positions[:, :, None]                  # (1|B,T,S)
        return self.table(self.bucket(distance)).permute(0, 3, 1, 2)                  # (1|B,H,T,S)

    def bucket(self, distance: Tensor) -> Tensor:
        """The bucket of each signed distance key - query."""
        n, base = self.n_buckets, torch.zeros_like(distance)
        if self.bidirectional:
            n //= 2
            base = (distance > 0).long() * n
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = n // 2
        ratio = torch.log(distance.clamp(min=1) / exact) / math.log(self.max_distance / exact)
        far = (exact + (ratio * (n - exact)).long()).clamp(max=n - 1)
        return base + torch.where(distance < exact, distance, far)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:                     # (B,H,T,K) -> (B,H,T,K)
    """Turns each pair (x_i, x_{i+K/2}) by its position's angle."""
    cos, sin = rotation
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin).to(x.dtype)


def angles(positions: Tensor, frequencies: Sequence[float]) -> Tensor:                # (1|B,T) -> (1|B,T,len(frequencies))
    """Radians, always in fp32: half precision cannot tell positions apart beyond 2,048."""
    return positions[..., None].float() * torch.tensor(frequencies, dtype=torch.float32, device=positions.device)


def inverse_frequencies(width: int, theta: float) -> tuple[float, ...]:
    """theta^(-2i/width) for i in 0..width/2-1. ConfigError for an odd width."""
    if width % 2:
        raise ConfigError(f"sines and cosines come in pairs: a width of {width} is odd; choose an even one")
    steps = torch.arange(0, width, 2, dtype=torch.int64, device="cpu").float() / width     # fp32, as the models were trained
    return tuple((1.0 / theta ** steps).tolist())


def linear_scaling(frequencies: Sequence[float], factor: float) -> tuple[float, ...]:
    """Position interpolation (arXiv:2306.15595): all positions are squeezed by `factor`."""
    return tuple(f / factor for f in frequencies)


def llama3_scaling(frequencies: Sequence[float], factor: float, low_freq_factor: float, high_freq_factor: float,
                   original_max_seq_len: int) -> tuple[float, ...]:
    """Llama 3.1's: waves longer than the trained context slow down by `factor`, short ones stay, those between are blended."""
    def scaled(f: float) -> float:
        wave = 2 * math.pi / f
        if wave > original_max_seq_len / low_freq_factor:
            return f / factor
        if wave < original_max_seq_len / high_freq_factor:
            return f
        share = (original_max_seq_len / wave - low_freq_factor) / (high_freq_factor - low_freq_factor)
        return (1 - share) * f / factor + share * f
    return tuple(map(scaled, frequencies))
