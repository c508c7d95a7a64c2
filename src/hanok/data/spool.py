"""Documents on their way into a corpus: chunks of a few megabytes, each a file that appears whole and holds all that is known of its documents.

A chunk's name says where it stands (segment of the sources, number in it), so that what is there need not be made again. Its text is kept in
blocks of 64 KiB (zlib), so that any one document can be read back for a few tenths of a millisecond.
"""
from __future__ import annotations

import json
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hanok import disk
from hanok.data.minhash import BANDS, SCRIPTS
from hanok.errors import DataError

BLOCK_BYTES = 1 << 16
DOCUMENT = np.dtype([("digest", "<u8", 2), ("bytes", "<u8"), ("tokens", "<u8"), ("unknown", "<u8"), ("block", "<u4"), ("at", "<u4"),
                     ("name_end", "<u4"), ("characters", "?"), ("shingled", "?"), ("bands", "<u8", BANDS), ("scripts", "<u4", len(SCRIPTS))])
"""What a chunk tells of a document: BLAKE2b of its text, sizes (tokens with the end-of-text one), where text and name stand, how it is shingled."""


def chunk_path(folder: Path, segment: int, number: int) -> Path:
    return folder / f"{segment:06d}-{number:06d}"


def write_chunk(path: Path, documents: np.ndarray, tokens: np.ndarray, names: Sequence[str], texts: Sequence[bytes]) -> None:
    """Fills in where texts and names stand, and writes all of it, whole or not at all."""
    blocks: list[bytes] = []
    held: list[bytes] = []
    size = 0
    for row, text in enumerate(texts):
        if held and size + len(text) > BLOCK_BYTES:
            blocks.append(zlib.compress(b"".join(held), 1))
            held, size = [], 0
        documents["block"][row], documents["at"][row] = len(blocks), size
        held.append(text)
        size += len(text)
    blocks.append(zlib.compress(b"".join(held), 1))
    spelled = [name.encode("utf-8", "replace") for name in names]
    documents["name_end"] = np.cumsum([len(name) for name in spelled])
    sections = {"documents": documents.tobytes(), "tokens": tokens.tobytes(), "names": b"".join(spelled),
                "ends": np.cumsum([len(block) for block in blocks]).astype("<u4").tobytes(), "text": b"".join(blocks)}
    head = json.dumps({name: len(data) for name, data in sections.items()}).encode()
    with disk.new_file(path) as handle:
        handle.write(len(head).to_bytes(8, "little") + head)
        for data in sections.values():
            handle.write(data)


class Chunk:
    """A chunk's file; nothing of it stays in memory but its table of documents, once that was asked for."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as handle:
                length = int.from_bytes(handle.read(8), "little")
                lengths = json.loads(handle.read(length))
            size = path.stat().st_size
        except OSError as error:
            raise disk.disk_error(path, error) from None
        except (ValueError, OverflowError, MemoryError):
            raise DataError(f"{path}: not a chunk of a build; remove its folder, or begin anew with --fresh") from None
        self.places: dict[str, tuple[int, int]] = {}
        at = 8 + length
        for name, n in lengths.items():
            self.places[name] = (at, n)
            at += n
        if size != at:
            raise DataError(f"{path}: {size} bytes, expected {at}; it was cut short: remove it and go on, or begin anew with --fresh")

    def section(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes of a section."""
        at, length = self.places[name]
        with open(self.path, "rb") as handle:
            handle.seek(at + start)
            return handle.read((length if stop is None else stop) - start)

    @property
    def n_documents(self) -> int:
        return self.places["documents"][1] // DOCUMENT.itemsize

    @cached_property
    def documents(self) -> np.ndarray:
        return np.frombuffer(self.section("documents"), DOCUMENT)

    def tokens(self, dtype: Any) -> np.ndarray:
        return np.frombuffer(self.section("tokens"), dtype)

    def name(self, row: int) -> str:
        ends = self.documents["name_end"]
        return self.section("names", int(ends[row - 1]) if row else 0, int(ends[row])).decode()

    def block(self, number: int) -> bytes:
        """The text of a block."""
        ends = np.frombuffer(self.section("ends"), "<u4")
        return zlib.decompress(self.section("text", int(ends[number - 1]) if number else 0, int(ends[number])))

    def texts(self, rows: Sequence[int] | np.ndarray) -> Iterator[bytes]:
        """The texts of some documents, in the order of their rows."""
        number, text = -1, b""
        for row in rows:
            document = self.documents[row]
            if document["block"] != number:
                number = int(document["block"])
                text = self.block(number)
            yield text[int(document["at"]):int(document["at"]) + int(document["bytes"])]


class Memo:
    """The last things that were asked for, as long as they are not too many bytes together."""

    def __init__(self, make: Callable[[Any], Any], size_of: Callable[[Any], int], most_bytes: int):
        self.make, self.size_of, self.room = make, size_of, most_bytes
        self.kept: OrderedDict[Any, Any] = OrderedDict()

    def __call__(self, key: Any) -> Any:
        if key in self.kept:
            self.kept.move_to_end(key)
        else:
            self.kept[key] = self.make(key)
            self.room -= self.size_of(self.kept[key])
            while self.room < 0 and len(self.kept) > 1:
                self.room += self.size_of(self.kept.popitem(last=False)[1])
        return self.kept[key]


class Spool:
    """All chunks of a build in the order of the sources; documents are numbered through them."""

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int]):
        self.paths, self.starts = list(paths), np.cumsum([0, *sizes])
        self._chunk = Memo(lambda number: Chunk(self.paths[number]), lambda chunk: chunk.documents.nbytes, 16 << 20)
        self._block = Memo(lambda place: self._chunk(place[0]).block(place[1]), len, 16 << 20)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def chunks(self) -> Iterator[tuple[int, Chunk]]:
        """Each chunk with the number of its first document."""
        for start, path in zip(self.starts, self.paths):
            yield int(start), Chunk(path)

    def place(self, document: int) -> tuple[int, int]:
        """Chunk and row of a document."""
        number = int(np.searchsorted(self.starts, document, "right")) - 1
        return number, document - int(self.starts[number])

    def row(self, document: int) -> np.void:
        number, row = self.place(document)
        return self._chunk(number).documents[row]

    def name(self, document: int) -> str:
        number, row = self.place(document)
        return self._chunk(number).name(row)

    def text(self, document: int) -> bytes:
        number, row = self.place(document)
        told = self._chunk(number).documents[row]
        return self._block((number, int(told["block"])))[int(told["at"]):int(told["at"]) + int(told["bytes"])]
