"""What a row of tokens is asked: token ids become a `Batch` with targets. An objective is a function of (token_ids, document_ids).

B rows, T positions; a row has T+1 tokens, so that T of them can be asked about the next one.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hanok.contracts import IGNORE_INDEX, Batch

Objective = Callable[[Tensor, Tensor | None], Batch]


def causal(token_ids: Tensor, document_ids: Tensor | None = None, *, separate: bool = True) -> Batch:
    """Each position is asked for the next token: (B,T+1) ids, and the number of each token's document (None: one document a row) -> (B,T).

    `separate`: no document sees another. Positions restart with each, its number goes along for the mask, and nobody is asked for the first token of
    the next (the end-of-text token, a document's last, is asked for). Otherwise rows are packed plainly, and documents see those before them.
    """
    inputs, targets = token_ids[:, :-1], token_ids[:, 1:]
    if document_ids is None or not separate:
        return Batch(inputs.contiguous(), targets=targets.contiguous())
    documents, index = document_ids[:, :-1], torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    crosses = documents != document_ids[:, 1:]                                                  # (B,T)
    begins = torch.cat([torch.zeros_like(crosses[:, :1]), crosses[:, :-1]], 1)                  # (B,T) True = first of its document
    positions = index - torch.where(begins, index, 0).cummax(1).values
    return Batch(inputs.contiguous(), positions=positions, document_ids=documents.contiguous(),
                 targets=targets.masked_fill(crosses, IGNORE_INDEX))
