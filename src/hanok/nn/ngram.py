"""Embeddings of pairs, triples, ... of tokens, added to the token's own: what a counting model knows, there from the first updates on.

Each length has a table. One that has room for all grams of its length gives each a row; in a smaller one they are hashed, and those that meet in a
row share it (fastText's trick, arXiv:1607.04606, 3). B batch, T positions, D d_model, V vocabulary, C capacity.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanok.nn.cache import KVCache, Memory, pad_to
from hanok.nn.layers import Embedding
from hanok.nn.masks import Span
from hanok.nn.position import Position

GOLDEN = 0x9E3779B97F4A7C15 - 2 ** 64
"""2^64 over the golden ratio, as a signed number: Knuth's multiplier, whose products' high bits are well mixed."""


class NGramEmbedding(Embedding):
    """`rows[i]` rows for the grams of i + 2 tokens that end at each position. Where no token stands before, "no token" does: id V."""

    def __init__(self, token: nn.Embedding, position: Position, rows: Sequence[int]):
        super().__init__(token, position)
        self.grams = nn.ModuleList(nn.Embedding(n, token.embedding_dim) for n in rows)

    @property
    def n_before(self) -> int:
        """Tokens before a position that its vector depends on."""
        return len(self.grams)

    def with_grams(self, token_ids: Tensor, before: Sequence[Tensor], positions: Tensor) -> Tensor:
        """(B,T), the tokens one, two, ... places before them, (1|B,T) -> (B,T,D)."""
        vocab_size, x, number, n_grams = self.token.num_embeddings, self.vectors(token_ids), token_ids, self.token.num_embeddings
        table: Any
        for earlier, table in zip(before, self.grams):
            number, n_grams = number + earlier * n_grams, n_grams * (vocab_size + 1)
            rows = table.num_embeddings
            x = x + table(number if n_grams <= rows else ((number * GOLDEN >> 32) & 0x7FFFFFFF) % rows)
        return self.position.embed(x, positions)

    def forward(self, token_ids: Tensor, positions: Tensor, document_ids: Tensor | None = None) -> Tensor:   # 3 x (B,T) -> (B,T,D)
        """Rows from their beginning: nothing stands before the first token of a row, or of a document."""
        return self.with_grams(token_ids, earlier_tokens(token_ids, self.n_before, self.token.num_embeddings, document_ids), positions)


def earlier_tokens(token_ids: Tensor, n: int, none: int, document_ids: Tensor | None = None) -> list[Tensor]:
    """The tokens 1..n places before each; `none` where a row, or a document in it, has not begun there: (B,T) -> n x (B,T)."""
    before = []
    for back in range(1, n + 1):
        shifted = F.pad(token_ids, (back, 0), value=none)[:, :token_ids.size(1)]
        if document_ids is not None:
            same = document_ids == F.pad(document_ids, (back, 0), value=-1)[:, :token_ids.size(1)]
            shifted = shifted.where(same, none)
        before.append(shifted)
    return before


class TokenCache(KVCache):
    """A KVCache that also remembers the tokens, in the slots of their keys."""

    def __init__(self, kv: Tensor, lengths: Sequence[int], token_ids: Tensor, memory: Memory | None = None):
        super().__init__(kv, lengths, memory)
        self.token_ids = token_ids                                                    # (B,C)

    def write(self, span: Span, token_ids: Tensor) -> None:
        """Keeps the tokens of a step in their slots."""
        if span.even:
            self.token_ids[:, span.past[0]:span.ends[0]] = token_ids
        else:
            row, column, slot = span.write or ()
            self.token_ids[row, slot] = token_ids[row, column]

    def before(self, span: Span, n: int, none: int) -> list[Tensor]:
        """The tokens 1..n slots before each query of a step that is written; `none` where a row has not begun: n x (B,T)."""
        slots = span.positions.expand(self.token_ids.size(0), -1)                     # slot = position
        return [self.token_ids.gather(1, (slots - back).clamp(min=0)).where(slots >= back, none) for back in range(1, n + 1)]

    def select(self, rows: Sequence[int]) -> TokenCache:
        kept = super().select(rows)
        return TokenCache(kept.kv, kept.lengths, self.token_ids[torch.as_tensor(rows, dtype=torch.long, device=self.kv.device)], kept.memory)

    def join(self, other: KVCache) -> TokenCache:
        both = super().join(other)
        assert isinstance(other, TokenCache)
        token_ids = torch.cat([pad_to(part.token_ids, both.capacity, 1) for part in (self, other)])
        return TokenCache(both.kv, both.lengths, token_ids, both.memory)
