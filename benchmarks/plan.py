"""What a plan said and what was then measured: time and memory over five sizes of three families; and the dial against a sweep.

    python benchmarks/plan.py [--families qwen3 gpt lstm] [--steps 12]           each run in a fresh process, judged at the probe's sgemm rate
    python benchmarks/plan.py --sweep [--minutes 2] [--data FILE_OR_FOLDER...]   the dial and nine runs (3 sizes x 3 rates), each with the same
                                                                                 seconds x sgemm rate; without --data the standard library
    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/plan.py --sweep ...         the same on one core, while another does something else
"""
from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common import cpu_now, foreign_cpu_share
from hanok import runtime
from hanok.config import from_dict, to_dict
from hanok.data.sources import standard_library
from hanok.models import catalog
from hanok.train.carry import Carry, carries
from hanok.train.dial import Choice
from hanok.train.expected import LIBRARY, survey
from hanok.train.measure import Machine, Shape, batches, here, sgemm_rate
from hanok.train.optim import optimizers
from hanok.train.plan import plan_of, sizes_of
from hanok.train.pretrain import Pretraining, prepare
from hanok.train.recipe import Recipe
from hanok.train.trainer import Trainer

SHAPES = {"attention": ((64, 2, 8), (128, 4, 8), (256, 4, 8), (384, 6, 4), (512, 6, 8)),
          "recurrent": ((64, 2, 16), (128, 1, 32), (256, 2, 32), (512, 2, 32), (768, 2, 16))}
"""Width, layers, rows."""
TEXT = replace(LIBRARY, held=0.0)
REFERENCE_RATE = 7.5e10 * torch.get_num_threads()
"""FLOP/s at which a budget's seconds are seconds."""


# ---- time and memory
def recipes(name: str) -> list[Recipe]:
    """Five sizes of a family."""
    choice = Choice({"model": {"family": name}}, TEXT, here())
    made = []
    for d_model, layers, rows in SHAPES["recurrent" if choice.recurrent else "attention"]:
        recipe = choice.recipe(d_model, layers, 4096, rows, 1000, None)
        made.append(replace(recipe, model=replace(recipe.model, sizes=sizes_of(choice.family, d_model, layers))))
    return made


def high_water() -> int:
    """The largest resident memory since this program began; getrusage's also knows the parent that it was forked from."""
    try:
        with open("/proc/self/status") as status:
            return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except OSError:
        return runtime.peak_memory_bytes()


def measured(told: dict[str, Any]) -> None:
    """In a process of its own: a few updates; seconds each, the sgemm rate beside each, and the peak of the process's memory."""
    recipe, resident = from_dict(Recipe, told["recipe"]), high_water()
    family = catalog.family(recipe.model.family)
    plain = {**to_dict(family.presets["tiny"]), "vocab_size": 4096, "max_seq_len": recipe.data.seq_len, **recipe.model.sizes}
    config = from_dict(family.config, plain)
    torch.manual_seed(0)
    model: Any = family.build(config).train()
    seen = Shape(recipe.train.micro_batch_size, recipe.data.seq_len or 256, told["document_tokens"])
    drawn = batches(4096, seen, family.objective == "masked", carries(model))
    trainer = Trainer(model, optimizers(model, recipe.train), drawn, recipe.train, vocab_size=4096, hidden=Carry(model) if carries(model) else None)
    trainer.step()
    begin, works = cpu_now(), []
    for _ in range(told["steps"]):
        rate, start = sgemm_rate(repeats=1), time.perf_counter()
        trainer.step()
        works.append(rate * (time.perf_counter() - start))
    print(json.dumps({"works": works, "peak": high_water(), "resident": resident, "foreign": foreign_cpu_share(begin)}))


def compare(families: list[str], steps: int) -> None:
    """The table."""
    worst = [0.0, 0.0]
    print("family  parameters  time: planned / measured   memory: planned / measured   foreign cores")
    for name in families:
        machine = Choice({"model": {"family": name}}, TEXT, here()).probed().machine
        print(f"{name}: sgemm {machine.sgemm / 1e9:.0f} GFLOP/s, coefficients {machine.product:.2f}, {machine.byte:.1f}, {machine.kernel:.2g}")
        for recipe in recipes(name):
            document = TEXT.n_bytes / TEXT.n_documents / TEXT.bytes_per_token(4096)
            order = json.dumps({"recipe": to_dict(recipe), "steps": steps, "document_tokens": document})
            child = subprocess.run([sys.executable, __file__, "--one", order], capture_output=True, text=True, check=True)
            seen = json.loads(child.stdout)
            plan = plan_of(recipe, replace(machine, resident=seen["resident"]), TEXT)
            ratios = plan.step_seconds * machine.sgemm / statistics.fmean(seen["works"]), plan.memory / seen["peak"]
            worst = [max(w, abs(math.log(r))) for w, r in zip(worst, ratios)]
            sizes = recipe.model.sizes
            print(f"  {sizes['n_layers']} x {sizes['d_model']:4}  {plan.parameters / 1e6:6.2f}M  {plan.step_seconds:7.3f} s "
                  f"{ratios[0]:5.2f}   {plan.memory / 2 ** 20:6.0f} MiB {ratios[1]:5.2f}   {seen['foreign']:.2f}", flush=True)
    print(f"worst: time {100 * math.expm1(worst[0]):.0f} % (goal 15), memory {100 * math.expm1(worst[1]):.0f} % (goal 20)")


# ---- the dial
def trained(recipe: Recipe, seconds: float) -> float:
    """Bits a byte after `seconds` at the reference rate: the clock is set by the sgemm rate, taken again twenty times on the way."""
    recipe = replace(recipe, train=replace(recipe.train, seconds=seconds, steps=10 ** 7, checkpoint_every=0, eval_every=10 ** 7, eval_tokens=262_144))
    with tempfile.TemporaryDirectory() as folder:
        run = Pretraining(prepare(recipe), Path(folder) / "run")
        clock = {"rate": sgemm_rate(), "until": seconds / 20, "raw": 0.0, "normal": 0.0}

        def normalise(step: Any) -> None:
            clock["normal"] += (run.trainer.seconds - clock["normal"]) * clock["rate"] / REFERENCE_RATE
            run.trainer.seconds = clock["normal"]
            if clock["normal"] > clock["until"]:
                clock["rate"], clock["until"] = sgemm_rate(), clock["until"] + seconds / 20

        run.run(normalise)
        return run.evaluate().bits_per_byte


def sweep(minutes: float, data: list[str]) -> None:
    """The dial, then three sizes (half and double its width, in its proportions) by three rates (half and double its peak)."""
    seconds, sources = 60 * minutes, tuple(data or map(str, standard_library()))
    given = {"data": {"sources": sources}}
    choice = Choice(given, survey(given), here()).probed()
    normal: Machine = replace(choice.machine, sgemm=REFERENCE_RATE)
    plan = Choice(given, choice.text, normal).best(seconds)
    rates = f"sgemm {sgemm_rate() / 1e9:.0f} GFLOP/s; a minute is one at {REFERENCE_RATE / 1e9:.0f}"
    print(f"{torch.get_num_threads()} threads, {rates}", flush=True)
    print(f"the dial: {dict(plan.rows(normal, math.inf))}", flush=True)
    dial = trained(plan.recipe, seconds)
    print(f"{dial:.3f} bits a byte (expected {plan.bits:.3f} ± {2 * plan.spread:.3f})", flush=True)
    width, layers = plan.recipe.model.sizes["d_model"], plan.recipe.model.sizes["n_layers"]
    best = math.inf
    for d_model in (width // 2 // 32 * 32, width, 2 * width):
        if d_model < 32:
            continue
        for factor in (0.5, 1, 2):
            told = plan.recipe.train
            recipe = replace(plan.recipe, model=replace(plan.recipe.model, sizes=sizes_of(choice.family, d_model, layers)),
                             train=replace(told, learning_rate=factor * told.learning_rate * (width / d_model) ** 0.5))
            bits = trained(recipe, seconds)
            best = min(best, bits)
            print(f"  {layers} x {d_model}, rate {recipe.train.learning_rate:.2g}: {bits:.3f}", flush=True)
    print(f"dial / best of the sweep: {dial / best:.3f} (goal 1.03)")


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--families", nargs="+", default=["qwen3", "gpt", "lstm"])
    arguments.add_argument("--steps", type=int, default=12)
    arguments.add_argument("--sweep", action="store_true")
    arguments.add_argument("--minutes", type=float, default=2.0)
    arguments.add_argument("--data", nargs="+", default=[])
    arguments.add_argument("--one", help=argparse.SUPPRESS)
    told = arguments.parse_args()
    if told.one:
        measured(json.loads(told.one))
    elif told.sweep:
        sweep(told.minutes, told.data)
    else:
        print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
        compare(told.families, told.steps)


if __name__ == "__main__":
    main()
