"""hanok corpus build SOURCE... --tokenizer T --out DIR"""
from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from hanok.cli.output import Json, Quiet, emit, next_commands, say, shown, typed

app = App(name="corpus", help="Build a corpus from any sources.", help_format="plaintext")
UNITS = {"reading": "bytes", "sorting": "documents", "comparing": "documents", "looking for held-out text": "chunks", "writing shards": "chunks"}
"""What is counted in each step of a build."""


@app.command
def build(
    source: Annotated[list[str], Parameter(negative="", allow_leading_hyphen=True, help="Files and folders of text, Markdown, code, JSONL, CSV, TSV, "
                                           "Parquet, Wikipedia dumps, WET and WARC, each also as .gz, .zst or .bz2; - is stdin; "
                                           "dataset:NAME[:CONFIG[:SPLIT]] is one of Hugging Face.")],
    *,
    tokenizer: Annotated[Path, Parameter(help="A tokenizer.json, or a folder that holds one.")],
    out: Annotated[Path, Parameter(help="The new folder. Until it is whole, OUT.building keeps what was done; the same command goes on with it.")],
    memory: Annotated[str, Parameter(help="Of all processes together, such as 512MB or 4GiB.")] = "1GiB",
    workers: Annotated[int, Parameter(help="Processes beside the first; 0: one a core, as far as the memory goes.")] = 0,
    validation: Annotated[float, Parameter(help="Share of the documents that is held out, by a hash of their text.")] = 0.02,
    dedup: Annotated[bool, Parameter(negative="--no-dedup", help="Remove copies, and documents whose shingles are an earlier one's to 0.8.")] = True,
    text_column: Annotated[str, Parameter(help="The key or column of the text in JSONL, CSV, TSV, Parquet and data sets.")] = "text",
    encoding: Annotated[str, Parameter(help="Of text, JSONL, CSV and TSV.")] = "utf-8",
    max_document: Annotated[int, Parameter(help="Characters; a longer document is split, and counted.")] = 1_000_000,
    skip_bad: Annotated[bool, Parameter(negative="", show_default=False, help="Leave out what cannot be read, and count it.")] = False,
    fresh: Annotated[bool, Parameter(negative="", show_default=False, help="Throw away what an interrupted build left, and begin anew.")] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Build a corpus: token shards without duplicates, split into training and validation, with a data card."""
    from hanok import report
    from hanok.data.build import BuildOptions
    from hanok.data.build import build as build_it
    from hanok.data.formats import ReadOptions
    from hanok.errors import ConfigError
    for one in source:
        if one.startswith("-") and one != "-":
            raise ConfigError(f"Unknown option: {one}. A file of that name is ./{one}")
    options = BuildOptions(ReadOptions(encoding, text_column, skip_bad, max_document), validation, dedup, bytes_of(memory), workers, fresh)
    bars: dict[str, Any] = {}
    try:
        def progress(what: str, done: float, of: float | None) -> None:
            if what not in bars:
                end(bars)
                bars[what] = report.Progress(what, total=of, unit=UNITS[what], quiet=quiet).__enter__()
            bars[what].update(done)

        card = build_it(source, tokenizer, out, options, progress, (lambda line: None) if quiet else say)
    except KeyboardInterrupt as interrupt:
        raise type(interrupt)("what was done so far is kept; the same command goes on") from None
    finally:
        end(bars)
    if json:
        emit(card)
        return
    gone, held = card["duplicates"], card["validation"]["documents"]
    say(f"{card['documents']:,} documents, {report.count(card['tokens'])} tokens in {shown(out)}: {card['bytes_per_token']:.2f} bytes a token, "
        f"{held:,} document{'s' * (held != 1)} held out, {gone['exact']['documents']:,} copies and {gone['near']['documents']:,} near ones "
        "left out")
    next_commands(f"hanok pretrain {typed(out)} --out runs/mine")


def end(bars: dict[str, Any]) -> None:
    """Ends the bar of what came last."""
    if bars:
        list(bars.values())[-1].__exit__(None, None, None)


def bytes_of(told: str) -> int:
    """512MB or 1.5GiB in bytes. ConfigError for anything else."""
    from hanok.errors import ConfigError
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", told.strip(), re.IGNORECASE)
    if not found:
        raise ConfigError(f"--memory {told}: expected a size such as 512MB or 4GiB")
    number, letter, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(letter.upper() or " "))
