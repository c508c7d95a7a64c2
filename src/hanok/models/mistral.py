"""Mistral 7B (arXiv:2310.06825): a Llama whose tokens look back no further than a window; what lies behind it reaches them through the layers.

llama.cpp knows a Mistral as a Llama and ignores the window, so that a GGUF file's context ends where the window does.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hanok.models import rope
from hanok.models.assembly import CausalLM
from hanok.models.family import Family
from hanok.models.llama import GGUF_SETTINGS, LlamaConfig, assemble, gguf_table, hf_table
from hanok.nn.masks import Causal, Window


@dataclass(frozen=True)
class MistralConfig(LlamaConfig):
    """Sizes of a Mistral."""
    window: int | None = None                            # tokens that one may look back, oneself included; None: all


def build(config: MistralConfig) -> CausalLM:
    """A Mistral with fresh weights."""
    return assemble(config, rules=(Causal(),) if config.window is None else (Causal(), Window(config.window)))


def reach(config: MistralConfig) -> int:
    """The positions up to which the window forbids nothing."""
    return min(config.max_seq_len, config.window or config.max_seq_len)


def write_gguf(config: MistralConfig) -> Mapping[str, Any]:
    return {**rope.write_gguf(config), "context_length": reach(config)}


def told_at_export(config: MistralConfig) -> str:
    if reach(config) == config.max_seq_len:
        return ""
    return f"llama.cpp ignores a Mistral's window: the file's context is {reach(config)} tokens, not {config.max_seq_len}"


PRESETS = {
    "tiny": MistralConfig(4096, 128, 4, 4, 2, 352, 256, window=128),
    "mistral-7b": MistralConfig(32000, 4096, 32, 32, 8, 14336, 32768, norm_eps=1e-5, tie_embeddings=False, window=4096),
}
MISTRAL = Family(
    "mistral", "Mistral: a Llama with a sliding window", MistralConfig, build, PRESETS, "decoder", "causal",
    hf=(hf_table("mistral", "MistralForCausalLM", max_seq_len=131072, n_kv_heads=8, settings={"sliding_window": ("window", 4096)}),),
    gguf=(gguf_table("llama", permute=True, settings={**GGUF_SETTINGS, "attention.sliding_window": ("window", None)},
                     marker="attention.sliding_window", write=write_gguf, told_at_export=told_at_export),))
