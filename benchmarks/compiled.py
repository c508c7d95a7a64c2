"""torch.compile on this machine: a training step compiled against the same one as it is, and what compiling costs first.

    python benchmarks/compiled.py [--family qwen3] [--preset tiny] [--rows 16] [--seq-len 256] [--pairs 8] [--threads 2]

Needs no data. This is why train.compile = "auto" leaves it off on CPUs. A C++ compiler has to be there.
"""
from __future__ import annotations

import argparse
from itertools import repeat

import torch

from common import alternate, seconds
from hanok.contracts import Batch
from hanok.models import catalog
from hanok.train.optim import optimizers
from hanok.train.recipe import TrainRecipe
from hanok.train.trainer import Trainer


def trainer(family: str, preset: str, batch: Batch, compile: str) -> Trainer:
    torch.manual_seed(0)
    config = catalog.preset(family, preset)
    model = catalog.family(family).build(config).train()
    recipe = TrainRecipe(steps=10 ** 6, compile=compile)
    return Trainer(model, optimizers(model, recipe), repeat(batch), recipe, vocab_size=config.vocab_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="qwen3")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ids = torch.randint(catalog.preset(args.family, args.preset).vocab_size, (args.rows, args.seq_len + 1))
    batch = Batch(ids[:, :-1].contiguous(), targets=ids[:, 1:].contiguous())
    compiled, plain = (trainer(args.family, args.preset, batch, how) for how in ("on", "off"))
    first, usual = seconds(compiled.step), seconds(plain.step)
    print(f"the first step: {first:.1f} s compiled, {usual:.1f} s as it is", flush=True)
    compiled.step()
    n = args.rows * args.seq_len
    name = f"{args.family} {args.preset}, compiled / plain"
    pair = alternate(name, "tokens/s", lambda: n / seconds(compiled.step), lambda: n / seconds(plain.step), args.pairs)
    print(pair.line())


if __name__ == "__main__":
    main()
