"""On an NVIDIA GPU: a training step against `transformers`, both in bf16 and compiled; and document masks as blocks against dense ones.

    python benchmarks/gpu.py [--pairs 10] [--rows 16] [--seq-len 1024]
    python benchmarks/gpu.py --documents [--tokens 32768] [--document 600]

Needs no data. The first is GPT-2 124M without dropout; 6N tokens/s is set beside the rate of a large bf16 product taken at the same moment. The
second is attention alone, 12 layers of 12 heads of 64, forward and backward: flex attention, SDPA under a dense mask, and SDPA of one document as a
floor.
"""
from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import repeat

import torch
from torch import Tensor

from common import Pair, seconds
from hanok.contracts import Batch
from hanok.models import catalog
from hanok.nn.attention import attend
from hanok.nn.masks import Causal, Documents, blocks, dense, span_of
from hanok.train.optim import optimizers
from hanok.train.recipe import TrainRecipe
from hanok.train.trainer import Trainer

VOCAB = 50257


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
def our_step(batch: Batch) -> tuple[Callable[[], object], int]:
    """hanok's trainer as it is: bf16 and compiled by itself, with clipping and the guard."""
    model = catalog.family("gpt2").build(replace(catalog.preset("gpt2", "gpt2"), dropout=0.0, attention_dropout=0.0)).cuda().train()
    recipe = TrainRecipe(steps=10 ** 6, optimizer="adamw", learning_rate=6e-4)
    trainer = Trainer(model, optimizers(model, recipe), repeat(batch), recipe, vocab_size=VOCAB, device="cuda")
    return trainer.step, sum(map(Tensor.numel, model.parameters()))


def their_step(batch: Batch) -> tuple[Callable[[], object], int]:
    """What `transformers`' users write on a GPU: SDPA, torch.compile, autocast, fused AdamW, clipping."""
    import transformers
    config = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    model = transformers.GPT2LMHeadModel(config).cuda().train()
    compiled, ids = torch.compile(model), batch.token_ids.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step, sum(map(Tensor.numel, model.parameters()))


def steps(n_pairs: int, rows: int, seq_len: int) -> None:
    ids = torch.randint(VOCAB, (rows, seq_len + 1), generator=torch.Generator().manual_seed(0))
    batch, peaks, made = Batch(ids[:, :-1].contiguous(), targets=ids[:, 1:].contiguous()), [], []
    for side in (our_step, their_step):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step, n = side(batch)
        print(f"{side.__name__}: the first takes {waited(step):.1f} s", flush=True)
        waited(step)
        waited(step)
        made.append(step)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    pair, rates = Pair(f"GPT-2 124M, {rows} x {seq_len}, bf16", "ktokens/s"), []
    for _ in range(n_pairs):
        rates.append(product_rate())
        for told, step in zip((pair.ours, pair.theirs), made):
            told.append(rows * seq_len / 1000 / statistics.median(waited(step) for _ in range(3)))
        pair.sgemm.append(rates[-1] / 1e9)
        pair.foreign.append(0.0)
    print(pair.line())
    for name, told, peak in zip(("ours", "theirs"), (pair.ours, pair.theirs), peaks):
        share = statistics.median(6e3 * n * rate / product for rate, product in zip(told, rates))
        print(f"  {name}: 6N tokens/s is {share:.0%} of the bf16 product's {statistics.median(rates) / 1e12:.0f} TFLOP/s; "
              f"peak {peak / 2 ** 20:.0f} MiB")


# ---- documents -------------------------------------------------------------------------------------------------
LAYERS = 12


def documents(n_tokens: int, length: int) -> None:
    print(f"{LAYERS} layers of attention, {n_tokens} tokens in documents of about {length}, forward and backward, ms; and the peak in MiB")
    for seq_len in (256, 512, 1024, 2048, 4096, 8192):
        torch._dynamo.reset()
        numbers = (torch.rand(n_tokens // seq_len, seq_len, generator=torch.Generator().manual_seed(0)) < 1 / length).cumsum(1).cuda()
        told = [cost(numbers, kind) for kind in MASKS]
        print(f"  {len(numbers):3} x {seq_len:5}   " + "   ".join(f"{kind} {1000 * time:7.2f} {peak / 2 ** 20:6.0f}"
                                                                 for kind, (time, peak) in zip(MASKS, told)), flush=True)


MASKS = {"blocks": lambda rules, span, n: blocks(rules, span, n), "dense": lambda rules, span, n: dense(rules, span), "one": lambda *_: None}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--documents", action="store_true")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--document", type=int, default=600)
    told = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    if told.documents:
        documents(told.tokens, told.document)
    else:
        steps(told.pairs, told.rows, told.seq_len)


if __name__ == "__main__":
    main()
