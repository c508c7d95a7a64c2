"""Dataclasses as TOML or JSON and back. What is unknown is refused, naming the nearest; every field's unit stands in its comment.

TOML is read by the standard library; the few lines that write it keep to what recipes need: tables, strings, numbers, booleans, flat lists.
"""
from __future__ import annotations

import dataclasses
import json
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from hanok.disk import read_text, write_text
from hanok.errors import ConfigError, nearest

C = TypeVar("C")
MOST_ON_A_LINE = 4
"""Items of a list that TOML shows side by side."""


def from_dict(cls: type[C], data: Mapping[str, Any], where: str = "") -> C:
    """Builds the dataclass `cls`. ConfigError on an unknown key (the nearest is named), a missing one, or a value of another type."""
    where = where or cls.__name__
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: got {data!r}, expected a table of settings")
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    values = converted(cls, data, where)
    for name, f in known.items():
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: '{name}' is missing; it has no default")
    return cls(**values)


def converted(cls: type, data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Some settings of the dataclass `cls` in their types. ConfigError as `from_dict`."""
    hints, known = typing.get_type_hints(cls), [f.name for f in dataclasses.fields(cls) if f.init]
    for name in data:
        if name not in known:
            raise ConfigError(f"{where}: unknown setting '{name}'; {nearest(name, known)}")
    return {name: convert(value, hints[name], f"{where}.{name}") for name, value in data.items()}


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`; a string from the command line becomes the number or truth value that it spells."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None or (value in ("none", "None", "") and type(None) in options and str not in options):
            return None
        return convert(value, next(option for option in options if option is not type(None)), where)
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if value in choices:
            return value
        raise ConfigError(f"{where}: got {value!r}; {nearest(str(value), map(str, choices))}")
    if origin in (tuple, list):
        item = (typing.get_args(hint) or (str,))[0]
        if isinstance(value, str):
            value = [part for part in value.split(",") if part]
        if not isinstance(value, Sequence):
            raise ConfigError(f"{where}: got {value!r}, expected a list")
        return origin(convert(part, item, where) for part in value)
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: got {value!r}, expected a table")
        return dict(value)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where)  # type: ignore[arg-type]
    if hint is bool:
        spelled = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in spelled:
            return spelled[value.lower()]
        raise ConfigError(f"{where}: got {value!r}, expected true or false")
    if hint in (int, float):
        number = _number(value, hint)
        if number is None:
            raise ConfigError(f"{where}: got {value!r}, expected {'a whole number' if hint is int else 'a number'}")
        return number
    if hint is str:
        if not isinstance(value, str):
            raise ConfigError(f"{where}: got {value!r}, expected text")
        return value
    return value


def _number(value: Any, hint: type) -> int | float | None:
    """`value` as an int or a float, or None if it is neither; a whole number never passes through a float that is too short for it."""
    if isinstance(value, bool):
        return None
    if hint is int and isinstance(value, int | str):
        with suppress(ValueError):
            return int(value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if hint is float:
        return number
    return int(number) if number.is_integer() else None


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain data that JSON and TOML know: None is left out, tuples become lists."""
    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return to_dict(value)
        if isinstance(value, tuple | list):
            return [plain(part) for part in value]
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        return str(value) if isinstance(value, Path) else value

    pairs = ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))
    return {name: plain(value) for name, value in pairs if value is not None}


def override(data: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """`data` with each `a.b=c` of `settings` put in its place. Values are strings; `from_dict` gives them their type."""
    result = json.loads(json.dumps(data))
    for setting in settings:
        path, equals, value = setting.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"--set {setting}: expected name=value, for example --set train.learning_rate=1e-3")
        *tables, name = path.strip().split(".")
        table = result
        for part in tables:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--set {setting}: '{part}' is a value, not a table")
        table[name] = value.strip()
    return result


def read_json(path: Path | str) -> dict[str, Any]:
    """A JSON object. ConfigError names file, line and column where it breaks."""
    try:
        data = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}; it should be JSON") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {_beyond(error)}; it should be JSON") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: got a {type(data).__name__}, expected a JSON object")
    return data


def read_toml(path: Path | str) -> dict[str, Any]:
    """A TOML file. ConfigError says where it breaks."""
    try:
        return tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {_beyond(error)}; it should be TOML") from None


def _beyond(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())


def write_json(path: Path | str, data: Any) -> None:
    """JSON with two spaces of indent and a newline at the end."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def toml(data: Mapping[str, Any], table: str = "") -> str:
    """Plain data as TOML."""
    lines = [f"{_toml_name(name)} = {_toml_value(value)}" for name, value in data.items() if not isinstance(value, Mapping) and value is not None]
    text = "\n".join(([f"[{table}]"] if table and lines else []) + lines)
    inner = [toml(value, f"{table}.{_toml_name(name)}" if table else _toml_name(name)) for name, value in data.items() if isinstance(value, Mapping)]
    return "\n\n".join(part for part in (text, *inner) if part)


def _toml_name(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml_value(name)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        if len(value) > MOST_ON_A_LINE:
            return "[\n" + "".join(f"    {_toml_value(part)},\n" for part in value) + "]"
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
