"""What every search begins with, ragged rows and their prefill, and the oracle: the likeliest token each time, for prompts of any lengths in one
batch. Every faster path is tested equal to it.

B batch, T positions, D d_model.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hanok.contracts import Batch, Generator, Request, State
from hanok.errors import RequestError


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int = 0, device: torch.device | None = None) -> tuple[Tensor, list[int]]:
    """Token ids padded on the right (B,T), and the true lengths."""
    lengths = [len(row) for row in rows]
    width = max(lengths)
    return torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows], device=device), lengths


def keep_of(lengths: Sequence[int], device: torch.device | None = None) -> Tensor | None:
    """(B,T) True at real tokens; None where no row is padded."""
    if len(set(lengths)) == 1:
        return None
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]


def source_of(rows: Sequence[Sequence[int]], device: torch.device | None = None) -> Batch:
    """What an encoder reads, from rows of token ids."""
    token_ids, lengths = pad_rows(rows, device=device)
    return Batch(token_ids, keep=keep_of(lengths, device))


def last(hidden: Tensor, lengths: Sequence[int]) -> Tensor:
    """Each row's last real hidden vector: (B,T,D) -> (B,D)."""
    return hidden[torch.arange(len(lengths)), torch.tensor(lengths) - 1]


def prefill(model: Generator, requests: Sequence[Request], budgets: Sequence[int]) -> tuple[State, Tensor]:
    """A state that has read every prompt, and the hidden vector of each prompt's last token: (B,D). RequestError where memory ends."""
    device = next(model.parameters()).device                                          # type: ignore[attr-defined]
    token_ids, lengths = pad_rows([request.token_ids for request in requests], device=device)
    source = source_of([request.source_ids or () for request in requests], device) if model.reads_source else None
    capacity = max(n + budget for n, budget in zip(lengths, budgets))
    try:
        state = model.start(source, len(requests), capacity)
    except (RuntimeError, TypeError) as error:                                        # torch has no class of its own for it on CPUs
        if not any(word in str(error).lower() for word in ("memory", "overflow")):
            raise
        raise RequestError(f"a state of {len(requests)} x {capacity} tokens does not fit into memory; ask for fewer new tokens", "too_long") from None
    return state, last(model.step(token_ids, state, lengths), lengths)


def greedy(model: Generator, prompts: Sequence[Sequence[int]], max_new_tokens: int, source: Batch | None = None) -> list[list[int]]:
    """Each prompt followed by its `max_new_tokens` likeliest continuations."""
    token_ids, lengths = pad_rows(prompts)
    state = model.start(source, len(prompts), max(lengths) + max_new_tokens)
    hidden, rows = last(model.step(token_ids, state, lengths), lengths), [list(row) for row in prompts]
    for n_left in reversed(range(max_new_tokens)):
        next_ids = model.head(hidden).argmax(-1)                                      # (B,)
        for row, token_id in zip(rows, next_ids.tolist()):
            row.append(token_id)
        if n_left:
            hidden = model.step(next_ids[:, None], state)[:, -1]
    return rows
