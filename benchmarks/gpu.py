"""On an NVIDIA GPU: a training step against `transformers`, both in bf16 and compiled; document masks as blocks against dense ones; the time dial.

    python benchmarks/gpu.py [--pairs 10] [--rows 16] [--seq-len 1024]
    python benchmarks/gpu.py --documents [--lengths 256 1024 4096] [--tokens 32768] [--document 600]
    python benchmarks/gpu.py --dial [--minutes 1] [--data FILE_OR_FOLDER...]

The first two need no data. The first is GPT-2 124M without dropout; 6N tokens/s is set beside the rate of a large bf16 product taken at the same
moment. The second is attention alone, 12 layers of 12 heads of 64, forward and backward: flex attention, SDPA under a dense mask, and SDPA of one
document as a floor. The third is `hanok pretrain --minutes`: what its plan said, and what then was (without --data, of the standard library).
"""
from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import seconds
from hanok.contracts import Batch
from hanok.data.sources import standard_library
from hanok.nn.attention import attend
from hanok.nn.masks import Causal, Documents, blocks, dense, span_of
from hanok.train.dial import Choice
from hanok.train.expected import survey
from hanok.train.measure import here
from hanok.train.pretrain import Pretraining, prepare
from training_step import SIDES, batch_of


def waited(work: Callable[[], object]) -> float:
    """Seconds of a call and of all that it started."""
    torch.cuda.synchronize()
    return seconds(lambda: (work(), torch.cuda.synchronize()))


def product_rate() -> float:
    """FLOP/s of an 8192 x 8192 x 8192 bf16 product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a @ b
    return 2 * 8192 ** 3 / statistics.median(waited(lambda: a @ b) for _ in range(5))


# ---- a step ----------------------------------------------------------------------------------------------------
def steps(n_pairs: int, rows: int, seq_len: int) -> None:
    """Both sides in turn, a product beside each pair; each side's peak is told over what lay there before it."""
    batch, products = batch_of(rows, seq_len), []
    sides: list[tuple[Callable[[], object], int]] = []
    rates: list[list[float]] = [[], []]
    for name, make in SIDES.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step, n = make(batch, "cuda")
        first = [waited(step) for _ in range(3)][0]
        print(f"{name}: the first step takes {first:.1f} s; peak {(torch.cuda.max_memory_allocated() - before) / 2 ** 20:.0f} MiB", flush=True)
        sides.append((step, n))
    for _ in range(n_pairs):
        products.append(product_rate())
        for told, (step, _) in zip(rates, sides):
            told.append(rows * seq_len / statistics.median(waited(step) for _ in range(3)))
    print(f"GPT-2 124M, {rows} x {seq_len}, bf16: ours {statistics.median(rates[0]) / 1000:.0f}, theirs {statistics.median(rates[1]) / 1000:.0f} "
          f"ktokens/s, {statistics.median(a / b for a, b in zip(*rates)):.2f}x in the median of {n_pairs} pairs")
    for name, told, (_, n) in zip(SIDES, rates, sides):
        share = statistics.median(6 * n * rate / product for rate, product in zip(told, products))
        print(f"  6N tokens/s, {name}: {share:.0%} of the bf16 product's {statistics.median(products) / 1e12:.0f} TFLOP/s")


# ---- documents -------------------------------------------------------------------------------------------------
LAYERS = 12


def documents(lengths: list[int], n_tokens: int, length: int) -> None:
    print(f"{LAYERS} layers of attention, {n_tokens} tokens in documents of about {length}, forward and backward, ms; and the peak in MiB")
    for seq_len in lengths:
        torch._dynamo.reset()
        numbers = (torch.rand(n_tokens // seq_len, seq_len, generator=torch.Generator().manual_seed(0)) < 1 / length).cumsum(1).cuda()
        told = [cost(numbers, kind) for kind in MASKS]
        print(f"  {len(numbers):3} x {seq_len:5}   " + "   ".join(f"{kind} {1000 * time:7.2f} {peak / 2 ** 20:6.0f}"
                                                                 for kind, (time, peak) in zip(MASKS, told)), flush=True)


MASKS = {"blocks": blocks, "dense": lambda rules, span, n_rows: dense(rules, span), "one": lambda *_: None}


def cost(numbers: Tensor, kind: str) -> tuple[float, int]:
    """Seconds and bytes."""
    q, k, v = (torch.randn(len(numbers), 12, numbers.size(1), 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    make, span, rules = MASKS[kind], span_of(Batch(numbers)), (Causal(), Documents(numbers))

    @torch.compile
    def deep(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = make(rules, span, len(numbers))
        for _ in range(LAYERS):
            q = attend(q, k, v, mask, mask is None)
        return q

    def work() -> None:
        torch.autograd.grad(deep(q, k, v).sum(), (q, k, v))

    for _ in range(3):
        work()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    return statistics.median(waited(work) for _ in range(20)), torch.cuda.max_memory_allocated() - before


# ---- the dial --------------------------------------------------------------------------------------------------
def dial(minutes: float, data: list[str]) -> None:
    """A run in so many minutes, and its plan."""
    given, found = {"data": {"sources": tuple(data or map(str, standard_library()))}}, {}
    took = {"probe": seconds(lambda: found.update(choice=Choice(given, survey(given), here()).probed()))}
    choice: Choice = found["choice"]
    took["plan"] = seconds(lambda: found.update(plan=choice.best(60 * minutes)))
    plan, machine = found["plan"], choice.machine
    print(f"probe {took['probe']:.0f} s, plan {took['plan']:.0f} s; sgemm {machine.sgemm / 1e12:.1f} TFLOP/s, coefficients {machine.product:.3g}, "
          f"{machine.byte:.3g}, {machine.kernel:.3g}")
    for name, told in plan.rows(machine, float("inf")):
        print(f"  {name:14} {told}", flush=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    took_each: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        run = Pretraining(prepare(plan.recipe), Path(folder) / "run")

        def see(step: Any) -> None:
            took_each.append(step.seconds - sum(took_each))

        run.run(see)
        bits = run.evaluate().bits_per_byte
    free, there_are = torch.cuda.mem_get_info()
    step, held = statistics.median(took_each[1:]), there_are - free
    print(f"{len(took_each)} of {plan.steps} steps in {sum(took_each):.1f} s; {bits:.3f} bits a byte, plan {plan.bits:.3f} ± {2 * plan.spread:.3f}")
    print(f"planned / measured: first step {plan.begin:.1f} / {took_each[0]:.1f} s, others {1000 * plan.step_seconds:.2f} / {1000 * step:.2f} ms "
          f"({plan.step_seconds / step:.2f}), memory {plan.memory / 2 ** 20:.0f} / {held / 2 ** 20:.0f} MiB ({plan.memory / held:.2f}; "
          f"{torch.cuda.max_memory_reserved() / 2 ** 20:.0f} of tensors)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--documents", action="store_true")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--document", type=int, default=600)
    parser.add_argument("--dial", action="store_true")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--data", nargs="+", default=[])
    told = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    if told.documents:
        documents(told.lengths, told.tokens, told.document)
    elif told.dial:
        dial(told.minutes, told.data)
    else:
        steps(told.pairs, told.rows, told.seq_len)


if __name__ == "__main__":
    main()
