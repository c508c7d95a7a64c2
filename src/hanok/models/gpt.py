"""GPT as the story tells it, and GPT-2.

`gpt` is the decoder of 2017 without its cross-attention: norms behind each sublayer, masked self-attention, sinusoidal positions, ReLU or GELU, and
logits from the tied embedding. `gpt2` (Radford et al., 2019) moves the norms to the front and learns its positions.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from hanok.models.assembly import CausalLM, initialise, tie
from hanok.models.family import REQUIRED, TRANSPOSED, Family, HFTable, Layout, Sizes, Weight, dense, same
from hanok.nn.attention import SelfAttention
from hanok.nn.layers import MLP, Embedding, PostNorm, PreNorm, activation
from hanok.nn.position import Learned, Position, Sinusoidal
from hanok.nn.stack import Block, Stack


@dataclass(frozen=True)
class GPTConfig(Sizes):
    """Sizes of a GPT."""
    vocab_size: int                                      # tokens
    d_model: int                                         # width of the residual stream
    n_layers: int
    n_heads: int
    d_ff: int                                            # width of the feed-forward net
    max_seq_len: int                                     # positions it is trained for; gpt2 has no others
    activation: Literal["relu", "gelu", "gelu_tanh"] = "gelu_tanh"
    norm_eps: float = 1e-5
    tie_embeddings: bool = True                          # the head is the embedding
    dropout: float = 0.0                                 # probability, on embeddings and on what a sublayer adds
    attention_dropout: float = 0.0                       # probability, on attention weights


def assemble(config: GPTConfig, residual: type[PreNorm], embed: Embedding, final_norm: nn.Module | None) -> CausalLM:
    norm = partial(nn.LayerNorm, config.d_model, eps=config.norm_eps)
    blocks = [Block(lambda: residual(norm(), config.dropout), SelfAttention(config.d_model, config.n_heads, dropout=config.attention_dropout),
                    MLP(config.d_model, config.d_ff, activation(config.activation))) for _ in range(config.n_layers)]
    head = nn.Linear(config.d_model, config.vocab_size, bias=False)
    return CausalLM(embed, Stack(blocks, Position(), final_norm), tie(head, embed) if config.tie_embeddings else head)


def build_gpt(config: GPTConfig) -> CausalLM:
    """The notes' GPT with fresh weights. As in 2017 the embedding is scaled by sqrt(d_model), since sines of size 1 are added to it."""
    token = nn.Embedding(config.vocab_size, config.d_model)
    embed = Embedding(token, Sinusoidal(config.d_model), scale=math.sqrt(config.d_model), dropout=config.dropout)
    model = assemble(config, PostNorm, embed, None)
    initialise(model)
    return model


def build_gpt2(config: GPTConfig) -> CausalLM:
    """A GPT-2 with fresh weights."""
    token = nn.Embedding(config.vocab_size, config.d_model)
    embed = Embedding(token, Learned(config.max_seq_len, config.d_model), dropout=config.dropout)
    model = assemble(config, PreNorm, embed, nn.LayerNorm(config.d_model, eps=config.norm_eps))
    initialise(model, residual_scale=(2 * config.n_layers) ** -0.5)
    return model


# ---- Hugging Face: GPT-2 stores its linear layers transposed (Conv1D), and q, k, v as one ---------------------
QKV_WEIGHT = Layout(lambda theirs: theirs.t().chunk(3), lambda ours: torch.cat(list(ours)).t())
QKV_BIAS = Layout(lambda theirs: theirs.chunk(3), lambda ours: torch.cat(list(ours)))


def gpt2_weights(config: GPTConfig) -> list[Weight]:
    weights = same(("transformer.wte.weight", "embed.token.weight"), ("transformer.wpe.weight", "embed.position.table.weight"))
    weights += dense("transformer.ln_f", "stack.final_norm")
    if not config.tie_embeddings:
        weights += same(("lm_head.weight", "head.weight"))
    for i in range(config.n_layers):
        theirs, ours = f"transformer.h.{i}.", f"stack.blocks.{i}."
        qkv = [f"{ours}attention.{p}_proj" for p in "qkv"]
        weights += [Weight(f"{theirs}attn.c_attn.weight", tuple(f"{p}.weight" for p in qkv), QKV_WEIGHT),
                    Weight(f"{theirs}attn.c_attn.bias", tuple(f"{p}.bias" for p in qkv), QKV_BIAS)]
        weights += dense(f"{theirs}attn.c_proj", f"{ours}attention.out_proj", TRANSPOSED)
        weights += dense(f"{theirs}mlp.c_fc", f"{ours}ffn.up", TRANSPOSED) + dense(f"{theirs}mlp.c_proj", f"{ours}ffn.down", TRANSPOSED)
        weights += dense(f"{theirs}ln_1", f"{ours}residual.0.norm") + dense(f"{theirs}ln_2", f"{ours}residual.1.norm")
    return weights


ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
SPELLED = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}


def read_gpt2(data: dict[str, object]) -> dict[str, object]:
    told = {"n_inner": 4 * int(str(data.get("n_embd") or 0)), **{k: v for k, v in data.items() if not (k == "n_inner" and v is None)}}
    name = str(data.get("activation_function", "gelu_new"))
    return {**told, "activation_function": ACTIVATIONS.get(name, name)}


def write_gpt2(config: GPTConfig) -> dict[str, object]:
    return {"activation_function": SPELLED[config.activation], "embd_pdrop": config.dropout, "resid_pdrop": config.dropout}


GPT2_TABLE = HFTable(
    "gpt2", "GPT2LMHeadModel",
    {"vocab_size": ("vocab_size", REQUIRED), "n_embd": ("d_model", REQUIRED), "n_layer": ("n_layers", REQUIRED), "n_head": ("n_heads", REQUIRED),
     "n_inner": ("d_ff", REQUIRED), "n_positions": ("max_seq_len", 1024), "activation_function": ("activation", "gelu_tanh"),
     "layer_norm_epsilon": ("norm_eps", 1e-5), "resid_pdrop": ("dropout", 0.1), "attn_pdrop": ("attention_dropout", 0.1),
     "tie_word_embeddings": ("tie_embeddings", True)},
    gpt2_weights, fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    neutral=frozenset({"initializer_range", "embd_pdrop", "n_ctx", "reorder_and_upcast_attn", "summary_type", "summary_use_proj",
                       "summary_activation", "summary_proj_to_labels", "summary_first_dropout", "task_specific_params"}),
    repeats=lambda config: {"lm_head.weight": "embed.token.weight"} if config.tie_embeddings else {},
    buffers=(r".*attn\.(bias|masked_bias)",), optional_prefix="transformer.", read=read_gpt2, write=write_gpt2)

GPT_PRESETS = {
    "tiny": GPTConfig(4096, 128, 4, 4, 512, 256),
    "notes": GPTConfig(40000, 512, 6, 8, 2048, 512, activation="relu", dropout=0.1),
}
GPT2_PRESETS = {
    "tiny": GPTConfig(4096, 128, 4, 4, 512, 256),
    "small": GPTConfig(4096, 256, 5, 4, 1024, 256),
    "gpt2": GPTConfig(50257, 768, 12, 12, 3072, 1024, dropout=0.1, attention_dropout=0.1),
    "gpt2-medium": GPTConfig(50257, 1024, 24, 16, 4096, 1024, dropout=0.1, attention_dropout=0.1),
    "gpt2-large": GPTConfig(50257, 1280, 36, 20, 5120, 1024, dropout=0.1, attention_dropout=0.1),
    "gpt2-xl": GPTConfig(50257, 1600, 48, 25, 6400, 1024, dropout=0.1, attention_dropout=0.1),
}
GPT = Family("gpt", "GPT as the notes tell it: the 2017 decoder alone, post-norm and sinusoidal", GPTConfig, build_gpt, GPT_PRESETS,
             "decoder", "causal")
GPT2 = Family("gpt2", "GPT-2: pre-norm, learned positions", GPTConfig, build_gpt2, GPT2_PRESETS, "decoder", "causal", hf=(GPT2_TABLE,))
