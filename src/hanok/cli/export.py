"""hanok export BUNDLE --to hf OUT"""
from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from hanok.cli.output import Json, emit, next_commands, say, shown, typed


def export(
    bundle: Annotated[str, Parameter(help="A bundle's folder, or the name of a pulled model.")],
    out: Annotated[Path, Parameter(help="The new folder.")],
    *,
    to: Annotated[Literal["hf"], Parameter(help="hf: a folder that Hugging Face's transformers opens.")] = "hf",
    json: Json = False,
) -> None:
    """Write a bundle for other tools."""
    from hanok.bundle.bundle import load_bundle
    from hanok.bundle.imports import export_folder
    from hanok.bundle.pull import find
    loaded = load_bundle(find(bundle))
    export_folder(loaded, out)
    if json:
        emit({"folder": str(out), "format": to, "family": loaded.family.name})
        return
    say(f"Hugging Face folder in {shown(out)}")
    kind = {"encoder": "AutoModel", "decoder": "AutoModelForCausalLM", "encoder-decoder": "AutoModelForSeq2SeqLM"}[loaded.family.kind]
    read = f"import transformers; print(transformers.{kind}.from_pretrained({shown(out)!r}))"
    next_commands(f"python -c {shlex.quote(read)}", f"hanok import {typed(out)} NEW")
