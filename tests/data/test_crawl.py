"""WET and WARC as documents: main text of HTML whatever it is written and packed in, the rest left out, cuts and other files refused in one line."""
from __future__ import annotations

import gzip
import random
import tracemalloc
import zlib
from pathlib import Path

import brotli
import pytest
import zstandard

from documents import read, refusal
from hanok.data import crawl
from hanok.data.formats import Counts

PAGE = """<html><head>{meta}<title>제목</title><style>p {{}}</style></head><body><nav><a href="/">메뉴</a> <a href="/b">둘째 메뉴</a></nav>
<main><h1>한옥 이야기</h1><p>{text}</p><p>Second paragraph with <b>bold</b> words &amp; more of them.</p></main>
<footer>저작권 Copyright</footer><script>var x = 1;</script></body></html>"""
TEXT = "한옥은 한국의 전통 가옥이다. 기둥과 보로 짓고 똠방 기와를 얹는다."


def record(kind: str, url: str, body: bytes, content_type: str = "text/plain") -> bytes:
    head = (f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2026-01-01T00:00:00Z\r\n"
            f"WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-{zlib.crc32(url.encode()):012d}>\r\n"
            f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n")
    return head.encode() + body + b"\r\n\r\n"


def response(url: str, body: bytes, headers: str = "Content-Type: text/html", status: str = "200 OK") -> bytes:
    http = f"HTTP/1.1 {status}\r\n{headers}\r\n\r\n".encode() + body
    return record("response", url, http, "application/http; msgtype=response")


def html(text: str = TEXT, meta: str = "") -> str:
    return PAGE.format(text=text, meta=meta)


INFO = record("warcinfo", "info", b"software: by hand\r\n", "application/warc-fields")


def pack(records: list[bytes], suffix: str) -> bytes:
    """As Common Crawl does: each record a member of its own."""
    return b"".join({"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}.get(suffix, bytes)(part) for part in records)


def write(path: Path, *records: bytes) -> Path:
    path.write_bytes(pack([INFO, *records], path.suffix[1:]))
    return path


@pytest.mark.parametrize("name", ["CC-MAIN-1.warc.wet.gz", "a.wet", "a.warc.wet.zst"])
def test_wet_gives_its_text_as_it_stands(tmp_path, name):
    counts = Counts()
    path = write(tmp_path / name, record("conversion", "https://한옥.kr/가?a=b", f"{TEXT}\n둘째 줄\n".encode()),
                 record("conversion", "http://e", b" \n"), record("metadata", "http://m", b"no text"),
                 record("conversion", "http://bad", b"\xff\xfe no text"),
                 record("conversion", "http://long", b"word " * 300_000))
    told = read(path, counts, encoding="cp949", max_document=600_000)
    assert told[0] == ("#https://한옥.kr/가?a=b", f"{TEXT}\n둘째 줄\n") and counts == Counts(bad=1, empty=1, split=1)
    assert [name for name, _ in told[1:]] == [f"#http://long part {number}" for number in (1, 2, 3)]
    assert "".join(text for _, text in told[1:]) == "word " * 300_000


@pytest.mark.parametrize("name", ["a.warc.gz", "a.warc"])
def test_warc_gives_the_main_text_of_pages_that_were_found(tmp_path, name):
    counts = Counts()
    path = write(tmp_path / name, record("request", "http://q", b"GET / HTTP/1.1\r\n\r\n", "application/http"),
                 response("http://a", html().encode(), "Content-Type: text/html; charset=UTF-8"),
                 response("http://x", html("xhtml " * 20).encode(), "content-type: application/xhtml+xml"),
                 response("http://i", random.Random(3).randbytes(5000), "Content-Type: image/png"),
                 response("http://t", b"plain", "Content-Type: text/plain"),
                 response("http://n", html().encode(), "X-Nothing: said"), response("http://404", html().encode(), status="404 Not Found"),
                 record("response", "http://broken", b"no http at all", "application/http; msgtype=response"),
                 record("response", "dns:a", b"1.2.3.4"), response("http://e", b"<html><body><script>1</script></body></html>"))
    told = read(path, counts)
    assert [name for name, _ in told] == ["#http://a", "#http://x"] and counts == Counts(empty=1)
    assert TEXT in told[0][1] and "Second paragraph with bold words & more of them." in told[0][1] and "한옥 이야기" in told[0][1]
    assert not any(word in told[0][1] for word in ("메뉴", "저작권", "var x", "<"))


@pytest.mark.parametrize("encoding, header, meta", [
    ("cp949", "; charset=euc-kr", ""), ("cp949", "", '<meta charset="ks_c_5601-1987">'), ("utf-8", "", ""), ("utf-16-le", "; charset=utf-16le", ""),
    ("cp949", "; charset=unheard-of", '<meta http-equiv="Content-Type" content="text/html; charset=EUC-KR">')])
def test_pages_in_korean_encodings(tmp_path, encoding, header, meta):
    path = write(tmp_path / "a.warc.gz", response("http://a", html(meta=meta).encode(encoding), f"Content-Type: text/html{header}"))
    assert TEXT in read(path)[0][1]


def chunked(body: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:100], body[100:])) + b"0\r\n\r\n"


def test_pages_as_they_were_packed_on_their_way(tmp_path):
    page = html().encode()
    sent = {"gzip": gzip.compress(page), "br": brotli.compress(page), "deflate": zlib.compress(page), "identity": page}
    records = [response(f"http://{coding}", body, f"Content-Type: text/html\r\nContent-Encoding: {coding}") for coding, body in sent.items()]
    records += [response(f"http://plain-{coding}", page, f"Content-Type: text/html\r\nContent-Encoding: {coding}") for coding in sent]
    records += [response("http://c", chunked(page), "Content-Type: text/html\r\nTransfer-Encoding: chunked"),
                response("http://c2", chunked(gzip.compress(page)),
                         "Content-Type: text/html\r\nTransfer-Encoding: chunked\r\nContent-Encoding: gzip"),
                response("http://c3", page, "Content-Type: text/html\r\nTransfer-Encoding: chunked")]
    counts = Counts()
    told = read(write(tmp_path / "a.warc.gz", *records), counts)
    assert len(told) == len(records) and all(TEXT in text for _, text in told) and counts == Counts()


def test_pages_that_cannot_be_read_are_counted_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(crawl, "LONGEST_ROW", 10_000)
    packed = "Content-Type: text/html\r\nContent-Encoding: gzip"
    broken = bytearray(gzip.compress(html().encode()))
    broken[40:60] = bytes(20)
    path = write(tmp_path / "a.warc", response("http://damaged", broken, packed), response("http://long", b"<p>" + b"x " * 9000),
                 response("http://bomb", gzip.compress(b"<p>" + b"x" * 5_000_000), packed),
                 response("http://chunk", b"ffff\r\nshort", "Content-Type: text/html\r\nTransfer-Encoding: chunked"),
                 response("http://good", html().encode()))
    counts = Counts()
    assert [name for name, _ in read(path, counts)] == ["#http://good"] and counts.bad == 4


@pytest.mark.parametrize("name", ["a.warc.gz", "a.warc", "a.wet"])
def test_an_archive_cut_short_or_of_another_kind_is_one_line(tmp_path, name):
    path = write(tmp_path / name, record("conversion", "http://c", TEXT.encode() * 50), response("http://a", html().encode()))
    whole = path.read_bytes()
    last = whole.rindex(b"WARC/1.0") if name != "a.warc.gz" else len(whole) - 400
    for end in (len(whole) - 3, len(whole) - 40, last + 60, last + 200):
        path.write_bytes(whole[:end])
        assert "cut short" in refusal(path, skip_bad=True), end
    path.write_bytes(pack([b"<html>no archive</html>\n" * 9], path.suffix[1:]))
    assert "no WARC file" in refusal(path, skip_bad=True)
    path.write_bytes(pack([b""], path.suffix[1:]))
    assert read(path) == []


def test_memory_is_that_of_a_page(tmp_path):
    big = response("http://video", bytes(20_000_000), "Content-Type: video/mp4")
    path = tmp_path / "a.warc.gz"
    path.write_bytes(gzip.compress(INFO) + gzip.compress(big, 1) + gzip.compress(response("http://a", html().encode())))
    del big
    read(path)
    tracemalloc.start()
    assert len(read(path)) == 1
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4_000_000
