"""What an update costs: counted on the meta device from the graph that the trainer really runs, and timed on this machine by a probe of seconds.

A count knows no machine: FLOPs of products, bytes that kernels read and write, kernels started, bytes of tensors alive at the worst moment. Three
coefficients turn it into time; they are fitted to a few real updates of small models, each beside a matrix product (sgemm) taken at the same moment.
"""
from __future__ import annotations

import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hanok import runtime
from hanok.bundle.bundle import empty_model
from hanok.contracts import IGNORE_INDEX, Batch
from hanok.data.objectives import Rows, apart, causal
from hanok.models.family import Family
from hanok.nn.loss import chunk_tokens, token_cross_entropy
from hanok.train.carry import Carry, carries
from hanok.train.muon import Muon
from hanok.train.optim import optimizers
from hanok.train.recipe import TrainRecipe
from hanok.train.trainer import Trainer

REFERENCE = 1024, 768, 3072
"""The product whose rate a machine is judged by, in fp32."""
MASKED = 0.15
"""Share of the positions that a masked objective asks for."""
LARGE, FRESH = 32 << 20, 3
"""Bytes from which the allocator asks the system for memory each time, and how many times more these cost for it: pages arrive one by one, zeroed."""
NEAR, FAR = 4 << 20, 3
"""Bytes that one kernel may touch before they lie outside a core's own cache, and how many times more they cost from twice as many on."""


@dataclass(frozen=True)
class Cost:
    """What one update is, on any machine."""
    flops: float = 0.0                       # of products, attention and recurrences
    moved: float = 0.0                       # bytes that kernels read and write
    kernels: float = 0.0                     # started
    peak: float = 0.0                        # bytes alive at the worst moment: weights, gradients, optimizer's state, activations, logits
    standing: float = 0.0                    # those of the first three, and of averaged weights, which are fp32 whatever products are made in

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.moved + other.moved, self.kernels + other.kernels, max(self.peak, other.peak),
                    max(self.standing, other.standing))

    def __mul__(self, times: float) -> Cost:
        """So much of it; what is alive at once stays."""
        return replace(self, flops=self.flops * times, moved=self.moved * times, kernels=self.kernels * times)


@dataclass(frozen=True)
class Shape:
    """What a model is given in one forward."""
    n_rows: int
    seq_len: int                             # tokens a row
    document_tokens: float = math.inf        # of a document, in the mean: rows that hold several take another path
    separate: bool = True                    # whether documents are kept apart

    @property
    def mixed(self) -> float:
        """The share of the batches in which a row holds two documents."""
        return 1 - (1 - min(1.0, self.seq_len / self.document_tokens)) ** self.n_rows if self.separate else 0.0


# ---- counting ------------------------------------------------------------------------------------------------
VIEWS = set("view _unsafe_view t transpose expand detach unsqueeze squeeze select split unsafe_split split_with_sizes slice alias permute unbind "
            "as_strided empty empty_like new_empty new_empty_strided empty_strided lift_fresh".split())
PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
"""Which of its arguments a product multiplies."""


class _Attention(torch.autograd.Function):
    """What the fast kernel keeps: queries, keys, values, the result, and a number a row."""
    @staticmethod
    def forward(ctx, q, k, v, tally):
        out, norms = torch.empty_like(q), q.new_empty(q.shape[:-1])
        ctx.save_for_backward(q, k, v, out, norms)
        ctx.told = tally, 2 * 2 * q.numel() * k.size(-2)
        tally.kernel(ctx.told[1], q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, *grads):
        q, k, v, out, _ = ctx.saved_tensors
        tally, flops = ctx.told
        tally.kernel(2.5 * flops, q, k, v, out, q, k, v)                              # the scores once more, and four products
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


class _LSTM(torch.autograd.Function):
    """oneDNN's layer: all steps in one kernel. It keeps a workspace of gates and cells, about 7 D a token."""
    @staticmethod
    def forward(ctx, x, tally, d_hidden, *weights):
        out, workspace = x.new_empty(*x.shape[:-1], d_hidden), x.new_empty(*x.shape[:-1], 7 * d_hidden)
        ctx.save_for_backward(x, out, workspace, *weights)
        ctx.told = tally, 2 * math.prod(x.shape[:-1]) * sum(w.numel() for w in weights)
        tally.kernel(ctx.told[1], x, out, workspace, kernels=x.size(1))
        return out

    @staticmethod
    def backward(ctx, *grads):
        x, out, workspace, *weights = ctx.saved_tensors
        tally, flops = ctx.told
        tally.kernel(2 * flops, x, x, out, workspace, *weights, kernels=2 * x.size(1))
        return torch.empty_like(x), None, None, *(torch.empty_like(w) for w in weights)


class _Instead(TorchFunctionMode):
    """On the meta device, composite functions take the slow path; here stands what the CPU's kernels do."""
    def __init__(self, tally: Tally):
        super().__init__()
        self.tally = tally

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            masked = len(args) > 3 and args[3] is not None
            if masked and args[3].dtype == torch.bool:
                self.tally.keep(torch.zeros(args[3].shape, device="meta"))            # becomes numbers that are added
            return _Attention.apply(*args[:3], self.tally)
        if function is torch._VF.lstm and isinstance(args[1], tuple | list) and self.tally.fused:
            x, (h, c), weights, has_bias = args[:4]
            for layer in range(args[4]):
                x = _LSTM.apply(x, self.tally, h.size(-1), *weights[layer * len(weights) // args[4]:(layer + 1) * len(weights) // args[4]])
            return x, h.clone(), c.clone()
        return function(*args, **kwargs)


class Tally(TorchDispatchMode):
    """Adds up what runs inside."""

    def __init__(self, fused: bool = True):
        super().__init__()
        self.fused = fused
        self.flops = self.moved = self.kernels = self.alive = self.peak = 0.0
        self.storages: dict[int, int] = {}
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name not in VIEWS and function.namespace == "aten":
            a, b = PRODUCTS.get(name, (0, 0))
            self.kernel(2 * args[a].numel() * args[b].size(-1) if b else 0, *_tensors(() if b else args), *_tensors(out))
        for tensor in _tensors(out):
            self.see(tensor)
        return out

    def kernel(self, flops: float, *tensors: Tensor, kernels: float = 1) -> None:
        self.flops, self.kernels = self.flops + flops, self.kernels + kernels
        touched = sum(4 * tensor.numel() for tensor in tensors)
        outside = min(1.0, math.log2(max(1.0, touched / kernels / NEAR)))
        self.moved += touched * (1 + (FAR - 1) * outside)

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.storages:
            self.storages[key] = storage.nbytes()
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            if storage.nbytes() >= LARGE:
                self.moved += FRESH * storage.nbytes()
            weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        self.alive -= self.storages.pop(key)

    def keep(self, tensor: Tensor) -> None:
        """Something that lives until the update's end."""
        self.kept.append(tensor)


def _tensors(tree: Any) -> Iterator[Tensor]:
    for part in tree if isinstance(tree, tuple | list) else (tree,):
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, tuple | list):
            yield from _tensors(part)


def count(family: Family, config: Any, recipe: TrainRecipe, shape: Shape) -> Cost:
    """One update of that model, forward to optimizer, in the mean over batches. ConfigError where it cannot be built."""
    cost, share = Cost(), shape.mixed if family.kind != "encoder-decoder" else 0.0    # pairs have a row of their own
    for part, mixed in ((1 - share, False), (share, True)):
        if part > 0.001:
            cost = cost + count_one(family, config, recipe, shape, mixed) * part
    return cost


def count_one(family: Family, config: Any, recipe: TrainRecipe, shape: Shape, mixed: bool) -> Cost:
    """As `count`, of batches in which some rows hold several documents, or none does.

    A recurrence that runs step by step is counted on rows of 8 and of 16 tokens: all but the number of steps is the same for as many tokens. Of many
    layers, and of many forwards an update, a few are counted, and the others are as the last.
    """
    if recipe.grad_accum_steps > 2:
        one, two = (count_one(family, config, replace(recipe, grad_accum_steps=n), shape, mixed) for n in (1, 2))
        return replace(further(one, two, recipe.grad_accum_steps - 1), peak=two.peak)
    if getattr(config, "n_layers", 0) > 4 and family.kind != "encoder-decoder":
        two, four = (count_one(family, replace(config, n_layers=n), recipe, shape, mixed) for n in (2, 4))
        return further(two, four, (config.n_layers - 2) / 2)
    model = empty_model(family, config)
    layers = [part for part in model.modules() if isinstance(part, nn.RNNBase)]
    by_steps = bool(layers) and (mixed or not isinstance(layers[0], nn.LSTM))
    if not by_steps or shape.seq_len <= 16:
        return run_on_meta(model, family, config, recipe, shape, mixed)
    short, long = (run_on_meta(model, family, config, recipe, replace(shape, n_rows=-(-shape.n_rows * shape.seq_len // t), seq_len=t), mixed)
                   for t in (8, 16))
    return replace(long, kernels=long.kernels + (shape.seq_len - 16) / 8 * (long.kernels - short.kernels))


def further(begin: Cost, then: Cost, steps: float) -> Cost:
    """On the line through two costs, so many times their distance from the first."""
    return Cost(*(a + steps * (b - a) for a, b in zip(astuple(begin), astuple(then))))


def run_on_meta(model: Any, family: Family, config: Any, recipe: TrainRecipe, shape: Shape, mixed: bool) -> Cost:
    """One update without memory or numbers."""
    made = optimizers(model, recipe)
    parameters = list(model.parameters())
    n_weights, tally = sum(p.numel() for p in parameters), Tally(fused=not mixed)
    head = nn.Sequential(model.head)                                                  # no plain matrix: the CPU's own products know no meta device
    with torch.device("meta"), tally, _Instead(tally):
        rows = torch.zeros(shape.n_rows, shape.seq_len, dtype=torch.long)
        seen = Batch(rows, source_ids=rows if family.kind == "encoder-decoder" else None,
                     document_ids=rows if mixed and not hasattr(model, "layers") else None)
        n_asked = max(1, round((MASKED if family.objective == "masked" else 1) * rows.numel()))
        for _ in range(recipe.grad_accum_steps):
            loss, _ = token_cross_entropy(model.hidden(seen), rows, head, chunk_size=chunk_tokens(config.vocab_size), n_targets=n_asked,
                                          label_smoothing=recipe.label_smoothing, z_loss=recipe.z_loss)
            loss.backward()
            del loss
            tally.kept.clear()
        peak = tally.peak
        for optimizer in made:
            if isinstance(optimizer, Muon):
                optimizer.step()
                peak = max(peak, tally.peak - state_bytes([optimizer]))
            else:
                tally.moved += 7 * 4 * sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    tally.moved += 4 * n_weights * (1 + 3 * bool(recipe.ema_decay))                   # the gradients' norm, and the averaged weights
    standing = state_bytes(made) + 4 * n_weights * (1 + bool(recipe.ema_decay))
    return Cost(tally.flops, tally.moved, tally.kernels + len(parameters) ** 0.5, peak + standing, standing + 4 * n_weights)


def state_bytes(made: Sequence[torch.optim.Optimizer]) -> int:
    """What optimizers remember: Muon a number a weight, AdamW two."""
    return sum(4 * (1 if isinstance(optimizer, Muon) else 2) * p.numel() for optimizer in made for group in optimizer.param_groups
               for p in group["params"])


# ---- timing --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Machine:
    """What work costs here. The coefficients are in FLOPs of the reference product, so that they hold when the machine's clock does not."""
    sgemm: float                             # FLOP/s of the reference product
    product: float                           # a FLOP of a model's products
    byte: float                              # a byte read or written
    kernel: float                            # a kernel's start
    memory: int                              # bytes that there are
    device: str = "cpu"
    resident: int = 0                        # bytes that the process held before the run: Python, torch and what they loaded
    begin: float = 0.0                       # seconds that a run's first update takes besides, where torch.compile works

    def seconds(self, cost: Cost) -> float:
        """Of an update of that cost."""
        return (self.product * cost.flops + self.byte * cost.moved + self.kernel * cost.kernels) / self.sgemm


USUAL = {"cpu": (0.89, 6.15, 1.07e6), "cuda": (0.07, 0.5, 4.5e8)}
"""Product, byte, kernel: the best for 39 models of qwen3, gpt and lstm together on a 2-core AMD EPYC with AVX-512; near those of three qwen3 on an
H100 in bf16 (docs/log.md). A probe begins from them."""
TRUST = 0.02
"""How much a coefficient's distance from the usual one weighs beside an update's: squares of logarithms."""


def sgemm_rate(device: torch.device | str = "cpu", repeats: int = 3) -> float:
    """FLOP/s of the reference product, the best of a few."""
    rows, inner, columns = REFERENCE
    a, b = torch.randn(rows, inner, device=device), torch.randn(inner, columns, device=device)
    return 2 * rows * inner * columns / min(timed(lambda: a @ b, device) for _ in range(repeats + 1))


def timed(work: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Seconds of a call."""
    begin = time.perf_counter()
    work()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def fit(costs: Sequence[Cost], works: Sequence[float], device: str = "cpu") -> tuple[float, float, float]:
    """Coefficients under which `costs` are `works` (seconds times the reference's FLOP/s at that moment), near the usual ones where these leave it
    open: least squares of logarithms, by Gauss and Newton."""
    table = np.array([(cost.flops, cost.moved, cost.kernels) for cost in costs])
    usual = np.log(USUAL[device])
    told, weight = usual.copy(), math.sqrt(TRUST)
    for _ in range(50):
        parts = table * np.exp(told)
        total = parts.sum(1, keepdims=True)
        wrong = np.concatenate([np.log(total[:, 0]) - np.log(works), weight * (told - usual)])
        slope = np.vstack([parts / total, weight * np.eye(3)])
        told = told - np.clip(np.linalg.lstsq(slope, wrong, rcond=None)[0], -1, 1)
    product, byte, kernel = np.exp(told).tolist()
    return product, byte, kernel


def batches(vocab_size: int, shape: Shape, masked: bool = False, carried: bool = False, seed: int = 0) -> Iterator[Batch]:
    """Endless batches of random tokens whose documents are as long as those of the text, as the loaders give them."""
    random = np.random.Generator(np.random.PCG64(seed))
    size, ends = (shape.n_rows, shape.seq_len + 1), min(1.0, 1 / shape.document_tokens)
    while True:
        ids = torch.from_numpy(random.integers(vocab_size, size=size))
        documents = torch.from_numpy((random.random(size) < ends).cumsum(1))
        if masked:
            targets = ids[:, 1:].masked_fill(torch.from_numpy(random.random((shape.n_rows, shape.seq_len)) > MASKED), IGNORE_INDEX)
            yield Batch(ids[:, :-1].contiguous(), targets=targets, **apart(documents[:, :-1].contiguous() if shape.separate else None))
        else:
            batch = causal(Rows(ids, documents), separate=shape.separate or carried)
            yield replace(batch, document_ids=documents[:, :-1].contiguous()) if carried else batch


def works_of(family: Family, config: Any, recipe: TrainRecipe, shape: Shape, n_steps: int, device: torch.device) -> tuple[Cost, list[float], float]:
    """An update's cost; what each of a few real ones took in FLOPs of the reference product; and the seconds that compiling the first one took."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = family.build(config).to(device).train()
    carried = carries(model)
    drawn = batches(config.vocab_size, shape, family.objective == "masked", carried)
    trainer = Trainer(model, optimizers(model, recipe), drawn, recipe, vocab_size=config.vocab_size, device=device,
                      hidden=Carry(model, recipe.grad_accum_steps) if carried else None)
    first = timed(trainer.step, device)
    for _ in range(2 if device.type == "cuda" else 0):
        trainer.step()
    works, times = [], []
    for _ in range(n_steps):
        rate = sgemm_rate(device, 1)
        times.append(timed(trainer.step, device))
        works.append(rate * times[-1])
    compiling = max(0.0, first - statistics.median(times)) if trainer.compiles else 0.0
    return count(family, config, recipe, shape), works, compiling


def memory_of(device: torch.device) -> int:
    """Bytes of the device's memory; of a CPU, what this process may have of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return runtime.memory_bytes()


def here(memory: int | None = None) -> Machine:
    """This machine unprobed: its memory, and the usual coefficients."""
    device = runtime.device()
    return Machine(0.0, *USUAL[device.type], memory or memory_of(device), device.type, runtime.peak_memory_bytes())


def probe(family: Family, samples: Sequence[tuple[Any, Shape]], recipe: TrainRecipe, *, memory: int | None = None, n_steps: int = 3) -> Machine:
    """This machine, from real updates of small models of the family: a config and its batches' shape each. Some seconds."""
    device, machine = runtime.device(), here(memory)
    costs, works, begin = [], [], 0.0
    for config, shape in samples:
        cost, taken, begin = works_of(family, config, recipe, shape, n_steps, device)      # of the last: the first one loads the compiler, too
        costs.append(cost)
        works.append(statistics.median(taken))
    product, byte, kernel = fit(costs, works, device.type)
    return replace(machine, sgemm=sgemm_rate(device, 5), product=product, byte=byte, kernel=kernel, begin=begin)
