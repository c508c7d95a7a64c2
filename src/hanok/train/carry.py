"""Truncated back-propagation through time: a recurrent language model reads on from where the last batch ended, and its gradient stops there.

The state lives here, outside of the module; a document that begins, begins from nothing. B batch, T positions, L layers, D d_model.
"""
from __future__ import annotations

from collections import deque
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


Memory = tuple[Cells, Tensor | None]
"""(L,B,D) each, without gradient; and (B,), the document that each row ended in, where documents are told."""


class Carry:
    """`hidden` of a recurrent language model, with a memory from batch to batch: row b of each goes on with row b of the last (`data.streams`).

    Of an update in `n_parts` micro-batches each has a memory of its own: a batch goes on from the one `n_parts` before it.
    """

    def __init__(self, model: nn.Module, n_parts: int = 1):
        self.model: Any = model
        self.parts = deque[Memory | None]([None] * n_parts, n_parts)                  # the next batch's first; None: nothing was read yet

    @property
    def cells(self) -> Cells | None:
        """Of all parts' rows, in their order; None before each was read."""
        known = [part[0] for part in self.parts if part is not None]
        return tuple(torch.cat(cells, 1) for cells in zip(*known)) if len(known) == len(self.parts) else None

    @property
    def head(self) -> nn.Module:
        return self.model.head

    def hidden(self, batch: Batch) -> Tensor:
        """(B,T) -> (B,T,D). A row goes on unless its first token's document is another than that of its last one. ConfigError: another B."""
        n_rows, memory = len(batch.token_ids), self.parts[0]
        cells, documents = (self.model.begin(None, n_rows)[0], None) if memory is None else memory
        if cells[0].size(1) != n_rows:
            raise ConfigError(f"a batch of {n_rows} rows cannot go on from a state of {cells[0].size(1)}; keep train.micro_batch_size")
        if batch.document_ids is not None and documents is not None:
            goes_on = (batch.document_ids[:, 0] == documents)[:, None]
            cells = tuple(torch.where(goes_on, cell, 0.0) for cell in cells)
        hidden, after = self.model.hidden_from(batch, cells)
        if batch.document_ids is not None:
            documents = batch.document_ids[:, -1]                                     # pads belong to the last document
        self.parts.append((tuple(cell.detach() for cell in after), documents))        # the first falls out
        return hidden

    __call__ = hidden

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps between two updates, the rows of all parts; nothing before the first."""
        cells = {f"cells/{i}": cell for i, cell in enumerate(self.cells or ())}
        documents = [part[1] for part in self.parts if part is not None and part[1] is not None]
        return {**cells, "documents": torch.cat(documents)} if cells and len(documents) == len(self.parts) else cells

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on where `state` was taken, in any number of parts. ConfigError: a state of another model, or of rows that do not divide."""
        n_parts = len(self.parts)
        if not tensors:
            self.parts.extend([None] * n_parts)
            return
        mine = self.model.begin(None, 1)[0]
        names = {f"cells/{i}": cell for i, cell in enumerate(mine)}
        for name, cell in names.items():
            told = tensors.get(name)
            if told is None or (told.size(0), told.size(2)) != (cell.size(0), cell.size(2)):
                shape = "missing" if told is None else f"{tuple(told.shape)}"
                raise ConfigError(f"the saved recurrent state's {name} is {shape}; expected ({cell.size(0)}, rows, {cell.size(2)})")
        n_rows = tensors["cells/0"].size(1)
        if n_rows % n_parts:
            raise ConfigError(f"the saved recurrent state has {n_rows} rows, which train.grad_accum_steps ({n_parts}) does not divide")
        cells = zip(*(tensors[name].to(cell.device, cell.dtype).chunk(n_parts, 1) for name, cell in names.items()))
        documents = tensors["documents"].to(mine[0].device).chunk(n_parts) if "documents" in tensors else [None] * n_parts
        self.parts.extend(zip(cells, documents))
