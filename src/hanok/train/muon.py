"""Muon (Keller Jordan, 2024): each matrix steps along its momentum with all singular values made about 1, by five Newton-Schulz iterations.

Scale and weight decay are Moonshot's (arXiv:2502.16982): an update is as long as AdamW's, so that both may share a learning rate. Matrices of one
shape are iterated together, a tall one as its transpose; fp32 on CPUs, whose bf16 products are slow, bf16 elsewhere. Of matrices that are cut up
(FSDP2) the whole is gathered, and each rank moves its part. n matrices of (R,C), R <= C.
"""
from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hanok.train.distributed import local, own_part, whole_of

A, B, C = 3.4445, -4.7750, 2.0315
"""The quintic a x + b x^3 + c x^5: steep at zero, and about 1 wherever it ends."""
MOST_NUMBERS = 1 << 24
"""Of all matrices that are iterated together: what a large model's iteration may hold beside it."""


class Muon(torch.optim.Optimizer):
    """For hidden matrices alone (2-D parameters): embeddings, heads and vectors belong to AdamW. State: `momentum`, the running mean of gradients."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.1, n_iterations: int = 5):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "n_iterations": n_iterations})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every matrix that has a gradient: Nesterov's look ahead, orthogonalised, scaled by 0.2 sqrt(max(R,C))."""
        loss = closure() if closure else None
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(tuple(sorted(p.shape)), []).append(p)
            for (rows, columns), alike in by_shape.items():
                at_once = max(1, MOST_NUMBERS // (rows * columns))
                for first in range(0, len(alike), at_once):
                    self.move(alike[first:first + at_once], group)
        return loss

    def move(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Updates matrices of one shape, or its transpose."""
        grads, means = [local(p.grad) for p in params if p.grad is not None], []
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            means.append(local(self.state[p]["momentum"]))
        torch._foreach_lerp_(means, grads, 1 - group["momentum"])
        ahead = [whole_of(x, p) for x, p in zip(torch._foreach_lerp(grads, means, group["momentum"]), params)]
        turned = [p.size(0) > p.size(1) for p in params]
        flat = orthogonalised(torch.stack([x.t() if turn else x for x, turn in zip(ahead, turned)]), group["n_iterations"])
        mine = [local(p) for p in params]
        if group["weight_decay"]:
            torch._foreach_mul_(mine, 1 - group["lr"] * group["weight_decay"])
        updates = [own_part(x.t() if turn else x, p) for x, turn, p in zip(flat.to(params[0].dtype).unbind(0), turned, params)]
        torch._foreach_add_(mine, updates, alpha=-group["lr"] * 0.2 * math.sqrt(max(params[0].shape)))


def orthogonalised(x: Tensor, n_iterations: int = 5) -> Tensor:                       # (n,R,C) -> (n,R,C)
    """U V^T of each matrix's U S V^T, roughly: singular values that are not tiny end in 0.7..1.2. A zero matrix stays zero."""
    x = x.float() if x.device.type == "cpu" else x.bfloat16()
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(n_iterations):
        gram = x @ x.mT                                                               # (n,R,R)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x
