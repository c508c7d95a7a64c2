"""Corpus build, deduplication on, beside the tokenizer alone on the same text; and, with --bounded, beside its own promise of memory and restarts.

    python benchmarks/corpus.py [--data FILE...] [--bytes 64e6] [--repeats 5] [--tokenizer DIR]
    python benchmarks/corpus.py --bounded [--bytes 10e9] [--memory 1GiB] [--folder BIG_ENOUGH]

The first alternates `build` (workers, shards and card included) with `Tokenizer.encode_batch` over all documents, both on all cores, and prints the
median of paired ratios. The second builds generated text twice, once with two kill -9 on the way, samples the memory of all processes together
(PSS, and RSS, which counts shared pages once a process), and compares the shards.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np

from common import FOREIGN, Pair, seconds, sgemm_gflops
from hanok.data.build import build
from hanok.data.formats import Counts, ReadOptions, find_units, read_unit
from hanok.text.tokenizer import Tokenizer, train

GOAL = 0.6


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--data", nargs="+", default=[])
    arguments.add_argument("--bytes", type=float)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--tokenizer")
    arguments.add_argument("--bounded", action="store_true")
    arguments.add_argument("--memory", default="1GiB")
    arguments.add_argument("--folder")
    told = arguments.parse_args()
    with tempfile.TemporaryDirectory(dir=told.folder) as name:
        folder = Path(name)
        data = told.data or [str(generated(folder / "text", int(told.bytes or (10e9 if told.bounded else 64e6))))]
        tokenizer = Path(told.tokenizer) if told.tokenizer else trained(data, folder / "tokenizer.json")
        if told.bounded:
            bounded(data, tokenizer, folder, told.memory)
        else:
            speed(data, tokenizer, folder, told.repeats)


# ---- text ------------------------------------------------------------------------------------------------------
def generated(folder: Path, n_bytes: int) -> Path:
    """JSONL files of so many bytes: words by Zipf's law, English-like and Korean, one document in ten a copy or near copy of one in its file."""
    folder.mkdir()
    sizes = [min(n_bytes - first, 128 << 20) for first in range(0, n_bytes, 128 << 20)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, range(len(sizes)), sizes, repeat(folder)))               # what one of them raised is raised here
    return folder


def write(seed: int, n_bytes: int, folder: Path) -> None:
    """One file, whose documents follow from its number."""
    random = np.random.Generator(np.random.PCG64(5))  # the same words for every file
    letters, syllables = np.array(list("etaoinshrdlucmfwypvbgk")), np.array([chr(code) for code in range(0xAC00, 0xAC00 + 1200)])
    words = np.array(["".join(random.choice(letters, n)) for n in random.integers(2, 11, 40_000)], dtype=object)
    korean = np.array(["".join(random.choice(syllables, n)) for n in random.integers(1, 5, 40_000)], dtype=object)
    with open(folder / f"{seed:05d}.jsonl", "w", encoding="utf-8") as file:
        file.writelines(documents(np.random.Generator(np.random.PCG64([5, seed])), words, korean, n_bytes))


def documents(random: np.random.Generator, words: np.ndarray, korean: np.ndarray, n_bytes: int) -> Iterator[str]:
    kept: list[list[str]] = []
    written = 0
    while written < n_bytes:
        which = random.random()
        if kept and which < 0.1:
            text = list(kept[int(random.integers(len(kept)))])
            if which < 0.05:
                text[len(text) // 2] = "changed"
        else:
            ranks = np.minimum((40_000.0 ** random.random(int(random.integers(50, 800)))).astype(int), 39_999)
            text = (korean if which > 0.8 else words)[ranks].tolist()
            kept = [*kept[-500:], text]
        line = json.dumps({"text": " ".join(text)}, ensure_ascii=False) + "\n"
        written += len(line.encode())
        yield line


def texts(data: list[str]) -> Iterator[str]:
    for unit in find_units(data):
        for document in read_unit(unit, ReadOptions(), Counts()):
            yield document.text


def trained(data: list[str], path: Path) -> Path:
    """A byte-level BPE of 8,192 tokens, learned from the first 8 MB."""
    some, size = [], 0
    for text in texts(data):
        some.append(text)
        size += len(text)
        if size > 8e6:
            break
    train("bpe", some, 8192).save(path)
    return path


# ---- speed -----------------------------------------------------------------------------------------------------
def speed(data: list[str], tokenizer: Path, folder: Path, repeats: int) -> None:
    everything, known = list(texts(data)), Tokenizer.load(tokenizer)
    megabytes = sum(len(text.encode()) for text in everything) / 1e6

    def ours() -> None:
        build(data, tokenizer, folder / "corpus")
        shutil.rmtree(folder / "corpus")

    def theirs() -> None:
        for first in range(0, len(everything), 4096):
            known.encode_batch(everything[first:first + 4096])

    theirs()
    pair, used = Pair("corpus build, of encode_batch", "MB/s"), []
    while len(pair.ours) < repeats:
        begin, before = time.perf_counter(), cpu()
        pair.ours.append(megabytes / seconds(ours))
        between = cpu()
        pair.theirs.append(megabytes / seconds(theirs))
        after = cpu()
        used.append((after[1] - between[1]) / (between[1] - before[1]))
        machine, mine = (now - then for now, then in zip(after, before))
        pair.foreign.append((machine - mine) / (time.perf_counter() - begin))
        pair.sgemm.append(sgemm_gflops(3))
    print(f"{megabytes:.1f} MB, {len(everything):,} documents, {os.cpu_count()} cores" + (
        f"; other processes were busy ({statistics.median(pair.foreign):.2f} cores)" if statistics.median(pair.foreign) > FOREIGN else ""))
    print(pair.line(GOAL))
    print(f"by CPU seconds, which a busy machine moves less: {statistics.median(used):.2f}x")


def cpu() -> tuple[float, float]:
    """CPU seconds of the whole machine, and of this process and the workers that it has seen end."""
    with open("/proc/stat") as stat:
        user, nice, system = map(int, stat.readline().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


# ---- memory and kills ------------------------------------------------------------------------------------------
def bounded(data: list[str], tokenizer: Path, folder: Path, memory: str) -> None:
    peaks = [0, 0]

    def start(out: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "hanok.cli.main", "corpus", "build", *data, "--tokenizer", str(tokenizer), "--out", str(folder / out)]
        return subprocess.Popen([*command, "--memory", memory, "--quiet"])

    def watch(process: subprocess.Popen[bytes], ready: Callable[[], bool] = lambda: False) -> bool:
        """Samples memory until the process ends (True), or kills it as soon as it is `ready`."""
        while process.poll() is None:
            for i, used in enumerate(memory_of(process.pid)):
                peaks[i] = max(peaks[i], used)
            if ready():
                process.send_signal(signal.SIGKILL)
                process.wait()
                return False
            time.sleep(0.05)
        if process.returncode:
            sys.exit(f"the build ended with status {process.returncode}")
        return True

    work, begin = folder / "killed.building", time.perf_counter()
    n_bytes = sum(unit.size for unit in find_units(data))
    third = n_bytes // (3 << 21)
    watch(start("killed"), lambda: len(list(work.glob("spool/*-*"))) > third)
    print(f"killed while reading, after {time.perf_counter() - begin:.0f} s")
    watch(start("killed"), lambda: any(work.glob("pairs-*.run")) or (work / "verdict.npy").exists())
    print(f"killed while deciding, after {time.perf_counter() - begin:.0f} s")
    watch(start("killed"))
    print(f"built after {time.perf_counter() - begin:.0f} s; now undisturbed")
    begin = time.perf_counter()
    watch(start("undisturbed"))
    cards = [json.loads((folder / name / "card.json").read_text()) for name in ("killed", "undisturbed")]
    places = [[(folder / name / side / "documents.npy").read_bytes() for side in ("train", "validation")] for name in ("killed", "undisturbed")]
    same = cards[0] == cards[1] and places[0] == places[1]
    print(f"{n_bytes / 1e9:.2f} GB in {time.perf_counter() - begin:.0f} s; peak of all processes together: PSS {peaks[0] / 2 ** 20:.0f} MiB, RSS "
          f"{peaks[1] / 2 ** 20:.0f} MiB, allowed {memory}; shards, card and boundaries {'identical' if same else 'DIFFER'}")


def memory_of(root: int) -> tuple[int, int]:
    """PSS and RSS in bytes of a process and all below it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(path.name))
    pss = rss = 0
    waiting = [root]
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        try:
            lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:])
        except OSError:
            continue
        if "Pss" in lines:
            pss, rss = pss + int(lines["Pss"].split()[0]) * 1024, rss + int(lines["Rss"].split()[0]) * 1024
    return pss, rss


if __name__ == "__main__":
    main()
