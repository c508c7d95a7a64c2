"""The chunked loss against F.cross_entropy over all logits: values, gradients, and the memory that it was made for.

N tokens, D d_model, V vocabulary.
"""
from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hanok.contracts import IGNORE_INDEX
from hanok.nn.layers import ScaledHead
from hanok.nn.loss import LEAST_ROWS, TILE, ByTiles, chunk_tokens, even_parts, for_compilers, loss_and_gradient, token_cross_entropy

B, T, D, V = 3, 7, 6, 19


def fill_in_head():
    return nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D), nn.Linear(D, V))


HEADS = {
    "plain": lambda: nn.Linear(D, V, bias=False), "biased": lambda: nn.Linear(D, V), "scaled": lambda: ScaledHead(nn.Linear(D, V), D ** -0.5),
    "fill-in": fill_in_head,
}
heads = pytest.mark.parametrize("head", HEADS, ids=list(HEADS))
chunks = pytest.mark.parametrize("chunk_size", [1, 4, B * T, 1000])


def setting(head="biased"):
    torch.manual_seed(0)
    hidden = torch.randn(B, T, D, requires_grad=True)
    targets = torch.randint(V, (B, T))
    targets[torch.rand(B, T) < 0.3] = IGNORE_INDEX
    return hidden, targets, HEADS[head]()


def whole(hidden, targets, head):
    return F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def whole_with_extras(hidden, targets, head, smoothing, z):
    logits, flat = head(hidden).flatten(0, 1), targets.flatten()
    smoothed = F.cross_entropy(logits, flat, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=smoothing)
    return smoothed + z * logits[flat != IGNORE_INDEX].logsumexp(-1).square().sum()


@heads
@chunks
@pytest.mark.parametrize(("smoothing", "z"), [(0.1, 0.0), (0.0, 0.3), (0.2, 0.05)])
def test_smoothing_and_z_loss_are_those_of_all_logits_at_once(head, chunk_size, smoothing, z):
    hidden, targets, module = setting(head)
    wanted = [hidden, *module.parameters()]
    expected = whole_with_extras(hidden, targets, module, smoothing, z)
    told = {"chunk_size": chunk_size, "label_smoothing": smoothing, "z_loss": z}
    total, n_targets = token_cross_entropy(hidden, targets, module, **told)
    assert n_targets == (targets != IGNORE_INDEX).sum()
    torch.testing.assert_close(total, expected)
    assert (total - whole(hidden, targets, module)).abs() > 0.05                      # and not those of the plain loss
    pairs = zip(torch.autograd.grad(total * 0.37, wanted), torch.autograd.grad(expected * 0.37, wanted))
    for got, truth in pairs:
        torch.testing.assert_close(got, truth, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(token_cross_entropy(hidden, targets, module, **told)[0], expected)


@pytest.mark.parametrize("told", [loss_and_gradient, for_compilers])
@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize(("smoothing", "z"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.3), (0.2, 0.05)])
def test_the_gradient_at_the_logits_is_autograds_and_nothing_at_spare_columns(told, spare, smoothing, z):
    """Whatever stands in a spare column."""
    torch.manual_seed(0)
    logits, targets = (7 * torch.randn(9, V + spare)).requires_grad_(), torch.randint(V, (9,))
    expected = whole_with_extras(logits[:, :V][None], targets[None], nn.Identity(), smoothing, z)
    losses, gradient = told(smoothing, z, targets, logits.detach().clone(), V)
    torch.testing.assert_close(losses.sum(), expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0], atol=1e-5, rtol=1e-4)
    half = told(smoothing, z, targets, logits.detach().bfloat16(), V)
    assert half[0].dtype == torch.float32 and half[1].dtype == torch.bfloat16 and half[1].shape == logits.shape


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_are_a_plain_matrix(biased, dtype):
    """As a GPU takes it; this processor can, too."""
    torch.manual_seed(0)
    head, x, targets = nn.Linear(D, V, bias=biased), torch.randn(12, D, requires_grad=True), torch.randint(V, (12,))
    weights = list(head.parameters())
    expected = whole(x[None], targets[None], head)
    way, d_x = ByTiles(head, weights, dtype), torch.empty_like(x)
    shapes: list[torch.Size] = []

    def of(targets, logits, n_classes):
        shapes.append(logits.shape)
        return loss_and_gradient(0.0, 0.0, targets, logits, n_classes)

    assert way.size(12, 40, 5) == LEAST_ROWS                                          # whatever is asked of these 40
    total = sum(way.chunk(x[rows].detach(), targets[rows], d_x[rows], of) for rows in (slice(0, 5), slice(5, 12)))
    assert shapes == [(LEAST_ROWS, TILE)] * 2
    near = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.03}
    torch.testing.assert_close(total, expected, **near)
    for got, truth in zip([d_x, *way.gradients()], torch.autograd.grad(expected, [x, *weights])):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, truth, **near)


def test_tiles_meet_few_sizes():
    """At most seven, whatever is asked of a batch: torch.compile's limit is eight."""
    way = ByTiles(nn.Linear(4, 8, bias=False), [torch.randn(8, 4)], torch.float32)
    size, seen = way.size(1, 16384, 2670), set()

    def of(targets, logits, n_classes):
        seen.add(len(logits))
        return logits[:, 0], logits

    assert size == 2560
    for n in range(1, size + 1, 37):
        way.chunk(torch.randn(n, 4), torch.zeros(n, dtype=torch.long), torch.empty(n, 4), of)
    assert seen == {512, 1024, 2048, 2560}
    seen.clear()
    assert way.size(1, 16384, 16384) == 16384
    for n in range(1, 16385, 251):
        way.chunk(torch.randn(n, 4), torch.zeros(n, dtype=torch.long), torch.empty(n, 4), of)
    assert len(seen) == 6


@pytest.mark.parametrize(("n", "most", "size"), [(0, 4, 4), (3, 4, 3), (8, 4, 4), (9, 4, 3), (1024, 333, 256), (16384, 2670, 2341)])
def test_parts_are_even_and_as_few_as_there_can_be(n, most, size):
    assert even_parts(n, most) == size <= most


def test_who_has_counted_the_targets_is_believed():
    hidden, targets, head = setting()
    n = int((targets != IGNORE_INDEX).sum())
    total, told = token_cross_entropy(hidden, targets, head, n_targets=n)
    assert told == n and total.item() == token_cross_entropy(hidden, targets, head)[0].item()


def test_what_is_asked_nothing_meets_no_head():
    """BERT asks about 15 % of its positions."""
    hidden, targets, head = setting()
    rows = []
    head.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    token_cross_entropy(hidden, targets, head, chunk_size=4)[0].backward()
    assert sum(rows) == (targets != IGNORE_INDEX).sum() < targets.numel()
    ignored = targets == IGNORE_INDEX
    assert not hidden.grad[ignored].any() and hidden.grad[~ignored].any(-1).all()


def test_large_logits_are_no_trouble():
    head = nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        head.weight[:] = torch.tensor([[1e4], [0.0], [-1e4]])
    hidden = torch.ones(1, 2, 1, requires_grad=True)
    total, _ = token_cross_entropy(hidden, torch.tensor([[0, 2]]), head, z_loss=1e-6)
    assert total.item() == pytest.approx(2e4 + 2 * 1e-6 * 1e8, rel=1e-6)
    total.backward()
    assert head.weight.grad.isfinite().all()


@heads
@chunks
def test_value_and_gradients_are_those_of_all_logits_at_once(head, chunk_size):
    hidden, targets, module = setting(head)
    wanted = [hidden, *module.parameters()]
    expected = whole(hidden, targets, module)
    total, n_targets = token_cross_entropy(hidden, targets, module, chunk_size=chunk_size)
    assert n_targets == (targets != IGNORE_INDEX).sum() and total.dtype == torch.float32
    torch.testing.assert_close(total, expected)
    pairs = zip(torch.autograd.grad(total * 0.37, wanted), torch.autograd.grad(expected * 0.37, wanted))
    for got, truth in pairs:
        torch.testing.assert_close(got, truth, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        quiet, _ = token_cross_entropy(hidden, targets, module, chunk_size=chunk_size)
    torch.testing.assert_close(quiet, expected)
    assert not quiet.requires_grad


@chunks
def test_where_nothing_is_asked_nothing_is_learned(chunk_size):
    hidden, targets, head = setting()
    total, n_targets = token_cross_entropy(hidden, torch.full_like(targets, IGNORE_INDEX), head, chunk_size=chunk_size)
    assert (total.item(), n_targets) == (0.0, 0)
    total.backward()
    assert not hidden.grad.any() and not head.weight.grad.any() and not head.bias.grad.any()


def test_gradients_are_given_once():
    """As by any other operation of torch: what was kept for the backward is gone after it, and there is no second derivative to be had."""
    hidden, targets, head = setting()
    total, _ = token_cross_entropy(hidden, targets, head)
    total.backward()
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()
    total, _ = token_cross_entropy(hidden, targets, head)
    gradient, = torch.autograd.grad(total * torch.ones((), requires_grad=True), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_micro_batches_add_up():
    hidden, targets, head = setting()
    token_cross_entropy(hidden, targets, head)[0].backward()
    expected, head.weight.grad = head.weight.grad, None
    parts = [token_cross_entropy(hidden[b:b + 1], targets[b:b + 1], head) for b in range(B)]
    assert sum(n for _, n in parts) == (targets != IGNORE_INDEX).sum()
    for total, _ in parts:
        total.backward()
    torch.testing.assert_close(head.weight.grad, expected)


@pytest.mark.parametrize("frozen", ["head", "body", "bias"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(frozen):
    hidden, targets, head = setting()
    if frozen == "body":
        hidden = hidden.detach()
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(frozen != "head" and name != frozen)
    total, _ = token_cross_entropy(hidden, targets, head, chunk_size=4)
    total.backward()
    twin, full = nn.Linear(D, V), hidden.detach().requires_grad_()
    twin.load_state_dict(head.state_dict())
    whole(full, targets, twin).backward()
    for got, truth in ((hidden, full), (head.weight, twin.weight), (head.bias, twin.bias)):
        assert (got.grad is None) == (not got.requires_grad)
        if got.requires_grad:
            torch.testing.assert_close(got.grad, truth.grad, atol=1e-5, rtol=1e-4)


def test_a_tied_matrix_gathers_both_of_its_gradients():
    torch.manual_seed(1)
    token, ids, targets = nn.Embedding(V, D), torch.randint(V, (B, T)), torch.randint(V, (B, T))
    head = nn.Linear(D, V, bias=False)
    head.weight = token.weight
    token_cross_entropy(token(ids), targets, head, chunk_size=5)[0].backward()
    got, token.weight.grad = token.weight.grad, None
    whole(token(ids), targets, head).backward()
    torch.testing.assert_close(got, token.weight.grad, atol=1e-5, rtol=1e-4)


def test_half_precision_sums_in_fp32():
    hidden, targets, head = setting()
    half, module = hidden.detach().bfloat16().requires_grad_(), head.bfloat16()
    total, _ = token_cross_entropy(half, targets, module, chunk_size=4)
    assert total.dtype == torch.float32
    expected = F.cross_entropy(module(half).flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    torch.testing.assert_close(total, expected)
    total.backward()
    assert half.grad.dtype == module.weight.grad.dtype == torch.bfloat16


def test_hidden_vectors_need_not_lie_in_a_row():
    hidden, targets, head = setting()
    strided = hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    token_cross_entropy(strided, targets, head, chunk_size=4)[0].backward()
    token_cross_entropy(hidden, targets, head, chunk_size=4)[0].backward()
    torch.testing.assert_close(strided.grad, hidden.grad)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gave."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))])
        return out


class Kept:
    """A tensor that autograd holds for the backward."""
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()

    def __init__(self, tensor):
        self.tensor = tensor
        Kept.alive.add(self)


N_MANY, V_LARGE, CHUNK = 256, 512, 16


@pytest.mark.parametrize("extras", [{}, {"label_smoothing": 0.1, "z_loss": 1e-4}], ids=["plain", "extras"])
@pytest.mark.parametrize("what", ["all", "head alone", "body alone"])
def test_the_logits_are_never_held_whole(what, extras):
    """N x V is 131,072 numbers here. No tensor is half as large, and what is kept for the backward is the gradients alone."""
    torch.manual_seed(0)
    hidden, targets, head = torch.randn(1, N_MANY, D), torch.randint(V_LARGE, (1, N_MANY)), nn.Linear(D, V_LARGE)
    hidden.requires_grad_(what != "head alone")
    head.requires_grad_(what != "body alone")
    rows = []
    head.register_forward_hook(lambda module, args, out: rows.append(out.numel() // V_LARGE))
    limit = max(CHUNK * V_LARGE, V_LARGE * D, N_MANY * D)
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        total, _ = token_cross_entropy(hidden, targets, head, chunk_size=CHUNK, **extras)
        held = sum(kept.tensor.numel() for kept in Kept.alive)
        total.backward()
    assert rows == [CHUNK] * (N_MANY // CHUNK)
    assert largest.numel <= limit < N_MANY * V_LARGE / 8
    assert held <= N_MANY * D + V_LARGE * (D + 1)
    assert not list(Kept.alive)                                                       # the backward lets go of all of it


def test_the_plain_loss_would_fail_that_test():
    hidden, targets, head = torch.randn(1, N_MANY, D, requires_grad=True), torch.randint(V_LARGE, (1, N_MANY)), nn.Linear(D, V_LARGE)
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        total = whole(hidden, targets, head)
        held = sum(kept.tensor.numel() for kept in Kept.alive)
    assert largest.numel >= N_MANY * V_LARGE and held >= N_MANY * V_LARGE and total.requires_grad


def test_scoring_holds_one_chunk_as_well():
    hidden, targets, head = torch.randn(1, N_MANY, D), torch.randint(V_LARGE, (1, N_MANY)), nn.Linear(D, V_LARGE)
    with torch.inference_mode(), Largest() as largest:
        token_cross_entropy(hidden, targets, head, chunk_size=CHUNK)
    assert largest.numel <= CHUNK * V_LARGE


@pytest.mark.parametrize(("vocab_size", "expected"), [(97, 4096), (8192, 2048), (32_768, 512), (262_144, 64), (10 ** 7, 64)])
def test_a_chunk_is_about_64_mib(vocab_size, expected):
    assert chunk_tokens(vocab_size) == expected


def test_a_gpu_has_larger_ones():
    assert [chunk_tokens(n, on_gpu=True) for n in (97, 50_257, 10 ** 7)] == [16384, 2670, LEAST_ROWS]


def test_a_matrix_on_a_cpu_takes_the_fast_product_and_sums_in_place():
    """No V x D sum is made beside the first: what chunks add, they add in place."""
    hidden, targets, head = setting("plain")
    calls = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    with Calls():
        token_cross_entropy(hidden, targets, head, chunk_size=4)[0].backward()
    n_chunks = -(-int((targets != IGNORE_INDEX).sum()) // 4)
    assert n_chunks > 2 and sum("_linear_pointwise" in name for name in calls) == n_chunks
    assert sum("addmm_" in name for name in calls) == n_chunks - 1


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_part_of_a_head_learns_nothing(frozen):
    hidden, targets, head = setting()
    getattr(head, frozen).requires_grad_(False)
    token_cross_entropy(hidden, targets, head, chunk_size=4)[0].backward()
    assert getattr(head, frozen).grad is None
    other = {"weight": "bias", "bias": "weight"}[frozen]
    expected = torch.autograd.grad(whole(hidden, targets, head), getattr(head, other))[0]
    torch.testing.assert_close(getattr(head, other).grad, expected)
