"""Llama 2 and 3 (arXiv:2307.09288, 2407.21783), SmolLM2, and Qwen3 (arXiv:2505.09388): RMSNorm before each sublayer, rotary positions, SwiGLU,
grouped key/value heads; Qwen3 also normalises each head's queries and keys. What `hanok pretrain` builds by default has Qwen3's layout, so that it
opens elsewhere.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from hanok.config import to_dict
from hanok.errors import ConfigError
from hanok.models.assembly import CausalLM, initialise, tie
from hanok.models.family import REQUIRED, Family, GGUFTable, HFTable, Layout, Sizes, Weight, same
from hanok.nn.attention import SelfAttention
from hanok.nn.layers import Embedding, GatedMLP, PreNorm
from hanok.nn.position import Position, Rotary, inverse_frequencies, linear_scaling, llama3_scaling
from hanok.nn.stack import Block, Stack


@dataclass(frozen=True)
class RopeScaling:
    """How positions beyond the trained context are reached."""
    kind: Literal["linear", "llama3"]
    factor: float                                        # how many times longer
    low_freq_factor: float = 1.0                         # llama3: waves longer than original/low slow down fully
    high_freq_factor: float = 4.0                        # llama3: waves shorter than original/high stay
    original_max_seq_len: int = 8192                     # llama3: positions before scaling


@dataclass(frozen=True)
class LlamaConfig(Sizes):
    """Sizes of a Llama or a Qwen3."""
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


def frequencies(config: LlamaConfig) -> tuple[float, ...]:
    """The rotary angles a position, K/2 of them."""
    plain = inverse_frequencies(head_width(config), config.rope_theta)
    match config.rope_scaling:
        case None:
            return plain
        case RopeScaling("linear", factor):
            return linear_scaling(plain, factor)
        case RopeScaling(_, factor, low, high, original):
            return llama3_scaling(plain, factor, low, high, original)


def head_width(config: LlamaConfig) -> int:
    """K."""
    return config.d_head or config.d_model // config.n_heads


def build(config: LlamaConfig) -> CausalLM:
    """A model with fresh weights."""
    norm = partial(nn.RMSNorm, config.d_model, eps=config.norm_eps)

    def block() -> Block:
        head_norms = [nn.RMSNorm(head_width(config), eps=config.norm_eps) if config.qk_norm else None for _ in range(2)]
        attention = SelfAttention(config.d_model, config.n_heads, n_kv_heads=config.n_kv_heads, d_head=config.d_head, qkv_bias=False, out_bias=False,
                                  q_norm=head_norms[0], k_norm=head_norms[1])
        return Block(lambda: PreNorm(norm(), config.dropout), attention, GatedMLP(config.d_model, config.d_ff, nn.SiLU()))

    embed = Embedding(nn.Embedding(config.vocab_size, config.d_model), Position())
    head = nn.Linear(config.d_model, config.vocab_size, bias=False)
    stack = Stack([block() for _ in range(config.n_layers)], Rotary(frequencies(config)), norm())
    model = CausalLM(embed, stack, tie(head, embed) if config.tie_embeddings else head)
    initialise(model, residual_scale=(2 * config.n_layers) ** -0.5)
    return model


# ---- Hugging Face ------------------------------------------------------------------------------------------
def hf_weights(config: LlamaConfig) -> list[Weight]:
    pairs = [("model.embed_tokens.weight", "embed.token.weight"), ("model.norm.weight", "stack.final_norm.weight")]
    if not config.tie_embeddings:
        pairs.append(("lm_head.weight", "head.weight"))
    for i in range(config.n_layers):
        theirs, ours = f"model.layers.{i}.", f"stack.blocks.{i}."
        pairs += [(f"{theirs}self_attn.{t}_proj.weight", f"{ours}attention.{o}_proj.weight") for t, o in zip("qkvo", ("q", "k", "v", "out"))]
        pairs += [(f"{theirs}mlp.{part}_proj.weight", f"{ours}ffn.{part}.weight") for part in ("gate", "up", "down")]
        pairs += [(f"{theirs}input_layernorm.weight", f"{ours}residual.0.norm.weight"),
                  (f"{theirs}post_attention_layernorm.weight", f"{ours}residual.1.norm.weight")]
        if config.qk_norm:
            pairs += [(f"{theirs}self_attn.{p}_norm.weight", f"{ours}attention.{p}_norm.weight") for p in "qk"]
    return same(*pairs)


def read_rope(data: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, or the newer `rope_parameters` that holds both, as our two settings."""
    data = dict(data)
    newer, scaling = data.pop("rope_parameters", None) or {}, data.pop("rope_scaling", None) or {}
    told = {**newer, **scaling}
    theta = told.pop("rope_theta", None) or data.pop("rope_theta", None) or 10_000.0
    kind = told.pop("rope_type", None) or told.pop("type", None) or "default"
    told.pop("type", None)
    names = {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
             "original_max_position_embeddings": "original_max_seq_len"}
    unknown = [name for name, value in told.items() if name not in names and value is not None]
    if kind not in ("default", "linear", "llama3") or unknown:
        what = f"setting '{unknown[0]}'" if unknown else f"type '{kind}'"
        raise ConfigError(f"rope_scaling: {what} is not supported; choose from default, linear, llama3")
    data["rope_theta"] = theta
    data["rope_scaling"] = None if kind == "default" else {"kind": kind, **{names[name]: value for name, value in told.items() if value is not None}}
    return data


def write_rope(config: LlamaConfig) -> dict[str, Any]:
    """Both spellings, so that older and newer readers find theirs."""
    scaling = config.rope_scaling
    told: dict[str, Any] = {"rope_type": "default"} if scaling is None else {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        told |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor,
                 "original_max_position_embeddings": scaling.original_max_seq_len}
    return {"rope_theta": config.rope_theta, "rope_scaling": None if scaling is None else told,
            "rope_parameters": {"rope_theta": config.rope_theta, **told}, "head_dim": head_width(config)}


def table(model_type: str, architecture: str, *, tied: bool, fixed: dict[str, Any], requires: dict[str, Any], neutral: frozenset[str]) -> HFTable:
    settings = {
        "vocab_size": ("vocab_size", REQUIRED), "hidden_size": ("d_model", REQUIRED), "num_hidden_layers": ("n_layers", REQUIRED),
        "num_attention_heads": ("n_heads", REQUIRED), "num_key_value_heads": ("n_kv_heads", None), "intermediate_size": ("d_ff", REQUIRED),
        "max_position_embeddings": ("max_seq_len", 2048), "head_dim": ("d_head", None), "rope_theta": ("rope_theta", 10_000.0),
        "rope_scaling": ("rope_scaling", None), "rms_norm_eps": ("norm_eps", 1e-6), "tie_word_embeddings": ("tie_embeddings", tied),
    }

    def read(data: dict[str, Any]) -> dict[str, Any]:
        data = {"num_key_value_heads": data.get("num_attention_heads"), **read_rope(data)}
        if set(data.get("layer_types") or ()) <= {"full_attention"}:
            data.pop("layer_types", None)
        return data

    return HFTable(
        model_type, architecture, settings, hf_weights, fixed={"hidden_act": "silu", "attention_bias": False, "pretraining_tp": 1} | fixed,
        neutral=neutral | {"initializer_range", "attention_dropout"}, requires=requires, read=read, write=write_rope,
        repeats=lambda config: {"lm_head.weight": "embed.token.weight"} if config.tie_embeddings else {}, buffers=(r".*rotary_emb\.inv_freq",))


# ---- GGUF ----------------------------------------------------------------------------------------------------
def permuted(n_heads: int) -> Layout:
    """llama.cpp stores rows of q and k of the llama architecture pairwise (for its rotary kernel); here halves follow each other."""
    def unpack(theirs: Tensor) -> list[Tensor]:
        return [theirs.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).reshape(theirs.shape)]

    def pack(ours: Any) -> Tensor:
        return ours[0].unflatten(0, (n_heads, 2, -1)).transpose(1, 2).reshape(ours[0].shape)

    return Layout(unpack, pack)


def gguf_weights(config: LlamaConfig, permute: bool) -> list[Weight]:
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
        if config.qk_norm:
            weights += same(*((f"{theirs}attn_{p}_norm.weight", f"{ours}attention.{p}_norm.weight") for p in "qk"))
    return weights


GGUF_SETTINGS = {
    "embedding_length": ("d_model", REQUIRED), "block_count": ("n_layers", REQUIRED), "attention.head_count": ("n_heads", REQUIRED),
    "attention.head_count_kv": ("n_kv_heads", None), "feed_forward_length": ("d_ff", REQUIRED), "context_length": ("max_seq_len", REQUIRED),
    "attention.layer_norm_rms_epsilon": ("norm_eps", REQUIRED), "rope.freq_base": ("rope_theta", 10_000.0), "attention.key_length": ("d_head", None),
}


def gguf_table(architecture: str, *, permute: bool, qk_norm: bool) -> GGUFTable:
    def read(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        width = metadata.get("attention.key_length") or metadata["embedding_length"] // metadata["attention.head_count"]
        if metadata.get("rope.dimension_count", width) != width or metadata.get("attention.value_length", width) != width:
            raise ConfigError(f"{architecture}: rotary over part of a head, or values of another width than keys, is not supported")
        told: dict[str, Any] = {"tie_embeddings": "output.weight" not in tensors, "qk_norm": qk_norm}
        if metadata.get("attention.head_count_kv") is None:
            told["n_kv_heads"] = metadata["attention.head_count"]
        kind = metadata.get("rope.scaling.type", "none")
        if kind == "linear":
            told["rope_scaling"] = {"kind": "linear", "factor": metadata["rope.scaling.factor"]}
        elif kind != "none":
            raise ConfigError(f"{architecture}: rope.scaling.type '{kind}' is not supported; choose from none, linear")
        if "rope_freqs.weight" in tensors:
            told["rope_scaling"] = llama3_from_factors(tensors["rope_freqs.weight"].tolist(), width, metadata)
        return told

    known = {"rope.dimension_count", "vocab_size", "attention.value_length", "rope.scaling.type", "rope.scaling.factor",
             "rope.scaling.original_context_length"}
    return GGUFTable(architecture, GGUF_SETTINGS, partial(gguf_weights, permute=permute), read, frozenset(known), (r"rope_freqs\.weight",))


def llama3_from_factors(factors: list[float], width: int, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """GGUF keeps Llama 3's scaling as the divisor of each frequency; the rule that made them is found again, and checked."""
    theta = metadata.get("rope.freq_base", 10_000.0)
    plain = inverse_frequencies(width, theta)
    scaling = RopeScaling("llama3", max(factors), original_max_seq_len=metadata.get("rope.scaling.original_context_length", 8192))
    made = llama3_scaling(plain, scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_seq_len)
    if any(abs(f / divisor - m) > 1e-4 * m for f, divisor, m in zip(plain, factors, made, strict=True)):
        raise ConfigError("rope_freqs.weight follows no rule known here (Llama 3's, with an original context of "
                          f"{scaling.original_max_seq_len}, was expected)")
    return to_dict(scaling)


LLAMA_PRESETS = {
    "tiny": LlamaConfig(4096, 128, 4, 4, 2, 352, 256),
    "smollm2-135m": LlamaConfig(49152, 576, 30, 9, 3, 1536, 8192, rope_theta=100_000.0, norm_eps=1e-5),
    "llama-2-7b": LlamaConfig(32000, 4096, 32, 32, 32, 11008, 4096, norm_eps=1e-5, tie_embeddings=False),
    "llama-3-8b": LlamaConfig(128256, 4096, 32, 32, 8, 14336, 8192, rope_theta=500_000.0, norm_eps=1e-5, tie_embeddings=False),
    "llama-3.2-1b": LlamaConfig(128256, 2048, 16, 32, 8, 8192, 131072, d_head=64, rope_theta=500_000.0, norm_eps=1e-5,
                                rope_scaling=RopeScaling("llama3", 32.0)),
}
QWEN3_PRESETS = {
    "tiny": LlamaConfig(4096, 128, 4, 4, 2, 352, 256, qk_norm=True),
    "small": LlamaConfig(4096, 256, 5, 4, 2, 704, 256, qk_norm=True),
    "base": LlamaConfig(16384, 512, 8, 8, 4, 1408, 512, qk_norm=True),
    "qwen3-0.6b": LlamaConfig(151936, 1024, 28, 16, 8, 3072, 40960, d_head=128, rope_theta=1_000_000.0, qk_norm=True),
    "qwen3-1.7b": LlamaConfig(151936, 2048, 28, 16, 8, 6144, 40960, d_head=128, rope_theta=1_000_000.0, qk_norm=True),
}


def build_qwen3(config: LlamaConfig) -> CausalLM:
    """A Qwen3; ConfigError where QK-norm is off, since then it is a Llama."""
    if not config.qk_norm:
        raise ConfigError("qwen3 has qk_norm = true; with false it is a llama: choose --family llama")
    return build(config)


LLAMA = Family(
    "llama", "Llama 2 and 3, SmolLM2: RMSNorm, rotary, SwiGLU, grouped heads", LlamaConfig, build, LLAMA_PRESETS, "decoder", "causal",
    hf=(table("llama", "LlamaForCausalLM", tied=False, fixed={"mlp_bias": False}, requires={"qk_norm": False}, neutral=frozenset(
        {"is_llama_config", "rope_interleaved"})),),
    gguf=(gguf_table("llama", permute=True, qk_norm=False),))
QWEN3 = Family(
    "qwen3", "Qwen3: a Llama with QK-norm; the default, since it opens elsewhere", LlamaConfig, build_qwen3, QWEN3_PRESETS, "decoder", "causal",
    hf=(table("qwen3", "Qwen3ForCausalLM", tied=False, fixed={"use_sliding_window": False, "sliding_window": None}, requires={"qk_norm": True},
              neutral=frozenset({"max_window_layers"})),),
    gguf=(gguf_table("qwen3", permute=False, qk_norm=True),))
