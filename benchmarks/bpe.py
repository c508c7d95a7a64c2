"""BPE training as people call it, beside `tokenizers` itself: whole processes on the same text files, with the same pre-tokenizer and vocabulary.

    python benchmarks/bpe.py [--data FILE_OR_FOLDER...] [--bytes 100e6] [--vocab-size 8192] [--repeats 3]

Ours is `hanok tokenizer train`, from files to tokenizer.json; theirs `Tokenizer.train(files)` and `save`, which reads line by line. Without --data
the text is made: words by Zipf's law, English-like and Korean.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import count
from pathlib import Path

from common import alternate, seconds
from corpus import generated, texts
from hanok.data.sources import find_files

GOAL = 1 / 1.2
THEIRS = """
import sys
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from hanok.text.training import PRE_TOKENIZERS
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer, tokenizer.decoder = PRE_TOKENIZERS["qwen2"](), decoders.ByteLevel()
tokenizer.train(sys.argv[3:], trainers.BpeTrainer(vocab_size=int(sys.argv[2]), min_frequency=2, special_tokens=["<|endoftext|>"], show_progress=False,
                                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
tokenizer.save(sys.argv[1])
"""
"""The same pre-tokenizer object, so that nothing but the way of the text differs."""


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--data", nargs="+", default=[])
    arguments.add_argument("--bytes", type=float, default=100e6)
    arguments.add_argument("--vocab-size", type=int, default=8192)
    arguments.add_argument("--repeats", type=int, default=3)
    told = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [str(path) for path in find_files(told.data)] if told.data else plain(folder, int(told.bytes))
        megabytes = sum(Path(path).stat().st_size for path in files) / 1e6
        ours = [sys.executable, "-m", "hanok.cli.main", "tokenizer", "train", *files, "--vocab-size", str(told.vocab_size), "--json", "--out"]
        theirs = [sys.executable, "-c", THEIRS, str(folder / "theirs.json"), str(told.vocab_size), *files]
        fresh = count()

        def ours_rate() -> float:
            return megabytes / seconds(lambda: run([*ours, str(folder / f"ours{next(fresh)}")]))

        pair = alternate("BPE training, of tokenizers itself", "MB/s", ours_rate, lambda: megabytes / seconds(lambda: run(theirs)), told.repeats)
        merges = [json.loads(path.read_text())["model"]["merges"] for path in (folder / "ours0" / "tokenizer.json", folder / "theirs.json")]
        same = sum(a == b for a, b in zip(*merges))
        print(f"{megabytes:.1f} MB in {len(files)} files; {len(merges[0])} merges, {same} of them the same in the same place")
        print(pair.line(GOAL))


def plain(folder: Path, n_bytes: int) -> list[str]:
    """Text files of 64 documents each, a line each."""
    lines = [text + "\n" for text in texts([str(generated(folder / "text", n_bytes))])]
    files = []
    for first in range(0, len(lines), 64):
        files.append(folder / f"{len(files):05d}.txt")
        files[-1].write_text("".join(lines[first:first + 64]), encoding="utf-8")
    return [str(path) for path in files]


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
