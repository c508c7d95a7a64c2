"""Rows whose one column is text: JSONL, CSV, TSV, Parquet, and Hugging Face data sets, a row at a time.

A row's name is file:line (of its first line), in Parquet and data sets file:row, so that a person finds it.
"""
from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hanok import disk
from hanok.data.reading import LONGEST_ROW, Counts, ReadOptions, documents, lines, need, told
from hanok.data.sources import Document
from hanok.errors import DataError

BATCH_ROWS = 64
"""Rows of Parquet that are unpacked at a time."""
TOO_LONG = f"is longer than {LONGEST_ROW} characters; cut it into several"


def read_jsonl(chunks: Iterable[str], name: str, options: ReadOptions, counts: Counts) -> Iterator[Document]:
    """One document a line, the string under `text_column`. DataError names file and line, and the keys of that line where this one is missing."""
    for number, line in enumerate(lines(chunks), 1):
        here = f"{name}:{number}"
        if line is None:
            counts.refuse(f"{here}: this line {TOO_LONG}", options)
        elif line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                counts.refuse(f"{here}: no JSON: {' '.join(str(error).split())[:200]}", options)
                continue
            if not isinstance(row, dict):
                counts.refuse(f'{here}: {_kind(row)}, expected an object like {{"{options.text_column}": "..."}}', options)
            elif options.text_column not in row:
                counts.refuse(f"{here}: no key '{options.text_column}', it has {told(row)}; name the one that holds the text with --text-column",
                              options)
            else:
                yield from _row(row[options.text_column], here, options, counts)


def read_csv(chunks: Iterable[str], name: str, options: ReadOptions, counts: Counts) -> Iterator[Document]:
    """One document a row, after a line that names the columns (RFC 4180: quoted fields may hold commas, line ends and doubled quotes)."""
    csv.field_size_limit(max(LONGEST_ROW, csv.field_size_limit()))    # of the process, and only ever raised
    rows = csv.reader(_csv_lines(chunks, name, options, counts), strict=True)

    def numbered() -> Iterator[tuple[int, list[str]]]:
        while True:
            first = rows.line_num + 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                counts.refuse(f"{name}:{first}: no CSV row: {error}", options)
                continue
            if row is None:
                return
            if row:
                yield first, row

    yield from _table(numbered(), name, options, counts)


def read_tsv(chunks: Iterable[str], name: str, options: ReadOptions, counts: Counts) -> Iterator[Document]:
    """One document a line, after a line that names the columns. Quotes are characters like others."""
    def numbered() -> Iterator[tuple[int, list[str]]]:
        for number, line in enumerate(lines(chunks), 1):
            if line is None:
                counts.refuse(f"{name}:{number}: this line {TOO_LONG}", options)
            elif line.strip():
                yield number, line.rstrip("\r").split("\t")

    yield from _table(numbered(), name, options, counts)


def read_parquet(path: Path, name: str, options: ReadOptions, counts: Counts) -> Iterator[Document]:
    """One document a row; of a file of any size, a few rows stand in memory. DataError names the columns that are there."""
    arrow, parquet = need("pyarrow", "a Parquet file"), need("pyarrow.parquet", "a Parquet file")
    column = options.text_column
    try:
        with parquet.ParquetFile(path, buffer_size=1 << 20) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                raise _no_column(name, schema.names, column)
            kind = schema.field(column).type
            text = kind.value_type if arrow.types.is_dictionary(kind) else kind
            if not any(is_text(text) for is_text in (arrow.types.is_string, arrow.types.is_large_string, arrow.types.is_string_view,
                                                     arrow.types.is_null)):
                raise DataError(f"{name}: column '{column}' is {' '.join(str(kind).split())[:80]}, expected string; it has {told(schema.names)}")
            number = 0
            for batch in file.iter_batches(BATCH_ROWS, columns=[column], use_threads=False):
                for cell in batch.column(0):
                    number += 1
                    try:
                        value = cell.as_py()
                    except UnicodeDecodeError as error:
                        counts.refuse(f"{name}:{number}: not UTF-8 at byte {error.start}", options)
                        continue
                    yield from _row(value, f"{name}:{number}", options, counts)
    except arrow.ArrowException as error:
        raise DataError(f"{name}: no Parquet file, cut short or damaged ({' '.join(str(error).split())[:200]}); fetch or write it again") from None
    except OSError as error:
        if error.errno:
            raise disk.disk_error(path, error) from None
        raise DataError(f"{name}: a damaged Parquet file ({' '.join(str(error).split())[:200]}); fetch or write it again") from None


def read_dataset(source: str, options: ReadOptions, counts: Counts) -> Iterator[Document]:
    """One document a row of dataset:NAME_OR_FOLDER[:CONFIG[:SPLIT]], streamed. SPLIT is train where none is named."""
    _, name, config, split = (*source.split(":"), "", "")[:4]
    datasets = need("datasets", source, "datasets")
    datasets.config.TORCH_AVAILABLE = False      # or streaming would import torch for nothing, in every process that reads
    column = options.text_column
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        if rows.column_names:
            if column not in rows.column_names:
                raise _no_column(source, rows.column_names, column)
            rows = rows.select_columns([column])
        for number, row in enumerate(rows, 1):
            if column not in row:
                raise _no_column(source, row, column)
            yield from _row(row[column], f"{source}:{number}", options, counts)
    except DataError:
        raise
    except Exception as error:                   # whatever a hub, a loader or a file format of theirs says
        raise DataError(f"{source}: {type(error).__name__}: {' '.join(str(error).split())[:300]}; expected "
                        "dataset:NAME_OR_FOLDER[:CONFIG[:SPLIT]]") from None


def _table(numbered: Iterator[tuple[int, list[str]]], name: str, options: ReadOptions, counts: Counts) -> Iterator[Document]:
    """Rows by their first line's number, the first of them the names of the columns."""
    names: list[str] = []
    for number, row in numbered:
        if not names:
            names = [value.strip() for value in row]
            if options.text_column not in names:
                raise _no_column(name, names, options.text_column)
        elif len(row) != len(names):
            counts.refuse(f"{name}:{number}: {len(row)} columns, expected {len(names)} ({told(names)})", options)
        else:
            yield from _row(row[names.index(options.text_column)], f"{name}:{number}", options, counts)


def _csv_lines(chunks: Iterable[str], name: str, options: ReadOptions, counts: Counts) -> Iterator[str]:
    for number, line in enumerate(lines(chunks), 1):
        if line is None:
            counts.refuse(f"{name}:{number}: this line {TOO_LONG}", options)
        yield f"{line or ''}\n"


def _row(value: Any, here: str, options: ReadOptions, counts: Counts) -> Iterator[Document]:
    if value is None or isinstance(value, str):
        yield from documents(here, [value or ""], options, counts)
    else:
        counts.refuse(f"{here}: '{options.text_column}' is {_kind(value)}, expected text", options)


def _no_column(name: str, names: Iterable[Any], column: str) -> DataError:
    return DataError(f"{name}: no column '{column}', it has {told(names)}; name the one that holds the text with --text-column, "
                     "or leave this source out")


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)
