"""hanok tokenizer train TEXT... --kind bpe|wordpiece|unigram|characters --vocab-size N --out DIR; hanok tokenizer import FILE --out DIR"""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from hanok.cli.output import Json, emit, next_commands, say, shown, typed

SAMPLE = 200_000
"""Characters by which a tokenizer's length of tokens is told."""
app = App(name="tokenizer", help="Train a tokenizer, or bring one of another tool.", help_format="plaintext")


@app.command
def train(
    text: Annotated[list[Path], Parameter(negative="", help="Files and folders.")],
    *,
    out: Annotated[Path, Parameter(help="The new folder for tokenizer.json.")],
    kind: Annotated[Literal["bpe", "wordpiece", "unigram", "characters"], Parameter(
        help="bpe: byte-level, as GPT; wordpiece: BERT's; unigram: T5's; characters: each one of the text is a token, numbered as nanoGPT does, and "
             "text with any other is refused.")] = "bpe",
    vocab_size: Annotated[int, Parameter(help="Tokens at most.")] = 8192,
    pre_tokenizer: Annotated[Literal["qwen2", "gpt-2"], Parameter(help="How bpe first cuts text; llama.cpp knows both.")] = "qwen2",
    encoding: Annotated[str, Parameter(help="Of the text files.")] = "utf-8",
    json: Json = False,
) -> None:
    """Train a tokenizer on text."""
    from hanok.data.sources import read_documents
    from hanok.disk import new_dir, refuse_occupied
    from hanok.runtime import interactive
    from hanok.text import tokenizer as room
    refuse_occupied(out)
    beginning: list[str] = []

    def texts() -> Iterator[str]:
        """One after the other, so that reading and counting go on side by side."""
        left = SAMPLE
        for document in read_documents(text, encoding=encoding):
            if left > 0:
                beginning.append(document.text[:left])
                left -= len(document.text)
            yield document.text

    trained = room.train(kind, texts(), vocab_size, pre_tokenizer=pre_tokenizer, progress=interactive() and not json)
    sample = "".join(beginning)
    bytes_per_token = len(sample.encode()) / max(1, len(trained.encode(sample)))
    with new_dir(out) as folder:
        trained.save(folder / "tokenizer.json")
    if json:
        emit({"tokenizer": str(out / "tokenizer.json"), "kind": kind, "vocab_size": trained.vocab_size, "bytes_per_token": bytes_per_token})
        return
    say(f"{kind} tokenizer of {trained.vocab_size:,} tokens in {shown(out)}: {bytes_per_token:.2f} bytes a token on its own text")
    brings = [f"hanok import ckpt.pt NEW --tokenizer {typed(out)}"] if kind == "characters" else []
    next_commands(f"hanok pretrain {' '.join(map(typed, text))} --out runs/mine --set tokenizer.path={typed(out)}", *brings)


@app.command(name="import")
def import_tokenizer(
    file: Annotated[str, Parameter(help="A .tiktoken rank file, a tokenizer.json or llama2.c's tokenizer.bin: its path, or "
                                        "pypi:NAME==VERSION#MEMBER; GPT-2's is pypi:openai-whisper==20250625#whisper/assets/gpt2.tiktoken")],
    *,
    out: Annotated[Path, Parameter(help="The new folder for tokenizer.json.")],
    pre_tokenizer: Annotated[Literal["gpt-2", "qwen2", "smollm", "llama-bpe", "cl100k", "o200k"] | None, Parameter(
        help="How a rank file's text is first cut; GPT-2's, p50k, cl100k and o200k are known by their number of ranks.")] = None,
    special: Annotated[list[str] | None, Parameter(negative="", help="A rank file's special token as NAME=ID; may be given several times.")] = None,
    json: Json = False,
) -> None:
    """Bring a tokenizer of another tool: its ids stay."""
    from hanok.bundle.imports import read_tokenizer
    from hanok.disk import new_dir, refuse_occupied
    refuse_occupied(out)
    brought = read_tokenizer(located(file), pre_tokenizer, None if special is None else dict(map(named, special)))
    with new_dir(out) as folder:
        brought.save(folder / "tokenizer.json")
    if json:
        emit({"tokenizer": str(out / "tokenizer.json"), "kind": brought.kind, "vocab_size": brought.vocab_size, "specials": brought.specials})
        return
    say(f"{brought.kind} tokenizer of {brought.vocab_size:,} tokens in {shown(out)}, {len(brought.specials)} of them special")
    next_commands(f"hanok import MODEL NEW --tokenizer {typed(out)}", f"hanok pretrain TEXT --out runs/mine --set tokenizer.path={typed(out)}")


def named(special: str) -> tuple[str, int]:
    """NAME=ID as a pair. ConfigError for anything else."""
    from hanok.errors import ConfigError
    name, _, token_id = special.rpartition("=")
    if not name or not token_id.isdecimal():
        raise ConfigError(f"--special {special}: expected NAME=ID, for example --special '<|endoftext|>=50256'")
    return name, int(token_id)


def located(source: str) -> Path:
    """Where a file lies; one of a package or a hub is fetched first."""
    from hanok.bundle.hub import fetch
    return fetch(source).folder_or_file if source.startswith(("pypi:", "hf:", "file:")) else Path(source)
