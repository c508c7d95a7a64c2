"""Time to loss on characters: a plain small GPT-2 against the speedrun family, each from the start of its process to the end of its evaluation.

    python benchmarks/time_to_loss.py --data tinyshakespeare.txt [--seeds 3] [--goal 1.885] [--threads 2] [--long]

The first 90 % of the text train, the last 10 % are read once, at the end: the mean over all of it in disjoint windows of the trained context (at most
256), in nats a character. Recipes: benchmarks/recipes/{plain,speedrun,speedrun-long}.toml; at most 1.0 million parameters. Plain and speedrun take
turns, a seed at a time; the medians count. `--long` also asks how low the speedrun gets in the plain recipe's whole time. Any text file will do; the
usual one is Karpathy's tinyshakespeare.txt (1,115,394 characters).
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parent / "recipes"
MOST_PARAMETERS = 1_000_000
LONG_GOAL = 1.56


def train(recipe_file: Path, text_file: Path, seed: int, threads: int) -> dict[str, Any]:
    """One run: what it lost on the held-out text, and its size."""
    import torch

    from hanok.data.corpus import build_corpus
    from hanok.data.loader import Loader, windows
    from hanok.data.sources import Document
    from hanok.evaluate.score import byte_lengths, score_batches
    from hanok.models import catalog
    from hanok.text.tokenizer import train as train_tokenizer
    from hanok.train.optim import optimizers
    from hanok.train.recipe import read_recipe
    from hanok.train.trainer import Trainer
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    recipe = read_recipe(recipe_file)
    told, seq_len = recipe.train, recipe.data.seq_len
    text = text_file.read_text(encoding="utf-8")
    cut = round(len(text) * (1 - recipe.data.validation))
    tokenizer = train_tokenizer("characters", [text], recipe.tokenizer.vocab_size)
    family = catalog.family(recipe.model.family)
    preset = catalog.preset(family.name, recipe.model.preset)
    sizes = {**recipe.model.sizes, "vocab_size": tokenizer.vocab_size, "max_seq_len": seq_len}
    model = family.build(dataclasses.replace(preset, **sizes)).train()
    with tempfile.TemporaryDirectory() as folder:
        learned, held_out = (build_corpus([Document("", part)], tokenizer, Path(folder) / name)
                             for name, part in (("train", text[:cut]), ("validation", text[cut:])))
        trainer = Trainer(model, optimizers(model, told), Loader(learned, seq_len=seq_len, batch_size=told.micro_batch_size, seed=seed), told,
                          vocab_size=tokenizer.vocab_size)
        trainer.run()
        score = score_batches(model.eval(), windows(held_out, seq_len, batch_size=64), byte_lengths(tokenizer))
    return {"loss": score.loss, "targets": score.tokens, "parameters": sum(p.numel() for p in model.parameters()), "training": trainer.seconds}


def timed(name: str, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The same in a process of its own, with the time from its start to its end."""
    begin = time.perf_counter()
    told = subprocess.run([sys.executable, __file__, "--data", args.data, "--threads", str(args.threads), "--run", name, str(seed)], check=True,
                          capture_output=True, text=True).stdout
    result = {"seconds": time.perf_counter() - begin, **json.loads(told)}
    print(f"  {name:14s} seed {seed}: {result['loss']:.4f} nats a character over {result['targets']:,}, {result['parameters'] / 1e6:.2f}M "
          f"parameters, {result['seconds']:.1f} s ({result['training']:.1f} s of them training)", flush=True)
    if result["parameters"] > MOST_PARAMETERS:
        raise SystemExit(f"{name} has {result['parameters']:,} parameters; the rules allow {MOST_PARAMETERS:,}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a text file, such as tinyshakespeare.txt")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--goal", type=float, default=1.885, help="nats a character")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(train(RECIPES / f"{args.run[0]}.toml", Path(args.data), int(args.run[1]), args.threads)))
        return
    from common import cpu_now, foreign_cpu_share, sgemm_gflops
    names, results, sgemm, begin = ["plain", "speedrun", *(["speedrun-long"] if args.long else [])], {}, [sgemm_gflops()], cpu_now()
    for seed in range(args.seeds):
        for name in names:
            results.setdefault(name, []).append(timed(name, args, seed))
            sgemm.append(sgemm_gflops())
    loss = {name: statistics.median(run["loss"] for run in runs) for name, runs in results.items()}
    seconds = {name: statistics.median(run["seconds"] for run in runs) for name, runs in results.items()}
    ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(results["plain"], results["speedrun"]))
    reached = loss["speedrun"] <= args.goal and ratio >= 8
    print(f"time to loss: plain {loss['plain']:.4f} in {seconds['plain']:.1f} s; speedrun {loss['speedrun']:.4f} in {seconds['speedrun']:.1f} s, "
          f"1/{ratio:.1f} of its time; goal {args.goal} in 1/8 {'reached' if reached else 'MISSED'}")
    if args.long:
        reached = loss["speedrun-long"] <= LONG_GOAL and seconds["speedrun-long"] <= seconds["plain"]
        print(f"loss in the plain recipe's time: {loss['speedrun-long']:.4f} in {seconds['speedrun-long']:.1f} s; "
              f"goal {LONG_GOAL} {'reached' if reached else 'MISSED'}")
    print(f"(medians of {args.seeds} seeds; sgemm {statistics.median(sgemm):.0f} GFLOP/s, {min(sgemm):.0f} to {max(sgemm):.0f}; "
          f"foreign load {foreign_cpu_share(begin):.2f} cores)")


if __name__ == "__main__":
    main()
