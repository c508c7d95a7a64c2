"""hanok export BUNDLE OUT --to hf|gguf"""
from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from hanok.cli.output import Json, emit, next_commands, say, shown, typed


def export(
    bundle: Annotated[str, Parameter(help="A bundle's folder, or the name of a pulled model.")],
    out: Annotated[Path, Parameter(help="The new folder, or the new .gguf file.")],
    *,
    to: Annotated[Literal["hf", "gguf"], Parameter(help="hf: a folder that Hugging Face's transformers opens. gguf: a file that llama.cpp and Ollama "
                                                        "open.")] = "hf",
    type: Annotated[Literal["f32", "f16", "q8_0"] | None, Parameter(help="Of a GGUF file's matrices; f16 where nothing is said.")] = None,
    json: Json = False,
) -> None:
    """Write a bundle for other tools."""
    from hanok.bundle.bundle import load_bundle
    from hanok.bundle.gguf_out import export_gguf
    from hanok.bundle.imports import export_folder
    from hanok.bundle.pull import find
    from hanok.errors import ConfigError
    if to == "hf" and (type or out.suffix == ".gguf"):
        told = f"--type {type}" if type else str(out)
        raise ConfigError(f"{told} is for GGUF files, and a Hugging Face folder was asked for; add --to gguf, or leave it out")
    loaded = load_bundle(find(bundle))
    if to == "gguf":
        lost = export_gguf(loaded, out, type or "f16")
        if json:
            emit({"file": str(out), "format": to, "type": type or "f16", "family": loaded.family.name, "lost": lost})
            return
        for line in lost:
            say(line)
        say(f"GGUF file ({(type or 'f16').upper()}) in {shown(out)}")
        next_commands(f"llama-cli -m {typed(out)}", f"hanok import {typed(out)} NEW")
        return
    export_folder(loaded, out)
    if json:
        emit({"folder": str(out), "format": to, "family": loaded.family.name})
        return
    say(f"Hugging Face folder in {shown(out)}")
    kind = {"encoder": "AutoModel", "decoder": "AutoModelForCausalLM", "encoder-decoder": "AutoModelForSeq2SeqLM"}[loaded.family.kind]
    read = f"import transformers; print(transformers.{kind}.from_pretrained({shown(out)!r}))"
    next_commands(f"python -c {shlex.quote(read)}", f"hanok import {typed(out)} NEW")
