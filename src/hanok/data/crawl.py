"""Common Crawl's archives (WARC 1.1, ISO 28500): the text of WET records as it stands, and of WARC responses what a reader came to the page for.

Records are found by fastwarc, HTML is read by resiliparse, which leaves menus, footers and scripts out. The web is never all well-formed: a page
that cannot be read is counted as bad and left out, whatever `skip_bad` says; an archive that is cut short is refused.
"""
from __future__ import annotations

import io
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from hanok.data.reading import BLOCK, LONGEST_ROW, Counts, ReadOptions, decoded, documents, need
from hanok.data.sources import Document
from hanok.errors import DataError

HTML = ("text/html", "application/xhtml+xml")
WIDER = {"euc_kr": "cp949", "euc-kr": "cp949", "shift_jis": "cp932", "gbk": "gb18030"}
"""What pages that declare an encoding are really written in."""


def read_crawl(blocks: Iterable[bytes], name: str, options: ReadOptions, counts: Counts) -> Iterator[Document]:
    """Documents as `name#url`, of conversion records (WET, always UTF-8) and of HTML responses with a status of 2xx.

    DataError: no WARC, or cut short.
    """
    warc = need("fastwarc.warc", "a Common Crawl archive")
    lenient = replace(options, encoding="utf-8", skip_bad=True)
    types, stream = warc.WarcRecordType, _Stream(blocks)
    try:
        for record in warc.ArchiveIterator(stream, record_types=types.conversion | types.response, stream_detect=False):
            here = f"{name}#{record.headers.get('WARC-Target-URI', '')}"
            if record.record_type == types.conversion:
                yield from documents(here, decoded(_blocks_of(record.reader), here, lenient), lenient, counts)
            elif _is_html(record):
                text = _main_text(record)
                if text is None:
                    counts.bad += 1
                else:
                    yield from documents(here, [text], lenient, counts)
    except OSError as error:
        raise DataError(f"{name}: no WARC file, or a damaged one ({error}); fetch it again") from None
    if stream.place and not stream.tail.replace(b"\r", b"").endswith(b"\n\n"):
        raise DataError(f"{name}: cut short, the last WARC record stops before its end; fetch it again")


class _Stream:
    """Blocks as the file that fastwarc asks for. It keeps its place and its last bytes: a record ends with two empty lines."""

    def __init__(self, blocks: Iterable[bytes]):
        self._blocks, self._left, self._at = iter(blocks), b"", 0
        self.place, self.tail = 0, b""

    def read(self, n: int) -> bytes:
        if self._at == len(self._left):
            self._left, self._at = next(self._blocks, b""), 0
        data = self._left[self._at:self._at + n]
        self._at += len(data)
        self.place += len(data)
        self.tail = (self.tail + data[-4:])[-4:]
        return data

    def tell(self) -> int:
        return self.place


def _blocks_of(reader: Any) -> Iterator[bytes]:
    while block := reader.read(BLOCK):
        yield block


def _is_html(record: Any) -> bool:
    if record.http_headers is None or (record.http_content_type or "").strip().lower() not in HTML:
        return False
    return 200 <= (record.http_headers.status_code or 0) < 300


def _main_text(record: Any) -> str | None:
    """The page's main text, or None if it cannot be read: too long, or not unpacked by what its headers say."""
    headers = record.http_headers
    body = record.reader.read(LONGEST_ROW + 1)
    try:
        for coding in (headers.get("Transfer-Encoding", ""), headers.get("Content-Encoding", "")):
            body = _unpacked(body, coding.strip().lower())
        if len(body) > LONGEST_ROW:
            return None
        return need("resiliparse.extract.html2text", "a WARC file").extract_plain_text(_decoded(body, record.http_charset), main_content=True)
    except (OSError, ValueError, zlib.error):
        return None


def _unpacked(body: bytes, coding: str) -> bytes:
    """The body without its coding, to at most one byte more than LONGEST_ROW. What is stored plain although its header says otherwise stays."""
    streams = need("fastwarc.stream_io", "a WARC file")
    if coding == "chunked" and body[:1] in b"0123456789abcdefABCDEF":
        reader = streams.ChunkedReader(io.BytesIO(body))
    elif coding in ("gzip", "x-gzip") and body[:2] == b"\x1f\x8b":
        reader = streams.GzipReader(io.BytesIO(body))
    elif coding == "br" and body[:1] != b"<":
        reader = streams.BrotliReader(io.BytesIO(body))
    elif coding == "deflate" and body[:1] == b"\x78":
        return zlib.decompressobj().decompress(body, LONGEST_ROW + 1)
    else:
        return body
    unpacked = bytearray()
    while len(unpacked) <= LONGEST_ROW and (block := reader.read(min(BLOCK, LONGEST_ROW + 1 - len(unpacked)))):
        unpacked += block
    return bytes(unpacked)


def _decoded(body: bytes, charset: str | None) -> str:
    """HTML as text: by what the response says, else the page's own <meta>, else its looks; what then is no text becomes U+FFFD."""
    guess = need("resiliparse.parse.encoding", "a WARC file")
    encoding = guess.map_encoding_to_html5(charset or "", False) or guess.detect_encoding(body, from_html_meta=True)
    return guess.bytes_to_str(body, WIDER.get(encoding, encoding), errors="replace")
