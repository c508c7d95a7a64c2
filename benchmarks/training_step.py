"""A training step of GPT-2 124M, fp32, no dropout, 4 rows of 256 tokens: hanok's trainer against `transformers` with torch.optim.AdamW(fused=True).

    python benchmarks/training_step.py [--pairs 8] [--threads 2] [--rows 4] [--seq-len 256]

Needs no data: token ids are drawn at random. Speed in turn in one process, the machine's matrix rate between the steps; peak memory of each side in a
process of its own. 6N tokens/s is the rate of the step's matrix products, as Kaplan et al. count them (arXiv:2001.08361, 2.1).
"""
from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import repeat

import torch

from common import alternate, seconds
from hanok.contracts import Batch
from hanok.models import catalog
from hanok.train.optim import optimizers
from hanok.train.recipe import TrainRecipe
from hanok.train.trainer import Trainer

VOCAB = 50257
N_FOR_MEMORY = 3
"""Steps after which the peak stands."""


def batch_of(rows: int, seq_len: int) -> Batch:
    ids = torch.randint(VOCAB, (rows, seq_len + 1), generator=torch.Generator().manual_seed(0))
    return Batch(ids[:, :-1].contiguous(), targets=ids[:, 1:].contiguous())


def our_step(batch: Batch, device: str = "cpu") -> tuple[Callable[[], object], int]:
    """hanok's trainer, with clipping and the guard as always; and N, the parameters. On a GPU it is compiled and in bf16 by itself."""
    model = catalog.family("gpt2").build(replace(catalog.preset("gpt2", "gpt2"), dropout=0.0, attention_dropout=0.0)).to(device).train()
    recipe = TrainRecipe(steps=10 ** 6, optimizer="adamw", learning_rate=6e-4)
    trainer = Trainer(model, optimizers(model, recipe), repeat(batch), recipe, vocab_size=VOCAB, device=device)
    return trainer.step, sum(p.numel() for p in model.parameters())


def their_step(batch: Batch, device: str = "cpu") -> tuple[Callable[[], object], int]:
    """What `transformers`' users write, on a GPU with torch.compile and autocast; its loss shifts the labels itself."""
    import transformers
    config = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    model = transformers.GPT2LMHeadModel(config).to(device).train()
    on_gpu, ids = device == "cuda", batch.token_ids.to(device)
    forward = torch.compile(model) if on_gpu else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            loss = forward(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step, sum(p.numel() for p in model.parameters())


SIDES = {"ours": our_step, "theirs": their_step}


def peak_mib(side: str, args: argparse.Namespace) -> float:
    """Peak memory of a process that trains this side alone."""
    told = [sys.executable, __file__, "--memory-of", side, "--threads", str(args.threads), "--rows", str(args.rows), "--seq-len", str(args.seq_len)]
    return float(subprocess.run(told, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    batch = batch_of(args.rows, args.seq_len)
    if args.memory_of:
        step, _ = SIDES[args.memory_of](batch)
        for _ in range(N_FOR_MEMORY):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    ours, theirs = (peak_mib(side, args) for side in SIDES)
    print(f"peak memory                        ours {ours:8.0f}  theirs {theirs:8.0f} MiB       {1 - ours / theirs:.0%} less  "
          f"goal 25% {'reached' if ours <= 0.75 * theirs else 'MISSED'}", flush=True)
    (our, n), (their, _) = our_step(batch), their_step(batch)
    our(), their()                                       # the first step allocates

    def rate(step: Callable[[], object]) -> float:
        return args.rows * args.seq_len / seconds(step)

    pair = alternate("GPT-2 124M training step", "tokens/s", lambda: rate(our), lambda: rate(their), args.pairs)
    print(pair.line(1.05))
    for name, rates in (("ours", pair.ours), ("theirs", pair.theirs)):
        share = statistics.median(6e-9 * n * r / s for r, s in zip(rates, pair.sgemm))
        goal = "" if name == "theirs" else f"  goal 80% {'reached' if share >= 0.8 else 'MISSED'}"
        print(f"6N tokens/s, {name:21s} {share:.0%} of sgemm{goal}")


if __name__ == "__main__":
    main()
