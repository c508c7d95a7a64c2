"""scripts/notes.py: what it finds out of step, and the pages that it writes. No command of the real notes is run here."""
from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).parents[2]
TOML = """
title = {en = "# Notes", ko = "# 노트"}
introduction = {en = "All of it.", ko = "전부."}
room.later = {en = "later.", ko = "나중에."}
[command]
families = "hanok families"
test = "python -m pytest tests/test_one.py::test_it"
[[section]]
en = "One"
ko = "하나"
statement = [
  {en = "There are families.", ko = "패밀리가 있다.", by = "families", show = ["^b"]},
  {en = "And again.", ko = "또.", by = "families", show = ["^a"], remark = {en = "Only so far.", ko = "여기까지."}},
  {en = "It runs.", ko = "돌아간다.", by = "test"},
  {en = "It will.", ko = "그럴 것이다.", room = "later"},
]
"""


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    monkeypatch.delitem(sys.modules, "notes", raising=False)
    import notes
    return notes


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "docs" / "notes.toml").write_text(TOML)
    (tmp_path / "tests" / "test_one.py").write_text("def test_it():\n    pass\n")
    return tmp_path


def written(notes: ModuleType, root: Path) -> None:
    printed = {"families": "a first\nb second\nb third", "test": "1 passed in 0.12s"}
    for language, path in notes.PAGES.items():
        (root / path).write_text(notes.page(notes.load(root), printed, language))


def test_a_page_has_each_statement_its_command_and_what_was_printed(notes: ModuleType, root: Path):
    written(notes, root)
    page = (root / "docs" / "notes.md").read_text()
    assert "**1.** There are families.\n\n```text\n$ hanok families\nb second\n```" in page
    assert "**2.** And again.\n\n```text\n# the same command as above: $ hanok families\na first\n```\n\nOnly so far." in page
    assert "**4.** It will.\n\n*Not built yet: later.*" in page
    assert "**3.** 돌아간다.\n\n```text\n$ python -m pytest" in (root / "docs" / "notes.ko.md").read_text()
    assert notes.check(root) == []


@pytest.mark.parametrize(("old", "new", "told"), [
    ("hanok families", "hanok familes", "command 'families': unknown command 'familes'"),
    ("::test_it", "::test_that", "there is no tests/test_one.py::test_that"),
    ("test_one.py", "test_two.py", "there is no tests/test_two.py::test_it"),
    ("by = \"test\"", "by = \"text\"", "there is no command 'text'"),
    (", by = \"test\"", "", "statement 3 needs either 'by'"),
    ("ko = \"또.\", ", "", "statement 2 has no 'ko'"),
    ("by = \"test\"", "room = \"later\"", "command 'test' shows no statement"),
    ("There are families.", "There were families.", "docs/notes.md is out of step"),
])
def test_what_is_out_of_step_is_named(notes: ModuleType, root: Path, old: str, new: str, told: str):
    written(notes, root)
    (root / "docs" / "notes.toml").write_text(TOML.replace(old, new))
    assert any(told in line for line in notes.check(root)), notes.check(root)


def test_a_page_that_lost_a_statement_is_out_of_step(notes: ModuleType, root: Path):
    written(notes, root)
    page = root / "docs" / "notes.ko.md"
    page.write_text(page.read_text().replace("**2.** 또.\n", ""))
    assert [line for line in notes.check(root) if line.startswith("docs/notes.ko.md is out of step")]


def test_a_line_that_is_not_there_ends_the_writing(notes: ModuleType):
    with pytest.raises(SystemExit, match="nothing that was printed matches"):
        notes.excerpt("one\ntwo", ["three"], "statement 1")
    assert notes.excerpt("1 passed in 0.12s\n", ["passed"], "") == ["1 passed"]
