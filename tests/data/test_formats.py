"""Sources of every kind found in one order, streams that stay small whatever they unpack to, text in any encoding, and refusals in one line."""
from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import pickle
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from hanok.data.compressed import blocks
from hanok.data.formats import Counts, ReadOptions, Unit, find_units, read_unit
from hanok.data.reading import BLOCK, decoded, documents, lines
from hanok.errors import ConfigError, DataError

PACK = {"gz": gzip.compress, "bz2": bz2.compress, "zst": zstandard.ZstdCompressor(write_checksum=True).compress}
KOREAN = "한옥은 나무와 흙으로 짓는다. Mixed text, 漢字 too 🏠\r\n"


def read(*sources: str | Path, counts: Counts | None = None, **options) -> list[tuple[str, str]]:
    """(name, text) of all documents."""
    counts = Counts() if counts is None else counts
    return [(document.name, document.text) for unit in find_units([str(source) for source in sources])
            for document in read_unit(unit, ReadOptions(**options), counts)]


def refusal(*sources: str | Path, **options) -> str:
    with pytest.raises(DataError) as error:
        read(*sources, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def test_a_folder_gives_all_kinds_in_the_order_of_names(tmp_path):
    put(tmp_path / "b.md", "# b")
    put(tmp_path / "a/z.jsonl.gz", gzip.compress(b'{"text": "row"}\n'))
    put(tmp_path / "a/c.PY.ZST", PACK["zst"](b"c = 1"))
    put(tmp_path / "t.csv", "id,text\n1,cell\n")
    put(tmp_path / "t.tsv", "text\tid\ntab\t1\n")
    for name in ("x.bin", "x.tar.gz", "x.zip", "x.parquet.gz", "other.gz", ".hidden.jsonl", "drawing.xml", "node_modules/m.jsonl"):
        put(tmp_path / name, gzip.compress(b"?") if name.endswith(".gz") else b"<svg/>")
    units = find_units([str(tmp_path)])
    assert [(unit.path.relative_to(tmp_path).as_posix(), unit.kind, unit.compression) for unit in units if unit.path] == [
        ("a/c.PY.ZST", "text", "zst"), ("a/z.jsonl.gz", "jsonl", "gz"), ("b.md", "text", None), ("t.csv", "csv", None), ("t.tsv", "tsv", None)]
    assert [unit.size for unit in units] == [unit.path.stat().st_size for unit in units if unit.path]
    assert pickle.loads(pickle.dumps(units)) == units
    assert [text for _, text in read(tmp_path)] == ["c = 1", "row", "# b", "cell", "tab"]
    assert [name for name, _ in read(tmp_path / "b.md", tmp_path / "a")] == [
        str(tmp_path / name) for name in ("b.md", "a/c.PY.ZST", "a/z.jsonl.gz:1")]


def test_kinds_are_known_by_name_and_a_named_file_of_no_kind_is_text(tmp_path):
    dump = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/"></mediawiki>'
    known = {"a.ndjson": "jsonl", "CC-MAIN-1.warc.wet.gz": "wet", "CC-MAIN-1.warc.gz": "warc", "x.warc": "warc", "p.parquet": "parquet",
             "kowiki.xml": "wikipedia", "kowiki-1.xml-p1p200.bz2": "wikipedia", "page.xml": "text", "x.odd": "text", "README": "text"}
    for name in known:
        data = (dump if "kowiki" in name else "<page/>").encode()
        put(tmp_path / name, PACK[name.rpartition(".")[2]](data) if name.endswith((".gz", ".bz2")) else data)
    assert {name: find_units([str(tmp_path / name)])[0].kind for name in known} == known


def test_sources_that_cannot_be_are_refused_at_once(tmp_path):
    assert "no files or folders were given" in refusal()
    assert "gone.txt: there is no such file" in refusal(tmp_path / "gone.txt")
    put(tmp_path / "only/x.bin", "?")
    assert ".jsonl" in refusal(tmp_path / "only") and "no text files" in refusal(tmp_path / "only")
    os.mkfifo(tmp_path / "pipe.txt")
    assert "not a regular file" in refusal(tmp_path / "pipe.txt")
    assert "unpack it" in refusal(put(tmp_path / "x.tar.gz", "?")) and "unpack it" in refusal(put(tmp_path / "x.parquet.zst", "?"))
    assert "more than once" in refusal("-", "-")
    assert all("dataset:NAME_OR_FOLDER" in refusal(source) for source in ("dataset:", "dataset:a:b:c:d"))
    with pytest.raises(ConfigError, match="max_document 0"):
        ReadOptions(max_document=0)
    for encoding in ("klingon", "base64", "rot13"):
        with pytest.raises(DataError, match="unknown encoding"):
            ReadOptions(encoding=encoding)


def test_a_built_corpus_inside_a_folder_is_not_text(tmp_path):
    put(tmp_path / "a.txt", "a text")
    for name in ("card.json", "card.md", "duplicates.jsonl", "train/corpus.json"):
        put(tmp_path / "corpus" / name, "{}")
    assert [name for name, _ in read(tmp_path)] == [str(tmp_path / "a.txt")]


@pytest.mark.parametrize("kind", PACK)
def test_packed_text_of_one_member_or_many_is_read_whole(tmp_path, kind):
    parts = [KOREAN.encode() * 3, b"", random.Random(1).randbytes(400_000).hex().encode(), b"x" * 300_000]
    one, many = PACK[kind](b"".join(parts)), b"".join(map(PACK[kind], parts))
    for data in (one, many):
        path = put(tmp_path / f"a.txt.{kind}", data)
        told = list(blocks(path, kind))
        assert b"".join(told) == b"".join(parts) and max(map(len, told)) <= BLOCK
        assert read(path, max_document=2_000_000) == [(str(path), b"".join(parts).decode())]


def test_zst_without_checksum_or_size_with_frames_to_skip_and_through_a_long_window(tmp_path):
    text = (KOREAN * 20_000).encode()
    streamed = zstandard.ZstdCompressor(level=1).compressobj()
    skip = (0x184D2A53).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"notes"
    data = skip + streamed.compress(text) + streamed.flush() + skip + zstandard.ZstdCompressor(write_content_size=False).compress(text) + skip
    assert b"".join(blocks(put(tmp_path / "a.zst", data), "zst")) == 2 * text
    assert b"".join(blocks(put(tmp_path / "b.zst", PACK["zst"](b"")), "zst")) == b""


@pytest.mark.parametrize("kind", PACK)
def test_an_archive_cut_short_or_damaged_is_one_line_that_names_it(tmp_path, kind):
    packed = PACK[kind](random.Random(2).randbytes(300_000).hex().encode())
    for length in (0, 2, 5, 9, len(packed) // 2, len(packed) - 1):
        told = refusal(put(tmp_path / f"a.txt.{kind}", packed[:length]))
        assert f"a.txt.{kind}: cut short" in told, length
    middle = len(packed) // 2
    broken = packed[:middle] + bytes(byte ^ 255 for byte in packed[middle:middle + 64]) + packed[middle + 64:]
    assert "damaged" in refusal(put(tmp_path / f"b.txt.{kind}", broken))
    assert "damaged" in refusal(put(tmp_path / f"c.jsonl.{kind}", '{"text": "never packed at all"}\n'), skip_bad=True)


SMALL = r"""
import re, sys
sys.path.insert(0, {src!r})
from hanok.data.formats import *
def most():
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
before = most()
counts, n, length = Counts(), 0, 0
for unit in find_units([{path!r}]):
    for document in read_unit(unit, ReadOptions(skip_bad=True), counts):
        n, length = n + 1, length + len(document.text)
assert "torch" not in sys.modules
print(n, length, counts.bad, counts.split, (most() - before) // 1024)
"""


def measured(path: Path) -> list[int]:
    """Documents, characters, bad, split, and the megabytes that reading `path` took, in a process of its own."""
    source = SMALL.format(src=str(Path(__file__).parents[2] / "src"), path=str(path))
    return [int(word) for word in subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout.split()]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process alone, without that of its parent")
@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_what_unpacks_to_a_hundred_megabytes_is_never_held_whole(tmp_path, kind):
    zeros = PACK[kind](b"0" * 100_000_000)
    assert len(zeros) < 200_000
    n, length, bad, n_split, megabytes = measured(put(tmp_path / f"a.txt.{kind}", zeros))
    assert (n, length, bad, n_split) == (100, 100_000_000, 0, 1) and megabytes < 24, megabytes
    rows = PACK[kind](b'{"text": "' + b"0" * 100_000_000 + b'"}\n{"text": "good"}\n')
    n, length, bad, _, megabytes = measured(put(tmp_path / f"a.jsonl.{kind}", rows))
    assert (n, length, bad) == (1, 4, 1) and megabytes < 64, megabytes
    plain = put(tmp_path / "b.txt", "")
    os.truncate(plain, 100_000_000)
    n, length, *_, megabytes = measured(plain)
    assert (n, length) == (100, 100_000_000) and megabytes < 24, megabytes


def test_korean_in_its_encodings_with_marks_and_decomposed(tmp_path):
    nfd = unicodedata.normalize("NFD", "한옥")  # jamo, as macOS writes names
    assert len(nfd) == 6
    for encoding in ("cp949", "euc-kr", "utf-8", "UTF_8", "utf-16", "utf-16-le", "utf-8-sig"):
        text = "한옥 mixed\r\n문장\n" if "utf" not in encoding.lower() else KOREAN + nfd
        assert read(put(tmp_path / "a.txt", text.encode(encoding)), encoding=encoding)[0][1] == text
    assert read(put(tmp_path / "b.txt", b"\xef\xbb\xbf" + nfd.encode()))[0][1] == nfd
    rows = '{"text": "한옥"}\n{"text": "기와"}\n'
    assert [text for _, text in read(put(tmp_path / "a.jsonl", rows.encode("cp949")), encoding="cp949")] == ["한옥", "기와"]
    assert [text for _, text in read(put(tmp_path / "b.jsonl", rows.encode("utf-16")), encoding="utf-16")] == ["한옥", "기와"]
    assert [text for _, text in read(put(tmp_path / "c.jsonl", b"\xef\xbb\xbf" + rows.encode()))] == ["한옥", "기와"]


def test_the_first_bad_byte_is_named_wherever_it_stands(tmp_path):
    for place in (0, 7, BLOCK - 1, BLOCK, 3 * BLOCK + 5):
        assert f"a.txt: not utf-8: 0xff at byte {place};" in refusal(put(tmp_path / "a.txt", b"a" * place + b"\xffa"))
        assert f"at byte {place + 3};" in refusal(put(tmp_path / "a.txt", b"\xef\xbb\xbf" + b"a" * place + b"\xff"))
    cut = "가".encode()[:2]
    assert f"at byte {BLOCK - 1};" in refusal(put(tmp_path / "a.txt", b"a" * (BLOCK - 1) + cut + b"a"))
    assert f"at byte {BLOCK - 1};" in refusal(put(tmp_path / "a.txt", b"a" * (BLOCK - 1) + cut))
    assert "--encoding" in refusal(put(tmp_path / "a.txt", "한".encode("cp949")))
    assert "not cp949: 0xff at byte 4" in refusal(put(tmp_path / "a.txt", "한옥".encode("cp949") + b"\xff\xff"), encoding="cp949")
    assert "utf-16-le" in refusal(put(tmp_path / "a.txt", "no mark".encode("utf-16-le")), encoding="utf-16")


def test_with_skip_bad_what_is_no_text_is_counted_and_the_rest_is_read(tmp_path):
    rows = b'{"text": "one"}\n{"text": "b\xffd"}\n{"text": "three"}\n{"text": "\\ud83d"}\nno json\n'
    path, counts = put(tmp_path / "a.jsonl", rows), Counts()
    assert read(path, counts=counts, skip_bad=True) == [(f"{path}:1", "one"), (f"{path}:3", "three")] and counts == Counts(bad=3)
    path, counts = put(tmp_path / "a.txt", b"good line\n" * 4 + b"bad \xff line\n" + b"good line\n"), Counts()
    assert read(path, counts=counts, skip_bad=True, max_document=20) == [
        (f"{path} part 1", "good line\n" * 2), (f"{path} part 2", "good line\n" * 2), (f"{path} part 4", "good line\n")]
    assert counts == Counts(bad=1, split=1)


def test_long_documents_are_split_at_line_ends_else_spaces_else_anywhere(tmp_path):
    path, counts = tmp_path / "a.txt", Counts()
    text = "one two\nthree\n" + "four five " * 2 + "sixsixsixsixsix"
    told = read(put(path, text), counts=counts, max_document=12)
    assert [piece for _, piece in told] == ["one two\n", "three\n", "four five ", "four five ", "sixsixsixsix", "six"]
    assert [name for name, _ in told] == [f"{path} part {number}" for number in range(1, 7)] and counts == Counts(split=1)
    assert read(put(path, text), max_document=len(text)) == [(str(path), text)]


@given(st.text(alphabet="ab \n한", max_size=200), st.integers(1, 30), st.integers(1, 50))
def test_pieces_are_the_text_and_do_not_depend_on_the_chunks(text, length, size):
    def pieces(chunks: list[str]) -> list[str]:
        counts = Counts()
        told = [document.text for document in documents("x", chunks, ReadOptions(max_document=length), counts)]
        assert counts.split == (len(text) > length) and counts.empty == (not text.strip())
        return told

    chunks = [text[start:start + size] for start in range(0, len(text), size)]
    assert pieces([text]) == pieces(chunks) and all(len(piece) <= length for piece in pieces(chunks))
    assert "".join("".join(pieces(chunks)).split()) == "".join(text.split())
    assert list(lines(chunks)) == (text.removesuffix("\n").split("\n") if text else [])
    packed = text.encode("utf-16")
    assert "".join(decoded([packed[start:start + size] for start in range(0, len(packed), size)], "x", ReadOptions("utf-16"))) == text


def test_empty_documents_are_counted_and_left_out(tmp_path):
    put(tmp_path / "a.txt", "")
    put(tmp_path / "b.txt", " \n\t\u3000\n")
    put(tmp_path / "c.jsonl", '{"text": ""}\n\n{"text": "x"}\n{"text": null}\n')
    counts = Counts()
    assert [text for _, text in read(tmp_path, counts=counts)] == ["x"] and counts == Counts(empty=4)


@pytest.mark.parametrize("text, expected", [
    ("plain {text}\n\nof two paragraphs\n", [("stdin", "plain {text}\n\nof two paragraphs\n")]),
    (' \n {"text": "one"}\n{"text": "한옥"}', [("stdin:2", "one"), ("stdin:3", "한옥")]), ("  \n", []), ("", [])])
def test_stdin_is_one_text_or_jsonl(monkeypatch, text, expected):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="latin-1"))
    assert find_units(["-"]) == [Unit("stdin", "stdin")]
    assert read("-") == expected


@pytest.mark.parametrize("module, name", [("zstandard", "a.txt.zst"), ("pyarrow", "a.parquet"), ("mwparserfromhell", "a.xml"),
                                          ("fastwarc.warc", "a.wet")])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    assert f"needs {module.partition('.')[0]}, which is not installed; pip install 'hanok[data]'" in refusal(put(tmp_path / name, "<mediawiki>"))


def test_reading_the_same_unit_again_gives_the_same_documents(tmp_path):
    path = put(tmp_path / "a.jsonl.zst", PACK["zst"]("".join(json.dumps({"text": KOREAN * n}) + "\n" for n in range(200)).encode()))
    first, again = read(path, max_document=500), read(path, max_document=500)
    assert first == again and len({name for name, _ in first}) == len(first) > 500


def test_what_a_killed_build_left_is_no_text(tmp_path):
    work = tmp_path / "corpus.building"
    work.mkdir()
    for name in ("build.json", "tokenizer.json", "t.txt"):
        (tmp_path / name).write_text("text")
        (work / name).write_text("{}")
    assert [unit.path.parent for unit in find_units([str(tmp_path)])] == [tmp_path] * 3
    assert len(find_units([str(work)])) == 3                          # it was named
    (work / "build.json").unlink()
    assert len(find_units([str(tmp_path)])) == 5
