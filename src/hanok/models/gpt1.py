"""GPT-1 (Radford et al., 2018): the decoder of 2017 alone, with learned positions and GELU.

Its Hugging Face class stores linear layers transposed (Conv1D) and q, k, v as one, fixes d_ff at 4 x d_model, and means the tanh approximation by
"gelu". GGUF has no architecture for it.
"""
from __future__ import annotations

from typing import Any

import torch

from hanok.models.assembly import CausalLM, initialise
from hanok.models.family import REQUIRED, TRANSPOSED, Family, HFTable, Layout, Weight, dense, same
from hanok.models.gpt import GPTConfig, assemble
from hanok.nn.layers import PostNorm
from hanok.nn.position import Learned

QKV_WEIGHT = Layout(lambda theirs: theirs.t().chunk(3), lambda ours: torch.cat(list(ours)).t())
QKV_BIAS = Layout(lambda theirs: theirs.chunk(3), lambda ours: torch.cat(list(ours)))
SUMMARY = frozenset({"initializer_range", "embd_pdrop", "n_ctx", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
                     "summary_first_dropout", "task_specific_params"})


def build(config: GPTConfig) -> CausalLM:
    """A GPT-1 with fresh weights."""
    model = assemble(config, Learned(config.max_seq_len, config.d_model), PostNorm)
    initialise(model)
    return model


def block_weights(config: GPTConfig) -> list[Weight]:
    """The blocks, and a head that is not tied, as GPT-1's class and GPT-2's both spell them."""
    weights = [] if config.tie_embeddings else same(("lm_head.weight", "head.weight"))
    for i in range(config.n_layers):
        theirs, ours = f"transformer.h.{i}.", f"stack.blocks.{i}."
        qkv = [f"{ours}attention.{p}_proj" for p in "qkv"]
        weights += [Weight(f"{theirs}attn.c_attn.weight", tuple(f"{p}.weight" for p in qkv), QKV_WEIGHT),
                    Weight(f"{theirs}attn.c_attn.bias", tuple(f"{p}.bias" for p in qkv), QKV_BIAS)]
        weights += dense(f"{theirs}attn.c_proj", f"{ours}attention.out_proj", TRANSPOSED)
        weights += dense(f"{theirs}mlp.c_fc", f"{ours}ffn.up", TRANSPOSED) + dense(f"{theirs}mlp.c_proj", f"{ours}ffn.down", TRANSPOSED)
        weights += dense(f"{theirs}ln_1", f"{ours}residual.0.norm") + dense(f"{theirs}ln_2", f"{ours}residual.1.norm")
    return weights


def hf_weights(config: GPTConfig) -> list[Weight]:
    return same(("transformer.tokens_embed.weight", "embed.token.weight"),
                ("transformer.positions_embed.weight", "embed.position.table.weight")) + block_weights(config)


SPELLED = {"gelu_tanh": "gelu", "relu": "relu"}


def read_hf(data: dict[str, Any]) -> dict[str, Any]:
    name = data.get("afn", "gelu")
    ours = {theirs: ours for ours, theirs in SPELLED.items()}.get(name, name)
    return {**data, "afn": ours, "n_inner": 4 * int(data.get("n_embd") or 0)}


def write_hf(config: GPTConfig) -> dict[str, Any]:
    return {"afn": SPELLED[config.activation], "embd_pdrop": config.dropout}


def refused(config: GPTConfig) -> str:
    if config.d_ff != 4 * config.d_model:
        return f"d_ff = 4 x d_model ({4 * config.d_model}, not {config.d_ff})"
    return "" if config.activation in SPELLED else f"activation = gelu_tanh or relu, not {config.activation}"


TABLE = HFTable(
    "openai-gpt", "OpenAIGPTLMHeadModel",
    {"vocab_size": ("vocab_size", 40478), "n_embd": ("d_model", REQUIRED), "n_layer": ("n_layers", REQUIRED), "n_head": ("n_heads", REQUIRED),
     "n_inner": ("d_ff", REQUIRED), "n_positions": ("max_seq_len", 512), "afn": ("activation", "gelu_tanh"),
     "layer_norm_epsilon": ("norm_eps", 1e-5), "resid_pdrop": ("dropout", 0.1), "attn_pdrop": ("attention_dropout", 0.1),
     "tie_word_embeddings": ("tie_embeddings", True)},
    hf_weights, neutral=SUMMARY | {"n_special", "predict_special_tokens"},
    repeats=lambda config: {"lm_head.weight": "embed.token.weight"} if config.tie_embeddings else {},
    buffers=(r".*attn\.bias", r".*position_ids"), optional_prefix="transformer.", read=read_hf, write=write_hf, refuses=refused)

PRESETS = {
    "tiny": GPTConfig(4096, 128, 4, 4, 512, 256),
    "gpt1": GPTConfig(40478, 768, 12, 12, 3072, 512, dropout=0.1, attention_dropout=0.1),
}
GPT1 = Family("gpt1", "GPT-1: post-norm, learned positions", GPTConfig, build, PRESETS, "decoder", "causal", hf=(TABLE,))
