"""The last step of a build: the tokens of what is kept, copied from chunks into the two corpora of the new folder.

Now and then it is noted how far both are; a build that goes on cuts them back to the note, and writes the same bytes again.
"""
from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from hanok.config import read_json, to_dict, write_json
from hanok.data.corpus import SHARD_TOKENS, CorpusInfo, append, append_tokens, shard_path, write_npy_header
from hanok.data.dedup import KEPT
from hanok.data.sides import HELD_OUT
from hanok.data.spool import Chunk, Spool

SIDES = {"train": KEPT, "validation": HELD_OUT}
NOTE_EVERY = 16
"""Chunks between two notes of how far the copying is."""


def write_sides(spool: Spool, states: np.ndarray, work: Path, new: Path, common: dict[str, Any], dtype: np.dtype,
                progress: Callable[[str, float, float | None], Any]) -> None:
    """Writes new/train and new/validation. `common`: what stands in the corpus.json of both."""
    note = work / "copied.json"
    told: dict[str, Any] = {"chunk": 0, **{side: {"documents": 0, "tokens": 0, "bytes": 0} for side in SIDES}}
    if note.is_file() and all(cut_back(new / side, read_json(note)[side], dtype) for side in SIDES):
        told = read_json(note)
        for path in new.iterdir():                       # what stands beside the sides is written last, and a kill may have left a part of it
            if path.is_file():
                path.unlink()
    else:
        shutil.rmtree(new, ignore_errors=True)
        for side in SIDES:
            (new / side).mkdir(parents=True)
            write_npy_header(new / side / "documents.npy", 0)
    for number in range(told["chunk"], len(spool.paths)):
        copy(spool, number, states, new, told, dtype)
        if (number + 1) % NOTE_EVERY == 0:
            write_json(note, {**told, "chunk": number + 1})
        progress("writing shards", number + 1, len(spool.paths))
    for side in SIDES:
        write_npy_header(new / side / "documents.npy", told[side]["documents"])
        info = CorpusInfo(dtype=dtype.name, shards=tuple(shards_of(told[side]["tokens"])), **told[side], **common)
        write_json(new / side / "corpus.json", to_dict(info))


def copy(spool: Spool, number: int, states: np.ndarray, new: Path, told: dict[str, Any], dtype: np.dtype) -> None:
    """One chunk's documents, each to its side."""
    chunk = Chunk(spool.paths[number])
    of, lengths = states[spool.starts[number]:spool.starts[number + 1]], chunk.documents["tokens"].astype(np.int64)
    tokens = chunk.tokens(dtype)
    for side, state in SIDES.items():
        mine, here = of == state, told[side]
        if not mine.any():
            continue
        starts = here["tokens"] + np.cumsum(lengths[mine]) - lengths[mine]
        append_tokens(new / side, shards_of(here["tokens"]), tokens[np.repeat(mine, lengths)])
        append(new / side / "documents.npy", starts.astype("<i8"))
        here["documents"] += int(mine.sum())
        here["tokens"] += int(lengths[mine].sum())
        here["bytes"] += int(chunk.documents["bytes"][mine].sum())


def shards_of(n_tokens: int) -> list[int]:
    """Tokens in each shard of so many."""
    full, rest = divmod(n_tokens, SHARD_TOKENS)
    return [SHARD_TOKENS] * full + [rest] * (rest > 0 or not full)


def cut_back(folder: Path, told: dict[str, int], dtype: np.dtype) -> bool:
    """Shortens a side's files to what the note tells; False where they hold less."""
    head = BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<i8", "fortran_order": False, "shape": (0,)})
    sizes = {shard_path(folder, i): n * dtype.itemsize for i, n in enumerate(shards_of(told["tokens"]))}
    sizes = {path: size for path, size in sizes.items() if size} | {folder / "documents.npy": len(head.getvalue()) + 8 * told["documents"]}
    for path, size in sizes.items():
        if not path.is_file() or path.stat().st_size < size:
            return False
    for path in folder.iterdir():
        if path in sizes:
            os.truncate(path, sizes[path])
        else:
            path.unlink()
    return True
