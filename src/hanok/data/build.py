"""hanok corpus build: from any sources to token shards, on all cores, in bounded memory, and on again after any kill.

    OUT.building/build.json     what is built of what; a build that goes on is of the same
    OUT.building/spool/         chunks, and for each segment of the sources that is read a .json: its tallies, its files' hashes
    OUT.building/verdict.npy    what is to happen with each document; duplicates.jsonl; contamination.json
    OUT.building/new/           what becomes OUT by a rename when it is whole

A segment is a large unit of the sources or some small ones in a row. What is a chunk, and what becomes of a document, follows from the sources alone,
so neither the workers, their number, the memory nor a kill can be seen in the result.
"""
from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hanok import disk
from hanok.config import read_json, write_json
from hanok.data.card import describe, page
from hanok.data.corpus import end_of_text_id
from hanok.data.dedup import judge
from hanok.data.formats import Counts, ReadOptions, Unit, find_units, read_unit
from hanok.data.shards import write_sides
from hanok.data.sides import contamination, divide
from hanok.data.spool import Chunk, Spool, chunk_path
from hanok.data.workers import CHUNK_LENGTH, Order, Pool, chunks_of, is_written
from hanok.errors import ConfigError, DataError, TokenizerError
from hanok.report import size
from hanok.text.tokenizer import Tokenizer

SEGMENT_BYTES = 2 << 20
"""Bytes on disk after which a segment of small units ends."""
FED_BYTES = 8 << 20
"""A unit of more is read by the parent and dealt out in chunks; where reading itself is the work (HEAVY) only if it is the only one."""
HEAVY = ("wikipedia", "wet", "warc")
PARENT_BYTES, WORKER_BYTES, READER_BYTES, DATASET_BYTES, SOURCE_BYTES = 120 << 20, 170 << 20, 100 << 20, 400 << 20, 2500
"""Memory of the parent, of a worker with a small tokenizer, more where sources are packed (Parquet, crawls, dumps), more of a data set's library, and
more of each source in the parent."""
MOST_UNKNOWN, MOST_UNKNOWN_AT_FIRST = 0.01, 0.1
"""Shares of unknown tokens beyond which a tokenizer is not one for this text: in all of it, in the first chunk."""
PACKED = {"gz": 4.0, "bz2": 5.0, "zst": 4.0}
Progress = Callable[[str, float, float | None], Any]
"""Hears what is done, how much of it, and how much there is (None: nobody knows)."""


@dataclass(frozen=True)
class BuildOptions:
    """How a corpus is built."""
    read: ReadOptions = field(default_factory=ReadOptions)
    validation: float = 0.02                 # share of the documents that is held out
    dedup: bool = True                       # whether copies and near copies go
    memory: int = 1 << 30                    # bytes of all processes together
    workers: int = 0                         # processes beside this one; 0: one a core
    fresh: bool = False                      # whether what an earlier build left is thrown away

    def __post_init__(self) -> None:
        if not 0 < self.validation < 1:
            raise ConfigError(f"--validation {self.validation:g}: expected a share between 0 and 1, for example 0.02")
        if self.workers < 0:
            raise ConfigError(f"--workers {self.workers}: expected 1 or more, or 0 for all cores")


@dataclass(frozen=True)
class TokenizerFacts:
    """What is asked of a tokenizer by who does not encode."""
    json: str
    vocab_size: int
    end_id: int | None
    unknown_id: int | None

    @classmethod
    def of(cls, path: Path) -> TokenizerFacts:
        tokenizer = Tokenizer.load(path)
        model = json.loads(text := tokenizer.to_json())["model"]
        unknown = model.get("unk_id")
        if unknown is None and model.get("unk_token") is not None:
            unknown = tokenizer.id_of(model["unk_token"])
        return cls(text, tokenizer.vocab_size, end_of_text_id(tokenizer), unknown)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.json.encode()).hexdigest()

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")


class Build:
    """One build: its sources, its work folder, and the steps of it. HanokError where it cannot begin; nothing is written before `work` is entered."""

    def __init__(self, sources: Sequence[str], tokenizer: Path | str, out: Path | str, options: BuildOptions):
        self.out, self.options = Path(out), options
        if self.out.name in ("", ".."):
            raise ConfigError(f"--out {out}: expected the name of a new folder, for example {self.out / 'corpus'}")
        if self.out.is_symlink():                                    # a rename would not replace what it points to
            self.out = Path(os.path.realpath(self.out))
        self.work = self.out.with_name(f"{self.out.name}.building")
        self.new = self.work / "new"
        self.tokenizer = TokenizerFacts.of(Path(tokenizer))
        inside = self.work.resolve()
        self.units = [unit for unit in find_units(sources) if unit.path is None or not unit.path.resolve().is_relative_to(inside)]
        self.segments = list(segments(self.units))
        self.n_workers = self.affordable()
        begun = self.work / "build.json"
        self.is_finished = (self.out / "card.json").is_file() and (self.work / "finished").is_file() and begun.is_file() and (
            read_json(begun) == json.loads(json.dumps(self.told())))

    def affordable(self) -> int:
        """How many workers the memory allows, of those that are wanted. ConfigError where it is too little for one."""
        kinds = {unit.kind for unit in self.units}
        reader = READER_BYTES if kinds - {"text", "jsonl", "csv", "tsv", "stdin", "dataset"} else 0
        worker = WORKER_BYTES + 16 * len(self.tokenizer.json) + 48 * self.options.read.max_document + reader
        parent = PARENT_BYTES + 16 * len(self.tokenizer.json) + 16 * self.options.read.max_document + reader + DATASET_BYTES * ("dataset" in kinds)
        parent += SOURCE_BYTES * len(self.units)
        if self.options.memory < parent + worker:
            raise ConfigError(f"--memory of {size(self.options.memory)} is too little for these sources and this tokenizer; "
                              f"give {-(-(parent + worker) >> 20):d}MiB at least")
        wanted = self.options.workers or os.cpu_count() or 1
        return max(1, min(wanted, (self.options.memory - parent) // worker))

    # ---- the work folder ---------------------------------------------------------------------------------------
    def told(self) -> dict[str, Any]:
        """What is built of what: whatever decides the result."""
        files = [[spelled(unit.name), unit.kind, unit.size, changed(unit)] for unit in self.units]
        return {"format": 1, "tokenizer": self.tokenizer.sha256, "validation": self.options.validation, "dedup": self.options.dedup,
                **self.read_options(), "sources": files}

    def read_options(self) -> dict[str, Any]:
        return dataclasses.asdict(self.options.read)

    def begin(self) -> Callable[[], None]:
        """Makes or finds the work folder, and locks it until the returned function is called. DataError: it is of another build, or in use."""
        disk.refuse_occupied(self.out)
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.work, os.O_RDONLY)
        except OSError as error:
            raise disk.disk_error(self.work, error) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:                                      # nothing there is this one's to remove
            os.close(lock)
            raise DataError(f"{self.work}: another process is building there; wait for it, or end it first") from None
        try:
            if self.options.fresh:
                self.empty()
            begun = self.work / "build.json"
            if begun.is_file():
                self.compare(read_json(begun))
            else:
                self.empty()
                self.refuse_full_disk()
            (self.work / "spool").mkdir(exist_ok=True)
            disk.write_text(self.work / "tokenizer.json", self.tokenizer.json)
            write_json(begun, self.told())
        except BaseException as error:
            self.leave(lock)
            if isinstance(error, OSError):
                raise disk.disk_error(Path(error.filename or self.work), error) from None
            raise
        return lambda: self.leave(lock)

    def leave(self, lock: int) -> None:
        """Unlocks the work folder; one that holds nothing yet goes."""
        with suppress(OSError):
            if not any((self.work / "spool").iterdir()):
                self.empty()
        with suppress(OSError):
            self.work.rmdir()
        os.close(lock)

    def empty(self) -> None:
        for path in sorted(self.work.iterdir(), key=lambda path: path.name in ("build.json", "finished")):      # a kill may come between
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def compare(self, begun: dict[str, Any]) -> None:
        """DataError names the first thing in which this build is not the one that was begun."""
        now = json.loads(json.dumps(self.told()))
        for name in now:
            before, after = begun.get(name, []), now[name]
            if name == "skip_bad" and after or before == after:          # what was read so far had nothing bad
                continue
            told = f"{name.replace('_', '-')} {before}, now it is {after}"
            if name == "sources":
                old, new = ({source[0]: source[1:] for source in sources} for sources in (before, after))
                path = next((path for path in {**old, **new} if old.get(path) != new.get(path)), None)
                told = "the same sources in another order" if path is None else f"other sources: {path} " + (
                    "is new" if path not in old else "is not among them any more" if path not in new else "has changed since")
            raise DataError(f"{self.work}: begun with {told}; give what it was begun with, or --fresh to begin anew")

    def refuse_full_disk(self) -> None:
        """DataError where the disk will not hold the text in chunks, its tokens twice, and what is known of the documents."""
        text = sum(unit.size * PACKED.get(unit.compression or "", 3.0 if unit.kind == "parquet" else 1.0) for unit in self.units)
        needed = int(text * (1.0 + 0.6 * self.tokenizer.dtype.itemsize)) + len(self.tokenizer.json) * 2 + (1 << 20)
        free = shutil.disk_usage(self.work).free
        if free < needed:
            raise DataError(f"{self.out}: {size(needed)} are needed for chunks and shards (estimated from {size(int(text))} of text), "
                            f"and the disk has {size(free)} left; free some space, or choose another place")

    # ---- reading -----------------------------------------------------------------------------------------------
    def read(self, progress: Progress, say: Callable[[str], Any]) -> tuple[Spool, dict[str, Any]]:
        """Everything in chunks; those that are there already are not made again. Tallies and hashes of the sources go along."""
        reading = Reading(self)
        packed = any(unit.compression or unit.path is None or unit.kind in (*HEAVY, "parquet") for unit in self.units)
        total = None if packed else float(sum(unit.size for unit in self.units))
        left = [number for number in range(len(self.segments)) if not reading.done(number)]
        if len(left) < len(self.segments) or any((self.work / "spool").iterdir()):
            say(f"going on with {self.work}: {len(self.segments) - len(left):,} of {len(self.segments):,} parts of the sources were read")
        if left:
            n_bytes = float(sum(self.units[i].size for number in set(range(len(self.segments))) - set(left) for i in range(*self.segments[number])))
            n_workers = self.n_workers if any(map(reading.fed, left)) else min(self.n_workers, len(left))
            try:
                with Pool(n_workers, self.told_to_workers()) as pool:
                    for kind, segment, *rest in pool.run(reading.orders(left)):
                        reading.hear(kind, segment, *rest)
                        if kind == "chunk":
                            n_bytes += rest[2]
                            progress("reading", n_bytes, total)
            except DataError as error:
                if not any((self.work / "spool").iterdir()):
                    raise
                raise DataError(f"{error}; {self.work} keeps what was read before, until --fresh") from None
            self.compare(read_json(self.work / "build.json"))       # what was read while it changed is neither the old nor the new
        told = [read_json(reading.told(number)) for number in range(len(self.segments))]
        paths = [chunk_path(self.work / "spool", number, i) for number, one in enumerate(told) for i in range(one["chunks"])]
        sizes = [Chunk(path).n_documents for path in paths]
        spool = Spool(paths, sizes)
        counts = [(int(chunk.documents["unknown"].sum()), int(chunk.documents["tokens"].sum())) for _, chunk in spool.chunks()]
        self.refuse_unknown(sum(unknown for unknown, _ in counts), sum(tokens for _, tokens in counts), MOST_UNKNOWN)
        hashes = [sha256 for one in told for sha256 in one["sha256"]]
        sources = [{"path": spelled(unit.name), "kind": unit.kind, "bytes": unit.size, "sha256": sha256} for unit, sha256 in zip(self.units, hashes)]
        why = next((one["why"] for one in told if one.get("why")), "")
        return spool, {**{name: sum(one[name] for one in told) for name in ("bad", "split", "empty")}, "sources": sources, "why": why}

    def refuse_unknown(self, n_unknown: int, n_tokens: int, most: float) -> None:
        """TokenizerError where the tokenizer cannot spell the text."""
        if n_unknown > most * n_tokens:
            raise TokenizerError(f"{100 * n_unknown / n_tokens:.1f} % of the tokens are unknown to the tokenizer: it is not for this text; train one "
                                 "on it (`hanok tokenizer train`), or give another with --tokenizer")

    def told_to_workers(self) -> dict[str, Any]:
        """The settings that a worker begins with."""
        return {"spool": str(self.work / "spool"), "tokenizer": str(self.work / "tokenizer.json"), "ngrams": None, "dedup": self.options.dedup,
                "unknown_id": self.tokenizer.unknown_id, "dtype": self.tokenizer.dtype.str, "chunk_length": CHUNK_LENGTH,
                "read": dataclasses.asdict(self.options.read)}

    # ---- deciding ----------------------------------------------------------------------------------------------
    def decide(self, spool: Spool, progress: Progress) -> tuple[np.ndarray, int]:
        """What is to happen with each document (see dedup), and how many pairs were compared; told in the work folder."""
        path = self.work / "verdict.npy"
        if not path.is_file():
            for stale in self.work.glob("*.run"):
                stale.unlink()
            verdict = judge(spool, self.work, self.room(), progress, self.options.dedup)
            write_json(self.work / "compared.json", {"pairs": verdict.n_compared})
            with disk.new_file(path) as handle:
                np.save(handle, verdict.states)
        return np.load(path), read_json(self.work / "compared.json")["pairs"]

    def room(self) -> int:
        """Bytes of memory that are left to this process."""
        try:
            with open("/proc/self/statm") as file:
                used = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            used = PARENT_BYTES
        return max(16 << 20, (self.options.memory - used - (48 << 20)) // 2)


def build(sources: Sequence[str], tokenizer: Path | str, out: Path | str, options: BuildOptions | None = None,
          progress: Progress = lambda what, done, of: None, say: Callable[[str], Any] = lambda line: None) -> dict[str, Any]:
    """Builds the corpus folder `out` (tokenizer.json, train/, validation/, card.json, card.md, duplicates.jsonl) and returns its card.

    `out` appears when it is whole; until then out.building keeps what was done, and the same call goes on with it. HanokError on bad input, on a
    tokenizer that is not for this text, where memory or disk are too small, and where what was begun there is another build.
    """
    options = options or BuildOptions()
    one = Build(sources, tokenizer, out, options)
    if one.is_finished:                                          # all but the work folder's end
        shutil.rmtree(one.work)
        return read_json(one.out / "card.json")
    end = one.begin()
    try:
        if one.n_workers < (wanted := options.workers or os.cpu_count() or 1):
            say(f"{one.n_workers} of {wanted} workers: more do not fit into --memory")
        try:
            spool, tallies = one.read(progress, say)
        except TokenizerError:                                   # what was read is of no use to another one
            one.empty()
            raise
        why = tallies.pop("why")
        states, n_compared = one.decide(spool, progress)
        try:
            told = divide(spool, states, options.validation)
        except DataError as error:                               # the same call would end here again: there is nothing to go on with
            one.empty()
            raise DataError(f"{error}; {tallies['bad']:,} were left out, the first of them: {why}" if why else str(error)) from None
        if told:
            say(told)
        mixed = contamination(spool, states, one.work, one.n_workers, {**one.told_to_workers(), "tokenizer": None}, progress)
        facts = one.tokenizer
        common = {"vocab_size": facts.vocab_size, "end_id": facts.end_id, "tokenizer_sha256": facts.sha256, "sources": tuple(tallies["sources"])}
        write_sides(spool, states, one.work, one.new, common, facts.dtype, progress)
        card = describe(spool, states, one.new, {**common, **tallies, "dedup": options.dedup, "pairs_compared": n_compared, "contamination": mixed,
                                                 "validation": options.validation, **one.read_options()})
        disk.write_text(one.new / "tokenizer.json", facts.json)
        shutil.copyfile(one.work / "duplicates.jsonl", one.new / "duplicates.jsonl")
        write_json(one.new / "card.json", card)
        disk.write_text(one.new / "card.md", page(card, one.out.name))
        disk.write_text(one.work / "finished", "")
        if one.out.is_dir():
            one.out.rmdir()
        os.replace(one.new, one.out)
        one.empty()
        return card
    except OSError as error:
        raise disk.disk_error(Path(error.filename or one.work), error) from None
    finally:
        end()


class Reading:
    """Who reads what, and what is done of it."""

    def __init__(self, build: Build):
        self.build, self.spool = build, build.work / "spool"
        self.n_heavy = sum(unit.kind in HEAVY for unit in build.units)
        self.waiting: dict[int, set[int]] = {}                   # by fed segment: chunks on their way
        self.known: dict[int, dict[str, Any]] = {}               # and what is known of it

    def told(self, segment: int) -> Path:
        return self.spool / f"{segment:06d}.json"

    def done(self, segment: int) -> bool:
        return self.told(segment).is_file()

    def units(self, segment: int) -> list[Unit]:
        return self.build.units[slice(*self.build.segments[segment])]

    def fed(self, segment: int) -> bool:
        """Whether the parent reads it."""
        first = self.units(segment)[0]
        return first.path is None or first.size > FED_BYTES and (first.kind not in HEAVY or self.n_heavy == 1)

    def orders(self, left: Sequence[int]) -> Iterator[Order]:
        """What there is to do."""
        for segment in left:
            units = [{**dataclasses.asdict(unit), "path": None if unit.path is None else str(unit.path)} for unit in self.units(segment)]
            if not self.fed(segment):
                yield "read", segment, units
                continue
            self.waiting[segment], self.known[segment] = set(), {}
            yield "hash", segment, units
            counts, number = Counts(), -1
            some = (document for unit in self.units(segment) for document in read_unit(unit, self.build.options.read, counts))
            for number, documents in enumerate(chunks_of(some, CHUNK_LENGTH)):
                texts = [document.text for document in documents]
                if not is_written(path := chunk_path(self.spool, segment, number)):
                    self.waiting[segment].add(number)
                    yield "write", segment, number, [document.name for document in documents], texts
                    continue
                if (segment, number) == (0, 0):
                    known = Chunk(path).documents
                    self.build.refuse_unknown(int(known["unknown"].sum()), int(known["tokens"].sum()), MOST_UNKNOWN_AT_FIRST)
                if units[0]["path"] is None:
                    self.same(path, texts, units[0]["name"])
            self.known[segment] |= {"chunks": number + 1, **dataclasses.asdict(counts)}
            self.finish(segment)

    def same(self, path: Path, texts: Sequence[str], name: str) -> None:
        """DataError where what no file holds is not what it was."""
        digests = b"".join(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest() for text in texts)
        if digests != Chunk(path).documents["digest"].tobytes():
            raise DataError(f"{name} does not give the text that it gave before the build was interrupted; give the same, or --fresh to begin anew")

    def hear(self, kind: str, segment: int, *rest: Any) -> None:
        """Takes a worker's reply."""
        if kind == "chunk":
            number, _, _, n_tokens, n_unknown = rest
            if (segment, number) == (0, 0):
                self.build.refuse_unknown(n_unknown, n_tokens, MOST_UNKNOWN_AT_FIRST)
            if segment in self.waiting:
                self.waiting[segment].discard(number)
                self.finish(segment)
        elif kind == "hashes":
            self.known[segment]["sha256"] = rest[0]
            self.finish(segment)
        else:
            n_chunks, counts, hashes = rest
            write_json(self.told(segment), {"chunks": n_chunks, **counts, "sha256": hashes})

    def finish(self, segment: int) -> None:
        """Tells in the work folder that a fed segment is done, once it is."""
        if not self.waiting[segment] and {"chunks", "sha256"} <= set(self.known[segment]):
            write_json(self.told(segment), self.known[segment])


def spelled(name: str) -> str:
    """A name as it comes back from a JSON file: of one that is no UTF-8, "?" for what cannot be written."""
    return name.encode("utf-8", "replace").decode()


def changed(unit: Unit) -> int:
    """When its file was last written to. DataError: it is not there any more."""
    try:
        return 0 if unit.path is None else unit.path.stat().st_mtime_ns
    except OSError as error:
        raise disk.disk_error(Path(unit.name), error) from None


def segments(units: Sequence[Unit]) -> Iterator[tuple[int, int]]:
    """Units from .. to, in order: each large one or one that is no file for itself, small ones together."""
    start, size = 0, 0
    for i, unit in enumerate(units):
        own = int(unit.size * PACKED.get(unit.compression or "", 1.0)) + 4096
        if start < i and (unit.path is None or size + own > SEGMENT_BYTES):
            yield start, i
            start, size = i, 0
        size += own if unit.path is not None else SEGMENT_BYTES
    if units:
        yield start, len(units)
