"""What stops a run that goes wrong: a loss or gradient that is no number, and, where asked for, a loss far above those before it."""
from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from hanok.errors import DataError
from hanok.train.recipe import TrainRecipe

WINDOW, LEAST = 128, 32
"""Losses that are remembered, and how many there have to be before one can be a spike."""


class DivergedError(DataError):
    """The loss or its gradient is no number any more, or leapt up. `step` would have been that update; `batch` is its first batch's place."""

    def __init__(self, message: str, step: int = 0, batch: Mapping[str, Any] | None = None):
        super().__init__(message)
        self.step, self.batch = step, dict(batch or {})


class Guard:
    """Looks at each update before it is made. A spike is above the last losses' median by `train.spike_factor` spreads.

    The spread is the median distance from that median, which one bad batch does not move; never less than a hundredth of the median.
    """

    def __init__(self, recipe: TrainRecipe):
        self.recipe, self.losses = recipe, deque[float](maxlen=WINDOW)

    def check(self, step: int, loss: float, grad_norm: float, batch: Mapping[str, Any]) -> None:
        """Remembers a good loss (nats a token). DivergedError says at which update and batch it was another."""
        for what, value in (("loss", loss), ("gradient's norm", grad_norm)):
            if not math.isfinite(value):
                raise self.error(f"the {what} of step {step} is {value}", "", step, batch)
        if self.recipe.spike_factor and len(self.losses) >= LEAST:
            middle = median(self.losses)
            spread = max(median(abs(x - middle) for x in self.losses), 0.01 * abs(middle))
            if loss > middle + self.recipe.spike_factor * spread:
                told = f"the loss of step {step} is {loss:.4g}, {(loss - middle) / spread:.3g} spreads above the {middle:.4g} of the steps before it"
                raise self.error(told, f", or raise train.spike_factor ({self.recipe.spike_factor})", step, batch)
        self.losses.append(loss)

    def error(self, told: str, or_else: str, step: int, batch: Mapping[str, Any]) -> DivergedError:
        place = ", ".join(f"{name} {value}" for name, value in batch.items())
        return DivergedError(f"{told}; lower train.learning_rate ({self.recipe.learning_rate}) or raise train.warmup_steps{or_else}"
                             + (f"; the batch is at {place}" if place else ""), step, batch)
