"""What a kill leaves of a corpus that is being written does not come into it."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from hanok.data import shards
from hanok.data.build import BuildOptions, build
from hanok.text.tokenizer import train


def test_scratch_of_a_killed_build_is_not_in_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "NOTE_EVERY", 1)
    texts = [f"the house of number {i} stands beside that of number {i * i}" for i in range(40)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train("bpe", texts, 300).save(tmp_path / "tokenizer.json")

    def stop(what: str, done: float, of: float | None) -> None:
        if what == "writing shards":
            raise KeyboardInterrupt

    work = [[str(tmp_path / "t.jsonl")], tmp_path / "tokenizer.json", tmp_path / "corpus", BuildOptions(workers=1)]
    with pytest.raises(KeyboardInterrupt):
        build(*work, stop)
    (tmp_path / "corpus.building" / "new" / ".card.json.0123456789abcdef").write_text("half a c")
    build(*work)
    assert sorted(path.name for path in (tmp_path / "corpus").iterdir()) == [
        "card.json", "card.md", "duplicates.jsonl", "tokenizer.json", "train", "validation"]
