"""Attention weights and hidden vectors on demand, for any family: hooks that stand for one forward, and nothing kept on a module.

The fast kernel never holds its weights, so a hook works them out anew from what a layer is given, with the pure function beside it
(nn.attention.attention_weights). Whose eyes they are is told by where a layer sits: inside `model.encoder`, or not.
B batch, T query positions, S source positions, L layers, H heads, D d_model.
"""
from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hanok.contracts import Batch
from hanok.errors import RequestError
from hanok.nn.attention import CrossAttention, SelfAttention, attention_weights
from hanok.nn.lower import FusedSelfAttention
from hanok.nn.masks import Frame
from hanok.nn.recurrent import Alignment
from hanok.nn.stack import Stack


@dataclass(frozen=True)
class Probe:
    """What was seen in one forward. Each row of weights sums to 1."""
    self_attention: list[Tensor]             # L x (B,H,T,T): the model's own tokens
    encoder_attention: list[Tensor]          # L x (B,H,S,S): the source's tokens, inside an encoder
    cross_attention: list[Tensor]            # L x (B,H,T,S): the model's tokens at the source's; an RNN's alignment is one layer of one head
    hidden: list[Tensor]                     # (L+1) x (B,T,D): the embedding's output, then each block's; of a model without blocks its last alone


def self_weights(attention: SelfAttention, x: Tensor, frame: Frame) -> Tensor:
    """(B,T,D) -> (B,H,T,T)."""
    q, k, _ = attention.placed(x, frame)
    return attention_weights(q, k, frame.mask, frame.is_causal, attention.scale)


def cross_weights(attention: CrossAttention, x: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """(B,T,D), (B,G,S,K) -> (B,H,T,S)."""
    return attention_weights(attention.queries(x), k, mask, scale=attention.scale)


def has_attention(model: nn.Module) -> bool:
    """Whether anything in it looks from one position at another, with weights that can be seen."""
    return any(isinstance(module, SelfAttention | CrossAttention | Alignment) for module in model.modules())


@torch.no_grad()
def probe(model: nn.Module, batch: Batch) -> Probe:
    """Reads one batch and gives every layer's attention weights and hidden vectors.

    Holds L x B x H x T x S numbers. RequestError (unsupported) for a model that has no attention.
    """
    part = getattr(model, "encoder", None)
    encoder = set(part.modules()) if isinstance(part, nn.Module) else set()
    seen = Probe([], [], [], [])
    aligned: dict[nn.Module, list[Tensor]] = {}
    with ExitStack() as hooks:
        def before(module: nn.Module, look: Callable[..., None]) -> None:
            hooks.callback(module.register_forward_pre_hook(lambda _, args, named: look(*args, **named), with_kwargs=True).remove)

        for module in model.modules():
            match module:
                case SelfAttention():
                    before(module, self_look(module, seen.encoder_attention if module in encoder else seen.self_attention))
                case CrossAttention():
                    before(module, cross_look(module, seen.cross_attention))
                case Alignment():
                    before(module, align_look(module, aligned.setdefault(module, [])))
                case Stack() if module not in encoder:
                    before(module, lambda x, *_, **__: seen.hidden.append(x))
                    for block in module.blocks:
                        hooks.callback(block.register_forward_hook(lambda _, __, x: seen.hidden.append(x)).remove)
                case FusedSelfAttention():
                    raise RequestError("this model was put together for inference; probe the plain one, m.bundle.model", "unsupported")
        if not has_attention(model):
            raise RequestError("this model has no attention: nothing in it looks from one position at another; look at its hidden vectors "
                               "(model.hidden) or at what it expects next (m.next_tokens, `hanok next`)", "unsupported")
        hidden = model.hidden(batch)                                                  # type: ignore[operator]
    seen.cross_attention.extend(torch.stack(steps, 1)[:, None] for steps in aligned.values())
    return seen if seen.hidden else replace(seen, hidden=[hidden])


def self_look(attention: SelfAttention, into: list[Tensor]) -> Callable[..., None]:
    return lambda x, frame, append=None: into.append(self_weights(attention, x, frame))


def cross_look(attention: CrossAttention, into: list[Tensor]) -> Callable[..., None]:
    return lambda x, k, v, mask: into.append(cross_weights(attention, x, k, mask))


def align_look(alignment: Alignment, into: list[Tensor]) -> Callable[..., None]:
    """Called once a decoder position: (B,S) each time."""
    return lambda query, keys, memory, keep=None: into.append(alignment.weights(query, keys, keep))
