"""The training loop, for every family: draw, hidden, loss, backward, clip, update. It knows no files; what is written is the callbacks' business.

The loss of a step is the mean over all targets of all its micro-batches, so that how a batch is split changes nothing.
"""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hanok.contracts import IGNORE_INDEX, Batch
from hanok.errors import DataError
from hanok.nn.loss import chunk_tokens, token_cross_entropy
from hanok.train.optim import set_learning_rate
from hanok.train.recipe import TrainRecipe
from hanok.train.schedule import cosine


class DivergedError(DataError):
    """The loss or its gradient is no number any more."""


@dataclass(frozen=True)
class Step:
    """What one update did."""
    step: int                                            # updates done, this one included
    tokens: int                                          # targets seen so far
    seconds: float                                       # spent in updates so far
    loss: float                                          # nats a token, before the update
    learning_rate: float
    grad_norm: float                                     # before clipping
    progress: float                                      # share of the run that is done, 0 to 1
    tokens_per_second: float                             # of this update


class Trainer:
    """Trains a model on batches. `device` is where the batches are sent; the model is there already."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[Batch], recipe: TrainRecipe, *, vocab_size: int,
                 device: torch.device | str = "cpu"):
        self.model: Any = model
        self.optimizer, self.batches, self.recipe, self.device = optimizer, batches, recipe, device
        self.chunk_size = chunk_tokens(vocab_size)
        self.n_steps, self.n_tokens, self.seconds = 0, 0, 0.0

    @property
    def progress(self) -> float:
        """The larger share of steps and of time."""
        by_time = self.seconds / self.recipe.seconds if self.recipe.seconds else 0.0
        return max(self.n_steps / self.recipe.steps, by_time)

    @property
    def done(self) -> bool:
        return self.progress >= 1.0

    def step(self) -> Step:
        """One update. DataError where there is no target; DivergedError where loss or gradient is no number: what was learned until then stands."""
        begin = time.perf_counter()
        rate = self.recipe.learning_rate * cosine(self.n_steps, self.progress, warmup_steps=self.recipe.warmup_steps, floor=self.recipe.floor)
        micro_batches = [next(self.batches) for _ in range(self.recipe.grad_accum_steps)]
        n_targets = sum(int(targets_of(batch).ne(IGNORE_INDEX).sum()) for batch in micro_batches)
        if not n_targets:
            raise DataError(f"the batches of step {self.n_steps + 1} ask for nothing; give documents of more than one token")
        total = 0.0
        for batch in micro_batches:
            batch = batch.to(self.device)
            loss, _ = token_cross_entropy(self.model.hidden(batch), targets_of(batch), self.model.head, chunk_size=self.chunk_size)
            (loss / n_targets).backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip or math.inf).item()
        for what, value in (("loss", total / n_targets), ("gradient's norm", norm)):
            if not math.isfinite(value):
                self.optimizer.zero_grad(set_to_none=True)
                raise DivergedError(f"the {what} of step {self.n_steps + 1} is {value}; lower train.learning_rate ({self.recipe.learning_rate}) or "
                                "raise train.warmup_steps")
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        took = time.perf_counter() - begin
        self.n_steps, self.n_tokens, self.seconds = self.n_steps + 1, self.n_tokens + n_targets, self.seconds + took
        return Step(self.n_steps, self.n_tokens, self.seconds, total / n_targets, rate, norm, min(1.0, self.progress), n_targets / took)

    def run(self, *on_step: Callable[[Step], Any]) -> None:
        """Updates until the run is done; each callback sees each of them."""
        self.model.train()
        while not self.done:
            step = self.step()
            for callback in on_step:
                callback(step)
        self.model.eval()


def targets_of(batch: Batch) -> Tensor:
    """What is asked of a batch. DataError where nothing is."""
    if batch.targets is None:
        raise DataError("a batch without targets was drawn; an objective that asks for something was expected")
    return batch.targets
