"""The three ways to put parts together: a causal language model, an encoder, and both of them joined.

No `forward` here asks which family it is in. B batch, T query positions, S source positions, D d_model, V vocabulary.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hanok.contracts import Batch
from hanok.errors import RequestError
from hanok.nn.attention import Attention
from hanok.nn.cache import KVCache, Memory
from hanok.nn.layers import MLP, Embedding, GatedMLP, SegmentEmbedding
from hanok.nn.masks import Causal, Documents, Keep, Rule, span_of
from hanok.nn.stack import Stack


class CausalLM(nn.Module):
    """Reads from the left and says what comes next."""
    reads_source = False

    def __init__(self, embed: Embedding, stack: Stack, head: nn.Module, rules: tuple[Rule, ...] = (Causal(),)):
        super().__init__()
        self.embed, self.stack, self.head, self.rules = embed, stack, head, rules

    @property
    def max_positions(self) -> int | None:
        return self.embed.position.max_positions

    def hidden(self, batch: Batch) -> Tensor:
        """(B,T,D). Right padding needs no Keep: no real token stands behind a pad."""
        span = span_of(batch)
        return self.stack(self.embed(batch.token_ids, span.positions), span, self.rules_of(batch), memory=self.remember(batch.source))

    def rules_of(self, batch: Batch) -> tuple[Rule, ...]:
        return self.rules if batch.document_ids is None else (*self.rules, Documents(batch.document_ids))

    def forward(self, batch: Batch) -> Tensor:                                        # -> (B,T,V)
        return self.head(self.hidden(batch))

    def remember(self, source: Batch | None) -> Memory | None:
        return None

    @torch.no_grad()
    def start(self, source: Batch | None, batch_size: int, capacity: int) -> KVCache:
        """An empty state for `batch_size` rows of at most `capacity` tokens."""
        most = self.max_positions
        if most is not None and capacity > most:
            raise RequestError(f"a state for {capacity} tokens was asked for, the model has {most} positions; ask for fewer", "too_long")
        block: Any = self.stack.blocks[0]
        attention, weight = block.attention, self.embed.token.weight
        shape = (len(self.stack.blocks), 2, batch_size, attention.n_kv_heads, capacity, attention.d_head)
        return KVCache(weight.new_zeros(shape), [0] * batch_size, self.remember(source))

    @torch.no_grad()                                                                  # it writes into the state in place
    def step(self, token_ids: Tensor, state: KVCache, lengths: Sequence[int] | None = None) -> Tensor:
        """(B,T) -> (B,T,D). Row b's first `lengths[b]` tokens are real; the hidden vectors behind them mean nothing."""
        span = state.span(token_ids.size(1), lengths)
        hidden = self.stack(self.embed(token_ids, span.positions), span, self.rules, state, state.memory)
        state.lengths = list(span.ends)                                               # last: a step that raised has not happened
        return hidden


class Encoder(nn.Module):
    """Reads in both directions."""

    def __init__(self, embed: Embedding, stack: Stack):
        super().__init__()
        self.embed, self.stack = embed, stack

    def hidden(self, batch: Batch) -> Tensor:                                         # -> (B,S,D)
        return self.encode(batch, self.embed(batch.token_ids, span_of(batch).positions))

    def encode(self, batch: Batch, embedded: Tensor) -> Tensor:
        rules: tuple[Rule, ...] = () if batch.keep is None else (Keep(batch.keep),)
        if batch.document_ids is not None:
            rules = (*rules, Documents(batch.document_ids))
        return self.stack(embedded, span_of(batch), rules)


class EncoderLM(Encoder):
    """An encoder with segments and a head that says what stands at each position (BERT). `extras` are further heads that tasks use."""
    embed: SegmentEmbedding

    def __init__(self, embed: SegmentEmbedding, stack: Stack, head: nn.Module, extras: dict[str, nn.Module]):
        super().__init__(embed, stack)
        self.head = head
        for name, module in extras.items():
            self.add_module(name, module)

    def hidden(self, batch: Batch) -> Tensor:                                         # -> (B,T,D)
        return self.encode(batch, self.embed(batch.token_ids, span_of(batch).positions, batch.segment_ids))

    def forward(self, batch: Batch) -> Tensor:                                        # -> (B,T,V)
        return self.head(self.hidden(batch))


class Seq2Seq(CausalLM):
    """A causal language model that also remembers a source."""
    reads_source = True

    def __init__(self, encoder: Encoder, embed: Embedding, stack: Stack, head: nn.Module):
        super().__init__(embed, stack, head)
        self.encoder = encoder

    def remember(self, source: Batch | None) -> Memory:
        if source is None:
            raise RequestError("an encoder-decoder answers a source, and there is none; give source_ids")
        encoded = self.encoder.hidden(source)                                         # (B,S,D)
        blocks: Iterable[Any] = self.stack.blocks
        return Memory(torch.stack([torch.stack(block.cross.keys_values(encoded)) for block in blocks]), source.keep)


def tie(head: nn.Linear, embed: Embedding) -> nn.Linear:
    """The head shares the embedding's matrix (arXiv:1608.05859)."""
    head.weight = embed.token.weight
    return head


def initialise(model: nn.Module, std: float = 0.02, residual_scale: float = 1.0) -> None:
    """Normal weights of `std`, zero biases; what writes into the residual stream (out_proj, down) is scaled, as GPT-2 does by 1/sqrt(2L)."""
    writers = {id(part.out_proj if isinstance(part, Attention) else part.down) for part in model.modules()
               if isinstance(part, Attention | MLP | GatedMLP)}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std * (residual_scale if id(module) in writers else 1.0))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
