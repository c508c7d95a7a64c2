"""Writes docs/cli.md, each verb's help as a terminal of 100 columns shows it, and tells which documents name commands that there are not.

`python scripts/docs.py` writes; with `--check` nothing is written, and what is out of step is named: docs/cli.md itself, and the commands in fenced
blocks (lines that begin with `hanok ` or `$ hanok `) of README.md, README.ko.md and docs/. They are parsed, never run.
"""
from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

from cyclopts import App
from cyclopts.exceptions import CoercionError, CycloptsError
from rich.console import Console

from hanok.cli.main import build_app, usage

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path("docs") / "cli.md"
WIDTH = 100
INTRODUCTION = """\
# The command line

<!-- Written by scripts/docs.py; `make docs` writes it anew. -->

`hanok VERB --help` says the same. Results go to stdout, everything for people to stderr; with `--json`, stdout gets one JSON document and nothing
else. The last lines say what to type next.

| status | meaning |
|-------:|---------|
| 0 | done |
| 1 | a fault of hanok's, with a traceback |
| 2 | a mistake, or a machine's refusal, told in one line |
| 130 | interrupted by Ctrl-C; nothing is left half-written |
"""
FENCE = re.compile(r"(`{3,}|~{3,})")
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
SYNOPSIS = re.compile(r"\[|\.\.\.|\w\|\w")


def page() -> str:
    """What docs/cli.md should hold."""
    app = build_app()
    parts = [f"## {' '.join(('hanok', *verb))}\n\n```text\n{help_of(app, verb)}\n```\n" for verb in ((), *verbs(app))]
    return "\n".join([INTRODUCTION, *parts])


def verbs(app: App, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every verb, and what stands below it."""
    for name in app:
        if not name.startswith("-"):
            yield (*before, name)
            yield from verbs(app[name], (*before, name))


def help_of(app: App, verb: tuple[str, ...]) -> str:
    """The help text, without colours."""
    screen = StringIO()
    app.help_print(list(verb), console=Console(file=screen, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False))
    return "\n".join(line.rstrip() for line in screen.getvalue().strip().splitlines())


def commands(text: str) -> Iterator[tuple[int, str]]:
    """Line numbers, from 1, and the hanok commands in a Markdown text's fenced blocks; a line that ends in a backslash goes on."""
    fence, number, lines = "", 0, text.splitlines()
    while number < len(lines):
        line, begin = lines[number].strip(), number + 1
        number += 1
        if mark := FENCE.match(line):
            fence = "" if fence and line == fence else fence or mark[1]
            continue
        while fence and line.endswith("\\") and number < len(lines):
            line = f"{line[:-1]} {lines[number].strip()}"
            number += 1
        if fence and line.removeprefix("$ ").startswith("hanok "):
            yield begin, line.removeprefix("$ ")


def fault(app: App, command: str) -> str | None:
    """What is wrong with a shell line that begins with hanok, or None. A synopsis ([--to DIR], TEXT..., a|b) need only know its verb and options."""
    if SYNOPSIS.search(QUOTED.sub("", command)):
        return fault_of_names(app, QUOTED.sub("", command))
    try:
        words = shlex.shlex(command, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        tokens = list(words)
    except ValueError as error:
        return str(error)
    for part in split(tokens):
        if part[:1] == ["hanok"] and (told := fault_of(app, part[1:])):
            return told
    return None


def split(tokens: list[str]) -> Iterator[list[str]]:
    """A shell line's commands, without what pipes, redirections and the like do with them."""
    part: list[str] = []
    for token in [*tokens, ";"]:
        if set(token) <= set(";|&()<>"):
            yield part
            part = []
        else:
            part.append(token)


def fault_of(app: App, tokens: list[str]) -> str | None:
    try:
        app.parse_args(tokens, exit_on_error=False, print_error=False)
    except CoercionError as error:
        placeholder = error.token is not None and error.token.value.isupper()
        return None if placeholder else usage(error)
    except CycloptsError as error:
        return usage(error)
    return None


def fault_of_names(app: App, synopsis: str) -> str | None:
    _, *words = re.findall(r"(?<![\w-])-{0,2}\w[\w-]*", synopsis)
    while words and not words[0].startswith("-") and any(not name.startswith("-") for name in app):
        if words[0] not in app:
            return fault_of(app, words[:1])
        app = app[words.pop(0)]
    known = {"--help", "-h"}.union(*(argument.names for argument in app.assemble_argument_collection()))
    return next((f"unknown option: {word}" for word in words if word.startswith("-") and word not in known), None)


def check(root: Path) -> list[str]:
    """What is out of step, one line each."""
    told = []
    if not (root / PAGE).is_file() or (root / PAGE).read_text(encoding="utf-8") != page():
        told.append(f"{PAGE} is out of step with the command line; `make docs` writes it anew")
    app = build_app()
    for path in (root / "README.md", root / "README.ko.md", *sorted((root / "docs").rglob("*.md"))):
        if path.is_file():
            told += [f"{path.relative_to(root)}:{number}: `{command}`: {wrong}"
                     for number, command in commands(path.read_text(encoding="utf-8")) if (wrong := fault(app, command))]
    return told


def main(arguments: list[str], root: Path = ROOT) -> int:
    if arguments not in ([], ["--check"]):
        print("usage: python scripts/docs.py [--check]", file=sys.stderr)
        return 2
    if arguments:
        told = check(root)
        print("\n".join(told), end="\n" * bool(told), file=sys.stderr)
        return int(bool(told))
    (root / PAGE).parent.mkdir(parents=True, exist_ok=True)
    (root / PAGE).write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
