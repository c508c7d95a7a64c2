"""Files that appear whole or not at all, and text that says where it is broken. Only the rooms that the import law names may use this one.

A file is written beside its place and renamed into it; a folder likewise, so that Ctrl-C, a full disk or a bad input leaves nothing half-written.
"""
from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from hanok.errors import DataError, HanokError


def disk_error(path: Path, error: OSError) -> HanokError:
    """The operating system's refusal as one line that says what to do."""
    told = {
        errno.ENOSPC: "the disk is full; free some space (nothing was left half-written)",
        errno.EFBIG: "the file would be larger than this place allows; choose another (nothing was left half-written)",
        errno.EDQUOT: "your disk quota is used up; free some space (nothing was left half-written)",
        errno.EACCES: "permission denied; choose another place or change its rights",
        errno.EROFS: "this place can only be read; choose another",
        errno.ENOENT: "there is no such file or folder; check the path",
        errno.ENOTDIR: "a part of this path is a file, not a folder",
        errno.EEXIST: "a part of this path is a file, not a folder",
        errno.EISDIR: "this is a folder; a file was expected",
    }
    return DataError(f"{path}: {told.get(error.errno or 0, error.strerror or str(error))}")


@contextmanager
def new_file(path: Path | str) -> Iterator[IO[bytes]]:
    """A binary file that takes the name `path` when the block ends well, and vanishes when it does not."""
    path = Path(path)
    handle, scratch = None, _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(scratch, "xb")  # noqa: SIM115 - it outlives this line on purpose
        yield handle
        handle.flush()
        os.fsync(handle.fileno())
        handle.close()
        os.replace(scratch, path)
    except BaseException as error:
        if handle is not None:
            with suppress(OSError):                          # what the disk refused waits in the buffer, and is refused again
                handle.close()
        with suppress(OSError):
            scratch.unlink()
        if isinstance(error, OSError):
            raise disk_error(path, error) from None
        raise


@contextmanager
def new_dir(path: Path | str) -> Iterator[Path]:
    """A folder that takes the name `path` when the block ends well. An existing non-empty `path` is refused before anything is done."""
    path = Path(path)
    refuse_occupied(path)
    scratch = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir()
        yield scratch
        if path.is_dir():
            path.rmdir()
        os.replace(scratch, path)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, OSError):
            raise disk_error(path, error) from None
        raise


def refuse_occupied(path: Path | str) -> None:
    """DataError if `path` is a file or a folder with something in it."""
    path = Path(path)
    try:
        is_there, is_dir = path.exists(), path.is_dir()
        is_occupied = is_dir and any(path.iterdir())
    except OSError as error:
        raise disk_error(path, error) from None
    if is_occupied:
        raise DataError(f"{path} is not empty; choose another folder, or remove it first")
    if is_there and not is_dir:
        raise DataError(f"{path} is a file; a new folder was expected")


def write_text(path: Path | str, text: str) -> None:
    """Writes UTF-8 text in one piece. What is no Unicode (half a surrogate pair, as in the name of a file that is no UTF-8) becomes "?"."""
    with new_file(path) as handle:
        handle.write(text.encode("utf-8", "replace"))


def read_bytes(path: Path | str) -> bytes:
    """The whole file, or a DataError that says what is wrong with the path."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise disk_error(Path(path), error) from None


def read_text(path: Path | str, encoding: str = "utf-8") -> str:
    """The file's text. DataError names the byte at which it stops being `encoding`."""
    return decode(read_bytes(path), str(path), encoding)


def decode(data: bytes, name: str, encoding: str = "utf-8") -> str:
    """Bytes as text; DataError names `name` and the byte offset of the first that cannot be read. A UTF-8 byte order mark is dropped."""
    try:
        return data.decode("utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding)
    except UnicodeDecodeError as error:
        bad = f"0x{error.object[error.start]:02x}" if error.start < len(error.object) else "the end"
        place = error.start + len(data) - len(error.object)  # the codec does not count a byte order mark that it dropped
        raise DataError(f"{name}: not {encoding}: {bad} at byte {place}; name its encoding with --encoding, "
                        "for example latin-1 or cp949") from None
    except (LookupError, ValueError):
        raise DataError(f"unknown encoding {encoding!r}; examples: utf-8, latin-1, cp949, euc-kr, utf-16") from None


def sha256(path: Path | str) -> str:
    """The file's SHA-256, in hexadecimal."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise disk_error(Path(path), error) from None
    return digest.hexdigest()


def below(root: Path | str, name: str) -> Path:
    """`root/name`, refused if it would leave `root`."""
    root = Path(root).resolve()
    try:
        path = (root / name).resolve()
    except (OSError, RuntimeError, ValueError):              # links in a circle; a zero byte
        path = None
    if path is None or (path != root and root not in path.parents):
        raise DataError(f"{name!r} leaves {root}; a name below it was expected")
    return path


def _beside(path: Path) -> Path:
    """A name for what is not finished. It is known before there is anything of that name, so that an interruption between the two leaves nothing."""
    return path.parent / f".{path.name}.{secrets.token_hex(8)}"
