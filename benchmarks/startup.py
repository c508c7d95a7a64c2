"""What a person waits for: `hanok --help`, opening a bundle, and the memory of fp32 generation, each in processes of their own.

    python benchmarks/startup.py [--repeats 7] [--model smollm2-135m-instruct]
"""
from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from common import seconds, sgemm_gflops
from hanok.bundle.pull import pull

LOADING = """
import json, sys, time, torch
begin = time.perf_counter()
import hanok
model = hanok.load(sys.argv[1])
loaded = time.perf_counter() - begin
from hanok.runtime import peak_memory_bytes
from hanok.contracts import Request
ids = torch.randint(100, model.config.vocab_size, (64,)).tolist()
model.answers([Request(ids, max_new_tokens=64)])
weights = sum(p.numel() * p.element_size() for p in model.bundle.model.parameters())
c = model.config
kv = c.n_layers * 2 * c.n_kv_heads * 128 * (c.d_head or c.d_model // c.n_heads) * 4
print(json.dumps({"load": loaded, "peak": peak_memory_bytes(), "weights": weights, "kv": kv}))
"""


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--repeats", type=int, default=7)
    arguments.add_argument("--model", default="smollm2-135m-instruct")
    told = arguments.parse_args()
    path = pull(told.model)
    script = str(Path(sys.executable).parent / "hanok")

    def help_time() -> float:
        return seconds(lambda: subprocess.run([script, "--help"], check=True, capture_output=True))

    help_time()
    took = statistics.median(help_time() for _ in range(told.repeats))
    print(f"hanok --help                       {took:.3f} s (goal 0.3; sgemm {sgemm_gflops():.0f} GFLOP/s)")
    runs = [json.loads(subprocess.run([sys.executable, "-c", LOADING, str(path)], check=True, capture_output=True, text=True).stdout)
            for _ in range(told.repeats)]
    loads = statistics.median(run["load"] for run in runs)
    print(f"loading {told.model}      {loads:.2f} s after import torch (goal 2)")
    run = sorted(runs, key=lambda run: run["peak"])[len(runs) // 2]
    mib = {name: run[name] / 2 ** 20 for name in ("peak", "weights", "kv")}
    over = mib["peak"] - mib["weights"] - mib["kv"]
    print(f"peak memory of fp32 generation     {mib['peak']:.0f} MiB = weights {mib['weights']:.0f} + KV cache {mib['kv']:.0f} + {over:.0f} "
          "(goal 334 = 350 MB)")


if __name__ == "__main__":
    main()
