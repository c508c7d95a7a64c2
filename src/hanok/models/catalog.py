"""The only room that knows every family."""
from __future__ import annotations

from collections.abc import Iterator

from hanok.errors import ConfigError, nearest
from hanok.models import bahdanau, bert, cnn, gpt, gpt1, gpt2, llama, luong, mistral, qwen2, qwen3, rnn, rnn_seq2seq, speedrun, t5, transformer
from hanok.models.family import Family, GGUFTable, HFTable

FAMILIES: dict[str, Family] = {family.name: family for family in (
    transformer.TRANSFORMER, bert.BERT, t5.T5, gpt.GPT, gpt1.GPT1, gpt2.GPT2, llama.LLAMA, mistral.MISTRAL, qwen2.QWEN2, qwen3.QWEN3,
    speedrun.SPEEDRUN, rnn.RNN_FAMILY, rnn.LSTM_FAMILY, rnn.GRU_FAMILY, cnn.CNN, rnn_seq2seq.RNN_ENCODER_DECODER, bahdanau.BAHDANAU, luong.LUONG)}
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
    """Every Hugging Face class with its family."""
    return ((family, table) for family in FAMILIES.values() for table in family.hf)


def gguf_tables() -> Iterator[tuple[Family, GGUFTable]]:
    """Every GGUF architecture with its family."""
    return ((family, table) for family in FAMILIES.values() for table in family.gguf)
