"""hanok ladder: one command climbs all four rungs, goes on where something is missing, and refuses what it cannot climb in one line."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Shell

from hanok.bundle.bundle import is_bundle, load_bundle
from hanok.cli.ladder import ladder
from hanok.config import to_dict, toml
from hanok.lab import recall, speed
from hanok.lab.ladder import RUNGS
from pairs import small_recipes, some_pairs


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pairs whose first line names no columns, and tiny recipes."""
    folder = tmp_path_factory.mktemp("ladder")
    (folder / "pairs.tsv").write_text("".join(f"{pair.group}\t{pair.source}\t{pair.target}\n" for pair in some_pairs(300)))
    (folder / "recipes").mkdir()
    for name, recipe in small_recipes().items():
        (folder / "recipes" / f"{name}.toml").write_text(toml(to_dict(recipe)))
    return folder


def climb(there: Path, capsys: pytest.CaptureFixture, **options) -> tuple[str, str]:
    ladder(there / "pairs.tsv", out=there / "out", recipes=there / "recipes", steps=2, threads=1, **options)
    return capsys.readouterr()


def test_one_command_one_table_one_picture(there: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    for room, name, value in ((speed, "LENGTHS", (4, 16)), (speed, "TOKENS", 64), (recall, "DISTANCES", (2, 4)), (recall, "N_ROWS", 8)):
        monkeypatch.setattr(room, name, value)
    monkeypatch.setenv("HANOK_HOME", str(there / "home"))
    out, told = climb(there, capsys)
    table = [line.split()[0] for line in out.split("\n\n")[0].splitlines()]
    assert table[2:] == list(RUNGS) and "BLEU" in out and out.count(" [") == 3 and "rnn: training" in told and told.startswith("parameters: rnn ")
    folder = there / "out"
    assert all(is_bundle(folder / name) for name in RUNGS) and (folder / "ladder.png").read_bytes().startswith(b"\x89PNG")
    assert load_bundle(folder / "rnn").config.cell == "rnn" and load_bundle(folder / "lstm").config.cell == "lstm"
    page = (folder / "ladder.md").read_text()
    assert all(f"\n| {name} " in page for name in RUNGS) and "![" in page and page.count("\n**") == 3
    rows = [[json.loads(line) for line in (folder / "data" / f"{name}.jsonl").read_text().splitlines()] for name in ("train", "test")]
    assert {row["group"] for row in rows[0]}.isdisjoint(row["group"] for row in rows[1])
    assert all(row["target"] == row["source"].upper() for row in rows[1])

    (folder / "ladder.md").unlink()
    results = json.loads((folder / "ladder.json").read_text())
    del results["rungs"]["bahdanau"]["recall"]
    (folder / "ladder.json").write_text(json.dumps(results))
    out, told = climb(there, capsys, json=True)
    again = json.loads(out)
    assert "training" not in told and "bahdanau: recalling" in told and "rnn: recalling" not in told and (folder / "ladder.md").exists()
    assert again["rungs"]["rnn"] == results["rungs"]["rnn"] and again["rungs"]["bahdanau"].keys() == again["rungs"]["rnn"].keys()


@pytest.mark.parametrize(("content", "options", "line"), [
    ("a\tb\nc\td\n", (), "pairs.tsv: line 1 has 2 columns, expected 3 (file, source, target)"),
    ("a\tb\nc\td\n", ("--columns", "english", "german"), "--columns names english, german; a column named source and one named target were expected"),
    ("source\ttarget\n" + "a\tb\n" * 3, (), "got 3 pairs with a source and a target; a ladder needs 100 at least: give a larger file"),
    ("f\ta\tb\n" * 200, (), "all 200 pairs are of the group 'f', so none can be held out"),
    ("", ("--minutes", "0"), "--minutes is 0.0; expected 0.001 or more"), ("", ("--steps", "0"), "--steps is 0; expected 1 or more"),
    ("", ("--recipes", "nowhere"), "nowhere: there is no such folder"),
])
def test_what_cannot_be_climbed(content: str, options: tuple[str, ...], line: str, shell: Shell):
    (shell.cwd / "pairs.tsv").write_text(content)
    assert line in shell.refused("ladder", "pairs.tsv", "--out", "out", *options)


def test_a_folder_of_something_else_or_without_a_rung(shell: Shell, there: Path):
    (shell.cwd / "pairs.tsv").write_text((there / "pairs.tsv").read_text())
    (shell.cwd / "out").mkdir()
    (shell.cwd / "out" / "mine.txt").write_text("mine")
    assert "out is not empty" in shell.refused("ladder", "pairs.tsv", "--out", "out")
    (shell.cwd / "few").mkdir()
    (shell.cwd / "few" / "rnn.toml").write_text((there / "recipes" / "rnn.toml").read_text())
    assert "few has no lstm.toml, the recipe of a rung" in shell.refused("ladder", "pairs.tsv", "--out", "new", "--recipes", "few")
    assert "there is no such file" in shell.refused("ladder", "nothing.tsv", "--out", "new")
    assert "pairs of a source and a target are read from .tsv, .csv, .jsonl files" in shell.refused("ladder", "few/rnn.toml", "--out", "new")


def test_other_settings_are_another_ladder(shell: Shell, there: Path):
    (shell.cwd / "out").mkdir()
    (shell.cwd / "out" / "ladder.json").write_text(json.dumps({"settings": {"seed": 0}}))
    line = shell.refused("ladder", there / "pairs.tsv", "--out", "out", "--recipes", there / "recipes", "--seed", 1)
    assert "this ladder was begun with other settings" in line and "seed 0 -> 1" in line
