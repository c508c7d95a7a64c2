"""One update against plain PyTorch, and what must not change it: how a batch is split, who listens, how long it takes."""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hanok.contracts import IGNORE_INDEX, Batch
from hanok.errors import DataError
from hanok.models import catalog
from hanok.train.optim import optimizers
from hanok.train.recipe import TrainRecipe
from hanok.train.trainer import Step, Trainer
from tiny import CONFIG, model
from zoo import BY_NAME, V

CONFIG = replace(CONFIG, vocab_size=V, max_seq_len=16)
RECIPE = TrainRecipe(steps=20, micro_batch_size=8, optimizer="adamw", learning_rate=1e-2, schedule="cosine", warmup_steps=4, floor=0.1,
                     weight_decay=0.1, beta1=0.9, beta2=0.95)


def draw(n_rows: int, seed: int) -> Batch:
    """Random rows, of which some positions are asked nothing, so that micro-batches do not weigh the same."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (n_rows, 13), generator=generator)
    targets = ids[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=generator) < 0.3] = IGNORE_INDEX
    targets[seed % n_rows] = IGNORE_INDEX                                             # one row asks nothing at all
    return Batch(ids[:, :-1], targets=targets)


def parts(batch: Batch, n: int) -> Iterator[Batch]:
    return (Batch(ids, targets=targets) for ids, targets in zip(batch.token_ids.chunk(n), batch.targets.chunk(n)))


def trainer(recipe: TrainRecipe = RECIPE, net: nn.Module | None = None, batches: Iterator[Batch] | None = None, **more) -> Trainer:
    net = net or model(CONFIG)
    more.setdefault("optimizers", optimizers(net, recipe))
    return Trainer(net, batches=batches or (draw(8, seed) for seed in range(10 ** 6)), recipe=recipe, vocab_size=V, **more)


def run(made: Trainer) -> list[Step]:
    steps: list[Step] = []
    made.run(steps.append)
    return steps


def weights(made: Trainer) -> torch.Tensor:
    return nn.utils.parameters_to_vector(made.model.parameters()).detach().clone()


# ---- one update

def test_the_trainer_does_what_plain_torch_does():
    """Logits in full, torch's own loss, clipping and AdamW, and the schedule's formula."""
    made, net = trainer(replace(RECIPE, clip=0.5)), model(CONFIG)
    groups = [{"params": [p for p in net.parameters() if p.ndim == n], "weight_decay": decay} for n, decay in ((2, 0.1), (1, 0.0))]
    plain, norms = torch.optim.AdamW(groups, lr=1, betas=(0.9, 0.95), eps=1e-8), []
    for n, step in enumerate(run(made)):
        batch = draw(8, n)
        rate = 1e-2 * min(1, (n + 1) / 4) * (0.1 + 0.9 * (1 + math.cos(math.pi * max(0, n - 4) / 16)) / 2)
        loss = F.cross_entropy(net(batch).flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE_INDEX)
        plain.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in net.parameters()))
        norms.append(norm)
        for p in net.parameters():
            p.grad *= min(1.0, 0.5 / norm)
        for group in plain.param_groups:
            group["lr"] = rate
        plain.step()
        assert step.loss == pytest.approx(loss.item(), rel=1e-4) and step.grad_norm == pytest.approx(norm, rel=1e-3)
        assert step.learning_rate == pytest.approx(rate)
    assert max(norms) > 1.0                                                           # so it was clipped
    assert (weights(made) - nn.utils.parameters_to_vector(net.parameters())).abs().max() < 1e-3


@pytest.mark.parametrize("n", [2, 4, 8])
def test_how_a_batch_is_split_changes_nothing(n):
    whole = run(trainer())
    pieces = run(trainer(replace(RECIPE, micro_batch_size=8 // n, grad_accum_steps=n),
                         batches=(part for seed in range(10 ** 6) for part in parts(draw(8, seed), n))))
    assert len(pieces) == 20
    for one, many in zip(whole, pieces):
        assert many.loss == pytest.approx(one.loss, rel=1e-5) and many.tokens == one.tokens and many.learning_rate == one.learning_rate
        assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e6])
def test_gradients_are_clipped_to_their_norm(clip):
    """With plain gradient descent the update is the learning rate times the clipped gradient."""
    net = model(CONFIG)
    made = trainer(replace(RECIPE, clip=clip, warmup_steps=0), net, optimizers=[torch.optim.SGD(net.parameters(), lr=RECIPE.learning_rate)])
    before = weights(made)
    step = made.step()
    moved = (weights(made) - before).norm().item() / step.learning_rate
    assert step.grad_norm > 0.1
    assert moved == pytest.approx(clip if clip == 1e-3 else step.grad_norm, rel=1e-2)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("name", ["t5-1.1", "transformer", "bert-mlm", "gpt2", "qwen3"])
def test_every_kind_of_model_learns_by_it(name):
    case = BY_NAME[name]
    torch.manual_seed(0)
    net = catalog.FAMILIES[case.family].build(case.config)
    source = {"source_ids": torch.randint(V, (4, 6))} if case.reads_source else {}
    batch = Batch(torch.randint(V, (4, 8)), targets=torch.randint(V, (4, 8)), **source)
    steps = run(trainer(replace(RECIPE, steps=25, warmup_steps=2), net, cycle([batch])))
    assert steps[-1].loss < steps[0].loss - 0.5


# ---- time and callbacks

def test_every_callback_sees_every_step_in_order():
    made, seen, modes = trainer(), [], []

    def listen(step: Step) -> None:
        seen.append(step)
        modes.append(made.model.training)

    others: list[int] = []
    made.run(listen, lambda step: others.append(step.step))
    assert [step.step for step in seen] == others == list(range(1, 21)) and all(modes) and not made.model.training
    assert [step.progress for step in seen] == [n / 20 for n in range(1, 21)] and made.done
    counts = [int((draw(8, n).targets != IGNORE_INDEX).sum()) for n in range(20)]
    assert [step.tokens for step in seen] == [sum(counts[:n + 1]) for n in range(20)]
    for before, step in zip([None, *seen], seen):
        took = step.seconds - (before.seconds if before else 0.0)
        assert took > 0 and step.tokens_per_second == pytest.approx((step.tokens - (before.tokens if before else 0)) / took, rel=1e-6)


def test_time_ends_the_run_and_drives_its_schedule():
    made = trainer(replace(RECIPE, steps=500, seconds=1000.0, warmup_steps=0))
    rates = []
    for spent in (0.0, 250.0, 500.0, 999.0):
        made.seconds = spent
        assert not made.done and made.progress == pytest.approx(spent / 1000, abs=1e-4)
        rates.append(made.step().learning_rate)
    assert rates == pytest.approx([1e-2 * (0.1 + 0.9 * math.cos(math.pi * share / 2) ** 2) for share in (0, 0.25, 0.5, 0.999)], rel=1e-3)
    made.seconds = 1000.0
    assert made.done and run(made) == [] and made.n_steps == 4
    again = trainer(made.recipe)
    again.restore(*made.state())
    assert [1e-2 * share for share in again.shares] == pytest.approx(rates)          # a checkpoint keeps what the clock decided
    assert trainer(RECIPE).state()[1]["shares"] == []


def test_a_run_ends_at_the_first_step_past_its_time():
    made = trainer(replace(RECIPE, steps=500, seconds=1000.0))

    def clock(step: Step) -> None:
        made.seconds = 400.0 * step.step

    steps: list[Step] = []
    made.run(clock, steps.append)
    assert [step.step for step in steps] == [1, 2, 3] and steps[-1].progress < 1.0


def test_the_larger_share_of_steps_and_time_counts():
    made = trainer(replace(RECIPE, steps=4, seconds=1e9))
    assert [step.progress for step in run(made)] == [0.25, 0.5, 0.75, 1.0]


def test_what_a_callback_raises_comes_through():
    made = trainer()

    def stop(step: Step) -> None:
        if step.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.run(stop)
    assert made.n_steps == 2


# ---- what cannot be learned from

class Steep(nn.Module):
    """Its loss is a number; the gradient of a square root at zero is not."""

    def __init__(self):
        super().__init__()
        self.zero, self.head = nn.Parameter(torch.zeros(3)), nn.Linear(3, V)

    def hidden(self, batch: Batch) -> torch.Tensor:
        return self.zero.sqrt().expand(*batch.token_ids.shape, 3)


def test_a_gradient_that_is_no_number_is_told_before_it_spoils_the_weights():
    made = trainer(net=Steep())
    before = weights(made)
    with pytest.raises(DataError, match=r"the gradient's norm of step 1 is (inf|nan); lower train.learning_rate \(0.01\) or raise train.warmup"):
        made.run()
    assert torch.equal(weights(made), before) and all(p.grad is None for p in made.model.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_told_with_its_step(value):
    made = trainer()
    made.step()
    made.step()
    with torch.no_grad():
        made.model.embed.token.weight[:] = value
    before = weights(made)
    with pytest.raises(DataError, match="the loss of step 3 is nan; lower train.learning_rate") as told:
        made.run()
    assert "\n" not in str(told.value) and torch.equal(weights(made).isnan(), before.isnan()) and made.n_steps == 2


def test_batches_that_ask_for_nothing_are_told():
    ids = torch.randint(V, (2, 5))
    nothing = Batch(ids, targets=torch.full_like(ids, IGNORE_INDEX))
    made = trainer(replace(RECIPE, grad_accum_steps=2), batches=cycle([nothing]))
    before = weights(made)
    with pytest.raises(DataError, match="the batches of step 1 ask for nothing"):
        made.step()
    assert torch.equal(weights(made), before)
    with pytest.raises(DataError, match="a batch without targets was drawn"):
        trainer(batches=cycle([Batch(ids)])).step()
    mixed = trainer(replace(RECIPE, grad_accum_steps=2), batches=cycle([nothing, draw(4, 1)])).step()      # half of them is enough
    alone = trainer(batches=cycle([draw(4, 1)])).step()
    assert mixed.loss == pytest.approx(alone.loss, rel=1e-6) and mixed.tokens == alone.tokens
