"""Every mistake that hanok can tell a person about, in one place.

The message is one line: what was got, what was expected, what to do. The command line prints it without a traceback and leaves with status 2;
a server maps `RequestError.kind` to a status of its own dialect.
"""
from __future__ import annotations

import difflib
from collections.abc import Iterable


class HanokError(Exception):
    """Somebody's mistake, told in one line."""


class ConfigError(HanokError):
    """A configuration, recipe or option that cannot be."""


class DataError(HanokError):
    """Text or labels that cannot be read or used."""


class WeightsError(HanokError):
    """A weights file that is missing, cut short, or does not fit its config."""


class TokenizerError(HanokError):
    """A tokenizer that cannot be trained, read or expressed."""


class RequestError(HanokError):
    """A request that a model cannot serve. `kind` is a stable word for machines: invalid, too_long, stale, unsupported."""

    def __init__(self, message: str, kind: str = "invalid"):
        super().__init__(message)
        self.kind = kind


class HubError(HanokError):
    """A model that could not be fetched: not there, not reachable, or not what its checksum says."""


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or the choices where nothing is near: the tail of an error message."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    return "choose from " + ", ".join(known) if known else "nothing may stand here"
