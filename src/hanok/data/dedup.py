"""Which documents go: copies of an earlier one, and those whose shingles are an earlier kept one's to 0.8 (Jaccard), whatever the memory.

Band hashes are sorted in runs on disk and merged in blocks. Documents that share a band are candidates: of its bucket each is held against the first
few and the last few before it, so that a bucket of any size costs no more than its length. A candidate that went itself hands on to the one that it
went for. What is near is decided by the shingle sets of the two texts, in the order of the documents; signatures only say where to look.
"""
from __future__ import annotations

import json
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hanok import disk
from hanok.data import minhash
from hanok.data.minhash import overlap, shingles
from hanok.data.spool import Memo, Spool

LEAST_SHARED, OF = 4, 5
"""Jaccard of 4/5 and more is near."""
FIRST, PREVIOUS = 8, 8
"""Members of a bucket that each is held against: the first of it, and those just before."""
KEPT, EMPTY, EXACT, NEAR = range(4)
RECORD = np.dtype([("key", "<u8"), ("value", "<u8")])
SMALLEST_BLOCK = 1 << 10
"""Records of a run that are read at a time, at least."""
_DOCUMENT_BITS = np.uint64(40)
"""An exact copy's record is its document's number with 24 more bits of its hash above: 88 bits of it have to be equal."""


class Runs:
    """Records of a key and a value that come back sorted by both; memory holds `most_bytes` of them, the disk the rest."""

    def __init__(self, folder: Path, name: str, most_bytes: int):
        self.folder, self.name = folder, name
        self.most = max(SMALLEST_BLOCK, most_bytes // RECORD.itemsize // 4)      # sorting holds them twice, and the order
        self.held: list[np.ndarray] = []
        self.n_held, self.lengths = 0, []  # type: int, list[int]

    def add(self, keys: np.ndarray, values: np.ndarray) -> None:
        """More records, in any order."""
        for start in range(0, len(keys), self.most):
            part = np.empty(len(keys[start:start + self.most]), RECORD)
            part["key"], part["value"] = keys[start:start + self.most], values[start:start + self.most]
            if self.n_held + len(part) > self.most:
                self._spill()
            self.held.append(part)
            self.n_held += len(part)

    def merged(self, whole: bool = True) -> Iterator[np.ndarray]:
        """All records in order, in blocks. `whole`: records of the same key are never in two of them, so they have to fit into memory."""
        if not self.lengths:
            if self.n_held:
                yield ordered(np.concatenate(self.held))
            return
        self._spill()
        size = max(SMALLEST_BLOCK, self.most // len(self.lengths))
        read, blocks = [0] * len(self.lengths), [np.empty(0, RECORD) for _ in self.lengths]
        wanted = set(range(len(self.lengths)))
        while True:
            for run in wanted:
                blocks[run] = np.concatenate([blocks[run], self._read(run, read[run], size)])
                read[run] = min(read[run] + size, self.lengths[run])
            open_runs = [run for run, length in enumerate(self.lengths) if read[run] < length]
            if not open_runs:
                break
            limit = min(blocks[run]["key"][-1] if whole else blocks[run][-1].item() for run in open_runs)
            ends = [int(np.searchsorted(block["key"], limit)) if whole else behind(block, limit) for block in blocks]   # of a whole key more may come
            if any(ends):
                yield ordered(np.concatenate([block[:end] for block, end in zip(blocks, ends)]))
            blocks = [block[end:] for block, end in zip(blocks, ends)]
            wanted = {run for run in open_runs if not len(blocks[run]) or whole and blocks[run]["key"][-1] == limit}
        if any(map(len, blocks)):
            yield ordered(np.concatenate(blocks))

    def close(self) -> None:
        """Forgets everything."""
        self.held.clear()
        for run in range(len(self.lengths)):
            with suppress(OSError):
                self._path(run).unlink()

    def _spill(self) -> None:
        if self.n_held:
            path = self._path(len(self.lengths))
            try:
                ordered(np.concatenate(self.held)).tofile(path)
            except OSError as error:
                raise disk.disk_error(path, error) from None
            self.lengths.append(self.n_held)
            self.held, self.n_held = [], 0

    def _read(self, run: int, start: int, n: int) -> np.ndarray:
        return np.fromfile(self._path(run), RECORD, n, offset=start * RECORD.itemsize)

    def _path(self, run: int) -> Path:
        return self.folder / f"{self.name}-{run:05d}.run"


def ordered(records: np.ndarray) -> np.ndarray:
    """Records by key, then value."""
    return records[np.lexsort((records["value"], records["key"]))]


def behind(block: np.ndarray, limit: tuple[int, int]) -> int:
    """How many of these records, which are in order, are not behind `limit`."""
    start, stop = (int(np.searchsorted(block["key"], np.uint64(limit[0]), side)) for side in ("left", "right"))
    return start + int(np.searchsorted(block["value"][start:stop], np.uint64(limit[1]), "right"))


@dataclass
class Verdict:
    """What is to happen with each document."""
    states: np.ndarray                       # (documents,) uint8: KEPT, EMPTY, EXACT or NEAR
    n_compared: int = 0                      # pairs whose shingles were compared
    gone: array[int] = field(default_factory=lambda: array("Q"))              # near ones, in order
    kept: array[int] = field(default_factory=lambda: array("Q"))              # for which each of them went
    jaccard: array[float] = field(default_factory=lambda: array("d"))         # of the two

    def root(self, document: int) -> tuple[int, float]:
        """The document itself, or the one for which it went, and the Jaccard of the two."""
        if self.states[document] != NEAR:
            return document, 1.0
        place = bisect_left(self.gone, document)
        return self.kept[place], self.jaccard[place]


def judge(spool: Spool, work: Path, most_bytes: int, progress: Callable[[str, int, int], Any] = lambda what, done, of: None,
          dedup: bool = True) -> Verdict:
    """Decides all documents of the spool, and writes work/duplicates.jsonl. The same whatever `most_bytes`, which the runs in memory keep to."""
    verdict = Verdict(np.zeros(len(spool), np.uint8))
    for start, chunk in spool.chunks():
        verdict.states[start:start + len(chunk.documents)][chunk.documents["tokens"] == 0] = EMPTY
    with disk.new_file(work / "duplicates.jsonl") as told:
        if dedup:
            found = copies(spool, work, most_bytes, verdict)
            nears(spool, work, most_bytes, verdict, told.write, progress)
            for block in found.merged():
                for document, first in zip(*(block[name].tolist() for name in ("key", "value"))):
                    told.write(line(spool, "exact", document, *verdict.root(first)))
            found.close()
    return verdict


def copies(spool: Spool, work: Path, most_bytes: int, verdict: Verdict) -> Runs:
    """All but the first of equal texts, each with the first."""
    runs, found = Runs(work, "texts", most_bytes // 2), Runs(work, "copies", most_bytes // 2)
    for start, chunk in spool.chunks():
        numbers = np.arange(start, start + len(chunk.documents), dtype=np.uint64)
        some = verdict.states[start:start + len(numbers)] == KEPT
        digests = chunk.documents["digest"][some]
        runs.add(digests[:, 0], numbers[some] | digests[:, 1] >> _DOCUMENT_BITS << _DOCUMENT_BITS)
    last = np.zeros(0, np.uint64)                # key, check and first document of the text that the next block may go on with
    for block in runs.merged(whole=False):
        check, documents = block["value"] >> _DOCUMENT_BITS, block["value"] & ((np.uint64(1) << _DOCUMENT_BITS) - np.uint64(1))
        begins = np.r_[True, (block["key"][1:] != block["key"][:-1]) | (check[1:] != check[:-1])]
        first = documents[np.maximum.accumulate(np.where(begins, np.arange(len(block)), 0))]
        if len(last) and (block["key"][0], check[0]) == (last[0], last[1]):
            begins[0] = False
            first[:np.flatnonzero(begins)[0] if begins.any() else len(block)] = last[2]
        last = np.array([block["key"][-1], check[-1], first[-1]])
        found.add(documents[~begins], first[~begins])
        verdict.states[documents[~begins].astype(np.int64)] = EXACT
    runs.close()
    return found


def nears(spool: Spool, work: Path, most_bytes: int, verdict: Verdict, write: Callable[[bytes], Any],
          progress: Callable[[str, int, int], Any]) -> None:
    """Documents that are near to an earlier one that is kept."""
    pairs = candidates(spool, work, most_bytes, verdict.states, progress)

    def set_of(document: int) -> np.ndarray:
        return shingles(spool.text(document), bool(spool.row(document)["characters"]))

    sets = Memo(set_of, lambda found: found.nbytes, most_bytes // 8)
    for block in pairs.merged():
        documents, begins = np.unique(block["key"], return_index=True)
        for document, start, stop in zip(documents.tolist(), begins, [*begins[1:], len(block)]):
            for earlier in sorted({verdict.root(other)[0] for other in block["value"][start:stop].tolist()}):
                shared, together = overlap(sets(earlier), sets(document))
                verdict.n_compared += 1
                if OF * shared >= LEAST_SHARED * together:
                    verdict.states[document] = NEAR
                    verdict.gone.append(document)
                    verdict.kept.append(earlier)
                    verdict.jaccard.append(shared / together)
                    write(line(spool, "near", document, earlier, shared / together))
                    break
            progress("comparing", document, len(spool))
    pairs.close()


def candidates(spool: Spool, work: Path, most_bytes: int, states: np.ndarray, progress: Callable[[str, int, int], Any]) -> Runs:
    """Pairs (document, an earlier one) that share a band."""
    runs, pairs = Runs(work, "bands", most_bytes // 2), Runs(work, "pairs", most_bytes // 4)
    for start, chunk in spool.chunks():
        rows = np.flatnonzero((states[start:start + len(chunk.documents)] == KEPT) & chunk.documents["shingled"])
        keys = chunk.documents["bands"][rows] ^ minhash.mixed(np.arange(minhash.BANDS, dtype=np.uint64))
        runs.add(keys.ravel(), np.repeat(rows + start, minhash.BANDS).astype(np.uint64))
        progress("sorting", start + len(chunk.documents), len(spool))
    held = np.empty(0, RECORD)                   # of the bucket that the next block may go on with, all that its later members are held against
    for block in runs.merged(whole=False):
        block = np.concatenate([held, block])
        for some in pairs_of(block["key"], block["value"], len(held)):
            pairs.add(*some)
        last = block[np.searchsorted(block["key"], block["key"][-1]):]
        held = np.concatenate([last[:FIRST], last[max(FIRST, len(last) - PREVIOUS):]])
    runs.close()
    return pairs


def pairs_of(keys: np.ndarray, documents: np.ndarray, n_known: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(documents, earlier ones) of each bucket: a run of equal keys, its documents in order. Of the first `n_known` the pairs are known."""
    places = np.arange(len(keys))
    first = np.maximum.accumulate(np.where(np.r_[True, keys[1:] != keys[:-1]], places, 0))
    crowded = np.flatnonzero((places > first) & (places >= n_known))
    for back in range(1, PREVIOUS + 1):
        crowded = crowded[places[crowded] - back >= first[crowded]]
        yield documents[crowded], documents[crowded - back]
    for on in range(FIRST):
        crowded = crowded[first[crowded] + on < places[crowded] - PREVIOUS]
        yield documents[crowded], documents[first[crowded] + on]


def line(spool: Spool, kind: str, document: int, kept: int, jaccard: float) -> bytes:
    """What duplicates.jsonl says of a document that went."""
    told = {"removed": spool.name(document), "kept": spool.name(kept), "kind": kind, "jaccard": round(jaccard, 4),
            "bytes": int(spool.row(document)["bytes"])}
    return (json.dumps(told, ensure_ascii=False) + "\n").encode("utf-8", "replace")
