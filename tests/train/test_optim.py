"""Muon against a plain loop, which parameter goes to which optimizer, at which rate, and what decays."""
from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hanok.errors import ConfigError
from hanok.models import catalog
from hanok.train import muon
from hanok.train.muon import Muon, orthogonalised
from hanok.train.optim import hidden_matrices, optimizers, set_learning_rates
from hanok.train.recipe import TrainRecipe
from tiny import CONFIG, model
from zoo import BY_NAME

RECIPE = TrainRecipe(optimizer="adamw", learning_rate=1e-2, weight_decay=0.1)
MUON = replace(RECIPE, optimizer="muon")


def tiny(family: str, **sizes) -> nn.Module:
    """The family's tiny preset, or the zoo's model of it."""
    if family in BY_NAME:
        return catalog.FAMILIES[BY_NAME[family].family].build(BY_NAME[family].config)
    found = catalog.FAMILIES[family]
    return found.build(replace(found.presets["tiny"], vocab_size=97, **sizes))


# ---- Muon

def plain_muon(weights: list[Tensor], gradients: list[list[Tensor]], *, lr: float, momentum: float, weight_decay: float) -> list[Tensor]:
    """One matrix at a time, in fp64, as the papers write it."""
    moved = []
    for i, weight in enumerate(weights):
        w, mean = weight.detach().double(), torch.zeros_like(weight, dtype=torch.float64)
        for step in gradients:
            g = step[i].double()
            mean = momentum * mean + g
            x = g + momentum * mean
            x = x / x.norm()
            if x.size(0) > x.size(1):
                x = x.t()
            for _ in range(5):
                gram = x @ x.t()
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            if w.size(0) > w.size(1):
                x = x.t()
            w = w * (1 - lr * weight_decay) - lr * 0.2 * math.sqrt(max(w.shape)) * x
        moved.append(w.float())
    return moved


SHAPES = [(8, 8), (8, 24), (24, 8), (8, 24), (5, 3), (8, 8), (8, 8)]


@pytest.mark.parametrize("most", [1 << 24, 200, 1])
def test_muon_is_the_plain_loop(monkeypatch, most):
    """However many matrices go through an iteration together."""
    monkeypatch.setattr(muon, "MOST_NUMBERS", most)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    gradients = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(4)]
    weights = [nn.Parameter(w.clone()) for w in start]
    optimizer = Muon(weights, lr=0.02, momentum=0.9, weight_decay=0.3)
    for step in gradients:
        for w, g in zip(weights, step):
            w.grad = g.clone()
        optimizer.step()
    for got, truth in zip(weights, plain_muon(start, gradients, lr=0.02, momentum=0.9, weight_decay=0.3)):
        torch.testing.assert_close(got.detach(), truth, atol=2e-5, rtol=1e-4)


@given(st.integers(2, 24), st.integers(2, 24), st.integers(1, 3), st.integers(0, 99))
def test_singular_values_become_about_one_and_vectors_stay(rows, columns, n, seed):
    """Whatever is at least 1/50 of the norm ends between about 0.7 and 1.2."""
    rows, columns = sorted((rows, columns))
    random = torch.randn(n, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, s, v = torch.linalg.svd(random, full_matrices=False)
    s = s.clamp(min=s.norm(dim=-1, keepdim=True) / 50)
    out = orthogonalised((u * s[:, None] @ v).float() * 10.0 ** (seed % 7 - 3)).double()
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.65 and values.max() < 1.2
    turned = u.mT @ out @ v.mT                                                        # diagonal: the singular vectors are those of before
    assert (turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-3


def test_a_step_of_muon_is_as_long_as_one_of_adamw():
    """A root mean square of about 0.2 (arXiv:2502.16982, 2.2), whatever the shape."""
    for shape in ((64, 64), (32, 128), (128, 32)):
        w = nn.Parameter(torch.zeros(shape))
        w.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-4
        Muon([w], lr=1.0).step()
        assert 0.14 < w.detach().square().mean().sqrt() < 0.24


def test_a_zero_gradient_moves_nothing_and_a_missing_one_is_passed_over():
    still, absent = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    still.grad = torch.zeros(3, 4)
    optimizer = Muon([still, absent], lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(still.detach(), torch.full((3, 4), 0.95)) and torch.equal(absent.detach(), torch.ones(3, 4))
    assert absent not in optimizer.state or not optimizer.state[absent]


# ---- which parameter goes where

def is_hidden(net: nn.Module) -> dict[str, bool]:
    by_muon, rest = optimizers(net, MUON)
    assert type(by_muon) is Muon and type(rest) is torch.optim.AdamW
    groups = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in (by_muon, rest)]
    assert not groups[0] & groups[1]
    assert groups[0] | groups[1] == {id(p) for p in net.parameters()}                 # each exactly once
    return {name: id(p) in groups[0] for name, p in net.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3", "gpt2", "t5-1.0", "t5-1.1", "transformer", "bert-mlm"])
def test_a_transformers_projections_are_hidden_and_nothing_else_is(family):
    for name, hidden in is_hidden(tiny(family)).items():
        inside = name.endswith(("_proj.weight", "up.weight", "down.weight", "gate.weight"))
        assert hidden == inside, name


def test_recurrent_weights_embeddings_heads_and_single_rows_are_not_hidden():
    assert {name for name, hidden in is_hidden(tiny("bahdanau")).items() if hidden} == {
        "bridge.weight", "alignment.q_proj.weight", "alignment.k_proj.weight", "token_gates.weight", "context_gates.weight", "readout.weight"}


@pytest.mark.parametrize("family", ["lstm", "gru", "rnn", "cnn"])
def test_what_has_no_hidden_matrix_is_adamws_alone(family):
    net = tiny(family)
    only, = optimizers(net, MUON)
    assert type(only) is torch.optim.AdamW and not hidden_matrices(net)
    assert sum(len(group["params"]) for group in only.param_groups) == len(list(net.parameters()))


# ---- rates

def test_every_group_gets_its_share_of_its_own_peak():
    net = model(replace(CONFIG, tie_embeddings=False))
    made = optimizers(net, replace(MUON, muon_learning_rate=0.03, embedding_learning_rate=0.05))
    names = {id(p): name for name, p in net.named_parameters()}
    for share in (1.0, 0.5, 0.5, 0.0, 0.25):
        set_learning_rates(made, share)
        rates = {names[id(p)]: group["lr"] for optimizer in made for group in optimizer.param_groups for p in group["params"]}
        for name, rate in rates.items():
            outside = name.startswith(("embed", "head"))
            peak = 0.05 if outside else 1e-2 if "norm" in name else 0.03
            assert rate == pytest.approx(share * peak), name
    assert {group["peak"] for optimizer in made for group in optimizer.param_groups} == {0.03, 0.05, 1e-2}


def test_unless_told_otherwise_adamw_has_one_rate_and_embeddings_beside_muon_twelve_times_as_much():
    def rates(recipe):
        net = model(CONFIG)
        outer = {id(net.embed.token.weight), id(net.head.weight)}
        return {(group["lr"], id(p) in outer) for made in optimizers(net, recipe) for group in made.param_groups for p in group["params"]}

    assert rates(RECIPE) == {(1e-2, False), (1e-2, True)} and rates(MUON) == {(1e-2, False), (0.12, True)}


# ---- weight decay, frozen parameters

@pytest.mark.parametrize("recipe", [RECIPE, MUON], ids=["adamw", "muon"])
def test_only_matrices_decay(recipe):
    net = catalog.FAMILIES["gpt2"].build(BY_NAME["gpt2"].config)                      # it has biases
    made = optimizers(net, replace(recipe, learning_rate=0.5, embedding_learning_rate=0.5))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in made:
        optimizer.step()
    for name, p in net.named_parameters():
        assert torch.allclose(p, before[name] * (0.95 if p.ndim > 1 else 1.0)), name
    assert any(p.ndim == 1 and p.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize("recipe", [RECIPE, MUON], ids=["adamw", "muon"])
def test_what_is_frozen_is_in_no_group(recipe):
    net = model(CONFIG)
    frozen = [net.embed.token.weight, net.stack.blocks[0].ffn.up.weight, net.stack.final_norm.weight]
    for p in frozen:
        p.requires_grad_(False)
    taken = {id(p) for optimizer in optimizers(net, recipe) for group in optimizer.param_groups for p in group["params"]}
    assert taken == {id(p) for p in net.parameters() if p.requires_grad} and not taken & {id(p) for p in frozen}
    net.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter of this model is trained"):
        optimizers(net, recipe)
