"""Scaled dot-product attention (arXiv:1706.03762, eq. 1) with many heads or grouped ones (GQA, arXiv:2305.13245).

`attend` asks the fast kernels; `attention_weights` is the same softmax as a pure function, for eyes and for tests.
B batch, T query positions, S key positions, D d_model, H query heads, G key/value heads, K d_head.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanok.errors import ConfigError
from hanok.nn.masks import Blocks, Frame
from hanok.nn.position import rotate

Append = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""New keys and values -> all of them: how a cache enters a layer."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Blocks | None = None, is_causal: bool = False, scale: float | None = None,
           dropout: float = 0.0) -> Tensor:
    """softmax(q k^T * scale + mask) v: (B,H,T,K), (B,G,S,K), (B,G,S,K) -> (B,H,T,K). scale None: 1/sqrt(K)."""
    grouped = q.size(1) != k.size(1)
    if isinstance(mask, Blocks):
        if not dropout and q.size(-1) >= 16:                                          # flex attention knows neither dropout nor smaller heads
            from torch.nn.attention.flex_attention import flex_attention
            return flex_attention(q.to(v.dtype), k.to(v.dtype), v, block_mask=mask.block_mask, scale=scale, enable_gqa=grouped)
        mask = mask.dense()
    if grouped and mask is not None and q.is_cuda:       # no fast kernel there takes groups and a mask, which add in a fixed order as well
        k, v = (part.repeat_interleave(q.size(1) // part.size(1), 1) for part in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=is_causal, scale=scale, enable_gqa=grouped)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | Blocks | None = None, is_causal: bool = False, scale: float | None = None) -> Tensor:
    """The softmax that `attend` applies to its values: (B,H,T,K), (B,G,S,K) -> (B,H,T,S). Each row sums to 1; to 0 where it may look nowhere."""
    k = k.repeat_interleave(q.size(1) // k.size(1), 1)
    scores = q @ k.transpose(-1, -2) * (q.size(-1) ** -0.5 if scale is None else scale)
    if isinstance(mask, Blocks):
        mask = mask.dense()
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).masked_fill(scores.amax(-1, keepdim=True).isneginf(), 0.0)


class Attention(nn.Module):
    """The four projections, split into heads; who looks at whom is said by the subclasses.

    `q_norm` and `k_norm` act on each head's K numbers (QK-norm, arXiv:2010.04245). ConfigError where the heads don't divide.
    """

    def __init__(self, d_model: int, n_heads: int, *, n_kv_heads: int | None = None, d_head: int | None = None, qkv_bias: bool = True,
                 out_bias: bool = True, scale: float | None = None, dropout: float = 0.0, q_norm: nn.Module | None = None,
                 k_norm: nn.Module | None = None):
        super().__init__()
        n_kv_heads = n_kv_heads or n_heads
        check_heads(d_model, n_heads, n_kv_heads, d_head)
        self.d_head, self.n_kv_heads, self.scale, self.dropout = d_head or d_model // n_heads, n_kv_heads, scale, dropout
        self.q_proj = nn.Linear(d_model, n_heads * self.d_head, bias=qkv_bias)
        self.k_proj = nn.Linear(d_model, n_kv_heads * self.d_head, bias=qkv_bias)
        self.v_proj = nn.Linear(d_model, n_kv_heads * self.d_head, bias=qkv_bias)
        self.out_proj = nn.Linear(n_heads * self.d_head, d_model, bias=out_bias)
        self.q_norm, self.k_norm = q_norm or nn.Identity(), k_norm or nn.Identity()

    def split(self, x: Tensor) -> Tensor:                                             # (B,T,H*K) -> (B,H,T,K)
        return x.unflatten(-1, (-1, self.d_head)).transpose(1, 2)

    def queries(self, x: Tensor) -> Tensor:                                           # (B,T,D) -> (B,H,T,K)
        return self.q_norm(self.split(self.q_proj(x)))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:                        # (B,S,D) -> 2 x (B,G,S,K)
        return self.k_norm(self.split(self.k_proj(x))), self.split(self.v_proj(x))

    def merge(self, x: Tensor) -> Tensor:                                             # (B,H,T,K) -> (B,T,D)
        return self.out_proj(x.transpose(1, 2).flatten(2))

    @property
    def active_dropout(self) -> float:
        return self.dropout if self.training else 0.0


class SelfAttention(Attention):
    """A sequence looks at itself (and at what its cache remembers)."""

    def forward(self, x: Tensor, frame: Frame, append: Append | None = None) -> Tensor:   # (B,T,D) -> (B,T,D)
        q, k, v = self.placed(x, frame)
        if append is not None:
            k, v = append(k, v)
        return self.merge(attend(q, k, v, frame.mask, frame.is_causal, self.scale, self.active_dropout))

    def placed(self, x: Tensor, frame: Frame) -> tuple[Tensor, Tensor, Tensor]:           # -> (B,H,T,K), 2 x (B,G,T,K)
        """Queries, keys and values; the first two turned by their positions."""
        q, (k, v) = self.queries(x), self.keys_values(x)
        if frame.rotation is not None:
            q, k = rotate(q, frame.rotation), rotate(k, frame.rotation)
        return q, k, v


class CrossAttention(Attention):
    """A decoder looks at an encoder's output, whose keys and values were computed once."""

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:    # (B,T,D) -> (B,T,D)
        return self.merge(attend(self.queries(x), k, v, mask, scale=self.scale, dropout=self.active_dropout))


def check_heads(d_model: int, n_heads: int, n_kv_heads: int, d_head: int | None) -> None:
    """ConfigError where d_model does not divide into heads, or query heads into groups."""
    if n_heads < 1 or n_kv_heads < 1:
        raise ConfigError(f"n_heads is {n_heads} and n_kv_heads {n_kv_heads}; expected 1 or more of each")
    if d_head is None and d_model % n_heads:
        fits = [n for n in range(1, d_model + 1) if d_model % n == 0]
        near = sorted(sorted(fits, key=lambda n: abs(n - n_heads))[:3])
        raise ConfigError(f"d_model {d_model} is not divisible by n_heads {n_heads}; try {', '.join(map(str, near))}")
    if n_heads % n_kv_heads:
        fits = [n for n in range(1, n_heads + 1) if n_heads % n == 0]
        raise ConfigError(f"n_heads {n_heads} is not divisible by n_kv_heads {n_kv_heads}; try {', '.join(map(str, fits))}")
