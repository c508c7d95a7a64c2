"""GPT-2 (Radford et al., 2019): the norms move to the front, a last one stands behind the stack, positions are learned.

GGUF keeps its linear layers the usual way round, where Hugging Face's class has them transposed; both hold q, k, v as one. llama.cpp knows the tanh
approximation of GELU alone, in a table of half precision.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hanok.models.assembly import CausalLM, initialise
from hanok.models.family import REQUIRED, Family, GGUFTable, HFTable, Layout, Weight, dense, same
from hanok.models.gpt import GPTConfig, assemble
from hanok.models.gpt1 import SUMMARY, block_weights
from hanok.nn.layers import PreNorm
from hanok.nn.position import Learned


def build(config: GPTConfig) -> CausalLM:
    """A GPT-2 with fresh weights."""
    final_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
    model = assemble(config, Learned(config.max_seq_len, config.d_model), PreNorm, final_norm=final_norm)
    initialise(model, residual_scale=(2 * config.n_layers) ** -0.5)
    return model


# ---- Hugging Face ------------------------------------------------------------------------------------------
def hf_weights(config: GPTConfig) -> list[Weight]:
    weights = same(("transformer.wte.weight", "embed.token.weight"), ("transformer.wpe.weight", "embed.position.table.weight"))
    return weights + dense("transformer.ln_f", "stack.final_norm") + block_weights(config)


ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
SPELLED = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}


def read_hf(data: dict[str, object]) -> dict[str, object]:
    told = {"n_inner": 4 * int(str(data.get("n_embd") or 0)), **{k: v for k, v in data.items() if not (k == "n_inner" and v is None)}}
    name = str(data.get("activation_function", "gelu_new"))
    return {**told, "activation_function": ACTIVATIONS.get(name, name)}


def write_hf(config: GPTConfig) -> dict[str, object]:
    return {"activation_function": SPELLED[config.activation], "embd_pdrop": config.dropout, "resid_pdrop": config.dropout}


TABLE = HFTable(
    "gpt2", "GPT2LMHeadModel",
    {"vocab_size": ("vocab_size", REQUIRED), "n_embd": ("d_model", REQUIRED), "n_layer": ("n_layers", REQUIRED), "n_head": ("n_heads", REQUIRED),
     "n_inner": ("d_ff", REQUIRED), "n_positions": ("max_seq_len", 1024), "activation_function": ("activation", "gelu_tanh"),
     "layer_norm_epsilon": ("norm_eps", 1e-5), "resid_pdrop": ("dropout", 0.1), "attn_pdrop": ("attention_dropout", 0.1),
     "tie_word_embeddings": ("tie_embeddings", True)},
    hf_weights, fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    neutral=SUMMARY | {"reorder_and_upcast_attn"},
    repeats=lambda config: {"lm_head.weight": "embed.token.weight"} if config.tie_embeddings else {},
    buffers=(r".*attn\.(bias|masked_bias)",), optional_prefix="transformer.", read=read_hf, write=write_hf)


# ---- GGUF ----------------------------------------------------------------------------------------------------
QKV = Layout(lambda theirs: theirs.chunk(3), lambda ours: torch.cat(list(ours)))


def gguf_weights(config: GPTConfig) -> list[Weight]:
    weights = same(("token_embd.weight", "embed.token.weight"), ("position_embd.weight", "embed.position.table.weight"))
    weights += dense("output_norm", "stack.final_norm")
    if not config.tie_embeddings:
        weights += same(("output.weight", "head.weight"))
    for i in range(config.n_layers):
        theirs, ours = f"blk.{i}.", f"stack.blocks.{i}."
        weights += [Weight(f"{theirs}attn_qkv.{kind}", tuple(f"{ours}attention.{p}_proj.{kind}" for p in "qkv"), QKV) for kind in ("weight", "bias")]
        weights += dense(f"{theirs}attn_output", f"{ours}attention.out_proj")
        weights += dense(f"{theirs}ffn_up", f"{ours}ffn.up") + dense(f"{theirs}ffn_down", f"{ours}ffn.down")
        weights += dense(f"{theirs}attn_norm", f"{ours}residual.0.norm") + dense(f"{theirs}ffn_norm", f"{ours}residual.1.norm")
    return weights


def read_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Older files repeat the embedding as their head."""
    head = tensors.get("output.weight")
    return {"activation": "gelu_tanh", "tie_embeddings": head is None or torch.equal(head, tensors["token_embd.weight"])}


GGUF_TABLE = GGUFTable(
    "gpt2",
    {"embedding_length": ("d_model", REQUIRED), "block_count": ("n_layers", REQUIRED), "attention.head_count": ("n_heads", REQUIRED),
     "feed_forward_length": ("d_ff", REQUIRED), "context_length": ("max_seq_len", REQUIRED), "attention.layer_norm_epsilon": ("norm_eps", REQUIRED)},
    gguf_weights, read_gguf, known=frozenset({"vocab_size"}), buffers=(r"output\.weight",), requires={"activation": "gelu_tanh"},
    precise=frozenset({"position_embd.weight"}))

PRESETS = {
    "tiny": GPTConfig(4096, 128, 4, 4, 512, 256),
    "small": GPTConfig(4096, 256, 5, 4, 1024, 256),
    "gpt2": GPTConfig(50257, 768, 12, 12, 3072, 1024, dropout=0.1, attention_dropout=0.1),
    "gpt2-medium": GPTConfig(50257, 1024, 24, 16, 4096, 1024, dropout=0.1, attention_dropout=0.1),
    "gpt2-large": GPTConfig(50257, 1280, 36, 20, 5120, 1024, dropout=0.1, attention_dropout=0.1),
    "gpt2-xl": GPTConfig(50257, 1600, 48, 25, 6400, 1024, dropout=0.1, attention_dropout=0.1),
}
GPT2 = Family("gpt2", "GPT-2: pre-norm, learned positions", GPTConfig, build, PRESETS, "decoder", "causal", hf=(TABLE,), gguf=(GGUF_TABLE,))
