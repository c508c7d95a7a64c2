"""Writes docs/notes.md and docs/notes.ko.md from docs/notes.toml: each statement of the source notes, the command that shows it, what it printed.

`python scripts/notes.py` runs every command once, in order, in a scratch folder of the repository (runs/notes), and writes both pages. With `--check`
nothing is run or written; what is out of step is named: a statement without a command or a reason, a command that does not exist, a page that has
other statements or commands than the file.
"""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from docs import fault

from hanok.cli.main import build_app

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path("docs") / "notes.toml"
SCRATCH = Path("runs") / "notes"
PAGES = {"en": Path("docs") / "notes.md", "ko": Path("docs") / "notes.ko.md"}
WIDTH = 110
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
WORDS = {"en": ("Not built yet", "the same command as above"), "ko": ("아직 만들지 않음", "위와 같은 명령")}


def load(root: Path = ROOT) -> dict[str, Any]:
    with open(root / SOURCE, "rb") as handle:
        return tomllib.load(handle)


def statements(notes: dict[str, Any]) -> list[dict[str, Any]]:
    return [statement for section in notes["section"] for statement in section["statement"]]


def faults(notes: dict[str, Any], root: Path = ROOT) -> list[str]:
    """What is wrong with the file, one line each."""
    told, app = [], build_app()
    for number, statement in enumerate(statements(notes), 1):
        where = f"{SOURCE}: statement {number}"
        told += [f"{where} has no '{language}'" for language in PAGES if not statement.get(language)]
        if ("by" in statement) == ("room" in statement):
            told.append(f"{where} needs either 'by', a command, or 'room', what is not built yet")
        if "by" in statement and statement["by"] not in notes["command"]:
            told.append(f"{where}: there is no command '{statement['by']}'")
    used = {statement.get("by") for statement in statements(notes)} | set(notes.get("first", ()))
    told += [f"{SOURCE}: command '{name}' shows no statement" for name in notes["command"] if name not in used]
    for name, command in notes["command"].items():
        for part in command.split(" && "):
            wrong = fault(app, part[part.index("hanok "):]) if "hanok " in part else missing_test(part, root)
            if wrong:
                told.append(f"{SOURCE}: command '{name}': {wrong}")
    return told


def missing_test(command: str, root: Path) -> str | None:
    """What is wrong with a `python -m pytest FILE::NAME` line, or None."""
    found = re.fullmatch(r"python -m pytest (\S+?\.py)(?:::(\w+))?( -k \S+)?", command)
    if not found:
        return f"`{command}` is neither a hanok command nor `python -m pytest FILE::NAME`"
    path = root / found[1]
    if not path.is_file() or (found[2] and f"def {found[2]}(" not in path.read_text(encoding="utf-8")):
        return f"there is no {found[1]}::{found[2]}"
    return None


def run(notes: dict[str, Any], root: Path = ROOT) -> dict[str, str]:
    """What each command prints."""
    shutil.rmtree(root / SCRATCH, ignore_errors=True)
    (root / SCRATCH).mkdir(parents=True)
    environment = {**os.environ, "COLUMNS": str(WIDTH), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "NO_COLOR": "1"}
    printed = {}
    for name, command in notes["command"].items():
        print(f"$ {command}", flush=True)
        done = subprocess.run(command, shell=True, cwd=root, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        printed[name] = ANSI.sub("", done.stdout + done.stderr)
        if done.returncode:
            sys.exit(f"`{command}` ended with {done.returncode}:\n{printed[name][-2000:]}")
    return printed


def excerpt(text: str, patterns: list[str], where: str) -> list[str]:
    """The first line that each pattern finds."""
    lines = [line.rstrip() for line in text.replace("\r", "\n").splitlines()]
    found = [next((line for line in lines if re.search(pattern, line)), None) for pattern in patterns]
    for pattern, line in zip(patterns, found):
        if line is None:
            sys.exit(f"{where}: nothing that was printed matches {pattern!r}:\n{text[-2000:]}")
    return [re.sub(r" in \d+\.\d+s.*", "", line) for line in found if line]


def page(notes: dict[str, Any], printed: dict[str, str] | None, language: str) -> str:
    """A page; without what was printed, the skeleton that `--check` compares."""
    missing, same = WORDS[language]
    parts, number, last = [notes["title"][language], "", notes["introduction"][language].strip(), ""], 0, None
    for section in notes["section"]:
        parts += [f"## {section[language]}", ""]
        for statement in section["statement"]:
            number += 1
            parts += [f"**{number}.** {statement[language].strip()}", ""]
            if "room" in statement:
                parts += [f"*{missing}: {notes['room'][statement['room']][language]}*", ""]
                continue
            command = notes["command"][statement["by"]]
            shown = [] if printed is None else excerpt(printed[statement["by"]], statement.get("show", []), f"statement {number}")
            parts += ["```text", f"$ {command}" if statement["by"] != last else f"# {same}: $ {command}", *shown, "```", ""]
            last = statement["by"]
            if language in statement.get("remark", {}):
                parts += [statement["remark"][language].strip(), ""]
    return "\n".join(parts)


def check(root: Path = ROOT) -> list[str]:
    """What is out of step, one line each."""
    notes = load(root)
    told = faults(notes, root)
    if told:
        return told
    for language, path in PAGES.items():
        there = (root / path).read_text(encoding="utf-8").splitlines() if (root / path).is_file() else []
        lines = iter(there)
        gone = next((line for line in page(notes, None, language).splitlines() if line not in lines), None)
        if gone is not None:
            told.append(f"{path} is out of step with {SOURCE}: {gone[:80]!r} is missing or misplaced; `make notes` writes it anew")
    return told


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print("usage: python scripts/notes.py [--check]", file=sys.stderr)
        return 2
    told = check() if arguments else faults(load())
    if told:
        print("\n".join(told), file=sys.stderr)
        return 1
    if not arguments:
        printed = run(load())
        for language, path in PAGES.items():
            (ROOT / path).write_text(page(load(), printed, language), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
