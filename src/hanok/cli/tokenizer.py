"""hanok tokenizer train TEXT... --kind bpe|wordpiece|unigram --vocab-size N --out DIR"""
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from hanok.cli.output import Json, emit, next_commands, say, shown, typed

app = App(name="tokenizer", help="Train a tokenizer.", help_format="plaintext")


@app.command
def train(
    text: Annotated[list[Path], Parameter(negative="", help="Files and folders.")],
    *,
    out: Annotated[Path, Parameter(help="The new folder for tokenizer.json.")],
    kind: Annotated[Literal["bpe", "wordpiece", "unigram"], Parameter(help="bpe: byte-level, as GPT; wordpiece: BERT's; unigram: T5's.")] = "bpe",
    vocab_size: Annotated[int, Parameter(help="Tokens.")] = 8192,
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
    texts = [document.text for document in read_documents(text, encoding=encoding)]
    trained = room.train(kind, texts, vocab_size, pre_tokenizer=pre_tokenizer, progress=interactive() and not json)
    sample = "".join(texts)[:1_000_000]
    bytes_per_token = len(sample.encode()) / max(1, len(trained.encode(sample)))
    with new_dir(out) as folder:
        trained.save(folder / "tokenizer.json")
    if json:
        emit({"tokenizer": str(out / "tokenizer.json"), "kind": kind, "vocab_size": trained.vocab_size, "bytes_per_token": bytes_per_token})
        return
    say(f"{kind} tokenizer of {trained.vocab_size:,} tokens in {shown(out)}: {bytes_per_token:.2f} bytes a token on its own text")
    next_commands(f"hanok pretrain {' '.join(map(typed, text))} --out runs/mine --set tokenizer.path={typed(out)}")
