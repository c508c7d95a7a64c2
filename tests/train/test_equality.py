"""The same numbers another way: a batch in pieces (1e-5), and a run that stopped and went on (to the bit)."""
from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from hanok.contracts import IGNORE_INDEX, Batch
from hanok.errors import ConfigError
from hanok.models import catalog
from hanok.train.optim import optimizers
from hanok.train.recipe import TrainRecipe
from hanok.train.trainer import Step, Trainer
from zoo import BY_NAME, V

RECIPE = TrainRecipe(steps=20, micro_batch_size=8, optimizer="adamw", learning_rate=5e-3, schedule="cosine", warmup_steps=4)
MUON = replace(RECIPE, optimizer="muon", schedule="wsd", label_smoothing=0.1, z_loss=1e-3)
SMALL = {"d_model": 24, "d_embed": 24, "d_hidden": 24, "vocab_size": V}


def build(name: str, dropout: float = 0.0) -> nn.Module:
    """The zoo's model of that name, or a small one of the family; with that dropout wherever it has one."""
    case = BY_NAME.get(name)
    family = catalog.FAMILIES[case.family if case else name]
    config = case.config if case else family.presets["tiny"]
    sizes = {} if case else {key: value for key, value in SMALL.items() if hasattr(config, key)}
    sizes |= {key: dropout for key in vars(config) if key.endswith("dropout")}
    torch.manual_seed(0)
    return family.build(replace(config, **sizes))


class Draw:
    """Batches of random rows of one text that repeats itself, in `parts` pieces; its place can be saved."""

    def __init__(self, reads_source: bool, masked: bool, parts: int = 1):
        self.reads_source, self.masked, self.parts, self.n = reads_source, masked, parts, 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        seed, part = divmod(self.n, self.parts)
        self.n += 1
        generator = torch.Generator().manual_seed(seed)
        ids = (torch.arange(13) * 3 + torch.randint(V, (8, 1), generator=generator)) % V
        targets = ids[:, 1:].clone()
        targets[torch.rand(targets.shape, generator=generator) < (0.85 if self.masked else 0.2)] = IGNORE_INDEX
        rows = slice(part * 8 // self.parts, (part + 1) * 8 // self.parts)
        source = {"source_ids": ids[rows, ::2], "source_keep": torch.ones(8, 7, dtype=torch.bool)[rows]} if self.reads_source else {}
        return Batch(ids[rows, :-1].contiguous(), targets=targets[rows].contiguous(), **source)


def trainer(name: str, recipe: TrainRecipe, parts: int = 1, dropout: float = 0.0) -> Trainer:
    net = build(name, dropout)
    recipe = replace(recipe, micro_batch_size=8 // parts, grad_accum_steps=parts)
    kind = catalog.FAMILIES[BY_NAME[name].family if name in BY_NAME else name].kind
    return Trainer(net, optimizers(net, recipe), Draw(kind == "encoder-decoder", kind == "encoder", parts), recipe, vocab_size=V)


def steps(made: Trainer, n: int) -> list[Step]:
    made.model.train()
    return [made.step() for _ in range(n)]


# ---- a batch in pieces

SPLITS = [*((name, RECIPE, (2, 8)) for name in ("qwen3", "gpt2", "t5-1.1", "bert-mlm")), ("qwen3", MUON, (4,)),
          *((name, replace(RECIPE, learning_rate=1e-2), (2, 8)) for name in ("lstm", "bahdanau"))]


@pytest.mark.parametrize(("name", "recipe", "splits"), SPLITS, ids=[f"{name}-{recipe.optimizer}" for name, recipe, _ in SPLITS])
def test_how_a_batch_is_split_changes_no_loss(name, recipe, splits):
    whole = steps(trainer(name, recipe), 20)
    assert whole[-1].loss < whole[0].loss - 0.01
    for parts in splits:
        pieces = steps(trainer(name, recipe, parts), 20)
        for one, many in zip(whole, pieces, strict=True):
            assert many.loss == pytest.approx(one.loss, rel=1e-5) and many.tokens == one.tokens


# ---- a run that goes on

FULL = replace(MUON, ema_decay=0.9, spike_factor=50.0, grad_accum_steps=2, clip=0.5)


def saved(made: Trainer) -> tuple[dict[str, torch.Tensor], dict, int]:
    tensors, plain = made.state()
    return {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(plain)), made.batches.n


def gone_on(made: Trainer, state) -> Trainer:
    tensors, plain, made.batches.n = state
    made.restore(tensors, plain)
    return made


@pytest.mark.parametrize(("name", "recipe", "k"), [
    *((name, FULL, 4) for name in ("qwen3", "gpt2", "t5-1.1", "bert-mlm", "lstm")), ("qwen3", FULL, 0), ("qwen3", FULL, 1), ("qwen3", RECIPE, 4)])
def test_a_run_that_stopped_goes_on_to_the_bit(name, recipe, k):
    """Dropout draws from torch's generator, which something else has used meanwhile."""
    made = trainer(name, recipe, parts=2, dropout=0.2)
    steps(made, k)
    state = saved(made)
    went_on = steps(made, 9 - k)
    torch.manual_seed(99)
    again = gone_on(trainer(name, recipe, parts=2, dropout=0.2), state)
    for p in again.model.parameters():
        assert p.grad is None
    for before, after in zip(went_on, steps(again, 9 - k), strict=True):
        assert (after.step, after.tokens, after.loss, after.grad_norm, after.learning_rate) == (
            before.step, before.tokens, before.loss, before.grad_norm, before.learning_rate)
    (end, plain, _), (end_again, plain_again, _) = saved(made), saved(again)
    assert list(end) == list(end_again) and all(torch.equal(end[name], end_again[name]) for name in end)
    assert {**plain, "seconds": 0} == {**plain_again, "seconds": 0}
    with made.averaged(), again.averaged():
        assert all(torch.equal(*pair) for pair in zip(made.model.parameters(), again.model.parameters()))


def test_the_generators_of_python_and_numpy_go_on_too():
    import random

    import numpy as np
    made = trainer("gpt2", RECIPE)
    random.gauss(0, 1), np.random.randn()                                             # both keep a second number for later
    state = saved(made)
    numbers = [(random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()) for _ in range(3)]
    gone_on(made, state)
    assert numbers == [(random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()) for _ in range(3)]


def test_parameters_without_a_gradient_have_no_state_and_need_none():
    """BERT's pooler learns nothing from masked words."""
    made = trainer("bert-pretraining", FULL)
    steps(made, 2)
    state = saved(made)
    assert {name for part in state[1]["optimizers"] for name in part["untouched"]} == {
        "pooler.0.weight", "pooler.0.bias", "next_sentence.weight", "next_sentence.bias"}
    again = gone_on(trainer("bert-pretraining", FULL), state)
    assert [step.loss for step in steps(made, 3)] == [step.loss for step in steps(again, 3)]


def changed(state, edit) -> tuple:
    tensors, plain = dict(state[0]), json.loads(json.dumps(state[1]))
    edit(tensors, plain)
    return tensors, plain, state[2]


NORM = "model/stack.blocks.1.residual.0.norm.weight"
DIFFERENCES = {
    "missing weight": (lambda t, p: t.pop(NORM), rf"the checkpoint has no {NORM}, which this run needs"),
    "missing mean": (lambda t, p: t.pop("ema/embed.token.weight"), "the checkpoint has no ema/embed.token.weight"),
    "missing state": (lambda t, p: t.pop("optimizer/1/embed.token.weight/exp_avg"), "no optimizer/1/embed.token.weight/exp_avg, which this run"),
    "missing random state": (lambda t, p: t.pop("random/torch"), "the checkpoint has no random/torch"),
    "left over": (lambda t, p: t.update({"model/more": torch.ones(2)}), "the checkpoint has model/more, for which this run has no place"),
    "misshapen weight": (lambda t, p: t.update({NORM: torch.ones(7)}), rf"{NORM} is \(7,\) in the checkpoint, \(32,\) in this run"),
    "misshapen state": (lambda t, p: t.update({"optimizer/0/stack.blocks.0.ffn.up.weight/momentum": torch.ones(3, 3)}), r"is \(3, 3\) in the checkp"),
    "other type": (lambda t, p: t.update({NORM: torch.ones(32, dtype=torch.bfloat16)}), "is torch.bfloat16 in the checkpoint, torch.float32 in this"),
    "other optimizer": (lambda t, p: p["optimizers"].pop(0), "the checkpoint's optimizers are AdamW, this run's are Muon and AdamW; resume with"),
    "no count": (lambda t, p: p.pop("tokens"), "the checkpoint does not tell its tokens"),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_the_first_difference_is_named_and_nothing_is_changed(what):
    made = trainer("gpt2", FULL)
    steps(made, 2)
    edit, told = DIFFERENCES[what]
    other = changed(saved(made), edit)
    fresh = trainer("gpt2", FULL)
    before = saved(fresh)
    with pytest.raises(ConfigError, match=told) as error:
        fresh.restore(*other[:2])
    assert "\n" not in str(error.value)
    after = saved(fresh)
    assert after[1] == before[1] and list(after[0]) == list(before[0]) and all(torch.equal(after[0][name], before[0][name]) for name in before[0])


def test_the_state_of_adamw_does_not_fit_muon():
    made = trainer("gpt2", RECIPE)
    steps(made, 1)
    with pytest.raises(ConfigError, match="the checkpoint's optimizers are AdamW, this run's are Muon and AdamW"):
        trainer("gpt2", MUON).restore(*saved(made)[:2])
