"""What goes where: results on stdout, everything for people on stderr; with --json, one JSON document on stdout and nothing else there."""
from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

Json = Annotated[bool, Parameter(name="--json", negative="", show_default=False, help="Print one JSON document and nothing else on stdout.")]
Quiet = Annotated[bool, Parameter(negative="", show_default=False, help="No progress on stderr.")]


def emit(document: dict[str, Any]) -> None:
    """One JSON document, spelled in ASCII where stdout knows no more."""
    plain = (sys.stdout.encoding or "utf-8").lower().replace("-", "") != "utf8"
    print(json.dumps(document, ensure_ascii=plain, indent=2, default=str))


def say(text: str = "") -> None:
    """A line for people."""
    print(text, file=sys.stderr, flush=True)


def next_commands(*commands: str) -> None:
    """What to type next."""
    say("next: " + "\n      ".join(commands))


def shown(path: Path) -> str:
    """A path as a person would type it: relative where it lies below the current folder."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def typed(bundle: Path | str) -> str:
    """A path, or a bundle's name, as the shell must be told."""
    return shlex.quote(shown(bundle) if isinstance(bundle, Path) else bundle)
