"""What decoding remembers: keys and values in preallocated slots, and an encoder's output as keys and values of every layer.

Slot s of a row holds its position s: truncation is a smaller number, causality hides every stale slot, and no row needs a pad mask.
L layers, B batch, G key/value heads, C capacity, S source positions, K d_head.
"""
from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hanok.errors import RequestError
from hanok.nn.masks import Span, span_after


def pad_to(x: Tensor, size: int, dim: int) -> Tensor:
    """Zeros (False) behind x until it is `size` long in `dim`."""
    missing = [*x.shape]
    missing[dim] = size - x.size(dim)
    return x if not missing[dim] else torch.cat([x, x.new_zeros(missing)], dim)


@dataclass
class Memory:
    """Every layer's keys and values of the encoder's output, computed once a source."""
    kv: Tensor                               # (L,2,B,G,S,K)
    keep: Tensor | None                      # (B,S)

    @property
    def mask(self) -> Tensor | None:                                                  # (B,1,1,S)
        return None if self.keep is None else self.keep[:, None, None]

    def select(self, rows: Tensor) -> Memory:
        return Memory(self.kv[:, :, rows], None if self.keep is None else self.keep[rows])

    def join(self, other: Memory) -> Memory:
        size = max(self.kv.size(4), other.kv.size(4))
        return Memory(torch.cat([pad_to(self.kv, size, 4), pad_to(other.kv, size, 4)], 2),
                      torch.cat([pad_to(self.all_keep(), size, 1), pad_to(other.all_keep(), size, 1)]))

    def all_keep(self) -> Tensor:                                                     # (B,S)
        return self.kv.new_ones(self.kv.size(2), self.kv.size(4), dtype=torch.bool) if self.keep is None else self.keep


@dataclass(eq=False)
class Mark:
    """A moment of a KVCache: only numbers, since slots below them keep their content until someone truncates below them."""
    lengths: tuple[int, ...]
    owner: KVCache
    stale: bool = False


class KVCache:
    """A State of preallocated keys and values. What lies behind a row's length is never looked at.

    It begins as zeros, not as empty memory: a hidden slot has weight 0, and 0 x NaN would be NaN.
    """

    def __init__(self, kv: Tensor, lengths: Sequence[int], memory: Memory | None = None):
        self.kv, self.lengths, self.memory = kv, list(lengths), memory                # (L,2,B,G,C,K)
        self.layers = [layer.unbind(0) for layer in kv.unbind(0)]                     # L x 2 x (B,G,C,K), views
        self.marks: weakref.WeakSet[Mark] = weakref.WeakSet()

    @property
    def capacity(self) -> int:
        return self.kv.size(4)

    def span(self, n_queries: int, lengths: Sequence[int] | None) -> Span:
        """Where the next tokens go. RequestError past the capacity."""
        span = span_after(self.lengths, n_queries, lengths, self.kv.device)
        if max(span.ends) > self.capacity:
            row = span.ends.index(max(span.ends))
            raise RequestError(f"row {row} needs {span.ends[row]} slots, its state has {self.capacity}; start it with more capacity", "too_long")
        return span

    def append(self, layer: int, span: Span, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:   # 2 x (B,G,T,K) -> 2 x (B,G,S,K)
        keys, values = self.layers[layer]
        if span.even:
            start, end = span.past[0], span.ends[0]
            keys[:, :, start:end], values[:, :, start:end] = k, v
        else:
            row, column, slot = span.write or ()
            keys[row, :, slot], values[row, :, slot] = k[row, :, column], v[row, :, column]
        if span.fresh:
            return k, v
        return keys[:, :, :span.n_keys], values[:, :, :span.n_keys]                   # views, no copy

    def select(self, rows: Sequence[int]) -> KVCache:
        index = torch.as_tensor(rows, dtype=torch.long, device=self.kv.device)
        memory = None if self.memory is None else self.memory.select(index)
        return KVCache(self.kv[:, :, index], [self.lengths[row] for row in rows], memory)

    def join(self, other: KVCache) -> KVCache:
        capacity = max(self.capacity, other.capacity)
        kv = torch.cat([pad_to(self.kv, capacity, 4), pad_to(other.kv, capacity, 4)], 2)
        memory = self.memory.join(other.memory) if self.memory is not None and other.memory is not None else None
        return KVCache(kv, self.lengths + other.lengths, memory)

    def truncate(self, lengths: Sequence[int]) -> None:
        if any(not 0 <= new <= old for new, old in zip(lengths, self.lengths, strict=True)):
            raise RequestError(f"cannot truncate rows of {self.lengths} tokens to {list(lengths)}; a row can only become shorter")
        for mark in self.marks:
            mark.stale |= any(new < kept for new, kept in zip(lengths, mark.lengths))
        self.lengths = list(lengths)

    def snapshot(self) -> Mark:
        mark = Mark(tuple(self.lengths), self)
        self.marks.add(mark)
        return mark

    def restore(self, mark: Mark) -> None:
        if mark.owner is not self or mark.stale:
            raise RequestError("this mark is of another state, or what it remembers was overwritten; take a new snapshot", "stale")
        self.truncate(mark.lengths)
