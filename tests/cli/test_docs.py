"""scripts/docs.py: the page that it writes, and what it finds out of step."""
from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from hanok.cli.main import build_app

APP = build_app()


def test_the_page_holds_every_verbs_help_at_one_width(docs: ModuleType, monkeypatch: pytest.MonkeyPatch):
    page = docs.page()
    for verb in ("hanok", "hanok pretrain", "hanok tokenizer", "hanok tokenizer train", "hanok import"):
        assert f"\n## {verb}\n\n```text\nUsage: {verb} " in page
    assert "--max-new-tokens INT" in page and "\x1b" not in page
    blocks = page.split("```text\n")[1:]
    assert all(len(line) <= 100 and line == line.rstrip() for block in blocks for line in block.split("```")[0].splitlines())
    for name, value in (("COLUMNS", "40"), ("TERM", "dumb"), ("FORCE_COLOR", "1"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    assert docs.page() == page


def test_what_was_written_is_in_step_until_it_is_changed(docs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert docs.main(["--check"], tmp_path) == 1 and "docs/cli.md is out of step" in capsys.readouterr().err
    assert docs.main([], tmp_path) == 0 and docs.main(["--check"], tmp_path) == 0
    assert capsys.readouterr() == ("", "")
    page = tmp_path / "docs/cli.md"
    page.write_text(page.read_text().replace("--max-new-tokens", "--max-tokens"))
    assert docs.main(["--check"], tmp_path) == 1 and "docs/cli.md is out of step" in capsys.readouterr().err
    assert docs.main(["--frobnicate"], tmp_path) == 2


@pytest.mark.parametrize("name", ["README.md", "README.ko.md", "docs/guide.md", "docs/below/more.md"])
def test_a_command_that_there_is_not_is_named_with_its_place(name: str, docs: ModuleType, tmp_path: Path):
    docs.main([], tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("# hanok\n\nhanok frobnicate is prose.\n\n```bash\n$ hanok frobnicate it\nhanok show runs/mine\n```\n"
                                 "~~~~\nhanok pull x \\\n  --frobnicate\nhanok: an error\n~~~~\n\nhanok frobnicate\n")
    first, second = docs.check(tmp_path)
    assert first.startswith(f"{name}:6: `hanok frobnicate it`: unknown command 'frobnicate'; choose from ")
    assert second.startswith(f"{name}:10: `hanok pull x  --frobnicate`: Unknown option: --frobnicate")


@pytest.mark.parametrize("command", [
    "hanok --help", "hanok pretrain --help", "hanok --version", "hanok tokenizer train a.txt b.txt --kind unigram --vocab-size 8000 --out tok",
    "hanok generate runs/mine --prompt 'def f(x): # | > [' --temperature 0.7   # a comment", 'hanok generate x --prompt "..." | head -1',
    "hanok score x --text FILE --json > score.json && hanok show x", "hanok pretrain TEXT... --out DIR [--family F] [--preset P] [--set a.b=c]",
    "hanok tokenizer train TEXT... --kind bpe|wordpiece|unigram --vocab-size N --out DIR", "hanok pretrain TEXT --out DIR --steps N",
    "hanok pull SOURCE [--to DIR]",
])
def test_commands_that_parse(command: str, docs: ModuleType):
    assert docs.fault(APP, command) is None


@pytest.mark.parametrize(("command", "told"), [
    ("hanok frobnicate", "unknown command 'frobnicate'"), ("hanok tokenizer frobnicate", "unknown command 'frobnicate'"),
    ("hanok show x --deep", "--deep"), ("hanok generate x", "--prompt"), ("hanok pretrain a --out b --steps many", "many"),
    ("hanok tokenizer train a --out b --kind bep", "bep"), ("hanok show x && hanok frobnicate", "unknown command 'frobnicate'"),
    ("hanok pull SOURCE [--into DIR]", "--into"), ("hanok frobnicate SOURCE [--to DIR]", "unknown command 'frobnicate'"),
    ("hanok tokenizer learn TEXT... --out DIR", "unknown command 'learn'"), ("hanok generate x --prompt 'it", "quot"),
])
def test_commands_that_do_not(command: str, told: str, docs: ModuleType):
    assert told in (docs.fault(APP, command) or "")
