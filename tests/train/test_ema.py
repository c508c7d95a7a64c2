"""The running mean of the weights: its numbers, and that it is there for evaluation and gone afterwards."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from hanok.contracts import Batch
from hanok.train.ema import Average
from hanok.train.optim import optimizers
from hanok.train.recipe import TrainRecipe
from hanok.train.trainer import Trainer
from tiny import CONFIG, model

RECIPE = TrainRecipe(steps=12, optimizer="adamw", learning_rate=1e-2, warmup_steps=2, ema_decay=0.5)


def trainer(recipe: TrainRecipe = RECIPE) -> Trainer:
    net = model(CONFIG)
    generator = torch.Generator().manual_seed(0)

    def batches():
        while True:
            ids = torch.randint(300, (4, 13), generator=generator)
            yield Batch(ids[:, :-1], targets=ids[:, 1:].contiguous())

    return Trainer(net, optimizers(net, recipe), batches(), recipe, vocab_size=300)


def weights(net: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


def test_the_mean_is_the_formula_and_only_in_place_inside():
    made, plain = trainer(), trainer(replace(RECIPE, ema_decay=0.0))
    mean = weights(made.model)
    for n in range(1, 13):
        made.step(), plain.step()
        decay = min(0.5, (1 + n) / (10 + n))
        mean = decay * mean + (1 - decay) * weights(made.model)
    assert decay == 0.5 > 2 / 11                                                      # both of the decays were met
    last = weights(made.model)
    assert torch.equal(last, weights(plain.model))                                    # it does not touch the training
    with made.averaged():
        torch.testing.assert_close(weights(made.model), mean)
        assert made.model.head.weight is made.model.embed.token.weight                # tied as before
    assert torch.equal(weights(made.model), last) and not torch.equal(last, mean)
    made.step(), plain.step()
    assert torch.equal(weights(made.model), weights(plain.model))


def test_weights_come_back_after_an_error_too():
    made = trainer()
    made.step()
    last = weights(made.model)
    with pytest.raises(KeyError), made.averaged():
        raise KeyError
    assert torch.equal(weights(made.model), last)


def test_without_a_mean_the_weights_are_the_last_ones():
    made = trainer(replace(RECIPE, ema_decay=0.0))
    made.step()
    last = weights(made.model)
    with made.averaged():
        assert torch.equal(weights(made.model), last)


def test_what_is_frozen_has_no_mean():
    net = model(CONFIG)
    net.embed.requires_grad_(False)
    average = Average(net, 0.9)
    assert set(average.weights) == {name for name, p in net.named_parameters() if p.requires_grad} and "embed.token.weight" not in average.weights
