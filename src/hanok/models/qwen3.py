"""Qwen3 (arXiv:2505.09388): a Llama that normalises each head's queries and keys (QK-norm, arXiv:2010.04245).

What `hanok pretrain` builds by default has this layout, so that it opens elsewhere. Fresh output projections are zero (Fixup, arXiv:1901.09321):
every block begins as the identity.
"""
from __future__ import annotations

from hanok.errors import ConfigError
from hanok.models.assembly import CausalLM
from hanok.models.family import Family
from hanok.models.llama import LlamaConfig, assemble, gguf_table, hf_table


def build(config: LlamaConfig) -> CausalLM:
    """A Qwen3 with fresh weights; ConfigError where QK-norm is off, since then it is a Llama."""
    if not config.qk_norm:
        raise ConfigError("qwen3 has qk_norm = true; with false it is a llama: choose --family llama")
    return assemble(config, residual_scale=0.0)


PRESETS = {
    "tiny": LlamaConfig(4096, 128, 4, 4, 2, 352, 256, qk_norm=True),
    "small": LlamaConfig(4096, 256, 5, 4, 2, 704, 256, qk_norm=True),
    "base": LlamaConfig(16384, 512, 8, 8, 4, 1408, 512, qk_norm=True),
    "qwen3-0.6b": LlamaConfig(151936, 1024, 28, 16, 8, 3072, 40960, d_head=128, rope_theta=1_000_000.0, qk_norm=True),
    "qwen3-1.7b": LlamaConfig(151936, 2048, 28, 16, 8, 6144, 40960, d_head=128, rope_theta=1_000_000.0, qk_norm=True),
}
QWEN3 = Family(
    "qwen3", "Qwen3: a Llama with QK-norm; the default, since it opens elsewhere", LlamaConfig, build, PRESETS, "decoder", "causal",
    hf=(hf_table("qwen3", "Qwen3ForCausalLM", max_seq_len=32768, n_kv_heads=32, d_head=128, requires={"qk_norm": True},
                 fixed={"attention_bias": False, "use_sliding_window": False}, neutral=frozenset({"sliding_window", "max_window_layers"})),),
    gguf=(gguf_table("qwen3", qk_norm=True),))
