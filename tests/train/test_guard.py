"""What stops a run that goes wrong, and that it stops before anything is spoilt."""
from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hanok.contracts import Batch
from hanok.errors import DataError
from hanok.train.guard import LEAST, WINDOW, DivergedError, Guard
from hanok.train.optim import optimizers
from hanok.train.recipe import TrainRecipe
from hanok.train.trainer import Trainer
from tiny import CONFIG, model

RECIPE = TrainRecipe(steps=200, micro_batch_size=4, learning_rate=1e-2, warmup_steps=4, spike_factor=8.0, optimizer="muon", ema_decay=0.9)
BAD = 40


def fed(guard: Guard, losses) -> Guard:
    for n, loss in enumerate(losses):
        guard.check(n + 1, loss, 1.0, {})
    return guard


def noisy(n: int) -> list[float]:
    return [2.0 + 0.1 * math.sin(7 * i) for i in range(n)]


def test_a_leap_is_a_spike_and_noise_is_none():
    guard = fed(Guard(RECIPE), noisy(LEAST))
    guard.check(LEAST + 1, 2.4, 1.0, {})
    with pytest.raises(DivergedError) as told:
        guard.check(LEAST + 2, 9.0, 1.0, {"epoch": 1, "window": 96})
    assert (told.value.step, told.value.batch) == (LEAST + 2, {"epoch": 1, "window": 96}) and isinstance(told.value, DataError)
    message = str(told.value)
    assert message.startswith(f"the loss of step {LEAST + 2} is 9, ") and "spreads above the 2" in message and "\n" not in message
    assert "or raise train.spike_factor (8.0)" in message and message.endswith("the batch is at epoch 1, window 96")
    assert 9.0 not in guard.losses
    guard.check(LEAST + 2, 2.0, 1.0, {})                                              # and it goes on


def test_nothing_is_a_spike_before_there_is_a_past_or_where_nobody_asks():
    fed(Guard(RECIPE), [*noisy(LEAST - 1), 50.0])
    fed(Guard(replace(RECIPE, spike_factor=0.0)), [*noisy(3 * WINDOW), 50.0])


@given(st.lists(st.floats(0.5, 10.0), min_size=LEAST, max_size=LEAST + 20))
def test_falling_losses_are_never_a_spike(losses):
    guard = fed(Guard(replace(RECIPE, spike_factor=1.0)), sorted(losses, reverse=True))
    guard.check(99, min(losses) / 2, 1.0, {})


def test_only_the_last_losses_count():
    """A run that has come down from 10 to 2 finds 8 a spike."""
    guard = fed(Guard(RECIPE), [*[10.0] * WINDOW, *[2.0] * WINDOW])
    assert len(guard.losses) == WINDOW
    with pytest.raises(DivergedError):
        guard.check(999, 8.0, 1.0, {})


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["loss", "gradient's norm"])
def test_what_is_no_number_is_told(what, value):
    guard = Guard(replace(RECIPE, spike_factor=0.0))
    with pytest.raises(DivergedError, match=rf"the {what} of step 7 is {value}; lower train.learning_rate \(0.01\) or raise train.w"):
        guard.check(7, value if what == "loss" else 1.0, 1.0 if what == "loss" else value, {"row": 3})


class Rows:
    """The same row again and again, but for one batch that says something else."""

    def __init__(self):
        self.place = 0

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        self.place += 1
        ids = torch.arange(17).repeat(4, 1)
        targets = ids[:, 1:] if self.place != BAD else 299 - ids[:, 1:]
        return Batch(ids[:, :-1].contiguous(), targets=targets.contiguous())

    def state(self) -> dict[str, int]:
        return {"row": self.place}


def tensors_of(made: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in made.state()[0].items()}


def test_a_spike_leaves_everything_unmoved_and_the_run_can_go_on_past_it():
    net = model(CONFIG)
    made = Trainer(net, optimizers(net, RECIPE), Rows(), RECIPE, vocab_size=300)
    for _ in range(BAD - 1):
        made.step()
    before, counts = tensors_of(made), (made.n_steps, made.n_tokens, made.seconds, list(made.guard.losses))
    with pytest.raises(DivergedError) as told:
        made.step()
    assert (told.value.step, told.value.batch) == (BAD, {"row": BAD - 1})
    assert counts == (made.n_steps, made.n_tokens, made.seconds, list(made.guard.losses))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(made).items())
    assert all(p.grad is None for p in net.parameters())
    assert made.step().step == BAD                                                    # the loader stands behind the bad batch


def test_without_a_factor_the_bad_batch_is_taken():
    net, recipe = model(CONFIG), replace(RECIPE, spike_factor=0.0)
    made = Trainer(net, optimizers(net, recipe), Rows(), recipe, vocab_size=300)
    losses = [made.step().loss for _ in range(BAD)]
    assert losses[-1] > 2 * losses[-2]
