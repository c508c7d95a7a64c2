"""Pairs of a source and a target: TSV, CSV or JSONL with named columns, split without leaks, tokenised once and memory-mapped.

    pairs.json            PairInfo: counts, dtype, vocabulary
    source.bin target.bin token ids one after the other, little endian, uint16 where the vocabulary has at most 65,536 entries, else uint32
    lengths.npy           int64 (N,2), the tokens of each source and target
"""
from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hanok import disk
from hanok.config import from_dict, read_json, to_dict, write_json
from hanok.data.corpus import cached
from hanok.data.reading import LONGEST_ROW
from hanok.data.sources import walk
from hanok.errors import ConfigError, DataError, TokenizerError
from hanok.text.tokenizer import Tokenizer

PAIR_SUFFIXES = (".tsv", ".csv", ".jsonl")
"""The files that hold pairs."""
BATCH_PAIRS = 4096
"""Pairs that are encoded at a time."""


@dataclass(frozen=True)
class TextPair:
    """A source, what should be written of it, and what it belongs to (a file, a speaker)."""
    source: str
    target: str
    group: str = ""


@dataclass(frozen=True)
class Columns:
    """Where a row holds what. `names` are those of a TSV or CSV whose first line is a pair already; (): its first line holds them."""
    source: str = "source"
    target: str = "target"
    group: str | None = None
    names: tuple[str, ...] = ()


def find_pairs(paths: Sequence[str | Path]) -> list[Path]:
    """The files that `paths` name: each file itself, of each folder those of PAIR_SUFFIXES that are text to learn from (`sources.walk`). DataError:
    none, or a file of another kind."""
    if not paths:
        raise DataError("no files or folders were given; name at least one")
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = walk(path, PAIR_SUFFIXES)
            if not found:
                raise DataError(f"{path}: no files of pairs in this folder; the suffixes that count are {' '.join(PAIR_SUFFIXES)}")
            files += found
        elif path.suffix.lower() not in PAIR_SUFFIXES:
            raise DataError(f"{path}: pairs of a source and a target are read from {', '.join(PAIR_SUFFIXES)} files")
        else:
            files.append(path)
    return files


def read_pairs(paths: Sequence[str | Path], columns: Columns = Columns(), encoding: str = "utf-8") -> Iterator[TextPair]:
    """The pairs of all files, in order; those with an empty side are passed over. DataError names file and line, and the columns that are there."""
    for path in find_pairs(paths):
        text = disk.read_text(path, encoding)
        rows = _json_rows(text, path) if path.suffix.lower() == ".jsonl" else _table_rows(text, path, columns.names)
        for line, row in rows:
            for name in (columns.source, columns.target, *([columns.group] if columns.group else [])):
                if name not in row:
                    raise DataError(f"{path}: line {line} has no column '{name}', it has {', '.join(map(str, row))}; say which are which with "
                                    "data.source_column and data.target_column, or name all of them with data.columns")
                if not isinstance(row[name], str):
                    raise DataError(f"{path}: line {line}: '{name}' is {json.dumps(row[name])[:40]}, expected text")
            if row[columns.source].strip() and row[columns.target].strip():
                yield TextPair(row[columns.source], row[columns.target], row[columns.group] if columns.group else "")


def _json_rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}: line {number} is no JSON: {' '.join(str(error).split())}") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}: line {number} is a {type(row).__name__}, expected an object like {{\"source\": ..., \"target\": ...}}")
            yield number, row


def _table_rows(text: str, path: Path, names: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = _csv_lines(text, path) if path.suffix.lower() == ".csv" else _tsv_lines(text)
    known = list(names)
    for number, values in lines:
        if not known:
            known = [value.strip() for value in values]
        elif len(values) != len(known):
            raise DataError(f"{path}: line {number} has {len(values)} columns, expected {len(known)} ({', '.join(known)})")
        else:
            yield number, dict(zip(known, values))


def _tsv_lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """Quotes are characters like others."""
    return ((number, line.rstrip("\r").split("\t")) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _csv_lines(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(max(LONGEST_ROW, csv.field_size_limit()))                    # of the process, and only ever raised
    lines = csv.reader(io.StringIO(text, newline=""))
    while True:
        try:
            values = next(lines, None)
        except csv.Error as error:
            raise DataError(f"{path}: line {lines.line_num}: {error}") from None
        if values is None:
            return
        if values:
            yield lines.line_num, values


def split_pairs(pairs: Iterable[TextPair], fraction: float, seed: int) -> tuple[list[TextPair], list[TextPair]]:
    """Training and validation pairs. About `fraction` of the groups, or of the sources where there are no groups, are held out, by a hash of (seed,
    group), so that more data moves no pair to the other side; of these, pairs whose source training has as well are left out.

    ConfigError: a fraction outside 0..1. DataError: too few groups or pairs.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"validation fraction {fraction:g}: expected a number between 0 and 1, for example 0.05")
    pairs = list(pairs)
    if not pairs:
        raise DataError("there are no pairs with a source and a target; give files that hold some")
    places = {group: _place(f"{seed}:{group}") for group in {pair.group or _same(pair.source) for pair in pairs}}
    if len(places) < 2:
        what = f"all {len(pairs)} pairs are of the group '{pairs[0].group}'" if pairs[0].group else f"all {len(pairs)} pairs have the same source"
        raise DataError(f"{what}, so none can be held out for validation; give more, or another data.group_column")
    ordered = sorted(places, key=lambda group: places[group])
    held = set(ordered[:min(max(1, sum(place < fraction for place in places.values())), len(ordered) - 1)])
    train = [pair for pair in pairs if (pair.group or _same(pair.source)) not in held]
    known = {_same(pair.source) for pair in train}
    validation = [pair for pair in pairs if (pair.group or _same(pair.source)) in held and _same(pair.source) not in known]
    if not validation:
        raise DataError("every source that was held out for validation is in the training data as well; give more pairs or a larger data.validation")
    return train, validation


def _same(source: str) -> str:
    """What two sources that count as equal share."""
    return " ".join(source.split()).casefold()


def _place(text: str) -> float:
    """A number from 0 to 1 that follows from the text."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:6], "big") / (1 << 48)


# ---- on disk -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PairInfo:
    """What stands in pairs.json."""
    pairs: int
    tokens: tuple[int, int]                              # of all sources, of all targets
    dtype: str                                           # uint16 or uint32
    vocab_size: int                                      # of the tokenizer


class PairCorpus:
    """A folder of tokenised pairs, memory-mapped: pair i is `corpus[i]`."""

    def __init__(self, path: Path, info: PairInfo, sides: tuple[np.ndarray, np.ndarray], lengths: np.ndarray):
        self.path, self.info, self.lengths, self._sides = path, info, lengths, sides      # lengths (N,2)
        self._ends = lengths.cumsum(0)

    @classmethod
    def open(cls, path: str | Path) -> PairCorpus:
        """Opens a folder that `build_pairs` made. DataError if it is none, or a file of it is missing or cut short."""
        path = Path(path)
        if not (path / "pairs.json").is_file():
            raise DataError(f"{path}: not a corpus of pairs, it has no pairs.json; build one there")
        info = from_dict(PairInfo, read_json(path / "pairs.json"), str(path / "pairs.json"))
        try:
            dtype = np.dtype(info.dtype).newbyteorder("<")
            lengths = np.load(path / "lengths.npy", allow_pickle=False)
            sides = _map(path / "source.bin", dtype, info.tokens[0]), _map(path / "target.bin", dtype, info.tokens[1])
        except OSError as error:
            raise disk.disk_error(path, error) from None
        except (ValueError, EOFError, TypeError):
            raise DataError(f"{path}: its files do not fit together; build the corpus again") from None
        if lengths.shape != (info.pairs, 2) or tuple(lengths.sum(0).tolist()) != info.tokens:
            raise DataError(f"{path}: lengths.npy does not fit pairs.json; build the corpus again")
        return cls(path, info, sides, lengths)

    def __len__(self) -> int:
        return self.info.pairs

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and target, (S,) and (T,): views of the disk, not to be written to."""
        (s, t), (s_end, t_end) = self.lengths[index], self._ends[index]
        return self._sides[0][s_end - s:s_end], self._sides[1][t_end - t:t_end]


def _map(path: Path, dtype: np.dtype, n: int) -> np.ndarray:
    if path.stat().st_size != n * dtype.itemsize:
        raise DataError(f"{path}: {path.stat().st_size} bytes, expected {n * dtype.itemsize}; it was cut short or changed, so build the corpus again")
    return np.asarray(np.memmap(path, dtype, "r", shape=(n,))) if n else np.empty(0, dtype)


def build_pairs(pairs: Sequence[TextPair], tokenizer: Tokenizer, out: str | Path) -> PairCorpus:
    """Encodes pairs into the new folder `out`, whole or not at all, and opens it. Sources get what the tokenizer puts around a text; targets nothing.

    A pair with a side that has no tokens is left out. DataError: `out` is not empty, or nothing is left.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    lengths: list[tuple[int, int]] = []
    with disk.new_dir(out) as folder:
        with open(folder / "source.bin", "wb") as sources, open(folder / "target.bin", "wb") as targets:
            for first in range(0, len(pairs), BATCH_PAIRS):
                some = pairs[first:first + BATCH_PAIRS]
                read = tokenizer.encode_batch([pair.source for pair in some], add_special=True)
                written = tokenizer.encode_batch([pair.target for pair in some])
                both = [(source, target) for source, target in zip(read, written) if source and target]
                lengths += [(len(source), len(target)) for source, target in both]
                for file, side in ((sources, 0), (targets, 1)):
                    ids = np.array([token for pair in both for token in pair[side]], np.int64)
                    if len(ids) and ids.max() >= tokenizer.vocab_size:
                        raise TokenizerError(f"the tokenizer gave id {ids.max()}, but its vocab_size is {tokenizer.vocab_size}")
                    file.write(ids.astype(dtype).tobytes())
        if not lengths:
            raise DataError("there are no pairs to build a corpus from; every one had an empty side")
        table = np.array(lengths, np.int64)
        np.save(folder / "lengths.npy", table, allow_pickle=False)
        n_source, n_target = table.sum(0).tolist()
        write_json(folder / "pairs.json", to_dict(PairInfo(len(lengths), (n_source, n_target), dtype.name, tokenizer.vocab_size)))
    return PairCorpus.open(out)


def cached_pairs(pairs: Sequence[TextPair], tokenizer: Tokenizer, folder: Path) -> PairCorpus:
    """The corpus of these pairs and this tokenizer below `folder`: encoded once, and again where it is damaged."""
    digest = hashlib.sha256(tokenizer.to_json().encode())
    for pair in pairs:
        digest.update(hashlib.sha256(json.dumps([pair.source, pair.target]).encode()).digest())
    path = folder / digest.hexdigest()[:32]
    return cached(PairCorpus.open, lambda: build_pairs(pairs, tokenizer, path), path)
