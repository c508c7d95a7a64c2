"""Where text comes from, whatever it is kept in: sources become units, and a unit becomes documents, in an order that never changes.

Text, Markdown, code and HTML files, JSONL, CSV, TSV, Parquet, Wikipedia's dumps, Common Crawl's WET and WARC, each also as .gz, .zst or .bz2 (Parquet
is packed inside already); folders of these, stdin, and data sets of Hugging Face. Nothing here imports torch: the processes that read stay small.
"""
from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from hanok import disk
from hanok.data.compressed import COMPRESSIONS, blocks
from hanok.data.crawl import read_crawl
from hanok.data.reading import BLOCK, Counts, ReadOptions, Unit, decoded, documents
from hanok.data.sources import SUFFIXES, Document, is_folder, walk
from hanok.data.tables import read_csv, read_dataset, read_jsonl, read_parquet, read_tsv
from hanok.data.wikipedia import read_wikipedia
from hanok.errors import DataError

__all__ = ["Counts", "ReadOptions", "Unit", "find_units", "read_unit"]

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".wet": "wet", ".warc": "warc"}
"""Kinds of file by their suffix, beside SUFFIXES (text) and .xml (Wikipedia, if it begins as a dump does)."""
ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".7z", ".rar", ".xz", ".lz4")
"""What has to be unpacked first."""
_XML = re.compile(r"\.xml(-p\d+p\d+)?$")
_ALL = ", ".join((*SUFFIXES, *KINDS, ".xml (MediaWiki)"))


def find_units(sources: Sequence[str]) -> list[Unit]:
    """What is read, in order: each file itself, each folder's files of the kinds above in the order of their relative names, "-" for stdin, and
    dataset:NAME_OR_FOLDER[:CONFIG[:SPLIT]].

    Folders are walked as `sources.find_files` does. DataError: what it refuses, an archive, stdin twice, a data set without a name.
    """
    if not sources:
        raise DataError("no files or folders were given; name at least one")
    if list(sources).count("-") > 1:
        raise DataError("stdin (-) was given more than once; it can be read once")
    units: list[Unit] = []
    for source in map(str, sources):
        if source == "-":
            units.append(Unit("stdin", "stdin"))
        elif source.startswith("dataset:"):
            if not source.split(":")[1] or source.count(":") > 3:
                raise DataError(f"{source}: expected dataset:NAME_OR_FOLDER[:CONFIG[:SPLIT]]")
            units.append(Unit(source, "dataset"))
        else:
            if not source:
                raise DataError("one of the sources is an empty name; name a file or a folder (. is this one)")
            path = Path(source)
            is_named = not is_folder(path)
            paths = [path] if is_named else walk(path, (*SUFFIXES, *KINDS, ".xml", *(f".{name}" for name in COMPRESSIONS)))
            found = [unit for path in paths if (is_named or not _is_left(path, source)) and (unit := _unit(path, is_named))]
            if not found:
                raise DataError(f"{source}: no text files in this folder; the suffixes that count are {_ALL}, each also with "
                                f"{', '.join(f'.{name}' for name in COMPRESSIONS)} behind it (hidden files and links out of the folder do not)")
            units += found
    return units


def read_unit(unit: Unit, options: ReadOptions, counts: Counts) -> Iterator[Document]:
    """The unit's documents, streamed: the same ones in the same order each time (stdin: once, by the process that owns it). `counts` grows while they
    are read. DataError names the file and the place."""
    if unit.kind == "dataset":
        return read_dataset(unit.name, options, counts)
    if unit.path is None:
        return _read_stdin(options, counts)
    if unit.kind == "parquet":
        return read_parquet(unit.path, unit.name, options, counts)
    raw = blocks(unit.path, unit.compression)
    if unit.kind == "wikipedia":
        return read_wikipedia(raw, unit.name, options, counts)
    if unit.kind in ("wet", "warc"):
        return read_crawl(raw, unit.name, options, counts)
    read = {"text": _read_text, "jsonl": read_jsonl, "csv": read_csv, "tsv": read_tsv}[unit.kind]
    return read(decoded(raw, unit.name, options), unit.name, options, counts)


def _unit(path: Path, is_named: bool) -> Unit | None:
    """The file as a unit. A file of another kind is text if a person named it, and None if it was only found in a folder."""
    name = path.name.lower()
    compression = next((c for c in COMPRESSIONS if name.endswith(f".{c}")), None)
    inner = name.removesuffix(f".{compression}") if compression else name
    kind = KINDS.get(Path(inner).suffix)
    if _XML.search(inner) and b"<mediawiki" in next(blocks(path, compression), b""):
        kind = "wikipedia"
    if kind is None and (is_named or inner.endswith(SUFFIXES)):
        kind = "text"
    is_archive = inner.endswith(ARCHIVES) or bool(kind == "parquet" and compression)
    if is_archive and is_named:
        raise DataError(f"{path}: an archive is not read as it is; unpack it and name the files or their folder")
    if kind is None or is_archive:
        return None
    try:
        return Unit(str(path), kind, path, compression, path.stat().st_size)
    except OSError as error:
        raise disk.disk_error(path, error) from None


def _is_left(path: Path, root: str) -> bool:
    """Whether a build that was killed left this file in its work folder below `root`: its own tokenizer and notes are no text."""
    inner = [folder for folder in path.parents if folder.name.endswith(".building") and folder != Path(root) and folder.is_relative_to(root)]
    return any((folder / "build.json").is_file() for folder in inner)


def _read_text(chunks: Iterable[str], name: str, options: ReadOptions, counts: Counts) -> Iterator[Document]:
    return documents(name, chunks, options, counts)


def _read_stdin(options: ReadOptions, counts: Counts) -> Iterator[Document]:
    """JSONL if its first character is "{", else one text."""
    chunks = decoded(iter(lambda: sys.stdin.buffer.read(BLOCK), b""), "stdin", options)
    begun: list[str] = []
    for chunk in chunks:
        begun.append(chunk)
        if chunk.strip():
            break
    is_jsonl = bool(begun) and begun[-1].lstrip().startswith("{")
    return (read_jsonl if is_jsonl else _read_text)(chain(begun, chunks), "stdin", options, counts)
