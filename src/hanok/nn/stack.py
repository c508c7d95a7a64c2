"""A block is a list of residual sublayers; a stack is a list of blocks that share one frame.

B batch, T query positions, D d_model. Read this file, attention.py and models/assembly.py and you have read every Transformer here.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from hanok.nn.attention import Append, CrossAttention, SelfAttention
from hanok.nn.cache import KVCache, Memory
from hanok.nn.layers import PreNorm
from hanok.nn.masks import Frame, Rule, Span, frame_of
from hanok.nn.position import Position


class Block(nn.Module):
    """Self-attention, cross-attention where there is a source, feed-forward; `residual` builds what wraps each of them."""

    def __init__(self, residual: Callable[[], PreNorm], attention: SelfAttention, ffn: nn.Module, cross: CrossAttention | None = None):
        super().__init__()
        self.attention, self.cross, self.ffn = attention, cross, ffn
        self.residual = nn.ModuleList(residual() for _ in range(2 if cross is None else 3))

    def forward(self, x: Tensor, frame: Frame, append: Append | None, *memory: Tensor | None) -> Tensor:   # (B,T,D) -> (B,T,D)
        x = self.residual[0](x, self.attention, frame, append)
        if self.cross is not None:
            x = self.residual[1](x, self.cross, *memory)
        return self.residual[-1](x, self.ffn)


class Stack(nn.Module):
    """Blocks in a row; position and mask are worked out once and shared."""

    def __init__(self, blocks: Sequence[Block], position: Position, final_norm: nn.Module | None = None):
        super().__init__()
        self.blocks, self.position, self.final_norm = nn.ModuleList(blocks), position, final_norm or nn.Identity()

    def forward(self, x: Tensor, span: Span, rules: tuple[Rule, ...], cache: KVCache | None = None, memory: Memory | None = None) -> Tensor:
        frame = frame_of(self.position, span, rules)
        for i, block in enumerate(self.blocks):
            append = None if cache is None else partial(cache.append, i, span)
            x = block(x, frame, append) if memory is None else block(x, frame, append, *memory.kv[i], memory.mask)
        return self.final_norm(x)
