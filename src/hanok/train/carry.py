"""Truncated back-propagation through time: a recurrent language model reads on from where the last batch ended, and its gradient stops there.

The state lives here, outside of the module; a document that begins, begins from nothing. B batch, T positions, L layers, D d_model.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hanok.contracts import Batch
from hanok.errors import ConfigError
from hanok.nn.recurrent import Cells, Recurrent


def carries(model: nn.Module) -> bool:
    """Whether it is a recurrent language model: one that gains by reading on. It may be a model without memory for its weights."""
    return isinstance(getattr(model, "layers", None), Recurrent) and not getattr(model, "reads_source", False)


class Carry:
    """`hidden` of a recurrent language model, with a memory from batch to batch: row b of each goes on with row b of the last (`data.streams`)."""

    def __init__(self, model: nn.Module):
        self.model: Any = model
        self.cells: Cells | None = None                  # (L,B,D) each, without gradient; None: nothing was read yet
        self.documents: Tensor | None = None             # (B,) the document that each row ended in

    @property
    def head(self) -> nn.Module:
        return self.model.head

    def hidden(self, batch: Batch) -> Tensor:
        """(B,T) -> (B,T,D). A row goes on unless its first token's document is another than that of its last one. ConfigError: another B."""
        n_rows = len(batch.token_ids)
        if self.cells is None:
            cells = self.model.begin(None, n_rows)[0]
        elif self.cells[0].size(1) != n_rows:
            raise ConfigError(f"a batch of {n_rows} rows cannot go on from a state of {self.cells[0].size(1)}; keep train.micro_batch_size")
        elif batch.document_ids is None or self.documents is None:
            cells = self.cells
        else:
            goes_on = (batch.document_ids[:, 0] == self.documents)[:, None]
            cells = tuple(torch.where(goes_on, cell, 0.0) for cell in self.cells)
        hidden, after = self.model.hidden_from(batch, cells)
        self.cells = tuple(cell.detach() for cell in after)
        if batch.document_ids is not None:
            self.documents = batch.document_ids[:, -1]                                # pads belong to the last document
        return hidden

    __call__ = hidden

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; nothing before the first batch."""
        cells = {f"cells/{i}": cell for i, cell in enumerate(self.cells or ())}
        return cells if self.documents is None else {**cells, "documents": self.documents}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on where `state` was taken. ConfigError: a state of another model."""
        if not tensors:
            self.cells = self.documents = None
            return
        mine = self.model.begin(None, 1)[0]
        names = {f"cells/{i}": cell for i, cell in enumerate(mine)}
        for name, cell in names.items():
            told = tensors.get(name)
            if told is None or (told.size(0), told.size(2)) != (cell.size(0), cell.size(2)):
                shape = "missing" if told is None else f"{tuple(told.shape)}"
                raise ConfigError(f"the saved recurrent state's {name} is {shape}; expected ({cell.size(0)}, rows, {cell.size(2)})")
        self.cells = tuple(tensors[name].to(cell.device, cell.dtype) for name, cell in names.items())
        documents = tensors.get("documents")
        self.documents = None if documents is None else documents.to(mine[0].device)
