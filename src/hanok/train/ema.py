"""A running mean of the weights (Polyak and Juditsky, 1992), which often predicts better than the last ones do."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hanok.train.distributed import local


class Average:
    """The mean of a model's trained parameters, by name. Early on it forgets faster, (1 + n)/(10 + n), so that the beginning does not linger."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, n_steps: int) -> None:
        """Takes in the weights behind update `n_steps`, counted from 1."""
        decay = min(self.decay, (1 + n_steps) / (10 + n_steps))
        torch._foreach_lerp_([local(mean) for mean in self.weights.values()], [local(p) for p in self.parameters.values()], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model's parameters are the mean; nothing is copied."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        for name, p in self.parameters.items():
            if (here := local(p)) is p:
                p.data, self.weights[name] = self.weights[name], p.data
            else:                                        # FSDP2 gathers from this memory and from no other
                mean = local(self.weights[name])
                kept = here.detach().clone()
                here.detach().copy_(mean)
                mean.copy_(kept)
