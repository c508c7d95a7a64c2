"""Files and folders as documents, and documents as training and validation text.

What is read never depends on the machine: a folder gives its text files in the order of their relative names, and a document's side of the split
is decided by a hash of its text, so neither the order of the files nor their names move it, and copies of a text stay on one side.
"""
from __future__ import annotations

import hashlib
import os
import stat
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hanok import disk
from hanok.errors import ConfigError, DataError

SUFFIXES = (".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".js", ".ts", ".html", ".css", ".json", ".toml", ".yaml", ".tex", ".java", ".go", ".rs")
"""The files of a folder that count as text."""
SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules", ".git"})
_NOT_LIBRARY = SKIPPED_FOLDERS | {"test", "tests", "idle_test", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Document:
    """One text that stands for itself: a model learns where it ends."""
    name: str                                # where it came from, for messages
    text: str                                # as it stands in the file, line ends included


def find_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files that `paths` name: each file itself, each folder's text files (SUFFIXES) in the order of their relative names.

    Hidden files and folders, SKIPPED_FOLDERS and symbolic links that leave their folder are passed over. DataError: a path that is missing or
    unreadable, a pipe or device, a folder without text files.
    """
    if not paths:
        raise DataError("no files or folders were given; name at least one")
    files: list[Path] = []
    for path in map(Path, paths):
        if is_folder(path):
            found = walk(path, SUFFIXES)
            if not found:
                raise DataError(f"{path}: no text files in this folder; the suffixes that count are {' '.join(SUFFIXES)} (hidden files "
                                "and links out of the folder do not)")
            files += found
        else:
            files.append(path)
    return files


def is_folder(path: Path) -> bool:
    """Whether the path is a folder; else it is a regular file. DataError: it is missing, unreadable, a pipe or a device."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise disk.disk_error(path, error) from None
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise DataError(f"{path}: not a regular file; sources are read more than once, so write it to a file first")
    return stat.S_ISDIR(mode)


def read_documents(paths: Sequence[str | Path], *, encoding: str = "utf-8") -> Iterator[Document]:
    """One document a file (see `find_files`), read one at a time; files with nothing but white space are passed over.

    DataError: what `find_files` refuses, at once; while reading, a file that is not `encoding` (its first bad byte is named), and at the end, if
    there was no text at all.
    """
    return _read(find_files(paths), encoding)


def hash_sources(paths: Sequence[str | Path]) -> list[dict[str, str | int]]:
    """Path, size in bytes and SHA-256 of every file that `paths` name, for a recipe or a manifest."""
    return [{"path": str(path), "bytes": path.stat().st_size, "sha256": disk.sha256(path)} for path in find_files(paths)]


def standard_library(root: Path | None = None) -> list[Path]:
    """The .py files of Python's standard library (or of `root`), sorted, without its tests, installed packages and files that are not UTF-8.

    About 13 MB of text that every machine has. DataError if there are none.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    files = [path for path in walk(root, (".py",), _NOT_LIBRARY) if _is_utf8(path)]
    if not files:
        raise DataError(f"{root}: no .py files of the standard library here; this Python keeps them elsewhere, so name a folder of text instead")
    return files


def split(documents: Iterable[Document], fraction: float, seed: int) -> tuple[list[Document], list[Document]]:
    """Training and validation documents; validation holds about `fraction` of the characters, and each at least one document.

    Documents go to validation in the order of a hash of (seed, text), each one that brings the total nearer to `fraction`. A text that is more than
    half of everything is itself cut: its last `fraction`, from a line end on, is validation. Both lists keep the order of `documents`.
    ConfigError: a fraction outside 0..1. DataError: too little text to cut.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"validation fraction {fraction:g}: expected a number between 0 and 1, for example 0.05")
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise DataError("there is no text to split into training and validation; give at least one document")
    keys = [_key(seed, document.text) for document in documents]
    sizes = dict.fromkeys(keys, 0)
    for key, document in zip(keys, documents):
        sizes[key] += len(document.text)
    total = sum(sizes.values())
    large = next((key for key, size in sizes.items() if 2 * size > total), None)
    if large is not None:
        held = _choose({key: size for key, size in sizes.items() if key != large}, fraction)
    else:
        held = _choose(sizes, fraction) or {min(sizes, key=lambda key: (sizes[key], key))}
        if len(held) == len(sizes):
            held.remove(max(held))
    train, validation = [], []
    for key, document in zip(keys, documents):
        if key == large:
            cut = _cut(document, fraction)
            train.append(replace(document, text=document.text[:cut]))
            validation.append(replace(document, text=document.text[cut:]))
        else:
            (validation if key in held else train).append(document)
    return train, validation


def _key(seed: int, text: str) -> str:
    """A hash of both; no copy of a text is made that may be as large as memory."""
    found = hashlib.sha256(f"{seed}:".encode())
    for at in range(0, len(text), 1 << 20):
        found.update(text[at:at + (1 << 20)].encode())
    return found.hexdigest()


def _read(files: Sequence[Path], encoding: str) -> Iterator[Document]:
    empty = True
    for path in files:
        text = disk.read_text(path, encoding)
        if text.strip():
            empty = False
            yield Document(str(path), text)
    if empty:
        where = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
        raise DataError(f"{where}: nothing but white space; give files with text in them")


OURS = ({"recipe.toml", "metrics.csv"}, {"config.json", "manifest.json", "model.safetensors"}, {"card.json", "duplicates.jsonl"},
        {"build.json", "tokenizer.json"})
"""Files by which a run, a bundle, a built corpus or one that is being built is known: what was written by training is not text to train on."""


def walk(root: Path, suffixes: Collection[str], skipped: Collection[str] = SKIPPED_FOLDERS) -> list[Path]:
    """A folder's files of these suffixes, in the order of their relative names; see `find_files` for what is passed over, and OURS."""
    def refuse(error: OSError) -> None:
        raise disk.disk_error(Path(error.filename), error) from None

    inside = root.resolve()
    files: list[Path] = []
    links: list[Path] = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        if Path(folder) != root and any(mine <= set(names) for mine in OURS):
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() in suffixes and path.is_file():
                (links if path.is_symlink() else files).append(path)
    known = {path.resolve() for path in files}
    for path in sorted(links):
        target = path.resolve()
        if target.is_relative_to(inside) and target not in known:
            known.add(target)
            files.append(path)
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _is_utf8(path: Path) -> bool:
    try:
        disk.read_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _choose(sizes: Mapping[str, int], fraction: float) -> set[str]:
    """The keys, in their own order, that each bring the sum of their sizes nearer to `fraction` of all."""
    chosen, left = set(), fraction * sum(sizes.values())
    for key in sorted(sizes):
        if sizes[key] < 2 * left:
            chosen.add(key)
            left -= sizes[key]
    return chosen


def _cut(document: Document, fraction: float) -> int:
    """Where the last `fraction` of the text begins: the nearest line end, else space, else character, that leaves each side half of its due."""
    text, size = document.text, len(document.text)
    at = round(size * (1 - fraction))
    for end in ("\n", " ", ""):
        cuts = (text.rfind(end, 0, at) + len(end), text.find(end, at) + len(end))
        fair = [cut for cut in cuts if (1 - fraction) * size <= 2 * cut <= (2 - fraction) * size and text[:cut].strip() and text[cut:].strip()]
        if fair:
            return min(fair, key=lambda cut: abs(cut - at))
    raise DataError(f"{document.name}: {size} characters are too few to set {fraction:g} of them aside for validation; give more text")
