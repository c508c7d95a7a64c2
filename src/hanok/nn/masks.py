"""Who may look at whom, as values. A mask is a tuple of rules; a query may look where all of them allow it.

Rules speak of slots (where a token stands in memory), position schemes of positions: packed rows restart positions, causality does not care.
A rule becomes a dense tensor only where no fast kernel can take it. B batch, T queries, S keys; "1|B": one row where all rows agree.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor

from hanok.contracts import Batch
from hanok.nn.position import Position

BLOCK = 128
"""Queries and keys of a block of flex attention. Shorter rows have nothing to skip, and its kernel for them (torch 2.11) takes only some shapes."""


@dataclass(frozen=True)
class Span:
    """The tokens of one forward and the slots that they take. Python numbers, so that choosing a path never waits for the device."""
    positions: Tensor                        # (1|B,T)
    k_positions: Tensor                      # (1|B,S)
    past: tuple[int, ...]                    # the first query's slot, a row; one number where all rows agree
    ends: tuple[int, ...] = ()               # each row's length after this forward; () without a state
    even: bool = True                        # all rows start at one slot and all their tokens are real
    write: tuple[Tensor, ...] | None = None  # uneven: row, column and slot of each real token, 3 x (N,)

    @property
    def n_queries(self) -> int:
        return self.positions.size(1)

    @property
    def n_keys(self) -> int:
        return self.k_positions.size(1)

    @property
    def fresh(self) -> bool:
        """Nothing came before: queries and keys are the same tokens."""
        return not any(self.past) and self.n_queries == self.n_keys

    def slots(self) -> tuple[Tensor, Tensor]:                                         # (1|B,T,1), (S,)
        device = self.positions.device
        past = torch.tensor(self.past, device=device)[:, None, None]
        return past + torch.arange(self.n_queries, device=device)[:, None], torch.arange(self.n_keys, device=device)


def span_of(batch: Batch) -> Span:
    """The span of a forward without a state."""
    positions = batch.positions
    if positions is None:
        positions = torch.arange(batch.token_ids.size(1), device=batch.token_ids.device)[None]
    return Span(positions, positions, past=(0,))


def span_after(lengths: Sequence[int], n_queries: int, counts: Sequence[int] | None, device: torch.device) -> Span:
    """The span of `n_queries` new columns behind rows of `lengths` tokens, of which `counts[b]` are real in row b (0: the row waits)."""
    counts = [n_queries] * len(lengths) if counts is None else list(counts)
    ends = tuple(past + n for past, n in zip(lengths, counts, strict=True))
    k_positions = torch.arange(max(ends), device=device)[None]
    if len(set(lengths)) == 1 and min(counts) == n_queries:
        past = lengths[0]
        return Span(k_positions[:, past:], k_positions, (past,), ends)
    real = [(row, t, past + t) for row, (past, n) in enumerate(zip(lengths, counts)) for t in range(n)]
    # A pad stands where its row's last real token stands, so that no table of positions is read beyond its end.
    positions = [[max(0, past + min(t, n - 1)) for t in range(n_queries)] for past, n in zip(lengths, counts)]
    write = torch.tensor(real, dtype=torch.long, device=device).reshape(-1, 3).unbind(1)
    return Span(torch.tensor(positions, device=device), k_positions, tuple(lengths), ends, even=False, write=write)


Allows = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Row, head, query and key, as whole numbers -> True = may look: how flex attention asks."""


class Rule(Protocol):
    """One reason not to look."""

    def free(self, span: Span) -> bool: ...                                           # True: it forbids nothing here

    def dense(self, span: Span) -> Tensor: ...                                        # (1|B,1,1|T,S), True = may look

    def allows(self) -> Allows: ...                                                   # the same of a fresh span, place by place


@dataclass(frozen=True)
class Causal:
    """Only oneself and what came before."""

    def free(self, span):
        return span.n_queries == 1 and span.past == (span.n_keys - 1,)

    def dense(self, span):
        queries, keys = span.slots()
        return (keys <= queries)[:, None]

    def allows(self):
        return lambda row, head, query, key: key <= query


@dataclass(frozen=True)
class Window:
    """Only the last `size` tokens, oneself included (Mistral, arXiv:2310.06825)."""
    size: int

    def free(self, span):
        return span.n_keys <= self.size

    def dense(self, span):
        queries, keys = span.slots()
        return (queries - keys < self.size)[:, None]

    def allows(self):
        return lambda row, head, query, key: query - key < self.size


@dataclass(frozen=True, eq=False)
class Keep:
    """Only real tokens; what a bidirectional encoder needs where rows are padded."""
    keep: Tensor                             # (B,S)

    def free(self, span):
        return False

    def dense(self, span):
        return self.keep[:, None, None]

    def allows(self):
        return lambda row, head, query, key: self.keep[row, key]


@dataclass(frozen=True, eq=False)
class Documents:
    """Only tokens of one's own document, where several are packed into a row."""
    document_ids: Tensor                     # (B,T); queries and keys are the same tokens

    def free(self, span):
        return False

    def dense(self, span):
        return (self.document_ids[:, :, None] == self.document_ids[:, None])[:, None]

    def allows(self):
        return lambda row, head, query, key: self.document_ids[row, query] == self.document_ids[row, key]


@dataclass(frozen=True, eq=False)
class Blocks:
    """Rules for flex attention (arXiv:2412.05496): blocks of BLOCK x BLOCK in which nobody may look are skipped, and nothing of T x S is held."""
    block_mask: Any                          # torch's BlockMask
    rules: tuple[Rule, ...]
    span: Span

    def dense(self) -> Tensor:                                                        # (1|B,1,T,S)
        """The same for kernels that want it whole."""
        return dense(self.rules, self.span)


@dataclass(frozen=True)
class Frame:
    """What all layers of one forward share: the doors of position, opened, and the mask."""
    rotation: tuple[Tensor, Tensor] | None   # 2 x (1|B,1,T,K)
    mask: Tensor | Blocks | None             # (1|B,1|H,1|T,S): True = may look, or a float that is added to the scores
    is_causal: bool = False


def frame_of(position: Position, span: Span, rules: tuple[Rule, ...]) -> Frame:
    """Opens the doors, and makes the mask dense only where no fast kernel can take it as a word: alone, causality is one; documents, under a compiler
    for GPUs, are blocks, where there is more than one."""
    rotation, bias = position.rotation(span.positions), position.bias(span.positions, span.k_positions)
    binding = tuple(rule for rule in rules if not rule.free(span))
    if bias is None and span.fresh:
        if binding == (Causal(),):
            return Frame(rotation, None, is_causal=True)
        packed = [rule.document_ids for rule in binding if isinstance(rule, Documents)]
        if packed and packed[0].is_cuda and span.n_queries > BLOCK and torch.compiler.is_compiling():
            return Frame(rotation, blocks(binding, span, packed[0].size(0)))
    if not binding:
        return Frame(rotation, bias)
    mask = dense(binding, span)
    return Frame(rotation, mask if bias is None else bias.masked_fill(~mask, float("-inf")))


def dense(rules: Sequence[Rule], span: Span) -> Tensor:                               # (1|B,1,1|T,S)
    """Where all of them allow it."""
    return reduce(torch.logical_and, (rule.dense(span) for rule in rules))


def blocks(rules: tuple[Rule, ...], span: Span, n_rows: int) -> Blocks:
    """The rules of a fresh span of so many rows, for flex attention."""
    from torch.nn.attention.flex_attention import and_masks, create_block_mask
    allows = and_masks(*(rule.allows() for rule in rules))
    return Blocks(create_block_mask(allows, n_rows, None, span.n_queries, span.n_keys, device=span.positions.device, BLOCK_SIZE=BLOCK), rules, span)
