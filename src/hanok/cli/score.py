"""hanok score BUNDLE --text FILE"""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from hanok.cli.output import Json, emit, next_commands, typed


def score(
    bundle: Annotated[str, Parameter(help="A bundle's folder, or the name of a pulled model.")],
    *,
    text: Annotated[Path, Parameter(help="A text file.")],
    encoding: Annotated[str, Parameter(help="Of the text file.")] = "utf-8",
    json: Json = False,
) -> None:
    """Say how well a model predicts a text: loss (nats a token), perplexity, bits per byte.

    No special tokens are added; the first token is context only; a text longer than the context is read in windows that advance by half of it.
    """
    from hanok.api import load
    from hanok.bundle.pull import find
    from hanok.disk import read_text
    from hanok.errors import DataError
    content = read_text(text, encoding)
    if not content.strip():
        raise DataError(f"{text} is empty; give a file with text in it")
    result = load(find(bundle)).score(content)
    if json:
        emit({**result.to_dict(), "text": str(text), "bundle": str(bundle)})
        return
    print(f"tokens         {result.tokens:,}\nloss           {result.loss:.4f} nats/token\nperplexity     {result.perplexity:.2f}\n"
          f"bits per byte  {result.bits_per_byte:.4f}")
    next_commands(f"hanok show {typed(bundle)}")
