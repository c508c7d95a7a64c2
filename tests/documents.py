"""What the tests of readers share: a source's documents, and the one line that refuses it."""
from __future__ import annotations

from pathlib import Path

import pytest

from hanok.data.formats import Counts, ReadOptions, find_units, read_unit
from hanok.errors import DataError


def read(source: str | Path, counts: Counts | None = None, **options) -> list[tuple[str, str]]:
    """(name behind the file's, text) of all documents."""
    counts = Counts() if counts is None else counts
    return [(document.name.removeprefix(str(source)), document.text) for unit in find_units([str(source)])
            for document in read_unit(unit, ReadOptions(**options), counts)]


def refusal(path: str | Path, **options) -> str:
    with pytest.raises(DataError) as error:
        read(path, **options)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)
