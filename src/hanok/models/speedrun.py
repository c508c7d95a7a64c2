"""The fastest loss that we know on a small machine; nothing else reads it, so it does not export.

A Llama with QK-norm (arXiv:2010.04245), ReLU^2 (Primer, arXiv:2109.08668) and embeddings of pairs and triples of tokens (nn/ngram.py).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hanok.contracts import Batch
from hanok.errors import ConfigError
from hanok.models.assembly import CausalLM, initialise
from hanok.models.family import Family, Sizes
from hanok.nn.attention import SelfAttention, check_heads
from hanok.nn.layers import MLP, PreNorm, SquaredReLU
from hanok.nn.masks import span_of
from hanok.nn.ngram import NGramEmbedding, TokenCache
from hanok.nn.position import Position, Rotary, inverse_frequencies
from hanok.nn.stack import Block, Stack

STD = 0.02
"""Of fresh matrices."""


@dataclass(frozen=True)
class SpeedrunConfig(Sizes):
    """Sizes of a speedrun model."""
    vocab_size: int                                      # tokens
    d_model: int                                         # width of the residual stream
    n_layers: int
    n_heads: int                                         # attention heads
    d_ff: int                                            # width of the feed-forward net
    max_seq_len: int                                     # positions it was trained for
    gram_rows: tuple[int, ...] = (4290, 2048)            # rows of the tables for pairs, triples, ... of tokens
    rope_theta: float = 10_000.0                         # base of the rotary wavelengths
    norm_eps: float = 1e-6
    dropout: float = 0.0                                 # probability, on what a sublayer adds

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(rows < 1 for rows in self.gram_rows):
            raise ConfigError(f"gram_rows is {list(self.gram_rows)}; expected 1 or more a table, or none at all: []")


class SpeedrunLM(CausalLM):
    """A causal language model whose embedding looks back a token or two."""
    embed: NGramEmbedding

    def hidden(self, batch: Batch) -> Tensor:                                         # -> (B,T,D)
        span = span_of(batch)
        return self.stack(self.embed(batch.token_ids, span.positions, batch.document_ids), span, self.rules_of(batch))

    def start(self, source: Batch | None, batch_size: int, capacity: int) -> TokenCache:
        empty = super().start(source, batch_size, capacity)
        return TokenCache(empty.kv, empty.lengths, torch.zeros(batch_size, capacity, dtype=torch.long, device=empty.kv.device))

    @torch.no_grad()
    def step(self, token_ids: Tensor, state: Any, lengths: Sequence[int] | None = None) -> Tensor:
        span = state.span(token_ids.size(1), lengths)
        state.write(span, token_ids)
        before = state.before(span, self.embed.n_before, self.embed.token.num_embeddings)
        hidden = self.stack(self.embed.with_grams(token_ids, before, span.positions), span, self.rules, state)
        state.lengths = list(span.ends)                                               # last: a step that raised has not happened
        return hidden


def build(config: SpeedrunConfig) -> SpeedrunLM:
    """A speedrun model with fresh weights; what writes into the residual stream begins at zero."""
    check_heads(config.d_model, config.n_heads, config.n_heads, None)
    d_head, norm = config.d_model // config.n_heads, partial(nn.RMSNorm, eps=config.norm_eps)

    def block() -> Block:
        attention = SelfAttention(config.d_model, config.n_heads, qkv_bias=False, out_bias=False, q_norm=norm(d_head), k_norm=norm(d_head))
        return Block(lambda: PreNorm(norm(config.d_model), config.dropout), attention, MLP(config.d_model, config.d_ff, SquaredReLU(), bias=False))

    embed = NGramEmbedding(nn.Embedding(config.vocab_size, config.d_model), Position(), config.gram_rows)
    stack = Stack([block() for _ in range(config.n_layers)], Rotary(inverse_frequencies(d_head, config.rope_theta)), norm(config.d_model))
    model = SpeedrunLM(embed, stack, nn.Linear(config.d_model, config.vocab_size, bias=False))
    initialise(model, STD, residual_scale=0.0)
    nn.init.normal_(embed.token.weight, std=10 * STD)                                 # the first block hears the token above its grams
    return model


PRESETS = {
    "tiny": SpeedrunConfig(4096, 128, 4, 4, 512, 256, (16384, 16384)),
    "characters": SpeedrunConfig(65, 96, 2, 3, 384, 128),
}
SPEEDRUN = Family("speedrun", "the fastest loss we know, by any means; it does not export", SpeedrunConfig, build, PRESETS, "decoder", "causal")
