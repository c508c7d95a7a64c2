"""Associative recall at a distance: some keys with their values, then tokens that mean nothing, then a key whose value is asked for.

What stands between the pairs and the question is all that changes, so that accuracy by distance shows memory over time and nothing else. A pair is
one token, for a key and a value together; a question is two, the key and ASK, since RNNsearch chooses where to look before it reads a token.
B rows, S source positions, T target positions.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from hanok.contracts import IGNORE_INDEX, Batch
from hanok.train.optim import optimizers
from hanok.train.recipe import TrainRecipe
from hanok.train.trainer import Step, Trainer

DISTANCES = (4, 8, 16, 32, 64, 128, 256)
N_PAIRS, N_VALUES, N_NOISE, ASK = 4, 8, 8, 0
KEYS = 1
VALUES = KEYS + N_PAIRS
PAIRS = VALUES + N_VALUES
NOISE = PAIRS + N_PAIRS * N_VALUES
VOCAB_SIZE = NOISE + N_NOISE
"""Where each kind of token begins."""
ROWS, N_ROWS = 32, 256
"""Rows of a training batch, all of one distance; rows that are asked about at each distance."""
N_QUESTIONS = N_ROWS * N_PAIRS
CHANCE = 1 / N_PAIRS
"""What is got by naming any of the values that were read."""
WIDTH = 64
"""The widest that a layer may be: the task has few tokens, and many updates teach more than many weights."""


def narrowed(config: Any) -> Any:
    """A family's config for this task: its layers, WIDTH wide, its feed-forward nets twice that, without dropout."""
    most = {"d_model": WIDTH, "d_embed": WIDTH, "d_hidden": WIDTH, "d_ff": 2 * WIDTH, "dropout": 0.0}
    sizes = {f.name: min(most[f.name], getattr(config, f.name)) for f in fields(config) if f.name in most}
    return replace(config, **sizes, vocab_size=VOCAB_SIZE, max_seq_len=max(config.max_seq_len, N_PAIRS + max(DISTANCES)))


def batch_of(n_rows: int, distance: int, random: np.random.Generator, n_pairs: int = N_PAIRS) -> Batch:
    """`distance` tokens of noise stand between the pairs, (B,S), and the questions for all of them in another order, (B,T)."""
    def shuffled(n: int) -> np.ndarray:                                               # (B,n)
        return random.permuted(np.tile(np.arange(n), (n_rows, 1)), axis=1)

    keys, values = shuffled(N_PAIRS)[:, :n_pairs], shuffled(N_VALUES)[:, :n_pairs]
    noise = random.integers(NOISE, VOCAB_SIZE, (n_rows, distance))
    source = np.concatenate([PAIRS + keys * N_VALUES + values, noise], 1)
    order = shuffled(n_pairs)
    asked, told = (np.take_along_axis(ids, order, 1) for ids in (KEYS + keys, VALUES + values))
    questions = np.stack([asked, np.full_like(asked, ASK)], 2).reshape(n_rows, -1)
    answers = np.stack([np.full_like(told, IGNORE_INDEX), told], 2).reshape(n_rows, -1)
    return Batch(torch.from_numpy(questions), source_ids=torch.from_numpy(source), targets=torch.from_numpy(answers))


def batches(seed: int) -> Iterator[Batch]:
    """Endless batches: each of 1 to N_PAIRS pairs, and of a distance that is as likely to be between 4 and 8 as between 128 and 256."""
    random = np.random.default_rng(seed)
    low, high = math.log(DISTANCES[0]), math.log(DISTANCES[-1])
    while True:
        yield batch_of(ROWS, round(math.exp(random.uniform(low, high))), random, int(random.integers(1, N_PAIRS + 1)))


def learn(model: nn.Module, recipe: TrainRecipe, device: torch.device | str, on_step: Callable[[Step], Any] = lambda step: None
          ) -> tuple[int, float]:
    """Trains it on mixed distances for as long as the recipe says: updates and seconds."""
    trainer = Trainer(model, optimizers(model, recipe), batches(recipe.seed), recipe, vocab_size=VOCAB_SIZE, device=device)
    trainer.run(on_step)
    return trainer.n_steps, trainer.seconds


@torch.no_grad()
def accuracy(model: Any, device: torch.device | str, seed: int) -> list[tuple[int, float]]:
    """The share of N_QUESTIONS questions that get the right value, at each distance, always on the same rows."""
    found = []
    for distance in DISTANCES:
        batch = batch_of(N_ROWS, distance, np.random.default_rng((seed, distance))).to(device)
        assert batch.targets is not None
        found.append((distance, float((model(batch).argmax(-1) == batch.targets)[batch.targets != IGNORE_INDEX].float().mean())))
    return found
