"""hanok import PATH OUT"""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from hanok.cli.output import Json, emit, next_commands, say, shown, typed


def import_model(
    path: Annotated[Path, Parameter(help="A Hugging Face folder or a .gguf file.")],
    out: Annotated[Path, Parameter(help="The new bundle's folder.")],
    *,
    json: Json = False,
) -> None:
    """Make a bundle of a Hugging Face folder or a GGUF file. What would not compute the same is refused by name."""
    from hanok.bundle.bundle import save_bundle
    from hanok.bundle.imports import load_any
    from hanok.disk import refuse_occupied
    refuse_occupied(out)
    bundle = load_any(path)
    save_bundle(bundle, out)
    if json:
        emit({"bundle": str(out), "family": bundle.family.name})
        return
    say(f"{bundle.family.name} bundle in {shown(out)}")
    next_commands(f"hanok show {typed(out)}")
