"""Training speed by sequence length: one update of as many tokens each time, in few long rows or many short ones.

Where time steps can be computed side by side, length costs next to nothing; a recurrence takes one after the other, each for as few rows as are left.
The models take turns, so that what else the machine does falls on all of them. B rows, T positions.
"""
from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from typing import Any

import torch

from hanok.contracts import Batch
from hanok.train.optim import optimizers
from hanok.train.recipe import TrainRecipe
from hanok.train.trainer import Trainer

LENGTHS = (8, 16, 32, 64, 128, 256, 512)
TOKENS = 2048
"""Source tokens of an update, and as many target tokens."""
ROUNDS = 5


def random_batch(vocab_size: int, length: int, n_tokens: int, seed: int = 0) -> Batch:
    """n_tokens / length rows, each with a source and a target of `length` random tokens."""
    draw = torch.Generator().manual_seed(seed)
    source, target, answer = (torch.randint(vocab_size, (max(1, n_tokens // length), length), generator=draw) for _ in range(3))
    return Batch(target, source_ids=source, targets=answer)


def tokens_per_second(builders: Mapping[str, Callable[[], Any]], recipes: Mapping[str, TrainRecipe], vocab_size: int, device: torch.device | str, *,
                      lengths: Sequence[int] = LENGTHS, n_tokens: int = TOKENS, rounds: int = ROUNDS,
                      on_length: Callable[[int], Any] = lambda done: None) -> dict[str, dict[int, float]]:
    """Of each model, at each length: the median over `rounds` updates, behind one that warms up; source and target tokens together."""
    found: dict[str, dict[int, float]] = {name: {} for name in builders}
    for done, length in enumerate(lengths):
        batch, trainers = random_batch(vocab_size, length, n_tokens), {}
        for name, build in builders.items():
            model = build().to(device).train()
            trainers[name] = Trainer(model, optimizers(model, recipes[name]), repeat(batch), recipes[name], vocab_size=vocab_size, device=device)
        rates: dict[str, list[float]] = {name: [] for name in builders}
        for _ in range(rounds + 1):
            for name, trainer in trainers.items():
                rates[name].append(2 * trainer.step().tokens_per_second)
        for name, told in rates.items():
            found[name][length] = statistics.median(told[1:])
        on_length(done + 1)
    return found
