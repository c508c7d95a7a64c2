"""gz, zst and bz2 as streams of blocks: of several members or frames, and never larger in memory than a block, whatever they unpack to.

A Zstandard stream is walked block by block (RFC 8878, section 3.1.1), so that its end is known from its having been cut short, which a stream
reader does not tell apart, and so that no piece of input can unpack to more than 128 KiB.
"""
from __future__ import annotations

import bz2
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from hanok import disk
from hanok.data.reading import BLOCK, need
from hanok.errors import DataError

COMPRESSIONS = ("gz", "zst", "bz2")
_ZSTD, _SKIPPABLE = 0xFD2FB528, 0x184D2A5


class _Damaged(Exception):
    """What a stream's own checks say."""


def blocks(path: Path, compression: str | None) -> Iterator[bytes]:
    """A file's bytes, unpacked, at most BLOCK at a time. DataError: unreadable, not of this compression, damaged, or cut short."""
    unpack = {None: _plain, "gz": _gz, "bz2": _bz2, "zst": _zst}[compression]
    try:
        with open(path, "rb") as handle:
            if compression and not handle.read(1):
                raise EOFError
            handle.seek(0)
            yield from unpack(handle)
    except EOFError:
        raise DataError(f"{path}: cut short, the .{compression} stream stops before its end; fetch or pack it again") from None
    except (_Damaged, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: no .{compression} file, or a damaged one ({error}); fetch or pack it again") from None
    except OSError as error:
        raise disk.disk_error(path, error) from None


def _plain(handle: BinaryIO) -> Iterator[bytes]:
    while block := handle.read(BLOCK):
        yield block


def _gz(handle: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=handle) as stream:
        while block := stream.read(BLOCK):
            yield block


def _bz2(handle: BinaryIO) -> Iterator[bytes]:
    with bz2.BZ2File(handle) as stream:
        while True:
            try:
                block = stream.read(BLOCK)
            except OSError as error:
                if error.errno:
                    raise
                raise _Damaged(str(error)) from None
            if not block:
                return
            yield block


def _zst(handle: BinaryIO) -> Iterator[bytes]:
    zstandard = need("zstandard", "a .zst file")
    try:
        while head := handle.read(4):
            magic = int.from_bytes(head, "little")
            if magic >> 4 == _SKIPPABLE:
                left = int.from_bytes(_exactly(handle, 4), "little")
                while left:
                    left -= len(_exactly(handle, min(left, BLOCK)))
                continue
            if len(head) == 4 and magic != _ZSTD:
                raise _Damaged(f"it begins with {head.hex(' ')}")
            head += _exactly(handle, 5 - len(head))
            has_checksum = head[4] & 4
            frame = zstandard.ZstdDecompressor().decompressobj()
            frame.decompress(head + _exactly(handle, zstandard.frame_header_size(head) - len(head)))
            is_last = 0
            while not is_last:
                mark = _exactly(handle, 3)
                bits = int.from_bytes(mark, "little")
                is_last, is_run, size = bits & 1, bits >> 1 & 3 == 1, bits >> 3
                if block := frame.decompress(mark + _exactly(handle, 1 if is_run else size)):
                    yield block
            if has_checksum:
                frame.decompress(_exactly(handle, 4))
    except zstandard.ZstdError as error:
        raise _Damaged(" ".join(str(error).split())) from None


def _exactly(handle: BinaryIO, n: int) -> bytes:
    data = handle.read(n)
    if len(data) < n:
        raise EOFError
    return data
