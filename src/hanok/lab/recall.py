"""Associative recall at a distance: some keys with their values, then tokens that mean nothing, then a key whose value is asked for.

What stands between the pairs and the question is all that changes, so that accuracy by distance shows memory over time and nothing else; accuracy by
the number of pairs shows how much is held apart. `influence` shows what reaches the answer before anything is learned. A pair is one token, for a key
and a value together; a question is two, the key and ASK, since RNNsearch chooses where to look before it reads a token.
B rows, S source positions, T target positions.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

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
RATES = (1.0, 0.25)
"""Times a rung's learning rate: what is right for sentences may be too much where one token decides. Each gets a part of the time, the better is
kept."""
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


def learn(build: Callable[[], Any], recipe: TrainRecipe, device: torch.device | str, on_step: Callable[[Step], Any] = lambda step: None
          ) -> tuple[Any, float, int, float]:
    """Trains a model on mixed distances for as long as the recipe says, at each of RATES for an equal part of it: the one with the lowest loss over
    its last tenth, its rate, its updates and seconds."""
    tried = []
    for i, share in enumerate(RATES):
        model = build().to(device)
        losses: list[float] = []
        rates = {name: share * rate for name in ("learning_rate", "muon_learning_rate", "embedding_learning_rate")
                 if (rate := getattr(recipe, name)) is not None}
        told = replace(recipe, **rates, seconds=recipe.seconds and recipe.seconds / len(RATES))
        trainer = Trainer(model, optimizers(model, told), batches(recipe.seed), told, vocab_size=VOCAB_SIZE, device=device)

        def kept(step: Step, losses: list[float] = losses, done: int = i) -> None:
            losses.append(step.loss)
            on_step(replace(step, progress=(done + min(1.0, step.progress)) / len(RATES)))

        trainer.run(kept)
        last = losses[-max(1, len(losses) // 10):]
        tried.append((sum(last) / len(last), model, told.learning_rate, trainer.n_steps, trainer.seconds))
    return min(tried, key=lambda one: one[0])[1:]


@torch.no_grad()
def accuracy(model: Any, device: torch.device | str, seed: int) -> list[tuple[int, float]]:
    """The share of N_QUESTIONS questions that get the right value, at each distance, always on the same rows."""
    return [(distance, answered(model, batch_of(N_ROWS, distance, np.random.default_rng((seed, distance))).to(device))) for distance in DISTANCES]


@torch.no_grad()
def accuracy_by_pairs(model: Any, device: torch.device | str, seed: int) -> list[tuple[int, float]]:
    """The share of right values at the farthest distance, where so many pairs have to be held apart."""
    far = DISTANCES[-1]
    return [(n, answered(model, batch_of(N_ROWS, far, np.random.default_rng((seed, far, n)), n).to(device))) for n in range(1, N_PAIRS + 1)]


def answered(model: Any, batch: Batch) -> float:
    """The share of a batch's questions that get the right value."""
    assert batch.targets is not None
    return float((model(batch).argmax(-1) == batch.targets)[batch.targets != IGNORE_INDEX].float().mean())


@torch.no_grad()
def influence(model: Any, device: torch.device | str, seed: int) -> list[tuple[int, float]]:
    """How far other pairs, and nothing else, move the logits of an answer: the root of the mean square over rows and vocabulary, at each distance."""
    found = []
    for distance in DISTANCES:
        one, other = (batch_of(N_ROWS, distance, np.random.default_rng((seed, distance, i))).to(device) for i in range(2))
        assert one.source_ids is not None and other.source_ids is not None
        changed = replace(one, source_ids=torch.cat([other.source_ids[:, :N_PAIRS], one.source_ids[:, N_PAIRS:]], 1))
        found.append((distance, float((model(one) - model(changed))[:, 1::2].double().square().mean().sqrt())))
    return found
