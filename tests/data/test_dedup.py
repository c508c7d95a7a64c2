"""What goes, against an oracle that compares every pair; and runs on disk that come back sorted whatever fits into memory."""
from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanok.data import dedup, minhash
from hanok.data.dedup import EMPTY, EXACT, KEPT, NEAR, Runs, judge, pairs_of
from hanok.data.spool import DOCUMENT, Spool, write_chunk
from hanok.data.workers import sign


def spool_of(folder: Path, texts: list[str], per_chunk: int = 7, same_band: bool = False) -> Spool:
    """Texts in chunks; `same_band`: all of them share a band, so that only what they hold decides."""
    folder.mkdir()
    paths, sizes = [], []
    for first in range(0, len(texts), per_chunk):
        plain = [text.encode() for text in texts[first:first + per_chunk]]
        found = np.zeros(len(plain), DOCUMENT)
        found["bytes"], found["tokens"] = [len(text) for text in plain], [len(text.split()) for text in plain]
        found["digest"] = [np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), "<u8") for text in plain]
        found["characters"] = minhash.by_character(minhash.script_counts(plain))
        for characters in (False, True):
            sign(found, plain, np.flatnonzero(found["characters"] == characters), characters)
        if same_band:
            found["bands"][:, 0] = 7
        paths.append(folder / f"{first:06d}")
        write_chunk(paths[-1], found, np.zeros(int(found["tokens"].sum()), np.uint16), [f"doc {first + i}" for i in range(len(plain))], plain)
        sizes.append(len(plain))
    return Spool(paths, sizes)


def oracle(texts: list[str]) -> dict[int, tuple[str, int]]:
    """Every text against every earlier one: who goes, how, and for whom."""
    gone: dict[int, tuple[str, int]] = {}
    sets = [set(minhash.shingles(text.encode(), False).tolist()) for text in texts]
    for i, text in enumerate(texts):
        if text in texts[:i]:
            gone[i] = ("exact", texts.index(text))
            continue
        for j in range(i):
            if j not in gone and sets[i] and 5 * len(sets[i] & sets[j]) >= 4 * len(sets[i] | sets[j]):
                gone[i] = ("near", j)
                break
    return {i: (kind, gone[j][1] if kind == "exact" and j in gone else j) for i, (kind, j) in gone.items()}


def some_texts(n: int) -> list[str]:
    """Texts of which many are copies of an earlier one, or differ from it by a few words."""
    chance = random.Random(3)
    texts: list[str] = []
    for _ in range(n):
        words = [f"w{chance.randrange(5000)}" for _ in range(chance.randrange(60, 200))]
        if texts and chance.random() < 0.5:
            words = chance.choice(texts).split()
            for _ in range(chance.choice((0, 0, 1, 1, len(words) // 10))):
                words[chance.randrange(len(words))] = "changed"
        texts.append(" ".join(words))
    return texts


def told(work: Path) -> dict[int, tuple[str, int]]:
    lines = [json.loads(line) for line in (work / "duplicates.jsonl").read_text().splitlines()]
    return {int(line["removed"].split()[1]): (line["kind"], int(line["kept"].split()[1])) for line in lines}


@pytest.mark.parametrize("most_bytes", [1 << 16, 1 << 26])
def test_what_goes_is_what_an_oracle_says(tmp_path, monkeypatch, most_bytes):
    monkeypatch.setattr(dedup, "SMALLEST_BLOCK", 8)
    texts = [*some_texts(120), "...", "", "--- !"]
    spool = spool_of(tmp_path / "spool", texts)
    verdict = judge(spool, tmp_path, most_bytes)
    expected = oracle(texts)
    assert {kind for kind, _ in expected.values()} == {"exact", "near"} and len(expected) > 30
    assert told(tmp_path) == expected
    states = {"exact": EXACT, "near": NEAR}
    assert verdict.states[:120].tolist() == [states[expected[i][0]] if i in expected else KEPT for i in range(120)]
    assert verdict.states[120:].tolist() == [KEPT, EMPTY, KEPT]
    assert not list(tmp_path.glob("*.run"))
    assert not judge(spool, tmp_path, most_bytes, dedup=False).states[:120].any()


def test_candidates_are_verified_at_four_fifths_exactly(tmp_path):
    """All share a band. Of 99 shingles each, 88 are shared: 88/110 goes; 87: 87/111 stays."""
    words = [f"w{i}" for i in range(103)]
    near, far = [*words[:92], *(f"x{i}" for i in range(11))], [*words[:91], *(f"y{i}" for i in range(12))]
    verdict = judge(spool_of(tmp_path / "spool", [" ".join(text) for text in (words, near, far)], same_band=True), tmp_path, 1 << 24)
    assert verdict.states.tolist() == [KEPT, NEAR, KEPT] and verdict.n_compared == 2
    line = json.loads((tmp_path / "duplicates.jsonl").read_text())
    assert line == {"removed": "doc 1", "kept": "doc 0", "kind": "near", "jaccard": 0.8, "bytes": len(" ".join(near))}


def test_only_those_that_are_kept_remove_others(tmp_path):
    """b is near to a, c to b but not to a: b goes for a, and c stays."""
    words = [f"w{i}" for i in range(80)]
    a, b, c = words[:60], words[5:65], words[10:70]
    verdict = judge(spool_of(tmp_path / "spool", [" ".join(text) for text in (a, b, c)], same_band=True), tmp_path, 1 << 24)
    assert verdict.states.tolist() == [KEPT, NEAR, KEPT]


def test_a_crowded_bucket_costs_its_length_and_finds_through_who_went(tmp_path):
    """Behind the first eight and before the last eight stands the one that is kept: who went for it leads there."""
    chance = random.Random(5)
    others = [" ".join(f"w{chance.randrange(10 ** 6)}" for _ in range(60)) for _ in range(40)]
    kept = [f"k{i}" for i in range(200)]
    copies = [" ".join([*kept[:i], "changed", *kept[i + 1:]]) for i in range(20, 60)]
    texts = [*others, " ".join(kept), *copies]
    verdict = judge(spool_of(tmp_path / "spool", texts, same_band=True), tmp_path, 1 << 24)
    assert verdict.states[:41].tolist() == [KEPT] * 41 and verdict.states[41:].tolist() == [NEAR] * 40
    assert {place for _, place in told(tmp_path).values()} == {40}
    assert verdict.n_compared <= 16 * len(texts)


def test_a_bucket_of_any_size_is_read_in_blocks(tmp_path, monkeypatch):
    """Copies of two texts, and a crowd that shares all bands: no block is larger than what memory holds, and what goes is the same."""
    chance = random.Random(8)
    texts = [chance.choice(["[deleted]", "[removed]", f"the same six words, or so{'!' * i}", f"{i} and {i * i}"]) for i in range(600)]
    spool, told_of, merged = spool_of(tmp_path / "spool", texts, per_chunk=50), set(), Runs.merged

    def measured(self, whole=True):
        for block in merged(self, whole):
            assert whole or len(block) <= dedup.SMALLEST_BLOCK * len(self.lengths)
            told_of.add((self.name, whole))
            yield block

    expected = judge(spool, tmp_path, 1 << 26)
    lines = (tmp_path / "duplicates.jsonl").read_text()
    monkeypatch.setattr(dedup, "SMALLEST_BLOCK", 8)
    monkeypatch.setattr(Runs, "merged", measured)
    verdict = judge(spool, tmp_path, 64 * 64)
    assert np.array_equal(verdict.states, expected.states) and (tmp_path / "duplicates.jsonl").read_text() == lines
    assert verdict.n_compared == expected.n_compared >= 100 and {("texts", False), ("bands", False)} <= told_of
    records = np.arange(1000, dtype=np.uint64)
    runs = Runs(tmp_path, "same", 64 * 64)
    runs.add(np.full(1000, 7, np.uint64), records[::-1])
    blocks = list(merged(runs, whole=False))
    assert np.array_equal(np.concatenate(blocks)["value"], records) and max(map(len, blocks)) <= 8 * 17
    runs.close()


def test_pairs_of_a_bucket():
    keys, documents = np.array([1, 2, 2, 2, 3, *[4] * 30], np.uint64), np.arange(35, dtype=np.uint64)
    pairs = [(int(a), int(b)) for later, earlier in pairs_of(keys, documents) for a, b in zip(later, earlier)]
    assert len(set(pairs)) == len(pairs) and {pair for pair in pairs if pair[0] < 5} == {(2, 1), (3, 2), (3, 1)}
    assert {b for a, b in pairs if a == 34} == {*range(5, 13), *range(26, 34)} and {b for a, b in pairs if a == 12} == set(range(5, 12))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 20), max_size=40), max_size=8), st.integers(1, 12))
def test_runs_come_back_sorted_and_keys_whole(tmp_path_factory, parts, held):
    """Runs of `held` records that are read a record or a few at a time."""
    folder, number = tmp_path_factory.mktemp("runs"), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "SMALLEST_BLOCK", 1)
        runs, everything = Runs(folder, "some", 64 * held), []
        for part in parts:
            values = np.arange(number, number + len(part), dtype=np.uint64)
            runs.add(np.array(part, np.uint64), values)
            everything += list(zip(part, values.tolist()))
            number += len(part)
        blocks = list(runs.merged())
        assert [tuple(record) for block in blocks for record in block.tolist()] == sorted(everything)
        seen = [set(block["key"].tolist()) for block in blocks]
        assert sum(map(len, seen)) == len(set().union(*seen))
        runs.close()
    assert not list(folder.iterdir())
