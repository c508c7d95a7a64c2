"""hanok corpus build as a stranger types it, and hanok pretrain on what it built."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Shell, settings

from hanok.cli.corpus import bytes_of
from hanok.errors import ConfigError
from hanok.text.tokenizer import train

SENTENCES = [f"The {colour} {thing} is {n} years old, and the {other} beside it is {n + 3}.\n" for n in range(20)
             for colour in ("red", "blue", "green") for thing, other in (("house", "door"), ("roof", "floor"), ("stair", "wall"))]
BUILT = ("corpus", "build", "text.jsonl", "--tokenizer", "tok", "--out", "corpus", "--workers", 1, "--validation", 0.2)


@pytest.fixture
def at_work(shell: Shell) -> Shell:
    """A folder with a tokenizer and sixty documents, of which one is a copy."""
    documents = ["".join(SENTENCES[i:i + 3]) for i in range(0, 180, 3)]
    lines = [json.dumps({"text": text}) for text in [*documents, documents[3]]]
    (shell.cwd / "text.jsonl").write_text("\n".join(lines))
    (shell.cwd / "tok").mkdir()
    train("bpe", SENTENCES, 300, further=["[MASK]", *(f"<extra_id_{i}>" for i in range(10))]).save(shell.cwd / "tok")
    return shell


def test_a_corpus_is_built_and_learned_from(at_work: Shell):
    ended = at_work(*BUILT)
    assert ended.out == "" and ended.next_commands() == ["hanok pretrain corpus --out runs/mine"]
    assert any("1 copies and" in line for line in ended.lines)
    card = json.loads((at_work.cwd / "corpus" / "card.json").read_text())
    assert card["duplicates"]["exact"]["documents"] == 1
    (at_work.cwd / "text.jsonl").unlink()                                            # the text is not read again
    for family in ("qwen3", "lstm", "bert", "t5"):
        sizes = settings("train.eval_tokens=64")[2:] if family == "qwen3" else ["--set", "train.micro_batch_size=2", "--set", "train.eval_tokens=64",
                                                                                "--set", "data.seq_len=32"]
        told = at_work("pretrain", "corpus", "--out", family, "--family", family, "--steps", 2, "--json", *sizes).json()
        assert told["steps"] == 2 and told["validation_loss"] > 0
        assert (at_work.cwd / family / "tokenizer.json").read_text() == (at_work.cwd / "corpus" / "tokenizer.json").read_text()
    on = at_work("pretrain", "--resume", "lstm", "--steps", 3, "--force", "--json").json()
    assert on["steps"] == 3
    card_file = at_work.cwd / "corpus" / "card.json"
    card_file.write_text(card_file.read_text().replace('"jaccard": 0.8', '"jaccard": 0.7'))
    assert "has changed" in at_work("pretrain", "--resume", "lstm", "--steps", 4, "--force").refused()


def test_what_a_built_corpus_cannot_be(at_work: Shell):
    assert at_work(*BUILT, "--quiet", "--json").json()["documents"] <= 60
    (at_work.cwd / "other").mkdir()
    train("bpe", SENTENCES, 280).save(at_work.cwd / "other")
    for arguments, message in ((["corpus", "text.jsonl"], "more sources stand beside it"),
                               (["corpus/train"], "corpus/train is a part of a built corpus; give the whole of it, corpus"),
                               (["corpus", "--set", "tokenizer.path=other"], "tokenizer.path other is not the tokenizer that corpus was built with"),
                               (["corpus", "--family", "transformer", "--set", "data.objective=seq2seq"], "seq2seq learns from pairs")):
        assert message in at_work.refused("pretrain", *arguments, "--out", "run")
    with open(at_work.cwd / "corpus" / "train" / "shard-00000.bin", "ab") as shard:
        shard.write(b"!")
    assert "shard-00000.bin" in at_work.refused("pretrain", "corpus", "--out", "run")


@pytest.mark.parametrize("change, message", [
    (["--memory", "much"], "--memory much: expected a size such as 512MB or 4GiB"), (["--memory", "1MB"], "is too little"),
    (["--validation", "2"], "--validation 2: expected a share"), (["--tokenizer", "none"], "none"), (["--text-column", "body"], "body"),
    (["--max-document", "0"], "expected 1"), (["--workers", "-1"], "--workers -1")])
def test_mistakes_are_one_line_and_leave_nothing(at_work: Shell, change: list[str], message: str):
    arguments = [*BUILT]
    if change[0] in arguments:
        del arguments[(at := arguments.index(change[0])):at + 2]
    assert message in at_work.refused(*arguments, *change)


def test_stdin_and_a_file_that_was_built_already(at_work: Shell):
    text = (at_work.cwd / "text.jsonl").read_bytes()
    arguments = ["-" if argument == "text.jsonl" else argument for argument in BUILT]
    assert at_work(*arguments, "--json", stdin=text).json()["sources"] == [{"path": "stdin", "kind": "stdin", "bytes": 0, "sha256": None}]
    assert "corpus is not empty" in at_work.refused(*BUILT)


@pytest.mark.parametrize("told, n_bytes", [("1GiB", 1 << 30), ("512MB", 512_000_000), ("1.5 gib", 3 << 29), ("1000000", 10 ** 6), ("64KiB", 1 << 16)])
def test_sizes_in_words(told: str, n_bytes: int):
    assert bytes_of(told) == n_bytes
    for wrong in ("", "GiB", "1XB", "-1GB"):
        with pytest.raises(ConfigError):
            bytes_of(wrong)


def test_the_work_folder_is_no_source(at_work: Shell):
    """A build of the folder in which it stands."""
    arguments: list[object] = ["." if argument == "text.jsonl" else argument for argument in BUILT]
    (at_work.cwd / "corpus.building").mkdir()
    Path(at_work.cwd / "corpus.building" / "left.txt").write_text("what an earlier build left")
    card = at_work(*arguments, "--json").json()
    assert [source["path"] for source in card["sources"]] == ["text.jsonl", "tok/tokenizer.json"]


@pytest.mark.parametrize("option", ["--worker", "-x", "--skipbad"])
def test_an_option_that_there_is_not_is_no_file(at_work: Shell, option: str):
    assert f"Unknown option: {option}. A file of that name is ./{option}" in at_work.refused(*BUILT, option)
    assert "one of the sources is an empty name" in at_work.refused(*BUILT[:2], "", *BUILT[3:])


def test_text_that_a_tokenizer_cannot_spell_is_named(at_work: Shell):
    (at_work.cwd / "few").mkdir()
    train("characters", ["only these latin letters"], 60).save(at_work.cwd / "few")
    (at_work.cwd / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("these letters", "only", "한옥")))
    assert "text.jsonl:3: got '한' at character 0" in at_work.refused(*BUILT[:4], "few", *BUILT[5:])
