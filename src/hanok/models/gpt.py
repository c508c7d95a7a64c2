"""GPT as the story tells it: the decoder of 2017 without its cross-attention. Norms behind each sublayer, masked self-attention, sinusoidal
positions, ReLU or GELU, and logits from the tied embedding. GPT-1 and GPT-2, which the world has files of, are assembled
from the same parts beside it.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn

from hanok.models.assembly import CausalLM, initialise, tie
from hanok.models.family import Family, Sizes
from hanok.nn.attention import SelfAttention
from hanok.nn.layers import MLP, Embedding, PostNorm, PreNorm, activation
from hanok.nn.position import Position, Sinusoidal
from hanok.nn.stack import Block, Stack


@dataclass(frozen=True)
class GPTConfig(Sizes):
    """Sizes of a GPT."""
    vocab_size: int                                      # tokens
    d_model: int                                         # width of the residual stream
    n_layers: int
    n_heads: int
    d_ff: int                                            # width of the feed-forward net
    max_seq_len: int                                     # positions it is trained for; gpt1 and gpt2 have no others
    activation: Literal["relu", "gelu", "gelu_tanh"] = "gelu_tanh"
    norm_eps: float = 1e-5
    tie_embeddings: bool = True                          # the head is the embedding
    dropout: float = 0.0                                 # probability, on embeddings and on what a sublayer adds
    attention_dropout: float = 0.0                       # probability, on attention weights


def assemble(config: GPTConfig, position: Position, residual: type[PreNorm], *, scale: float = 1.0, final_norm: nn.Module | None = None) -> CausalLM:
    """What all GPTs share: an embedding with its positions, plain blocks, a linear head."""
    norm = partial(nn.LayerNorm, config.d_model, eps=config.norm_eps)
    embed = Embedding(nn.Embedding(config.vocab_size, config.d_model), position, scale=scale, dropout=config.dropout)
    blocks = [Block(lambda: residual(norm(), config.dropout), SelfAttention(config.d_model, config.n_heads, dropout=config.attention_dropout),
                    MLP(config.d_model, config.d_ff, activation(config.activation))) for _ in range(config.n_layers)]
    head = nn.Linear(config.d_model, config.vocab_size, bias=False)
    return CausalLM(embed, Stack(blocks, Position(), final_norm), tie(head, embed) if config.tie_embeddings else head)


def build(config: GPTConfig) -> CausalLM:
    """The notes' GPT with fresh weights. As in 2017 the embedding is scaled by sqrt(d_model), since sines of size 1 are added to it."""
    model = assemble(config, Sinusoidal(config.d_model), PostNorm, scale=math.sqrt(config.d_model))
    initialise(model)
    return model


PRESETS = {
    "tiny": GPTConfig(4096, 128, 4, 4, 512, 256),
    "notes": GPTConfig(40000, 512, 6, 8, 2048, 512, activation="relu", dropout=0.1),
}
GPT = Family("gpt", "GPT as the notes tell it: the 2017 decoder alone, post-norm and sinusoidal", GPTConfig, build, PRESETS, "decoder", "causal")
