"""Gated convolutions over the past (arXiv:1612.08083): a token sees itself and the k-1 before it, in every layer; the state is these k-1 inputs.

A convolution is one matrix product over the k tokens side by side. B batch, T positions, D d_model, k kernel_size.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanok.nn.recurrent import Cells


class GatedConvolution(nn.Module):
    """h = (X*W + b) sigmoid(X*V + c) (eq. 1): `proj` holds W above V, each as k matrices side by side, the oldest token's first."""

    def __init__(self, d_model: int, kernel_size: int):
        super().__init__()
        self.kernel_size = kernel_size
        self.proj = nn.Linear(kernel_size * d_model, 2 * d_model)

    def forward(self, padded: Tensor, seen: Tensor | None = None) -> Tensor:          # (B,k-1+T,D), (B,T,k) True = may look -> (B,T,D)
        n_tokens = padded.size(1) - self.kernel_size + 1
        taps = torch.stack([padded[:, j:j + n_tokens] for j in range(self.kernel_size)], 2)    # (B,T,k,D)
        if seen is not None:
            taps = taps * seen[..., None]
        return F.glu(self.proj(taps.flatten(2)))


class GatedConvolutions(nn.Module):
    """Gated convolutions in a row, each added to its input (section 2 of the paper); it reads as `nn.recurrent.Recurrent` does."""

    def __init__(self, d_model: int, n_layers: int, kernel_size: int, dropout: float = 0.0):
        super().__init__()
        self.d_model, self.kernel_size = d_model, kernel_size
        self.layers = nn.ModuleList(GatedConvolution(d_model, kernel_size) for _ in range(n_layers))
        self.dropout = nn.Dropout(dropout)

    def begin(self, batch_size: int, like: Tensor) -> Cells:
        """Zeros of the type of `like`, as the paper pads a text's beginning: a (k-1,B,D) for each layer."""
        return (like.new_zeros(self.kernel_size - 1, batch_size, self.d_model),) * len(self.layers)

    def forward(self, x: Tensor, before: Cells, seen: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """(B,T,D) -> (B,T,D), and what each layer read: (B,k-1+T,D) each."""
        read = []
        for layer, past in zip(self.layers, before):
            read.append(torch.cat([past.transpose(0, 1), x], 1))
            x = x + self.dropout(layer(read[-1], seen))
        return x, read

    def read(self, x: Tensor, cells: Cells | None = None, counts: Sequence[int] | None = None) -> tuple[Tensor, Cells]:
        """(B,T,D) -> (B,T,D), and the cells behind it. Row b's first `counts[b]` vectors are real (None: all; 0: the row waits)."""
        out, read = self(x, self.begin(x.size(0), x) if cells is None else cells)
        ends = torch.tensor([x.size(1)] * x.size(0) if counts is None else counts, device=x.device)
        last = torch.arange(self.kernel_size - 1, device=x.device)[:, None] + ends                       # (k-1,B)
        return out, tuple(padded[torch.arange(x.size(0), device=x.device), last] for padded in read)

    def whole(self, x: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """(B,T,D) -> (B,T,D) from zeros; no token sees another document."""
        seen = None
        if document_ids is not None:
            seen = F.pad(document_ids, (self.kernel_size - 1, 0)).unfold(1, self.kernel_size, 1) == document_ids[..., None]
        return self(x, self.begin(x.size(0), x), seen)[0]
