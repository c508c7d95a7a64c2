"""The training loop, for every family: draw, hidden, loss, backward, clip, update. It knows no files; what is written is the callbacks' business.

The loss of a step is the mean over all targets of all its micro-batches, so that how a batch is split changes nothing. A step waits for the device
once, where it looks whether loss and gradient are numbers.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hanok.contracts import IGNORE_INDEX, Batch
from hanok.errors import DataError
from hanok.nn.loss import chunk_tokens, token_cross_entropy
from hanok.nn.recurrent import GRUCell, LSTMCell
from hanok.runtime import deterministic
from hanok.train import snapshot
from hanok.train.carry import Carry
from hanok.train.compiled import Compiled, Hidden, forget, gradient_of, hidden_of
from hanok.train.distributed import ALONE, Ranks, is_sharded, local
from hanok.train.ema import Average
from hanok.train.guard import DivergedError, Guard
from hanok.train.optim import set_learning_rates
from hanok.train.recipe import TrainRecipe
from hanok.train.schedule import share

__all__ = ["DivergedError", "Step", "Trainer"]


@dataclass(frozen=True)
class Step:
    """What one update did."""
    step: int                                            # updates done, this one included
    tokens: int                                          # targets seen so far
    seconds: float                                       # spent in updates so far
    loss: float                                          # nats a token, before the update; with smoothing and z-loss where they are asked for
    learning_rate: float                                 # of AdamW
    grad_norm: float                                     # before clipping
    progress: float                                      # share of the run that is done, 0 to 1
    tokens_per_second: float                             # of this update


class Trainer:
    """Trains a model on batches. `device` is where the batches are sent; the model is there already.

    `hidden` stands in for model.hidden: one that carries a recurrent state over batches, for example. With train.ema_decay, `averaged` puts the
    averaged weights in place for evaluation and for the bundle. Of several `ranks` each has its own batches and all make the same update.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], batches: Iterator[Batch], recipe: TrainRecipe, *,
                 vocab_size: int, device: torch.device | str = "cpu", hidden: Hidden | None = None, ranks: Ranks = ALONE):
        self.model: Any = model
        self.optimizers, self.batches, self.recipe, self.device = list(optimizers), batches, recipe, torch.device(device)
        self.hidden = hidden or hidden_of(model, recipe.compile, self.device)
        self.gradient = gradient_of(model, recipe.compile, self.device)
        if self.compiles:
            forget()
        self.parameters = list(model.parameters())                                    # asking a model takes as long as a small matrix product
        self.average = Average(model, recipe.ema_decay) if recipe.ema_decay else None
        self.guard, self.ranks, self.sharded = Guard(recipe), ranks, is_sharded(self.parameters)
        self.in_bf16 = precision(recipe.precision, model, self.device) == "bf16"
        self.chunk_size = chunk_tokens(vocab_size, on_gpu=self.device.type == "cuda")
        self.n_steps, self.n_tokens, self.seconds = 0, 0, 0.0
        self.shares: list[float] = []                    # of the peak rates, an update, where the clock decides: nothing else can tell them again

    @property
    def compiles(self) -> bool:
        """Whether the first update waits for a compiler."""
        return isinstance(self.hidden, Compiled) or isinstance(self.gradient, Compiled)

    @property
    def progress(self) -> float:
        """The larger share of steps and of time."""
        by_time = self.seconds / self.recipe.seconds if self.recipe.seconds else 0.0
        return max(self.n_steps / self.recipe.steps, by_time)

    @property
    def done(self) -> bool:
        return self.progress >= 1.0

    def step(self) -> Step:
        """One update. DataError where there is no target.

        DivergedError where loss or gradient is no number or the loss leapt up: all but the batches' place is as it was before the step, weights,
        optimizers, counts, random and carried states.
        """
        begin = time.perf_counter()
        now = share(self.recipe, self.n_steps, self.progress)
        place, before = self.batches.state() if hasattr(self.batches, "state") else {}, self.mark()
        micro_batches = [next(self.batches) for _ in range(self.recipe.grad_accum_steps)]
        counts = [int(targets_of(batch).ne(IGNORE_INDEX).sum()) for batch in micro_batches]
        n_targets = int(self.ranks.sums(sum(counts))[0])
        if not n_targets:
            raise DataError(f"the batches of step {self.n_steps + 1} ask for nothing; give documents of more than one token")
        try:
            with deterministic(self.device):
                loss, norm = self.accumulate(micro_batches, counts, n_targets, before)
                self.guard.check(self.n_steps + 1, loss, norm, place)
                self.update(now, norm)
            if self.recipe.seconds:
                self.shares.append(now)
        except DivergedError:
            self.go_back(before)
            raise
        finally:
            for p in self.parameters:
                p.grad = None
        took = self.ranks.same(time.perf_counter() - begin)
        self.n_steps, self.n_tokens, self.seconds = self.n_steps + 1, self.n_tokens + n_targets, self.seconds + took
        return Step(self.n_steps, self.n_tokens, self.seconds, loss, now * self.recipe.learning_rate, norm, min(1.0, self.progress), n_targets / took)

    def mark(self) -> tuple[snapshot.Chance, dict[str, Tensor]]:
        """What an update draws from and carries on: random states and a recurrent model's memory."""
        return snapshot.chance(self.device), self.hidden.state() if isinstance(self.hidden, Carry) else {}

    def go_back(self, mark: tuple[snapshot.Chance, dict[str, Tensor]]) -> None:
        """As if the update had not been begun."""
        snapshot.set_chance(mark[0], self.device)
        if isinstance(self.hidden, Carry):
            self.hidden.restore(mark[1])

    def accumulate(self, micro_batches: Sequence[Batch], counts: Sequence[int], n_targets: int,
                   before: tuple[snapshot.Chance, dict[str, Tensor]]) -> tuple[float, float]:
        """All ranks' loss and the norm of its gradients: `gradients`, and once more without the compiler where its backward pass fails, which is
        compiled when it is first asked for."""
        told: Tensor | None = None
        try:
            told = self.gradients(micro_batches, counts, n_targets)
        except Exception as error:
            if not isinstance(self.hidden, Compiled) or not self.hidden.gives_up(error):
                raise
        if told is None:
            self.go_back(before)
            for p in self.parameters:
                p.grad = None
            told = self.gradients(micro_batches, counts, n_targets)
        self.ranks.add_up(self.parameters)                                            # the loss of another rank is no fault of the compiler's
        told[1] = nn.utils.get_total_norm([local(p.grad) for p in self.parameters if p.grad is not None])
        loss, norm = told.tolist()
        return self.ranks.agreed(loss, norm, self.sharded)

    def gradients(self, micro_batches: Sequence[Batch], counts: Sequence[int], n_targets: int) -> Tensor:
        """This rank's part of the gradients of the mean over all targets, those of other ranks too; (2,) its part of that mean, and room."""
        told = torch.zeros(2, device=self.device)
        for batch, count in zip(micro_batches, counts):
            batch = batch.to(self.device)
            with self.autocast():
                loss, _ = token_cross_entropy(self.hidden(batch), targets_of(batch), self.model.head, chunk_size=self.chunk_size, n_targets=count,
                                              label_smoothing=self.recipe.label_smoothing, z_loss=self.recipe.z_loss, gradient=self.gradient)
            loss = loss / n_targets
            loss.backward()
            told[0] += loss.detach()
        return told

    def update(self, now: float, norm: float) -> None:
        """Clips, and moves every parameter; `now` is the share of each peak rate."""
        if self.recipe.clip and norm > self.recipe.clip:
            grads = [local(p.grad) for p in self.parameters if p.grad is not None]
            torch._foreach_mul_(grads, self.recipe.clip / (torch.tensor(norm, device=self.device) + 1e-6))
        set_learning_rates(self.optimizers, now)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.average:
            self.average.update(self.n_steps + 1)

    def run(self, *on_step: Callable[[Step], Any]) -> None:
        """Updates until the run is done; each callback sees each of them."""
        self.model.train()
        while not self.done:
            step = self.step()
            for callback in on_step:
                callback(step)
        self.model.eval()

    def autocast(self) -> AbstractContextManager[Any]:
        """Inside, products are made in train.precision."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.in_bf16 else nullcontext()

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model's weights are their running mean, where there is one."""
        return self.average.in_place() if self.average else nullcontext()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that it needs to go on bit for bit, but for the place in the data: live tensors, to be written before the next step, and plain data."""
        return snapshot.take(self)

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Back to where `state` was taken. ConfigError names the first thing missing, left over or misshapen, and nothing is changed."""
        snapshot.put_back(self, tensors, plain)


def precision(asked: str, model: nn.Module, device: torch.device) -> str:
    """train.precision, decided: what `auto` is on this device. Recurrences, whose sums are long, stay in fp32."""
    if asked != "auto":
        return asked
    recurrent = any(isinstance(module, nn.RNNBase | GRUCell | LSTMCell) for module in model.modules())
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() and not recurrent else "fp32"


def targets_of(batch: Batch) -> Tensor:
    """What is asked of a batch. DataError where nothing is."""
    if batch.targets is None:
        raise DataError("a batch without targets was drawn; an objective that asks for something was expected")
    return batch.targets
