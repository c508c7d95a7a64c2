"""Llama 2 and 3 (arXiv:2307.09288, 2407.21783) and SmolLM2: RMSNorm before each sublayer, rotary positions, SwiGLU, grouped key/value heads.

Mistral, Qwen2 and Qwen3 are what this trunk assembles with one thing more; their files say what. The tables of all of them are made here.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from hanok.errors import ConfigError
from hanok.models import rope
from hanok.models.assembly import CausalLM, initialise, tie
from hanok.models.family import REQUIRED, Family, GGUFTable, HFTable, Layout, Sizes, Weight, same
from hanok.models.rope import RopeScaling, head_width
from hanok.nn.attention import SelfAttention
from hanok.nn.layers import Embedding, GatedMLP, PreNorm
from hanok.nn.masks import Causal, Rule
from hanok.nn.position import Position, Rotary
from hanok.nn.stack import Block, Stack


@dataclass(frozen=True)
class LlamaConfig(Sizes):
    """Sizes of a Llama, a Qwen2 or a Qwen3."""
    vocab_size: int                                      # tokens
    d_model: int                                         # width of the residual stream
    n_layers: int
    n_heads: int                                         # query heads
    n_kv_heads: int                                      # key/value heads; divides n_heads
    d_ff: int                                            # width of the feed-forward net
    max_seq_len: int                                     # positions it was trained for
    d_head: int | None = None                            # numbers a head; None: d_model / n_heads
    rope_theta: float = 10_000.0                         # base of the rotary wavelengths
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    qk_norm: bool = False                                # RMSNorm on each head's queries and keys
    tie_embeddings: bool = True                          # the head is the embedding
    dropout: float = 0.0                                 # probability, on what a sublayer adds


def assemble(config: LlamaConfig, *, qkv_bias: bool = False, rules: tuple[Rule, ...] = (Causal(),), residual_scale: float | None = None) -> CausalLM:
    """The trunk of the relatives, with fresh weights; `residual_scale` of what writes into the residual stream, None: GPT-2's."""
    norm = partial(nn.RMSNorm, config.d_model, eps=config.norm_eps)

    def block() -> Block:
        head_norms = [nn.RMSNorm(head_width(config), eps=config.norm_eps) if config.qk_norm else None for _ in range(2)]
        attention = SelfAttention(config.d_model, config.n_heads, n_kv_heads=config.n_kv_heads, d_head=config.d_head, qkv_bias=qkv_bias,
                                  out_bias=False, q_norm=head_norms[0], k_norm=head_norms[1])
        return Block(lambda: PreNorm(norm(), config.dropout), attention, GatedMLP(config.d_model, config.d_ff, nn.SiLU()))

    embed = Embedding(nn.Embedding(config.vocab_size, config.d_model), Position())
    head = nn.Linear(config.d_model, config.vocab_size, bias=False)
    stack = Stack([block() for _ in range(config.n_layers)], Rotary(rope.frequencies(config)), norm())
    model = CausalLM(embed, stack, tie(head, embed) if config.tie_embeddings else head, rules)
    initialise(model, residual_scale=(2 * config.n_layers) ** -0.5 if residual_scale is None else residual_scale)
    return model


def build(config: LlamaConfig) -> CausalLM:
    """A Llama with fresh weights."""
    return assemble(config)


# ---- Hugging Face ------------------------------------------------------------------------------------------
def hf_weights(config: LlamaConfig, qkv_bias: bool = False) -> list[Weight]:
    pairs = [("model.embed_tokens.weight", "embed.token.weight"), ("model.norm.weight", "stack.final_norm.weight")]
    if not config.tie_embeddings:
        pairs.append(("lm_head.weight", "head.weight"))
    for i in range(config.n_layers):
        theirs, ours = f"model.layers.{i}.", f"stack.blocks.{i}."
        pairs += [(f"{theirs}self_attn.{t}_proj.weight", f"{ours}attention.{o}_proj.weight") for t, o in zip("qkvo", ("q", "k", "v", "out"))]
        if qkv_bias:
            pairs += [(f"{theirs}self_attn.{p}_proj.bias", f"{ours}attention.{p}_proj.bias") for p in "qkv"]
        pairs += [(f"{theirs}mlp.{part}_proj.weight", f"{ours}ffn.{part}.weight") for part in ("gate", "up", "down")]
        pairs += [(f"{theirs}input_layernorm.weight", f"{ours}residual.0.norm.weight"),
                  (f"{theirs}post_attention_layernorm.weight", f"{ours}residual.1.norm.weight")]
        if config.qk_norm:
            pairs += [(f"{theirs}self_attn.{p}_norm.weight", f"{ours}attention.{p}_norm.weight") for p in "qk"]
    return same(*pairs)


def hf_table(model_type: str, architecture: str, *, max_seq_len: int, n_kv_heads: int | None = None, d_head: int | None = None,
             settings: Mapping[str, tuple[str, Any]] | None = None, fixed: Mapping[str, Any] | None = None, neutral: frozenset[str] = frozenset(),
             requires: Mapping[str, Any] | None = None, weights: Callable[[Any], list[Weight]] = hf_weights) -> HFTable:
    """The table of a relative; the sizes are what its class takes where a file is silent (n_kv_heads None: n_heads)."""
    trunk = {
        "vocab_size": ("vocab_size", REQUIRED), "hidden_size": ("d_model", REQUIRED), "num_hidden_layers": ("n_layers", REQUIRED),
        "num_attention_heads": ("n_heads", REQUIRED), "num_key_value_heads": ("n_kv_heads", None), "intermediate_size": ("d_ff", REQUIRED),
        "max_position_embeddings": ("max_seq_len", max_seq_len), "head_dim": ("d_head", d_head), "rope_theta": ("rope_theta", 10_000.0),
        "rope_scaling": ("rope_scaling", None), "rms_norm_eps": ("norm_eps", 1e-6), "tie_word_embeddings": ("tie_embeddings", False),
    }

    def read(data: dict[str, Any]) -> dict[str, Any]:
        data = rope.read_hf(data)
        if data.setdefault("num_key_value_heads", n_kv_heads) is None:
            data["num_key_value_heads"] = data.get("num_attention_heads")
        if set(data.get("layer_types") or ()) <= {"full_attention"}:
            data.pop("layer_types", None)
        return data

    return HFTable(
        model_type, architecture, {**trunk, **(settings or {})}, weights, fixed={"hidden_act": "silu", **(fixed or {})},
        neutral=neutral | {"initializer_range", "attention_dropout"}, requires={"qk_norm": False} if requires is None else requires, read=read,
        write=rope.write_hf, repeats=lambda config: {"lm_head.weight": "embed.token.weight"} if config.tie_embeddings else {},
        buffers=(r".*rotary_emb\.inv_freq",))


# ---- GGUF ----------------------------------------------------------------------------------------------------
def permuted(n_heads: int) -> Layout:
    """llama.cpp stores rows of q and k of the llama architecture pairwise (for its rotary kernel); here halves follow each other."""
    def unpack(theirs: Tensor) -> list[Tensor]:
        return [theirs.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).reshape(theirs.shape)]

    def pack(ours: Any) -> Tensor:
        return ours[0].unflatten(0, (n_heads, 2, -1)).transpose(1, 2).reshape(ours[0].shape)

    return Layout(unpack, pack)


def gguf_weights(config: LlamaConfig, permute: bool, qkv_bias: bool = False) -> list[Weight]:
    weights = same(("token_embd.weight", "embed.token.weight"), ("output_norm.weight", "stack.final_norm.weight"))
    if not config.tie_embeddings:
        weights += same(("output.weight", "head.weight"))
    for i in range(config.n_layers):
        theirs, ours = f"blk.{i}.", f"stack.blocks.{i}."
        for part, heads in (("q", config.n_heads), ("k", config.n_kv_heads)):
            layout = [permuted(heads)] if permute else []
            weights.append(Weight(f"{theirs}attn_{part}.weight", (f"{ours}attention.{part}_proj.weight",), *layout))
        weights += same(
            (f"{theirs}attn_v.weight", f"{ours}attention.v_proj.weight"), (f"{theirs}attn_output.weight", f"{ours}attention.out_proj.weight"),
            (f"{theirs}attn_norm.weight", f"{ours}residual.0.norm.weight"), (f"{theirs}ffn_norm.weight", f"{ours}residual.1.norm.weight"),
            *((f"{theirs}ffn_{part}.weight", f"{ours}ffn.{part}.weight") for part in ("gate", "up", "down")))
        if qkv_bias:
            weights += same(*((f"{theirs}attn_{p}.bias", f"{ours}attention.{p}_proj.bias") for p in "qkv"))
        if config.qk_norm:
            weights += same(*((f"{theirs}attn_{p}_norm.weight", f"{ours}attention.{p}_norm.weight") for p in "qk"))
    return weights


GGUF_SETTINGS = {
    "embedding_length": ("d_model", REQUIRED), "block_count": ("n_layers", REQUIRED), "attention.head_count": ("n_heads", REQUIRED),
    "attention.head_count_kv": ("n_kv_heads", None), "feed_forward_length": ("d_ff", REQUIRED), "context_length": ("max_seq_len", REQUIRED),
    "attention.layer_norm_rms_epsilon": ("norm_eps", REQUIRED), "rope.freq_base": ("rope_theta", 10_000.0), "attention.key_length": ("d_head", None),
}


def gguf_table(architecture: str, *, permute: bool = False, qkv_bias: bool = False, qk_norm: bool = False, **more: Any) -> GGUFTable:
    """The table of a relative; `more` are further fields of it."""
    def read(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        width = metadata.get("attention.key_length") or metadata["embedding_length"] // metadata["attention.head_count"]
        if metadata.get("rope.dimension_count", width) != width or metadata.get("attention.value_length", width) != width:
            raise ConfigError(f"{architecture}: rotary over part of a head, or values of another width than keys, is not supported")
        told: dict[str, Any] = {"tie_embeddings": "output.weight" not in tensors, "qk_norm": qk_norm}
        if metadata.get("attention.head_count_kv") is None:
            told["n_kv_heads"] = metadata["attention.head_count"]
        return told | rope.read_gguf(architecture, metadata, tensors, width)

    fields: dict[str, Any] = {
        "settings": GGUF_SETTINGS, "weights": partial(gguf_weights, permute=permute, qkv_bias=qkv_bias), "read": read,
        "known": rope.GGUF_KNOWN | {"vocab_size", "attention.value_length"}, "buffers": (rope.FACTORS.replace(".", r"\."),),
        "requires": {"qk_norm": qk_norm}, "write": rope.write_gguf, "derived": rope.gguf_factors}
    return GGUFTable(architecture, **{**fields, **more})


PRESETS = {
    "tiny": LlamaConfig(4096, 128, 4, 4, 2, 352, 256),
    "smollm2-135m": LlamaConfig(49152, 576, 30, 9, 3, 1536, 8192, rope_theta=100_000.0, norm_eps=1e-5),
    "llama-2-7b": LlamaConfig(32000, 4096, 32, 32, 32, 11008, 4096, norm_eps=1e-5, tie_embeddings=False),
    "llama-3-8b": LlamaConfig(128256, 4096, 32, 32, 8, 14336, 8192, rope_theta=500_000.0, norm_eps=1e-5, tie_embeddings=False),
    "llama-3.2-1b": LlamaConfig(128256, 2048, 16, 32, 8, 8192, 131072, d_head=64, rope_theta=500_000.0, norm_eps=1e-5,
                                rope_scaling=RopeScaling("llama3", 32.0)),
}
LLAMA = Family(
    "llama", "Llama 2 and 3, SmolLM2: RMSNorm, rotary, SwiGLU, grouped heads", LlamaConfig, build, PRESETS, "decoder", "causal",
    hf=(hf_table("llama", "LlamaForCausalLM", max_seq_len=2048, fixed={"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
                 neutral=frozenset({"is_llama_config", "rope_interleaved"})),),
    gguf=(gguf_table("llama", permute=True),))
