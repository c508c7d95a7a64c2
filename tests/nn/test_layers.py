"""Feed-forward nets against their equations: values, gradients, and what they do not keep for the backward."""
from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from hanok.nn.layers import MLP, GatedMLP, SquaredReLU, activation

B, T, D, F = 2, 3, 4, 10
KINDS = {
    "plain": (lambda: MLP(D, F, activation("gelu_tanh")), lambda net, x: net.down(net.activation(net.up(x)))),
    "squared": (lambda: MLP(D, F, SquaredReLU(), bias=False), lambda net, x: (x @ net.up.weight.T).clamp(min=0) ** 2 @ net.down.weight.T),
    "gated": (lambda: GatedMLP(D, F, activation("silu")), lambda net, x: net.down(net.activation(net.gate(x)) * net.up(x))),
}
kinds = pytest.mark.parametrize("kind", KINDS, ids=list(KINDS))


def net_of(kind, down=None):
    torch.manual_seed(0)
    make, equation = KINDS[kind]
    net = make()
    if down is not None:
        net.down = down
    return net, equation, torch.randn(B, T, D, requires_grad=True)


@kinds
@pytest.mark.parametrize("down", [None, lambda: nn.Sequential(nn.Linear(F, 2), nn.Linear(2, D))], ids=["linear", "of low rank"])
@pytest.mark.parametrize("frozen", [False, True])
def test_values_and_gradients_are_those_of_the_equation(kind, down, frozen):
    if kind == "squared" and down is not None:
        pytest.skip("its equation names the one matrix")
    net, equation, x = net_of(kind, down and down())
    if frozen:
        net.requires_grad_(False)
    wanted = [x, *(p for p in net.parameters() if p.requires_grad)]
    got, truth = net(x), equation(net, x)
    torch.testing.assert_close(got, truth)
    d = torch.randn_like(got)
    for ours, theirs in zip(torch.autograd.grad(got, wanted, d), torch.autograd.grad(truth, wanted, d)):
        torch.testing.assert_close(ours, theirs)


@kinds
def test_what_goes_down_is_not_kept_for_the_backward(kind):
    net, _, x = net_of(kind)
    kept = []
    net.down.register_forward_pre_hook(lambda module, args: kept.append(weakref.ref(args[0])))
    out = net(x)
    assert len(kept) == 1 and kept[0]() is None
    out.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


@kinds
def test_a_second_backward_is_the_first(kind):
    net, _, x = net_of(kind)
    out = net(x).sum()
    first = torch.autograd.grad(out, x, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(out, x)[0], first, rtol=0, atol=0)
