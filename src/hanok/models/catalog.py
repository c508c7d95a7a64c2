"""The only room that knows every family."""
from __future__ import annotations

from collections.abc import Iterator

from hanok.errors import ConfigError, nearest
from hanok.models import bert, gpt, llama, t5, transformer
from hanok.models.family import Family, GGUFTable, HFTable

FAMILIES: dict[str, Family] = {family.name: family for family in (
    transformer.TRANSFORMER, bert.BERT, t5.T5, gpt.GPT, gpt.GPT2, llama.LLAMA, llama.QWEN3)}
DEFAULT = "qwen3"


def family(name: str) -> Family:
    """The family of that name. ConfigError names the nearest."""
    if name not in FAMILIES:
        raise ConfigError(f"unknown family '{name}'; {nearest(name, FAMILIES)}")
    return FAMILIES[name]


def preset(family_name: str, name: str):
    """A family's config of that name. ConfigError names the nearest."""
    presets = family(family_name).presets
    if name not in presets:
        raise ConfigError(f"{family_name} has no preset '{name}'; {nearest(name, presets)}")
    return presets[name]


def hf_tables() -> Iterator[tuple[Family, HFTable]]:
    """Every Hugging Face class that can be read, with its family."""
    return ((family, table) for family in FAMILIES.values() for table in family.hf)


def gguf_tables() -> Iterator[tuple[Family, GGUFTable]]:
    """Every GGUF architecture that can be read, with its family."""
    return ((family, table) for family in FAMILIES.values() for table in family.gguf)
