"""JSONL, CSV, TSV, Parquet and data sets, a row at a time: the text as it was written, and what is wrong told with its line."""
from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import documents
from documents import read
from hanok.data import tables
from hanok.data.formats import Counts

KOREAN = "한옥, \"기와\"\n지붕\t漢字"


def refusal(source: str | Path, **options) -> str:
    """Behind the file's name."""
    return documents.refusal(source, **options).removeprefix(str(source))


def put(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def parquet(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=100)
    return path


def test_jsonl_gives_a_document_a_line(tmp_path):
    rows = [{"id": 1, "text": KOREAN}, {"text": "two\u2028lines\x85", "more": [1]}]
    path = put(tmp_path / "a.jsonl", json.dumps(rows[0], ensure_ascii=False) + "\r\n\n  \n" + json.dumps(rows[1], ensure_ascii=False))
    assert read(path) == [(":1", KOREAN), (":4", "two\u2028lines\x85")]
    assert read(put(path, '{"body": "x"}\n'), text_column="body") == [(":1", "x")]


@pytest.mark.parametrize("line, told", [
    ('{"text": "cut', "no JSON: Unterminated string"), ("[1]", "a list, expected an object"), ("7", "a number, expected an object"),
    ('{"body": "x", "제목": 1}', "no key 'text', it has body, 제목; name the one that holds the text with --text-column"), ("{}", "it has nothing"),
    ('{"text": 7}', "'text' is a number, expected text"), ('{"text": {"a": 1}}', "'text' is an object"), ("[" * 100_000, "no JSON"),
    ('{"text": "\\ud83d"}', "half a surrogate pair"), ('{"text": 1' + "0" * 5000 + "}", "no JSON")])
def test_bad_jsonl_is_told_with_its_line_or_counted(tmp_path, line, told):
    path, counts = put(tmp_path / "a.jsonl", f'{{"text": "good"}}\n{line}\n{{"text": "also"}}\n'), Counts()
    assert refusal(path).startswith(":2: ") and told in refusal(path)
    assert read(path, counts, skip_bad=True) == [(":1", "good"), (":3", "also")] and counts == Counts(bad=1)


def test_a_line_of_any_length_ends_somewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "LONGEST_ROW", 1000)
    monkeypatch.setattr("hanok.data.reading.LONGEST_ROW", 1000)
    long = "x" * 2000
    for name, text, rows in (("a.jsonl", f'{{"text": "a"}}\n{{"text": "{long}"}}\n{{"text": "b"}}', [(":1", "a"), (":3", "b")]),
                             ("a.tsv", f"text\na\n{long}\nb", [(":2", "a"), (":4", "b")]),
                             ("a.csv", f"text\na\n{long}\nb", [(":2", "a"), (":4", "b")])):
        counts = Counts()
        assert "this line is longer than" in refusal(put(tmp_path / name, text))
        assert read(tmp_path / name, counts, skip_bad=True) == rows and counts.bad == 1


def test_csv_fields_hold_anything_and_are_named_by_their_first_line(tmp_path):
    path = tmp_path / "a.csv"
    assert read(put(path, "\ufeffid, text\r\n1,plain\r\n\r\n2,\"a \"\"b\"\",\r\nc\"\r\n3,\r\n4,d")) == [
        (":2", "plain"), (":4", 'a "b",\r\nc'), (":7", "d")]
    long = "한" * 400_000
    assert read(put(path, f'text\n"{long}"\n')) == [(":2", long)]


@given(st.lists(st.text(alphabet='ab,"\n\r\t 한', min_size=1, max_size=30).filter(str.strip), max_size=10))
def test_csv_as_python_writes_it_comes_back(tmp_path_factory, texts):
    handle = io.StringIO(newline="")
    csv.writer(handle).writerows([["n", "text"], *enumerate(texts)])
    path = put(tmp_path_factory.mktemp("csv") / "a.csv", handle.getvalue())
    assert [text for _, text in read(path)] == texts


def test_bad_tables_are_told_with_their_line_or_counted(tmp_path):
    csv_file, tsv_file = tmp_path / "a.csv", tmp_path / "a.tsv"
    for path, comma in ((csv_file, ","), (tsv_file, "\t")):
        put(path, f"id{comma}body\n1{comma}x\n")
        assert "no column 'text', it has id, body; name the one that holds the text with --text-column" in refusal(path)
        assert "no column" in refusal(path, skip_bad=True)
        assert read(path, text_column="body") == [(":2", "x")]
        put(path, f"id{comma}text\n1{comma}x\n2\n3{comma}y{comma}z\n4{comma}w\n")
        assert refusal(path).startswith(":3: 1 columns, expected 2 (id, text)")
        counts = Counts()
        assert read(path, counts, skip_bad=True) == [(":2", "x"), (":5", "w")] and counts == Counts(bad=2)
    assert refusal(put(csv_file, 'text\ngood\n"open\nto the end\n')).startswith(":3: no CSV row: unexpected end of data")
    counts = Counts()
    assert read(put(csv_file, 'text\ngood\n"a"b\nmore\n'), counts, skip_bad=True) == [(":2", "good"), (":4", "more")] and counts.bad == 1
    many = ",".join(f"column{number}" for number in range(500))
    assert "column19 and 480 more;" in refusal(put(csv_file, many + "\n"))
    assert read(put(csv_file, "")) == []


def test_tsv_takes_quotes_as_they_stand(tmp_path):
    assert read(put(tmp_path / "a.tsv", 'text\tid\r\n"half\t1\r\nit\'s "so"\t2\r\n')) == [(":2", '"half'), (":3", 'it\'s "so"')]


def test_parquet_rows_of_every_text_type(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"{KOREAN} {number}" for number in range(250)]
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        parquet(path, id=range(250), text=pa.array(texts, pa.string()).cast(kind))
        assert read(path) == [(f":{number}", text) for number, text in enumerate(texts, 1)]
    counts = Counts()
    assert read(parquet(path, body=["a", None, " ", "b"]), counts, text_column="body") == [(":1", "a"), (":4", "b")] and counts == Counts(empty=2)
    counts = Counts()
    assert read(parquet(path, text=pa.nulls(3)), counts) == [] and counts == Counts(empty=3)


def test_bad_parquet_is_one_line(tmp_path):
    path = parquet(tmp_path / "a.parquet", id=[1, 2], body=["x", "y"])
    assert refusal(path).startswith(": no column 'text', it has id, body; name the one")
    assert "column 'id' is int64, expected string" in refusal(path, text_column="id")
    assert "is binary" in refusal(parquet(path, text=pa.array([b"x"])))
    parquet(path, text=["x" * 1000] * 1000)
    whole = path.read_bytes()
    for data in (b"", whole[:-100], b"PAR1" + bytes(100), whole[:20] + bytes(200) + whole[220:]):
        path.write_bytes(data)
        assert "Parquet file" in refusal(path)
    places = b"".join(place.to_bytes(4, "little") for place in (0, 1, 3, 4))
    broken = pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(places), pa.py_buffer(b"a\xff\xfeb")])
    parquet(path, text=broken)
    counts = Counts()
    assert refusal(path).startswith(":2: not UTF-8 at byte 0")
    assert read(path, counts, skip_bad=True) == [(":1", "a"), (":3", "b")] and counts == Counts(bad=1)


LARGE = r"""
import re, sys
from hanok.data.formats import *
import pyarrow, pyarrow.parquet
def most():
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
before = most()
n = sum(len(document.text) for unit in find_units([sys.argv[1]]) for document in read_unit(unit, ReadOptions(), Counts()))
assert "torch" not in sys.modules
print(n, (most() - before) // 1024)
"""


def measured(source: Path | str, program: str = LARGE, **environment: str) -> list[str]:
    env = {"PATH": "", "PYTHONPATH": str(Path(__file__).parents[2] / "src"), **environment}
    done = subprocess.run([sys.executable, "-c", program, str(source)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process alone, without that of its parent")
def test_a_row_group_of_any_size_is_read_a_few_rows_at_a_time(tmp_path):
    writer = pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("text", pa.string())]), compression="zstd")
    with writer:
        writer.write_table(pa.table({"text": [f"{number:08d} " * 2000 for number in range(10_000)]}), row_group_size=10_000)
    n, megabytes = map(int, measured(tmp_path / "a.parquet"))
    assert n == 10_000 * 18_000 and megabytes < 110
    same = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["x" * 100_000]))
    n, megabytes = map(int, measured(parquet(tmp_path / "b.parquet", text=same)))
    assert n == 100_000_000 and megabytes < 80


DATASET = """
import sys
from hanok.data.formats import *
from hanok.errors import DataError
for source in sys.argv[1].split():
    counts = Counts()
    try:
        for unit in find_units([source]):
            print(*[(d.name.removeprefix(source), d.text) for d in read_unit(unit, ReadOptions(skip_bad=True), counts)], counts.bad, sep="|")
    except DataError as error:
        print(str(error).removeprefix(source))
assert "torch" not in sys.modules
"""


def test_a_data_set_streams_from_a_folder_without_the_net_and_without_torch(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    put(folder / "train.jsonl", "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in ("one", "한옥", " ")))
    put(folder / "test.jsonl", '{"text": "held"}\n')
    (tmp_path / "rows").mkdir()
    parquet(tmp_path / "rows" / "a.parquet", text=["p", "q"])
    (tmp_path / "other").mkdir()
    put(tmp_path / "other" / "a.csv", "body,n\nx,1\n")
    names = (f"{folder}", f"{folder}:default:test", f"{folder}::test", f"{tmp_path / 'rows'}", f"{tmp_path / 'other'}", f"{folder}::none",
             f"{tmp_path / 'gone'}", "no-such-owner/no-such-set")
    lines = " ".join(measured(" ".join(f"dataset:{name}" for name in names), DATASET, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home")))
    assert "(':1', 'one')|(':2', '한옥')|0" in lines and "(':1', 'p')|(':2', 'q')|0" in lines and lines.count("(':1', 'held')|0") == 2
    assert ": no column 'text', it has body, n;" in lines and "Bad split: none" in lines and lines.count("expected dataset:NAME_OR_FOLDER") == 3


def test_a_missing_data_sets_package_names_its_own_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs datasets, which is not installed; pip install 'hanok[datasets]'" in refusal("dataset:any")
