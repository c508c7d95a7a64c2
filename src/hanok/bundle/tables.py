"""Which of a family's tables can express a config, and what stands in the way: one rule for Hugging Face's classes and GGUF's architectures."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hanok.errors import ConfigError
from hanok.models import catalog
from hanok.models.family import Family, GGUFTable, HFTable

Table = TypeVar("Table", HFTable, GGUFTable)


def obstacle(table: HFTable | GGUFTable, config: Any) -> str:
    """What the table needs and this config has not; empty where it can be expressed."""
    if any(getattr(config, name) != value for name, value in table.requires.items()):
        return ", ".join(f"{name} = {value}" for name, value in table.requires.items())
    return table.refuses(config)


def expressible(tables: Sequence[HFTable | GGUFTable], config: Any) -> bool:
    """Whether one of them can express this config: what `writable` would refuse need not be suggested."""
    return any(not obstacle(table, config) for table in tables)


def writable(family: Family, tables_of: Callable[[Family], Sequence[Table]], config: Any, who: str, what: str, having: str) -> Table:
    """The first table that can express this config. ConfigError: `who` has no `what` for it, and the families that are `having` one."""
    tables = tables_of(family)
    if not tables:
        able = ", ".join(f.name for f in catalog.FAMILIES.values() if tables_of(f))
        raise ConfigError(f"{who} has no {what} for {family.name}; families that {having} are {able}")
    obstacles = [obstacle(table, config) for table in tables]
    if "" not in obstacles:
        raise ConfigError(f"no {who} {what} expresses this {family.name}: it needs {'; or '.join(obstacles)}")
    return tables[obstacles.index("")]
