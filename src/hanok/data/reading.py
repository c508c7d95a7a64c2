"""What every reader of text stands on: its options, its tallies, and streams that no document, line or archive can make large in memory.

Text flows as chunks: bytes -> `decoded` -> `lines` -> `documents`. None of them depends on where the chunks were cut.
"""
from __future__ import annotations

import codecs
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from hanok.data.sources import Document
from hanok.errors import ConfigError, DataError

BLOCK = 1 << 18
"""Bytes that are read at a time."""
LONGEST_ROW = 1 << 24
"""Characters in a line of JSONL, CSV or TSV, in a page of a dump, or bytes of a web page: about eight times the longest novel."""
_LOST = "\udcff"
"""Stands for bytes that are no text where bad rows are left out; no encoding gives it, none takes it."""
codecs.register_error("hanok.lost", lambda error: (_LOST, error.end))  # type: ignore[attr-defined]


@dataclass(frozen=True)
class ReadOptions:
    """How sources are read."""
    encoding: str = "utf-8"                  # of text, JSONL, CSV and TSV; the other formats say theirs themselves
    text_column: str = "text"                # the key or column that holds the text, in JSONL, CSV, TSV, Parquet and data sets
    skip_bad: bool = False                   # count what cannot be read and go on, where the rest of the file can be
    max_document: int = 1_000_000            # characters; a longer document is split at a line end, else a space, else anywhere

    def __post_init__(self) -> None:
        if self.max_document < 1:
            raise ConfigError(f"max_document {self.max_document}: expected 1 character or more")
        try:
            bytes(4).decode(self.encoding)       # four zeros are text in all of them; nothing at all is not even looked up
            codecs.getincrementaldecoder(self.encoding)
        except (LookupError, ValueError):
            raise DataError(f"unknown encoding {self.encoding!r}; examples: utf-8, latin-1, cp949, euc-kr, utf-16") from None


@dataclass
class Counts:
    """What readers met on their way."""
    bad: int = 0                             # rows, pages or pieces of text left out because they could not be read
    split: int = 0                           # documents longer than max_document
    empty: int = 0                           # documents of nothing but white space, left out
    why: str = field(default="", compare=False)                              # the first that is bad, and what is wrong with it

    def refuse(self, message: str, options: ReadOptions) -> None:
        """DataError, or with `skip_bad` one more that is bad."""
        if not options.skip_bad:
            raise DataError(f"{message} (--skip-bad leaves it out)")
        self.bad, self.why = self.bad + 1, self.why or message


@dataclass(frozen=True)
class Unit:
    """A source that is read from its beginning to its end: a file, stdin, or a data set."""
    name: str                                # as told to people
    kind: str                                # text, jsonl, csv, tsv, parquet, wikipedia, wet, warc, dataset or stdin
    path: Path | None = None                 # None: stdin and data sets
    compression: str | None = None           # gz, zst or bz2
    size: int = 0                            # bytes on disk; 0: stdin and data sets


def need(module: str, purpose: str, extra: str = "data") -> Any:
    """An optional module. DataError names the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"{purpose} needs {module.partition('.')[0]}, which is not installed; pip install 'hanok[{extra}]'") from None


def decoded(blocks: Iterable[bytes], name: str, options: ReadOptions) -> Iterator[str]:
    """Bytes as text, a UTF-8 byte order mark dropped. DataError names the first byte that is not `encoding`; with `skip_bad` it becomes _LOST."""
    encoding = "utf-8-sig" if options.encoding.lower().replace("_", "-") in ("utf-8", "utf8") else options.encoding
    decoder = codecs.getincrementaldecoder(encoding)("hanok.lost" if options.skip_bad else "strict")
    n_bytes = 0
    for block in chain(blocks, [b""]):
        n_bytes += len(block)
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            bad = f"0x{error.object[error.start]:02x}" if error.start < len(error.object) else "the end"
            place = n_bytes - len(error.object) + error.start
            raise DataError(f"{name}: not {options.encoding}: {bad} at byte {place}; name its encoding with --encoding, for example latin-1 or "
                            "cp949 (--skip-bad leaves such text out)") from None
        except UnicodeError as error:        # UTF-16 and UTF-32 without a mark
            raise DataError(f"{name}: not {options.encoding}: {error}; name its encoding with --encoding, for example utf-16-le") from None


def lines(chunks: Iterable[str]) -> Iterator[str | None]:
    r"""The text between two "\n", line by line; None for a line of more than LONGEST_ROW characters."""
    begun: list[str] = []
    length = 0
    for chunk in chunks:
        first, *more = chunk.split("\n")
        length += len(first)
        if length <= LONGEST_ROW:
            begun.append(first)
        if more:
            yield "".join(begun) if length <= LONGEST_ROW else None
            yield from (line if len(line) <= LONGEST_ROW else None for line in more[:-1])
            begun, length = [more[-1]], len(more[-1])
    if length:
        yield "".join(begun) if length <= LONGEST_ROW else None


def documents(name: str, chunks: Iterable[str], options: ReadOptions, counts: Counts) -> Iterator[Document]:
    """One text as a document, or as `name part 1`, `name part 2`... where it is longer than max_document; nothing, where it is white space."""
    is_empty = True
    for part, (piece, is_last) in enumerate(_cut(chunks, options.max_document), 1):
        counts.split += part == 2
        if not piece or piece.isspace():
            continue
        is_empty = False
        here = name if is_last and part == 1 else f"{name} part {part}"
        try:
            piece.encode()
        except UnicodeEncodeError as error:
            counts.refuse(f"{here}: character {error.start + 1} is half a surrogate pair, which is no text", options)
            continue
        yield Document(here, piece)
    counts.empty += is_empty


def told(names: Iterable[Any]) -> str:
    """Column names for a message, cut to what a line can hold."""
    names = [" ".join(str(name).split())[:40] for name in names]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") if names else "nothing"


def _cut(chunks: Iterable[str], length: int) -> Iterator[tuple[str, bool]]:
    """The text in pieces of at most `length` characters, and whether each is the last."""
    text, start = "", 0
    for chunk in chunks:
        if start:
            text, start = text[start:], 0
        text += chunk
        while len(text) - start > length:
            stop = start + length
            stop = text.rfind("\n", start, stop) + 1 or text.rfind(" ", start, stop) + 1 or stop
            yield text[start:stop], False
            start = stop
    yield text[start:], True
