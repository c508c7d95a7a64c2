"""Pairs are read by their columns' names, split without leaks, kept as they were, and come once an epoch in rows of like length."""
from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanok.data.objectives import seq2seq
from hanok.data.pair_loader import PairLoader, budgeted, pair_windows
from hanok.data.pairs import Columns, PairCorpus, TextPair, build_pairs, cached_pairs, read_pairs, split_pairs
from hanok.data.reading import LONGEST_ROW
from hanok.errors import ConfigError, DataError
from tiny import tokenizer

objective = partial(seq2seq, start_id=0, end_id=0, pad_id=0)
PAIRS = [("the house", "집"), ('a "stone"', "돌, 하나"), ("rain", "비")]


# ---- reading

def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def read(path: Path, **columns) -> list[tuple[str, str, str]]:
    return [(pair.source, pair.target, pair.group) for pair in read_pairs([path], Columns(**columns))]


def test_three_forms_of_the_same_pairs(tmp_path):
    expected = [(source, target, "f") for source, target in PAIRS]
    table = write(tmp_path / "a.tsv", "file\ten\tko\n" + "".join(f"f\t{s}\t{t}\n" for s, t in PAIRS))
    bare = write(tmp_path / "b.TSV", "".join(f"f\t{s}\t{t}\r\n" for s, t in PAIRS) + "\nf\t\tempty\nf\tempty\t \n")
    quoted = write(tmp_path / "c.csv", 'ko,en,file\n' + "".join(f'"{t}","{s.replace(chr(34), chr(34) * 2)}",f\n' for s, t in PAIRS))
    lines = write(tmp_path / "d.jsonl", "\n".join(json.dumps({"en": s, "ko": t, "file": "f", "n": 1}) for s, t in PAIRS))
    for path in (table, quoted, lines):
        assert read(path, source="en", target="ko", group="file") == expected
    assert read(bare, source="en", target="ko", group="file", names=("file", "en", "ko")) == expected
    everything = list(read_pairs([tmp_path], Columns("en", "ko"))) if not bare.unlink() else []
    assert [(pair.source, pair.target, pair.group) for pair in everything] == [(s, t, "") for s, t in PAIRS] * 3


@pytest.mark.parametrize(("name", "text", "told"), [
    ("a.tsv", "en\tko\nx\ty\n", "line 2 has no column 'source', it has en, ko; say which are which with data.source_column"),
    ("a.tsv", "source\ttarget\nx\ty\nz\n", "line 3 has 1 columns, expected 2 (source, target)"),
    ("a.jsonl", '{"source": "x", "target": "y"}\n{"source": 3, "target": "y"}', "line 2: 'source' is 3, expected text"),
    ("a.jsonl", '{"source": "x"', "line 1 is no JSON: "), ("a.jsonl", "[1]", "line 1 is a list, expected an object"),
    ("a.jsonl", '\n{"source": "x"}', "line 2 has no column 'target', it has source;"),
    ("a.csv", "source,target\n\"" + "x" * (LONGEST_ROW + 1) + '",y\n', "line 2: field larger than field limit"),
    ("a.txt", "x", "pairs of a source and a target are read from .tsv, .csv, .jsonl files"),
])
def test_what_cannot_be_read_is_told_with_its_line(tmp_path, name, text, told):
    with pytest.raises(DataError) as error:
        read(write(tmp_path / name, text))
    assert told in str(error.value) and "\n" not in str(error.value) and name in str(error.value)


def test_missing_files_and_empty_folders_are_told(tmp_path):
    for paths, told in (([], "no files or folders were given"), ([tmp_path], "no files of pairs in this folder"),
                        ([tmp_path / "x.tsv"], "there is no such file")):
        with pytest.raises(DataError, match=told):
            list(read_pairs(paths))


# ---- splitting

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), min_size=1, max_size=80), st.floats(0.05, 0.6), st.integers(0, 3), st.booleans())
def test_neither_a_group_nor_a_source_stands_on_both_sides(drawn, fraction, seed, grouped):
    pairs = [TextPair(f"Source  {source}" if n % 2 else f"source {source} ", f"t{n}", f"g{group}" if grouped else "") for n, (source, group) in
             enumerate(drawn)]
    try:
        train, held = split_pairs(pairs, fraction, seed)
    except DataError as error:
        assert "held out" in str(error)
        return
    assert train and held and {*train, *held} <= {*pairs} and (train, held) == split_pairs(pairs, fraction, seed)
    assert not {" ".join(p.source.lower().split()) for p in train} & {" ".join(p.source.lower().split()) for p in held}
    assert not grouped or not {p.group for p in train} & {p.group for p in held}
    known = {" ".join(p.source.lower().split()) for p in train}
    assert all(" ".join(p.source.lower().split()) in known for p in pairs if p not in train and p not in held)


def test_about_the_share_is_held_out_and_more_data_moves_nothing():
    pairs = [TextPair(f"s{n}", f"t{n}") for n in range(2000)]
    train, held = split_pairs(pairs, 0.1, 0)
    assert 150 < len(held) < 250 and len(train) + len(held) == 2000
    assert {*split_pairs(pairs[:1000], 0.1, 0)[1]} <= {*held} and {*split_pairs(pairs, 0.1, 1)[1]} != {*held}
    with pytest.raises(DataError, match="all 2 pairs are of the group 'g', so none can be held out"):
        split_pairs([TextPair("a", "b", "g"), TextPair("c", "d", "g")], 0.1, 0)
    with pytest.raises(DataError, match="there are no pairs"):
        split_pairs([], 0.1, 0)
    with pytest.raises(ConfigError, match="expected a number between 0 and 1"):
        split_pairs(pairs, 1.0, 0)


# ---- on disk

def test_a_corpus_gives_back_what_was_put_in(tmp_path):
    pairs = [TextPair(source, target) for source, target in PAIRS] * 3
    for kind in ("bpe", "unigram"):
        words = tokenizer(kind, 420)
        corpus = cached_pairs(pairs, words, tmp_path)
        assert len(corpus) == 9 and cached_pairs(pairs, words, tmp_path).path == corpus.path
        for n, pair in enumerate(pairs):
            source, target = corpus[n]
            assert source.tolist() == words.encode(pair.source, add_special=True) and target.tolist() == words.encode(pair.target)
            assert (source.tolist()[-1] == words.id_of("</s>")) == (kind == "unigram")
            assert corpus.lengths[n].tolist() == [len(source), len(target)]
    assert len(list(tmp_path.iterdir())) == 2 and len(cached_pairs(pairs[:4], words, tmp_path)) == 4


def test_a_damaged_corpus_is_told_and_its_cache_built_again(tmp_path):
    pairs = [TextPair(source, target) for source, target in PAIRS]
    corpus = cached_pairs(pairs, tokenizer(), tmp_path)
    whole = (corpus.path / "source.bin").read_bytes()
    for name, damage in (("source.bin", whole[:-2]), ("lengths.npy", b"x"), ("pairs.json", b"{")):
        (corpus.path / name).write_bytes(damage)
        with pytest.raises((DataError, ConfigError)) as error:
            PairCorpus.open(corpus.path)
        assert "\n" not in str(error.value)
        assert (cached_pairs(pairs, tokenizer(), tmp_path).path / "source.bin").read_bytes() == whole
    shutil.rmtree(corpus.path)
    with pytest.raises(DataError, match="not a corpus of pairs"):
        PairCorpus.open(corpus.path)
    with pytest.raises(DataError, match="there are no pairs to build a corpus from"):
        build_pairs([], tokenizer(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


# ---- loading

class Spaces:
    """A word is an id, so that a pair's length is chosen, and its first token tells which pair it is."""
    vocab_size = 1000

    def encode_batch(self, texts, add_special=False):
        return [[int(word) for word in text.split()] for text in texts]


def numbered(lengths: list[tuple[int, int]], folder: str) -> PairCorpus:
    """Pair n reads n n n ..., and writes it."""
    pairs = [TextPair(" ".join([str(n)] * s), " ".join([str(n)] * t)) for n, (s, t) in enumerate(lengths)]
    return build_pairs(pairs, Spaces(), Path(folder) / "pairs")


def numbers(batch) -> list[int]:
    return batch.source_ids[:, 0].tolist()


sizes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=40)


@settings(max_examples=50, deadline=None)
@given(sizes, st.integers(1, 5), st.sampled_from([0, 24]), st.integers(1, 2), st.integers(0, 25))
def test_each_pair_comes_once_an_epoch_on_any_ranks_resumed_anywhere(lengths, batch_size, batch_tokens, n_ranks, steps):
    with tempfile.TemporaryDirectory() as folder:
        corpus = numbered(lengths, folder)
        make = partial(PairLoader, corpus, batch_size=batch_size, objective=objective, seed=5, batch_tokens=batch_tokens, n_ranks=n_ranks)
        ranks = [make(rank=rank) for rank in range(n_ranks)]
        dealt = [list(itertools.chain.from_iterable(itertools.zip_longest(*(numbers(next(loader)) for loader in ranks)))) if not batch_tokens else
                 [n for loader in ranks for n in numbers(next(loader))] for _ in range(3 * len(lengths) // batch_size + 3)]
        order = [n for step in dealt for n in step]
        for epoch in range(len(order) // len(lengths)):
            assert sorted(order[epoch * len(lengths):(epoch + 1) * len(lengths)]) == list(range(len(lengths)))
        again, resumed = make(rank=n_ranks - 1), make(rank=n_ranks - 1)
        for _ in range(steps):
            next(again)
        state = json.loads(json.dumps(again.state()))
        assert all(type(value) is int for value in state.values())
        resumed.restore(state)
        for _ in range(len(lengths) + 2):
            assert torch.equal(next(again).targets, next(resumed).targets) and again.state() == resumed.state()


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(1, 4), st.integers(1, 3))
def test_how_an_update_is_split_changes_nothing(lengths, batch_size, n_parts):
    with tempfile.TemporaryDirectory() as folder:
        corpus, together = numbered(lengths, folder), batch_size * n_parts
        whole = PairLoader(corpus, batch_size=together, objective=objective)
        parts = PairLoader(corpus, batch_size=batch_size, objective=objective, rows_per_update=together)
        for _ in range(2 * len(lengths)):
            assert numbers(next(whole)) == [n for _ in range(n_parts) for n in numbers(next(parts))]


def test_rows_are_of_like_length_and_updates_are_shuffled():
    lengths = [(n % 50 + 1, n % 50 + 1) for n in range(600)]
    with tempfile.TemporaryDirectory() as folder:
        corpus = numbered(lengths, folder)
        loader = PairLoader(corpus, batch_size=7, objective=objective)
        widths = []
        for _ in range(3 * 85):                                                          # in later epochs as well, though 7 does not divide 600
            batch = next(loader)
            own = [lengths[n][0] for n in numbers(batch)]
            widths.append((batch.source_ids.size(1), max(own) - min(own)))
        assert sum(spread for _, spread in widths) / len(widths) < 2
        assert [width for width, _ in widths[:85]] != sorted(width for width, _ in widths[:85]) and widths[:85] != widths[85:170]


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(2, 60))
def test_batches_keep_to_their_tokens(lengths, batch_tokens):
    begins = budgeted(np.array(lengths), batch_tokens)
    for start, stop in itertools.pairwise([0, *begins, len(lengths)]):
        part = np.array(lengths[start:stop])
        assert len(part) == 1 or len(part) * (part[:, 0].max() + part[:, 1].max() + 1) <= batch_tokens
        if stop < len(lengths):
            more = np.array(lengths[start:stop + 1])
            assert len(more) * (more[:, 0].max() + more[:, 1].max() + 1) > batch_tokens, "one more would have fitted"


def test_long_pairs_are_left_out_and_windows_count_exactly():
    lengths = [(3, 2), (9, 2), (2, 9), (8, 7), (8, 8), (1, 1)]
    with tempfile.TemporaryDirectory() as folder:
        corpus = numbered(lengths, folder)
        loader = PairLoader(corpus, batch_size=1, objective=objective, max_len=8)
        assert sorted(numbers(next(loader))[0] for _ in range(3)) == [0, 3, 5]               # a target needs room for its end
        assert [n for batch in pair_windows(corpus, objective=objective, batch_size=2, max_len=8) for n in numbers(batch)] == [5, 0, 3]
        for most in range(1, 15):
            parts = [[numbers(batch) for batch in pair_windows(corpus, most, objective=objective, batch_size=8, max_len=8)] for _ in range(2)]
            asked = sum(lengths[n][1] + 1 for n in parts[0][0])
            assert parts[0] == parts[1] and asked >= min(most, 13) and {*parts[0][0]} <= {0, 3, 5}
            assert len(parts[0][0]) == 1 or asked - max(lengths[n][1] + 1 for n in parts[0][0]) < most
        with pytest.raises(DataError, match="no pair has sides of at most 1 tokens, the shortest has 2; raise data.seq_len"):
            PairLoader(corpus, batch_size=1, objective=objective, max_len=1)
        with pytest.raises(ConfigError, match="has pairs 6, this loader has 3"):
            loader.restore(PairLoader(corpus, batch_size=1, objective=objective).state())
