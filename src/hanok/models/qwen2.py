"""Qwen2 and Qwen2.5 (arXiv:2407.10671, 2412.15115): a Llama with biases on queries, keys and values."""
from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from hanok.models.assembly import CausalLM
from hanok.models.family import Family
from hanok.models.llama import LlamaConfig, assemble, gguf_table, hf_table, hf_weights


def build(config: LlamaConfig) -> CausalLM:
    """A Qwen2 with fresh weights."""
    return assemble(config, qkv_bias=True)


TRUNK = hf_table("qwen2", "Qwen2ForCausalLM", max_seq_len=32768, n_kv_heads=32, fixed={"use_sliding_window": False, "use_mrope": False},
                 neutral=frozenset({"sliding_window", "max_window_layers"}), weights=partial(hf_weights, qkv_bias=True))


def read_hf(data: dict[str, Any]) -> dict[str, Any]:
    """Their class only has heads of hidden_size / num_attention_heads; a width that says the same is not told twice."""
    data, n_heads = TRUNK.read(data), data.get("num_attention_heads")
    if n_heads and data.get("head_dim") == data.get("hidden_size", 0) // n_heads:
        del data["head_dim"]
    return data


PRESETS = {
    "tiny": LlamaConfig(4096, 128, 4, 4, 2, 352, 256),
    "qwen2-0.5b": LlamaConfig(151936, 896, 24, 14, 2, 4864, 131072, rope_theta=1_000_000.0),
    "qwen2.5-0.5b": LlamaConfig(151936, 896, 24, 14, 2, 4864, 32768, rope_theta=1_000_000.0),
    "qwen2.5-1.5b": LlamaConfig(151936, 1536, 28, 12, 2, 8960, 131072, rope_theta=1_000_000.0),
    "qwen2-7b": LlamaConfig(152064, 3584, 28, 28, 4, 18944, 131072, rope_theta=1_000_000.0, tie_embeddings=False),
}
QWEN2 = Family(
    "qwen2", "Qwen2 and Qwen2.5: a Llama with biases on q, k and v", LlamaConfig, build, PRESETS, "decoder", "causal",
    hf=(replace(TRUNK, read=read_hf),), gguf=(gguf_table("qwen2", qkv_bias=True),))
