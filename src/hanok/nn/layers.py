"""Feed-forward nets, the two residuals, the embedding and the heads: what stands between one attention and the next.

B batch, T positions, D d_model, F d_ff, V vocabulary.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hanok.errors import ConfigError
from hanok.nn.position import Position

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU("tanh"), "silu": nn.SiLU, "tanh": nn.Tanh,
}
"""By name: relu; gelu (exact, arXiv:1606.08415); gelu_tanh (its approximation, GPT-2's); silu; tanh."""


def activation(name: str) -> nn.Module:
    """The activation of that name. ConfigError for an unknown one."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"unknown activation '{name}'; choose from {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


class SquaredReLU(nn.Module):
    """max(x, 0)^2 (Primer, arXiv:2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


class MLP(nn.Module):
    """down(activation(up(x))) (arXiv:1706.03762, eq. 2)."""

    def __init__(self, d_model: int, d_ff: int, activation: nn.Module, bias: bool = True):
        super().__init__()
        self.up, self.down, self.activation = nn.Linear(d_model, d_ff, bias), nn.Linear(d_ff, d_model, bias), activation

    def forward(self, x: Tensor) -> Tensor:                                           # (B,T,D) -> (B,T,D)
        up = self.up(x)
        return down_again(self.down, lambda: self.activation(up))


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (GLU variants, arXiv:2002.05202): SwiGLU with SiLU, GEGLU with GELU."""

    def __init__(self, d_model: int, d_ff: int, activation: nn.Module, bias: bool = False):
        super().__init__()
        self.gate, self.up = nn.Linear(d_model, d_ff, bias), nn.Linear(d_model, d_ff, bias)
        self.down, self.activation = nn.Linear(d_ff, d_model, bias), activation

    def forward(self, x: Tensor) -> Tensor:                                           # (B,T,D) -> (B,T,D)
        gate, up = self.activation(self.gate(x)), self.up(x)
        return down_again(self.down, lambda: gate * up)


def down_again(down: nn.Module, middle: Callable[[], Tensor]) -> Tensor:
    """down(middle()), whose widest tensor is not kept for the backward but made once more: (B,T,F) is the most that a block remembers."""
    inside = middle()
    if not inside.requires_grad or torch.compiler.is_compiling():                     # a compiler chooses by itself what it keeps
        return down(inside)
    place, size = inside.data_ptr(), inside.numel()

    def keep(saved: Tensor) -> Tensor | torch.Size:
        return saved.shape if saved.data_ptr() == place and saved.numel() == size else saved

    def give(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else middle().view(kept)

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        return down(inside)


class PreNorm(nn.Module):
    """x + dropout(sublayer(norm(x))): GPT-2 and everything since."""

    def __init__(self, norm: nn.Module, dropout: float = 0.0):
        super().__init__()
        self.norm, self.dropout = norm, nn.Dropout(dropout)

    def forward(self, x: Tensor, sublayer: nn.Module, *args) -> Tensor:
        return x + self.dropout(sublayer(self.norm(x), *args))


class PostNorm(PreNorm):
    """norm(x + dropout(sublayer(x))): the 2017 Transformer, BERT and the first GPT."""

    def forward(self, x: Tensor, sublayer: nn.Module, *args) -> Tensor:
        return self.norm(x + self.dropout(sublayer(x, *args)))


class Embedding(nn.Module):
    """Tokens (times `scale`) plus what the position scheme adds, then a norm and dropout where there are any."""

    def __init__(self, token: nn.Embedding, position: Position, *, scale: float = 1.0, norm: nn.Module | None = None, dropout: float = 0.0):
        super().__init__()
        self.token, self.position, self.scale = token, position, scale
        self.norm, self.dropout = norm or nn.Identity(), nn.Dropout(dropout)

    def vectors(self, token_ids: Tensor) -> Tensor:                                   # (B,T) -> (B,T,D)
        x = self.token(token_ids)
        return x if self.scale == 1.0 else x * self.scale

    def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:                # (B,T), (1|B,T) -> (B,T,D)
        return self.dropout(self.norm(self.position.embed(self.vectors(token_ids), positions)))


class SegmentEmbedding(Embedding):
    """BERT's: which sentence a token belongs to is added too (arXiv:1810.04805, figure 2)."""

    def __init__(self, token: nn.Embedding, position: Position, *, n_segments: int, norm: nn.Module, dropout: float = 0.0):
        super().__init__(token, position, norm=norm, dropout=dropout)
        self.segment = nn.Embedding(n_segments, token.embedding_dim)

    def forward(self, token_ids: Tensor, positions: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        segment = self.segment.weight[0] if segment_ids is None else self.segment(segment_ids)
        return self.dropout(self.norm(self.position.embed(self.vectors(token_ids) + segment, positions)))


class ScaledHead(nn.Module):
    """A linear head over scaled vectors: T5 1.0 scales by d_model^-1/2 since its embedding is tied."""

    def __init__(self, linear: nn.Linear, scale: float):
        super().__init__()
        self.linear, self.scale = linear, scale

    def forward(self, x: Tensor) -> Tensor:                                           # (...,D) -> (...,V)
        return self.linear(x * self.scale)
