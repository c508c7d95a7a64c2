"""A corpus gives back what was put in, across shards and pieces, and says which of its files is broken."""
from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanok.data.corpus import BATCH_LENGTH, Corpus, build_corpus, cached, cut_pieces, end_of_text_id
from hanok.data.sources import Document
from hanok.errors import ConfigError, DataError, TokenizerError
from hanok.text.tokenizer import PRE_TOKENIZERS, train


class Bytes:
    """A byte is an id; 256 ends a text where it is known."""

    def __init__(self, vocab_size: int = 257, end: str | None = "<|endoftext|>"):
        self.vocab_size = vocab_size
        self.specials = {} if end is None else {"<pad>": vocab_size - 2, end: vocab_size - 1}

    def encode_batch(self, texts):
        return [list(text.encode()) for text in texts]


def expected(texts: list[str], tokenizer: Bytes) -> tuple[list[int], list[int]]:
    """The line of tokens, and the number of the document of each."""
    end = [end for end in [end_of_text_id(tokenizer)] if end is not None]
    rows = [[*text.encode(), *end] for text in texts if text]
    return [token for row in rows for token in row], [number for number, row in enumerate(rows) for _ in row]


def documents(texts: list[str]) -> list[Document]:
    return [Document(f"document {number}", text) for number, text in enumerate(texts)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=12).filter(any), st.integers(1, 40), st.sampled_from([257, 65536, 65537]),
       st.sampled_from(["<|endoftext|>", "</s>", None]), st.data())
def test_slices_across_shards_and_documents(texts, shard_tokens, vocab_size, end, data):
    tokenizer = Bytes(vocab_size, end)
    with tempfile.TemporaryDirectory() as folder:
        corpus = build_corpus(documents(texts), tokenizer, Path(folder) / "corpus", shard_tokens=shard_tokens)
        tokens, numbers = expected(texts, tokenizer)
        assert (len(corpus), corpus.n_documents) == (len(tokens), numbers[-1] + 1)
        assert len(list(corpus.path.glob("shard-*.bin"))) == -(-len(tokens) // shard_tokens) == len(corpus.info.shards)
        assert corpus.info.bytes == sum(len(text.encode()) for text in texts)
        for start, stop in [(0, len(tokens)), (0, 0), (len(tokens), len(tokens)),
                            sorted(data.draw(st.tuples(st.integers(0, len(tokens)), st.integers(0, len(tokens)))))]:
            ids = corpus.slice(start, stop)
            assert ids.tolist() == tokens[start:stop] and ids.dtype == (np.uint16 if vocab_size <= 65536 else np.uint32)
            assert corpus.document_ids(start, stop).tolist() == numbers[start:stop]
        for start, stop in [(-1, 1), (0, len(tokens) + 1), (1, 0)]:
            with pytest.raises(IndexError):
                corpus.slice(start, stop)
            with pytest.raises(IndexError):
                corpus.document_ids(start, stop)


def test_the_files_are_plain_little_endian(tmp_path):
    sources = [{"path": "a.txt", "bytes": 2, "sha256": "00"}]
    corpus = build_corpus(documents(["ab", "", "c"]), Bytes(), tmp_path / "new" / "corpus", shard_tokens=3, tokenizer_sha256="ff", sources=sources)
    assert (corpus.path / "shard-00000.bin").read_bytes() == b"a\0b\0\0\1"
    assert (corpus.path / "shard-00001.bin").read_bytes() == b"c\0\0\1"
    starts = np.load(corpus.path / "documents.npy")
    assert starts.dtype == np.int64 and starts.tolist() == [0, 3]
    assert json.loads((corpus.path / "corpus.json").read_text()) == {
        "documents": 2, "tokens": 5, "bytes": 3, "dtype": "uint16", "vocab_size": 257, "shards": [3, 2], "end_id": 256, "tokenizer_sha256": "ff",
        "sources": sources}
    assert sorted(path.name for path in corpus.path.iterdir()) == ["corpus.json", "documents.npy", "shard-00000.bin", "shard-00001.bin"]


def test_wide_ids_keep_their_value(tmp_path):
    tokenizer = Bytes(70_000)
    assert build_corpus(documents(["a"]), tokenizer, tmp_path / "wide").slice(0, 2).tolist() == [97, 69_999]
    tokenizer.vocab_size = 65_536
    with pytest.raises(TokenizerError, match="gave id 69999, but its vocab_size is 65536"):
        build_corpus(documents(["a"]), tokenizer, tmp_path / "narrow")
    assert not (tmp_path / "narrow").exists()


def test_text_streams_in_batches_and_long_documents_in_pieces(tmp_path):
    long = "".join(f"line {number}\n" for number in range(700_000))                # 8.2 million characters
    texts = ["first", long, *(["short"] * 30_000), "한옥 " * 10]
    largest, read, reports = 0, 0, []

    class Watched(Bytes):
        def encode_batch(self, texts):
            nonlocal largest
            largest = max(largest, sum(map(len, texts)))
            reports.append(read)
            return super().encode_batch(texts)

    def stream() -> Iterator[Document]:
        nonlocal read
        for document in documents(texts):
            read += 1
            yield document

    done: list[int] = []
    corpus = build_corpus(stream(), Watched(), tmp_path / "corpus", shard_tokens=3_000_000, progress=done.append)
    assert BATCH_LENGTH <= largest < BATCH_LENGTH + (2 << 20) and len(reports) == 4
    assert reports[0] == 2, "the first batch is encoded before the rest is read"
    assert done == sorted(done) and done[-1] == sum(len(text.encode()) for text in texts) and len(done) == len(reports)
    assert corpus.n_documents == len(texts)
    assert corpus.slice(0, len(corpus)).tolist() == expected(texts, Bytes())[0]


@given(st.text(alphabet="ab,1 \n\r\t한", max_size=200), st.integers(1, 20))
def test_pieces_join_to_the_text_and_keep_their_length(text, length):
    pieces = list(cut_pieces(text, length))
    assert "".join(piece for piece, _ in pieces) == text
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(length <= len(piece) <= 2 * length for piece, _ in pieces[:-1]) and len(pieces[-1][0]) <= 2 * length


def test_pieces_end_with_a_line_else_before_a_word_else_anywhere():
    assert list(cut_pieces("ab\ncd\nef\n", 2)) == [("ab\n", False), ("cd\n", False), ("ef\n", True)]
    assert list(cut_pieces("abc def ghij", 3)) == [("abc", False), (" def", False), (" ghij", True)]
    assert list(cut_pieces("abcdefgh", 2)) == [("abcd", False), ("efgh", True)]


LINES = ["def f(x):\n", "    return x\n", "\n", "\n\n", "a line of words, and more\n", "\tx = 12\r\n", "end.  \n"]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@given(lines=st.lists(st.sampled_from(LINES), min_size=20))
def test_cuts_stand_where_byte_level_tokenizers_cut(name, lines):
    text = "".join(lines)
    words = PRE_TOKENIZERS[name]().pre_tokenize_str
    alone = [word for piece, _ in cut_pieces(text, 60) for word, _ in words(piece)]
    assert alone == [word for word, _ in words(text)]


def test_a_trained_tokenizer_gives_each_document_back(tmp_path):
    texts = ["a hanok has a floor\n", "<|endoftext|> is text here", "한옥의 마루", "a floor and a roof\n" * 20]
    tokenizer = train("bpe", texts, 300)
    corpus = build_corpus(documents(texts), tokenizer, tmp_path / "corpus", shard_tokens=16)
    corpus.check(tokenizer)
    ids, numbers = corpus.slice(0, len(corpus)), corpus.document_ids(0, len(corpus))
    assert [tokenizer.decode(ids[numbers == n].tolist()) for n in range(corpus.n_documents)] == texts
    assert corpus.info.end_id == tokenizer.specials["<|endoftext|>"] and (ids == corpus.info.end_id).sum() == len(texts)


def test_a_failure_leaves_nothing(tmp_path):
    def broken() -> Iterator[Document]:
        yield Document("good", "good")
        raise DataError("the second document is broken")

    with pytest.raises(DataError, match="second document"):
        build_corpus(broken(), Bytes(), tmp_path / "corpus")
    for empty in ([], documents(["", ""])):
        with pytest.raises(DataError, match="no text to build a corpus from"):
            build_corpus(empty, Bytes(), tmp_path / "corpus")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "mine").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        build_corpus(broken(), Bytes(), tmp_path / "corpus")
    assert (tmp_path / "corpus" / "mine").read_text() == "mine"
    with pytest.raises(ConfigError, match="shard_tokens 0"):
        build_corpus(broken(), Bytes(), tmp_path / "other", shard_tokens=0)


@pytest.mark.parametrize("name", ["corpus.json", "documents.npy", "shard-00001.bin"])
@pytest.mark.parametrize("harm", ["missing", "cut short", "emptied"])
def test_broken_files_are_named(tmp_path, name, harm):
    path = build_corpus(documents(["abc", "def"]), Bytes(), tmp_path / "corpus", shard_tokens=3).path / name
    data = path.read_bytes()
    path.unlink()
    if harm != "missing":
        path.write_bytes(data[:-1] if harm == "cut short" and name != "corpus.json" else data[:len(data) // 2] if harm == "cut short" else b"")
    with pytest.raises((DataError, ConfigError)) as error:
        Corpus.open(tmp_path / "corpus")
    assert name in str(error.value) and "\n" not in str(error.value)


def test_counts_that_do_not_fit_are_refused(tmp_path):
    path = build_corpus(documents(["abc", "def"]), Bytes(), tmp_path / "corpus").path
    info = json.loads((path / "corpus.json").read_text())
    for change in ({"tokens": 9}, {"dtype": "float32"}, {"documents": 3}, {"shards": [4, 4]}):
        (path / "corpus.json").write_text(json.dumps(info | change))
        with pytest.raises(DataError):
            Corpus.open(path)
    (path / "corpus.json").write_text(json.dumps(info))
    assert len(Corpus.open(path)) == 8


def test_check_refuses_another_tokenizer(tmp_path):
    corpus = build_corpus(documents(["abc"]), Bytes(), tmp_path / "corpus", tokenizer_sha256="aa")
    corpus.check(Bytes(), "aa")
    corpus.check(Bytes())
    with pytest.raises(DataError, match="made with vocab_size 257, but the tokenizer has 300"):
        corpus.check(Bytes(300))
    with pytest.raises(DataError, match="end-of-text id 256, but the tokenizer has None"):
        corpus.check(Bytes(end=None))
    with pytest.raises(DataError, match="SHA-256 aa, but the tokenizer has bb"):
        corpus.check(Bytes(), "bb")


def test_a_corpus_that_another_process_built_in_the_meantime_is_taken(tmp_path):
    """Two runs on the same text may begin at once."""
    def build():
        build_corpus([Document("a", "the house stands")], Bytes(), tmp_path / "corpus")
        return build_corpus([Document("a", "the house stands")], Bytes(), tmp_path / "corpus")    # what is slower finds the place taken

    with pytest.raises(DataError):
        cached(Corpus.open, lambda: build_corpus([], Bytes(), tmp_path / "none"), tmp_path / "none")
    assert cached(Corpus.open, build, tmp_path / "corpus").n_documents == 1
