"""The law of expected losses (`hanok.train.expected.LAW`), fitted again from runs of this machine's own.

    python benchmarks/law.py RUNS.jsonl [--data FILE_OR_FOLDER...] [--threads N]        without --data the standard library

Trains what of GRID is not in RUNS.jsonl yet, each run as the dial would settle it (an hour of two cores in all; a cut is no loss), and fits the
law's constants to all lines of the file: least squares of logarithms by Gauss and Newton, near the constants that stand there where the runs leave
it open. Runs are by updates, so that what else the machine does changes nothing.
"""
from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hanok.data.sources import standard_library
from hanok.train.dial import Choice
from hanok.train.expected import LAW, Law, expected_bits, survey
from hanok.train.measure import here
from hanok.train.plan import config_of, sizes_of, weights_of
from hanok.train.pretrain import Pretraining, prepare

GRID = ((64, 2, 4096, 4, 400), (64, 2, 4096, 4, 1600), (64, 2, 4096, 4, 4800), (128, 3, 4096, 4, 400), (128, 3, 4096, 4, 1200),
        (128, 3, 4096, 4, 3600), (192, 4, 4096, 4, 400), (192, 4, 4096, 4, 1200), (256, 4, 4096, 4, 400), (256, 4, 4096, 4, 1200),
        (128, 3, 2048, 4, 1200), (128, 3, 8192, 4, 1200), (128, 2, 2048, 4, 1600), (128, 3, 4096, 8, 600), (128, 3, 4096, 16, 300))
"""Width, layers, vocabulary, rows of 256 tokens, updates."""
FITTED = ("least", "size", "alpha", "data", "beta", "vocabulary", "critical")
LOOSE = {"least": 0.3, "size": 1.0, "alpha": 0.15, "data": 1.0, "beta": 0.15, "vocabulary": 0.5, "critical": 0.7}
"""How far, in logarithms, a constant may lie from where it stood, as far as the runs do not say it: one standard deviation."""
NOISE = 0.01
"""Of a run's loss: one standard deviation of its logarithm."""


def run(choice: Choice, d_model: int, layers: int, vocab_size: int, rows: int, steps: int, threads: int) -> dict[str, Any]:
    """One run, and what the law is told of it."""
    recipe = choice.recipe(d_model, layers, vocab_size, rows, steps, None)
    told = replace(recipe.train, threads=threads, eval_every=10 ** 7, checkpoint_every=0, eval_tokens=262_144)
    recipe = replace(recipe, model=replace(recipe.model, sizes=sizes_of(choice.family, d_model, layers)), train=told)
    with tempfile.TemporaryDirectory() as folder:
        made = Pretraining(prepare(recipe), Path(folder) / "run")
        made.run(lambda step: None)
        bits = made.evaluate().bits_per_byte
    tokens = rows * int(choice.seq_len)
    return {"d": d_model, "n": layers, "V": vocab_size, "rows": rows, "steps": steps, "inner": weights_of(choice.family.name, config_of(recipe))[1],
            "n_bytes": steps * tokens * choice.text.bytes_per_token(vocab_size), "unique": choice.text.n_bytes, "per_update": tokens,
            "zlib": choice.text.zlib, "bits": bits}


def bits_of(law: Law, told: dict[str, Any]) -> float:
    return expected_bits(law, told["inner"], told["n_bytes"], told["unique"], told["per_update"], told["V"], told["zlib"])


def fit(runs: list[dict[str, Any]], begin: Law = LAW) -> Law:
    """The constants under which these runs are expected to end as they did."""
    begin = replace(begin, zlib=float(np.mean([told["zlib"] for told in runs])))
    before = np.log([getattr(begin, name) for name in FITTED])
    spread = np.array([LOOSE[name] for name in FITTED])

    def law_of(x: np.ndarray) -> Law:
        return replace(begin, **dict(zip(FITTED, np.exp(x).tolist())))

    def wrong(x: np.ndarray) -> np.ndarray:
        law = law_of(x)
        return np.concatenate([[math.log(bits_of(law, told) / told["bits"]) / NOISE for told in runs], (x - before) / spread])

    x, step = before.copy(), 1e-4
    for _ in range(200):
        now, slope = wrong(x), np.empty((len(runs) + len(x), len(x)))
        for i in range(len(x)):
            slope[:, i] = (wrong(x + step * np.eye(len(x))[i]) - now) / step
        x = x - 0.5 * np.clip(np.linalg.lstsq(slope, now, rcond=None)[0], -0.3, 0.3)
    return law_of(x)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("runs", type=Path)
    arguments.add_argument("--data", nargs="+", default=[])
    arguments.add_argument("--threads", type=int, default=0)
    told = arguments.parse_args()
    runs = [json.loads(line) for line in told.runs.read_text().splitlines()] if told.runs.is_file() else []
    known = {tuple(one[name] for name in ("d", "n", "V", "rows", "steps")) for one in runs}
    missing = [shape for shape in GRID if shape not in known]
    if missing:
        given = {"data": {"sources": tuple(told.data or map(str, standard_library()))}}
        choice = Choice(given, survey(given), here())
        for shape in missing:
            runs.append(run(choice, *shape, told.threads or torch.get_num_threads()))
            with open(told.runs, "a") as file:
                file.write(json.dumps(runs[-1]) + "\n")
            print(f"{shape}: {runs[-1]['bits']:.4f} bits a byte", flush=True)
    law = fit(runs)
    residuals = [math.log(bits_of(law, one) / one["bits"]) for one in runs]
    for one, residual in zip(runs, residuals):
        print(f"  {one['n']} x {one['d']:3}, {one['V']:5} tokens, {one['rows']:2} rows, {one['steps']:5} updates: {one['bits']:.3f}, "
              f"expected {100 * residual:+.1f} % of it")
    print(f"spread of the residuals {100 * float(np.std(residuals)):.1f} %, worst {100 * max(map(abs, residuals)):.1f} %")
    print(law)


if __name__ == "__main__":
    main()
