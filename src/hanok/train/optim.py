"""Optimizers and which parameters they take: matrices decay, vectors (biases, norms) do not."""
from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def adamw(model: nn.Module, *, learning_rate: float, betas: tuple[float, float], eps: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101), fused; only tensors of two or more dimensions decay."""
    groups = [{"params": params, "weight_decay": decay} for params, decay in split(model.parameters(), weight_decay) if params]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)


def split(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[tuple[list[nn.Parameter], float]]:
    """(matrices, weight_decay) and (vectors, 0), of what is trained."""
    trained = [p for p in parameters if p.requires_grad]
    return [([p for p in trained if p.ndim >= 2], weight_decay), ([p for p in trained if p.ndim < 2], 0.0)]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
