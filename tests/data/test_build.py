"""A corpus from sources to shards: the same whoever built it and however often it was killed, and mistakes in one line."""
from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanok.data import build as room
from hanok.data import dedup, shards, sides, workers
from hanok.data.build import BuildOptions, build
from hanok.data.corpus import Corpus, end_of_text_id
from hanok.data.formats import ReadOptions, Unit
from hanok.errors import ConfigError, DataError, TokenizerError
from hanok.text.tokenizer import Tokenizer, train

SMALL = {"SEGMENT_BYTES": 12_000, "FED_BYTES": 40_000, "CHUNK_LENGTH": 6_000}
"""Segments and chunks of a few documents, and one file that is fed."""
BUILD = """
import sys
from hanok.data import build as room
for name, value in {small}.items(): setattr(room, name, value)
room.build([sys.argv[1]], sys.argv[2], sys.argv[3], room.BuildOptions(workers=2, validation=0.2))
"""


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """English and Korean, some of them copies or near copies."""
    chance = random.Random(4)
    english = [f"{a}{b}" for a in "ba ke li mo nu re so ti".split() for b in "n rt st m lk".split()]
    korean = [f"{a}{b}" for a in "가나다라마바사아" for b in "는를에서도"]
    made: list[str] = []
    for _ in range(260):
        words = [chance.choice(korean if chance.random() < 0.02 or len(made) % 5 == 0 else english) for _ in range(chance.randrange(30, 120))]
        if len(made) > 20 and chance.random() < 0.25:
            words = chance.choice(made).split(" ")
            words[len(words) // 2] = chance.choice(("changed", words[len(words) // 2]))
        made.append(" ".join(words))
    return made


@pytest.fixture(scope="module")
def tokenizer(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train("bpe", texts, 400).save(path)
    return path


@pytest.fixture(scope="module")
def source(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: one large JSONL file that is fed, a small one, and text files that make segments together."""
    folder = tmp_path_factory.mktemp("source")
    write(folder / "a.jsonl", texts[:150])
    write(folder / "b.jsonl", texts[150:200])
    (folder / "c").mkdir()
    for number, text in enumerate(texts[200:]):
        (folder / "c" / f"{number:03d}.txt").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(room, name, value)


@pytest.fixture(scope="module")
def whole(source: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed build of one worker makes."""
    out = tmp_path_factory.mktemp("whole") / "corpus"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(room, name, value)
        build([str(source)], tokenizer, out, BuildOptions(workers=1, validation=0.2))
    return out


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    return path


def files(folder: Path) -> dict[str, str]:
    """Hashes of all files but card.md, whose title is the folder's name."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*")
            if path.is_file() and path.name != "card.md"}


def built(source: Path, tokenizer: Path, out: Path, **options: Any) -> dict[str, Any]:
    return build([str(source)], tokenizer, out, BuildOptions(**{"workers": 2, "validation": 0.2, **options}))


# ---- what is built
def test_the_shards_hold_what_is_kept_and_nothing_else(texts: list[str], tokenizer: Path, whole: Path):
    card = json.loads((whole / "card.json").read_text())
    gone = [json.loads(line) for line in (whole / "duplicates.jsonl").read_text().splitlines()]
    removed = {place(line["removed"]) for line in gone}
    assert {line["kind"] for line in gone} == {"exact", "near"} and all(place(line["kept"]) < place(line["removed"]) for line in gone)
    assert not removed & {place(line["kept"]) for line in gone}
    known = Tokenizer.load(tokenizer)
    sizes = dict.fromkeys(("documents", "tokens", "bytes"), 0)
    for side, is_held in (("train", False), ("validation", True)):
        kept = [text for i, text in enumerate(texts) if i not in removed and is_held == (
            int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest()[:8], "little") < 0.2 * 2 ** 64)]
        corpus = Corpus.open(whole / side)
        end = end_of_text_id(known)
        ids = [token for text in kept for token in [*known.encode(text), end]]
        assert corpus.slice(0, len(corpus)).tolist() == ids and corpus.n_documents == len(kept) == card[side]["documents"] > 10
        assert corpus.info.bytes == sum(len(text.encode()) for text in kept)
        starts = np.cumsum([0, *(len(known.encode(text)) + 1 for text in kept)])[:-1]
        assert np.array_equal(np.load(whole / side / "documents.npy"), starts)
        corpus.check(known, card["tokenizer_sha256"])
        for name in sizes:
            sizes[name] += getattr(corpus.info, name)
    assert {name: card[name] for name in sizes} == sizes and sizes["documents"] + len(removed) == len(texts)
    for kind in ("exact", "near"):
        lines = [line for line in gone if line["kind"] == kind]
        assert card["duplicates"][kind] == {"documents": len(lines), "bytes": sum(line["bytes"] for line in lines)}


def place(name: str) -> int:
    """The number of a document of `texts`, from its name."""
    file, _, row = name.rpartition(":")
    return int(row) - 1 + (150 if "b.jsonl" in file else 0) if ".jsonl" in name else 200 + int(Path(name).stem)


def test_the_card_says_what_is_in_it(source: Path, tokenizer: Path, whole: Path):
    card = json.loads((whole / "card.json").read_text())
    assert card["shards"] == {name: sha for name, sha in files(whole).items() if name.endswith(".bin")}
    assert [(entry["path"], entry["sha256"]) for entry in card["sources"]] == [
        (str(path), hashlib.sha256(path.read_bytes()).hexdigest()) for path in sorted(source.rglob("*.*"))]
    assert card["bytes_per_token"] == round(card["bytes"] / card["tokens"], 4)
    assert set(card["scripts"]) == {"Latin", "Hangul"} and sum(card["scripts"].values()) == pytest.approx(1)
    assert (whole / "tokenizer.json").read_text() == Tokenizer.load(tokenizer).to_json()
    page = (whole / "card.md").read_text()
    assert f"{card['documents']:,} documents" in page and "hanok pretrain corpus --out" in page
    assert {path.name for path in whole.iterdir()} == {"card.json", "card.md", "duplicates.jsonl", "tokenizer.json", "train", "validation"}
    assert not whole.with_name("corpus.building").exists()


def test_workers_memory_and_cuts_change_nothing(source: Path, tokenizer: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dedup, "SMALLEST_BLOCK", 16)
    monkeypatch.setattr(room.Build, "room", lambda self: 1 << 14)
    monkeypatch.setattr(room, "CHUNK_LENGTH", 3_000)
    monkeypatch.setattr(room, "FED_BYTES", 10 ** 9)
    built(source, tokenizer, tmp_path / "corpus", workers=3)
    assert files(tmp_path / "corpus") == files(whole)


def test_without_dedup_all_stay(source: Path, tokenizer: Path, texts: list[str], tmp_path: Path):
    card = built(source, tokenizer, tmp_path / "corpus", dedup=False)
    assert card["documents"] == len(texts) and (tmp_path / "corpus" / "duplicates.jsonl").read_text() == ""


def test_long_documents_are_split_and_counted(tokenizer: Path, tmp_path: Path):
    write(tmp_path / "t.jsonl", ["word " * 1000, "", "short"])
    card = built(tmp_path / "t.jsonl", tokenizer, tmp_path / "corpus", read=ReadOptions(max_document=1000), dedup=False)
    assert (card["split_documents"], card["empty"], card["documents"]) == (1, 1, 6)
    assert card["bytes"] == 5000 + 5


def test_contamination_is_counted(tokenizer: Path, tmp_path: Path):
    """Of two documents that are held out one has 13 words of a training document; of the other's no more than 12 in a row."""
    chance = random.Random(2)

    def text(words: list[str], held: bool) -> str:
        while True:
            made = " ".join([*words, *(f"w{chance.randrange(10 ** 6)}" for _ in range(40))])
            if (int.from_bytes(hashlib.blake2b(made.encode(), digest_size=16).digest()[:8], "little") < 0.2 * 2 ** 64) == held:
                return made

    common = [f"c{i}" for i in range(13)]
    write(tmp_path / "t.jsonl", [text([], False), text(common, False), text(common[:12], True), text(common, True)])
    mixed = built(tmp_path / "t.jsonl", tokenizer, tmp_path / "corpus")["contamination"]
    assert mixed == {"ngram_words": 13, "ngram_characters": 26, "documents": 1, "of": 2, "held_out": 2}


def test_both_sides_have_a_document(tokenizer: Path, tmp_path: Path):
    write(tmp_path / "t.jsonl", ["one", "two", "three"])
    for share, which in ((1e-9, "none of 3 documents fell to validation"), (1 - 1e-9, "all of 3 documents fell to validation")):
        said: list[str] = []
        card = build([str(tmp_path / "t.jsonl")], tokenizer, tmp_path / which[:4], BuildOptions(workers=1, validation=share), say=said.append)
        assert any(which in line for line in said)
        assert sorted((card["train"]["documents"], card["validation"]["documents"])) == [1, 2]


# ---- kills
def test_kill_9_leaves_what_goes_on(source: Path, tokenizer: Path, whole: Path, tmp_path: Path):
    """Killed twice while it reads, and once behind it, a build ends with the bytes of an undisturbed one."""
    out, work = tmp_path / "corpus", tmp_path / "corpus.building"
    command = [sys.executable, "-c", BUILD.format(small=SMALL), str(source), str(tokenizer), str(out)]
    seen = 0

    def chunks() -> int:
        return len(list(work.glob("spool/*-*")))

    for more in (2, 3, None):
        child = subprocess.Popen(command)
        until = time.monotonic() + 60
        while child.poll() is None and time.monotonic() < until and not (
                (work / "verdict.npy").exists() if more is None else chunks() >= seen + more):
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL and not out.exists() and chunks() >= seen
        seen = chunks()
    built(source, tokenizer, out)
    assert files(out) == files(whole) and not work.exists()


@pytest.mark.parametrize("step, n", [("reading", 1), ("reading", 9), ("comparing", 5), ("looking for held-out text", 5), ("writing shards", 5)])
def test_broken_off_anywhere_it_goes_on(source: Path, tokenizer: Path, whole: Path, tmp_path: Path, step: str, n: int,
                                        monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sides, "SAVE_EVERY", 2)
    monkeypatch.setattr(shards, "NOTE_EVERY", 2)
    heard: list[str] = []

    def stop(what: str, done: float, of: float | None) -> None:
        heard.append(what)
        if heard.count(step) == n:
            raise KeyboardInterrupt

    options = BuildOptions(workers=1, validation=0.2)
    with pytest.raises(KeyboardInterrupt):
        build([str(source)], tokenizer, tmp_path / "corpus", options, stop)
    assert (tmp_path / "corpus.building").is_dir() and not (tmp_path / "corpus").exists()
    again: list[str] = []
    build([str(source)], tokenizer, tmp_path / "corpus", options, lambda what, done, of: again.append(what))
    assert files(tmp_path / "corpus") == files(whole)
    assert step == "reading" or "reading" not in again                # what was read is not read again
    assert step != "writing shards" or "comparing" not in again


def test_killed_between_the_rename_and_the_end(source: Path, tokenizer: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room.Build, "empty", lambda self: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room.Build, "leave", lambda self, lock: os.close(lock))
        built(source, tokenizer, tmp_path / "corpus")
    assert (tmp_path / "corpus.building" / "finished").exists()
    monkeypatch.undo()
    for name, value in SMALL.items():
        monkeypatch.setattr(room, name, value)
    built(source, tokenizer, tmp_path / "corpus")
    assert files(tmp_path / "corpus") == files(whole) and not (tmp_path / "corpus.building").exists()


def test_a_build_that_goes_on_is_of_the_same(source: Path, tokenizer: Path, texts: list[str], tmp_path: Path):
    mine = tmp_path / "t.jsonl"
    write(mine, texts[:100])
    once = {"n": 0}

    def stop(what: str, done: float, of: float | None) -> None:
        once["n"] += 1
        if once["n"] == 3:
            raise KeyboardInterrupt

    def begin(options: BuildOptions, given: Path = mine, tokens: Path = tokenizer) -> None:
        once["n"] = 0
        build([str(given)], tokens, tmp_path / "corpus", options, stop)

    with pytest.raises(KeyboardInterrupt):
        begin(BuildOptions(workers=1))
    other = tmp_path / "other.json"
    train("bpe", texts, 300).save(other)
    for change, message in ((lambda: begin(BuildOptions(workers=1, validation=0.1)), "validation 0.02, now it is 0.1"),
                            (lambda: begin(BuildOptions(workers=1, dedup=False)), "dedup True, now it is False"),
                            (lambda: begin(BuildOptions(workers=1), tokens=other), "begun with tokenizer "),
                            (lambda: begin(BuildOptions(workers=1, read=ReadOptions(max_document=50))), "max-document 1000000, now it is 50"),
                            (lambda: begin(BuildOptions(workers=1), given=source), "other sources: .*t.jsonl is not among them any more")):
        with pytest.raises(DataError, match=message) as error:
            change()
        assert "--fresh" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(KeyboardInterrupt):
        begin(BuildOptions(workers=1, memory=1 << 31, read=ReadOptions(skip_bad=True)))      # neither changes what is made of what was read
    write(mine, texts[:101])
    with pytest.raises(DataError, match="other sources: .*t.jsonl has changed since"):
        begin(BuildOptions(workers=1, read=ReadOptions(skip_bad=True)))
    card = build([str(mine)], tokenizer, tmp_path / "corpus", BuildOptions(workers=1, fresh=True))
    assert card["documents"] + sum(card["duplicates"][kind]["documents"] for kind in ("exact", "near")) == 101


def test_two_builds_do_not_meet(source: Path, tokenizer: Path, tmp_path: Path):
    end = room.Build([str(source)], tokenizer, tmp_path / "corpus", BuildOptions()).begin()
    with pytest.raises(DataError, match="another process is building there"):
        built(source, tokenizer, tmp_path / "corpus")
    end()
    assert not (tmp_path / "corpus.building").exists()


def test_who_finds_it_taken_leaves_what_is_there(source: Path, tokenizer: Path, tmp_path: Path):
    """The first has made no chunk yet."""
    work = tmp_path / "corpus.building"
    end = room.Build([str(source)], tokenizer, tmp_path / "corpus", BuildOptions()).begin()
    before = sorted(work.iterdir())
    with pytest.raises(DataError, match="another process is building there"):
        built(source, tokenizer, tmp_path / "corpus")
    assert sorted(work.iterdir()) == before and (work / "build.json") in before
    end()


def test_sources_that_change_or_vanish_while_they_are_read_are_named(tokenizer: Path, texts: list[str], tmp_path: Path):
    mine, other = write(tmp_path / "t.jsonl", texts[:100]), write(tmp_path / "u.jsonl", texts[100:130])
    for do, message in ((lambda: mine.write_text(mine.read_text() + "\n"), "other sources: .*t.jsonl has changed since"),
                        (other.unlink, "u.jsonl: there is no such file")):
        heard: list[str] = []

        def act(what: str, done: float, of: float | None, heard: list[str] = heard, do: Any = do) -> None:
            heard.append(what)
            if len(heard) == 1:
                do()

        with pytest.raises(DataError, match=message):
            build([str(mine), str(other)], tokenizer, tmp_path / "corpus", BuildOptions(workers=1, fresh=True), act)
        assert not (tmp_path / "corpus").exists()


def test_a_file_whose_name_is_no_utf8_does_not_stop_what_goes_on(tokenizer: Path, texts: list[str], tmp_path: Path):
    folder = tmp_path / "t"
    folder.mkdir()
    for number, text in enumerate(texts[:5]):
        Path(os.fsdecode(os.fsencode(folder) + b"/%d\xff.txt" % number)).write_text(text)

    def stop(what: str, done: float, of: float | None) -> None:
        if what == "looking for held-out text":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build([str(folder)], tokenizer, tmp_path / "corpus", BuildOptions(workers=1), stop)
    assert build([str(folder)], tokenizer, tmp_path / "corpus", BuildOptions(workers=1))["documents"] == 5


def test_a_worker_whose_parent_was_killed_writes_no_more(source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one = room.Build([str(source)], tokenizer, tmp_path / "corpus", BuildOptions())
    end = one.begin()
    worker = workers.Worker(one.told_to_workers(), lambda *message: None)
    worker.write(0, 0, ["a"], ["some text"])
    monkeypatch.setattr(workers.os, "getppid", lambda: 1)
    with pytest.raises(BrokenPipeError):
        worker.write(0, 1, ["b"], ["more text"])
    assert [path.name for path in (one.work / "spool").iterdir()] == ["000000-000000"]
    end()


def test_out_may_be_a_link_and_has_a_name(source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    built(source, tokenizer, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "card.json").is_file()
    monkeypatch.chdir(tmp_path)
    for name in (".", "", ".."):
        with pytest.raises(ConfigError, match="expected the name of a new folder"):
            built(source, tokenizer, Path(name))


def test_a_tokenizer_for_other_text_is_refused_again(texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file that is fed: its first chunk, which decided, is there, and the rest would be for the tokenizer."""
    monkeypatch.setattr(room, "FED_BYTES", 0)
    other = tmp_path / "tokenizer.json"
    train("wordpiece", ["only these latin letters are known here"] * 20, 60).save(other)
    many = write(tmp_path / "t.jsonl", [*(f"한국어 글 {i} 번째" for i in range(20)), *(f"are known here{' letters' * 250}" for _ in range(200))])
    for _ in range(2):
        with pytest.raises(TokenizerError, match="unknown to the tokenizer"):
            built(many, other, tmp_path / "corpus")


# ---- mistakes
@pytest.mark.parametrize("few, message", [([], "no text to build a corpus from"), (["  ", ""], "no text to build a corpus from"),
                                            (["only one"], "a corpus of one document"), (["same", "same"], "a corpus of one document")])
def test_too_little_text_is_one_line(tokenizer: Path, tmp_path: Path, few: list[str], message: str):
    with pytest.raises(DataError, match=message) as error:
        built(write(tmp_path / "t.jsonl", few), tokenizer, tmp_path / "corpus")
    assert "\n" not in str(error.value) and sorted(path.name for path in tmp_path.iterdir()) == ["t.jsonl"]       # nothing to go on with


def test_a_tokenizer_for_other_text_is_refused(texts: list[str], tmp_path: Path):
    other = tmp_path / "tokenizer.json"
    train("wordpiece", ["only these latin letters are known here"] * 20, 60).save(other)
    korean = write(tmp_path / "t.jsonl", [f"한국어 글 {i} 번째" for i in range(50)])
    with pytest.raises(TokenizerError, match=r"\d\d.\d % of the tokens are unknown to the tokenizer"):
        built(korean, other, tmp_path / "corpus")
    known = ["these letters are known here", "are known here"] * 60
    mixed = write(tmp_path / "m.jsonl", [*known, "한국어", *(f"한 {i}" for i in range(9))])
    with pytest.raises(TokenizerError, match=r"\d.\d % of the tokens are unknown to the tokenizer"):
        built(mixed, other, tmp_path / "corpus")
    train("bpe", texts, 400).save(other)
    built(mixed, other, tmp_path / "corpus")                                          # and nothing of the first stands in the way


def test_bad_lines_are_named_or_counted(tokenizer: Path, tmp_path: Path, texts: list[str]):
    bad = write(tmp_path / "t.jsonl", texts[:30])
    bad.write_text(bad.read_text() + "{not json\n")
    with pytest.raises(DataError, match="t.jsonl.*31.*; .*corpus.building keeps what was read before, until --fresh"):
        built(bad, tokenizer, tmp_path / "corpus")
    with pytest.raises(DataError, match=r"no text to build a corpus from.*; 31 were left out, the first of them: .*t.jsonl:1: no key 'zz'"):
        built(bad, tokenizer, tmp_path / "other", read=ReadOptions(skip_bad=True, text_column="zz"))
    assert built(bad, tokenizer, tmp_path / "corpus", read=ReadOptions(skip_bad=True))["bad"] == 1


def test_memory_and_disk_are_looked_at_before_it_starts(source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"--memory of 64.0 MiB is too little .* give \d+MiB at least"):
        built(source, tokenizer, tmp_path / "corpus", memory=64 << 20)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=r"give \d{4,}MiB at least"):
        patch.setattr(room, "find_units", lambda sources: [Unit(f"{i}.txt", "text", Path(f"{i}.txt")) for i in range(500_000)])
        built(source, tokenizer, tmp_path / "corpus", memory=1 << 30)
    free = type("Usage", (), {"free": 1 << 10})
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: free)
    with pytest.raises(DataError, match=r"corpus: \d.* MiB are needed for chunks and shards .* and the disk has 1.0 KiB left"):
        built(source, tokenizer, tmp_path / "corpus")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="--validation 1: expected a share"):
        BuildOptions(validation=1)


def test_a_worker_that_is_killed_is_one_line(source: Path, tokenizer: Path, tmp_path: Path):
    one = room.Build([str(source)], tokenizer, tmp_path / "corpus", BuildOptions())
    end = one.begin()
    with pytest.raises(DataError, match="was ended by signal 9; where memory was short"), workers.Pool(1, one.told_to_workers()) as pool:
        pool.workers[0].kill()
        list(pool.run([("read", 0, [])]))
    end()


# ---- workers
def test_workers_know_no_torch(source: Path, tokenizer: Path, tmp_path: Path):
    """A worker's own process, given a whole segment to do, says at its end what it imported."""
    one = room.Build([str(source)], tokenizer, tmp_path / "corpus", BuildOptions())
    end = one.begin()
    command = workers.BEGIN.format(path=sys.path) + "; import sys; print(sorted(sys.modules), file=sys.stderr)"
    worker = subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    unit = {"name": "b", "kind": "jsonl", "path": str(source / "b.jsonl"), "compression": None, "size": 1}
    for message in (one.told_to_workers(), ("read", 3, [unit])):
        workers.send(worker.stdin, message)
    _, told = worker.communicate()
    end()
    assert worker.returncode == 0 and b"'hanok.data.workers'" in told and b"'tokenizers'" in told
    assert b"'torch'" not in told and b"'hanok.cli" not in told
