"""Layers that read from left to right and carry a few vectors (Elman's RNN, the LSTM, the GRU), the state that decoding carries, and alignments.

The layers are torch.nn's, where a whole sequence is one call; what has to stop between two tokens uses a cell, whose input's share of the gates is
worked out before. Cells are (L,B,D), whatever L counts, and are never written in place: a snapshot is a few references.
B batch, T positions, S source positions, D the cell's width, L layers, M the memory's width, A the keys' width.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from hanok.errors import RequestError
from hanok.nn.cache import pad_to
from hanok.nn.layers import Embedding
from hanok.nn.position import Position

Cells = tuple[Tensor, ...]


class TokenEmbedding(Embedding):
    """Tokens and nothing else: who reads them one after the other knows their order."""

    def __init__(self, vocab_size: int, d_model: int, dropout: float = 0.0):
        super().__init__(nn.Embedding(vocab_size, d_model), Position(), dropout=dropout)

    def forward(self, token_ids: Tensor, positions: Tensor | None = None) -> Tensor:  # (B,T) -> (B,T,D)
        return self.dropout(self.vectors(token_ids))


# ---- layers --------------------------------------------------------------------------------------------------
class Recurrent(nn.RNNBase):
    """One of torch.nn's recurrent layers (batch first) whose state is a tuple of cells."""
    n_cells = 1

    def enter(self, cells: Cells) -> Tensor | Cells:
        return cells[0]

    def leave(self, after: Tensor | Cells) -> Cells:
        assert isinstance(after, Tensor)
        return (after,)

    def begin(self, batch_size: int, like: Tensor) -> Cells:
        """Zeros of the type of `like`: (L,B,D) each; a layer of two directions counts twice."""
        shape = (self.num_layers * (1 + self.bidirectional), batch_size, self.hidden_size)
        return (like.new_zeros(shape),) * self.n_cells

    def read(self, x: Tensor, cells: Cells | None = None, counts: Sequence[int] | None = None) -> tuple[Tensor, Cells]:
        """(B,T,*) -> (B,T,D), and the cells behind it. Row b's first `counts[b]` vectors are real (None: all; 0: the row waits)."""
        before = self.begin(x.size(0), x) if cells is None else cells
        if counts is None or min(counts) == x.size(1):
            out, after = self(x, self.enter(before))
            return out, self.leave(after)
        packed = pack_padded_sequence(x, torch.tensor(counts).clamp(min=1), batch_first=True, enforce_sorted=False)
        out, after = self(packed, self.enter(before))
        out, _ = pad_packed_sequence(out, batch_first=True, total_length=x.size(1))
        reads = torch.tensor(counts, device=x.device).bool()[:, None]                 # (B,1)
        return out, tuple(torch.where(reads, new, old) for new, old in zip(self.leave(after), before))

    def whole(self, x: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """(B,T,*) -> (B,T,D) from zeros. Right padding needs no care; packed documents are read side by side, each from zeros."""
        if document_ids is None:
            return self.read(x)[0]
        packed, back, _ = pack_documents(x, document_ids)
        out, _ = self(packed)
        return out.data[back].unflatten(0, document_ids.shape)

    def read_on(self, x: Tensor, cells: Cells, document_ids: Tensor | None = None, keep: Tensor | None = None) -> tuple[Tensor, Cells]:
        """(B,T,*) -> (B,T,D), and the cells behind each row's last real token: a row's first document goes on from its cells, others from zeros."""
        counts = None if keep is None else keep.sum(1)
        if document_ids is None or bool((document_ids == document_ids[:, :1]).all()):
            return self.read(x, cells, None if counts is None else counts.tolist())
        if keep is not None:
            document_ids = document_ids.where(keep, -1)                               # pads are a document of their own
        packed, back, document = pack_documents(x, document_ids)
        first, last = document[:, 0], document[:, -1]
        if counts is not None:
            last = document.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
        before = tuple(cell.new_zeros(cell.size(0), int(packed.batch_sizes[0]), cell.size(2)).index_copy(1, first, cell) for cell in cells)
        out, after = self(packed, self.enter(before))
        ends = tuple(cell[:, last] for cell in self.leave(after))
        if counts is not None:
            ends = tuple(torch.where(counts.bool()[:, None], end, cell) for end, cell in zip(ends, cells))
        return out.data[back].unflatten(0, document_ids.shape), ends


class RNN(Recurrent, nn.RNN):
    """h = tanh(W x + U h + b) (Elman, 1990)."""


class GRU(Recurrent, nn.GRU):
    """The gated recurrent unit (arXiv:1406.1078), with the reset gate behind the product, as that paper's first version has it and cuDNN does."""


class LSTM(Recurrent, nn.LSTM):
    """Long short-term memory (Hochreiter and Schmidhuber, 1997) with forget gates that begin open (Jozefowicz et al., 2015)."""
    n_cells = 2

    def enter(self, cells):
        return cells

    def leave(self, after):
        return after

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name, bias in self.named_parameters():
            if name.startswith("bias_ih"):
                nn.init.ones_(bias[self.hidden_size:2 * self.hidden_size])


def pack_documents(x: Tensor, document_ids: Tensor) -> tuple[PackedSequence, Tensor, Tensor]:
    """Rows of documents, (B,T,*) and (B,T), as one packed batch of them without a pad; where each token of the rows stands in it, (B*T,); and which
    of its documents each token is of, (B,T)."""
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    begins = begins.flatten()
    document = begins.cumsum(0) - 1                                                   # (B*T,) numbered through all rows
    lengths = document.bincount()
    t = torch.arange(len(begins), device=x.device) - begins.nonzero()[:, 0][document]
    rank = lengths.argsort(descending=True).argsort()                                 # the longest document first, as packing wants it
    order = (t * len(lengths) + rank[document]).argsort()
    return PackedSequence(x.flatten(0, 1)[order], t.bincount().cpu()), order.argsort(), rank[document].unflatten(0, document_ids.shape)


class GRUCell(nn.Module):
    """One step of `GRU`, from the input's share of its gates (reset, update, new)."""

    def __init__(self, d_hidden: int):
        super().__init__()
        self.h_proj = nn.Linear(d_hidden, 3 * d_hidden)

    def forward(self, gates: Tensor, h: Tensor) -> Tensor:                            # (B,3D), (B,D) -> (B,D)
        own, width = self.h_proj(h), h.size(-1)
        reset, update = (gates[:, :2 * width] + own[:, :2 * width]).sigmoid().chunk(2, -1)
        new = torch.addcmul(gates[:, 2 * width:], reset, own[:, 2 * width:]).tanh()
        return torch.lerp(new, h, update)


class LSTMCell(nn.Module):
    """One step of `LSTM`, from the input's share of its gates (in, forget, new, out)."""

    def __init__(self, d_hidden: int):
        super().__init__()
        self.h_proj = nn.Linear(d_hidden, 4 * d_hidden)

    def forward(self, gates: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:  # (B,4D), (B,D), (B,D) -> 2 x (B,D)
        enter, forget, new, leave = (gates + self.h_proj(h)).chunk(4, -1)
        c = torch.addcmul(forget.sigmoid() * c, enter.sigmoid(), new.tanh())
        return leave.sigmoid() * c.tanh(), c


# ---- what decoding carries ---------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Source:
    """What a decoder may look at: an encoder's output, and the keys that an alignment made of it once."""
    memory: Tensor                           # (B,S,M)
    keys: Tensor                             # (B,S,A)
    keep: Tensor | None                      # (B,S)

    def select(self, rows: Tensor) -> Source:
        return Source(self.memory[rows], self.keys[rows], None if self.keep is None else self.keep[rows])

    def join(self, other: Source) -> Source:
        size = max(self.memory.size(1), other.memory.size(1))
        pairs = ((self.memory, other.memory), (self.keys, other.keys), (self.all_keep(), other.all_keep()))
        return Source(*(torch.cat([pad_to(x, size, 1) for x in pair]) for pair in pairs))

    def all_keep(self) -> Tensor:                                                     # (B,S)
        return self.memory.new_ones(self.memory.shape[:2], dtype=torch.bool) if self.keep is None else self.keep


@dataclass(frozen=True, eq=False)
class Moment:
    """A mark of a RecurrentState; it never grows stale."""
    cells: Cells
    lengths: tuple[int, ...]
    owner: RecurrentState


class RecurrentState:
    """A State of cells and, where a decoder looks back at it, a source. It has no capacity, and goes back to a snapshot only."""

    def __init__(self, cells: Cells, lengths: Sequence[int], source: Source | None = None):
        self.cells, self.lengths, self.source = cells, list(lengths), source          # each cell (L,B,D)

    def ends(self, n_tokens: int, counts: Sequence[int] | None) -> list[int]:
        """The lengths behind the next `n_tokens` columns, of which `counts[b]` are real in row b."""
        return [n + more for n, more in zip(self.lengths, [n_tokens] * len(self.lengths) if counts is None else counts, strict=True)]

    def select(self, rows: Sequence[int]) -> RecurrentState:
        index = torch.as_tensor(rows, dtype=torch.long, device=self.cells[0].device)
        return RecurrentState(tuple(cell[:, index] for cell in self.cells), [self.lengths[row] for row in rows],
                              None if self.source is None else self.source.select(index))

    def join(self, other: RecurrentState) -> RecurrentState:
        source = self.source.join(other.source) if self.source is not None and other.source is not None else None
        return RecurrentState(tuple(torch.cat(pair, 1) for pair in zip(self.cells, other.cells, strict=True)), self.lengths + other.lengths, source)

    def truncate(self, lengths: Sequence[int]) -> None:
        if list(lengths) != self.lengths:
            raise RequestError(f"a recurrent state of {self.lengths} tokens cannot go back to {list(lengths)}: what it read is mixed into its cells; "
                               "take a snapshot before and restore it", "unsupported")

    def snapshot(self) -> Moment:
        return Moment(self.cells, tuple(self.lengths), self)

    def restore(self, mark: Moment) -> None:
        if mark.owner is not self:
            raise RequestError("this mark is of another state; take a new snapshot", "stale")
        self.cells, self.lengths = mark.cells, list(mark.lengths)


# ---- alignments ----------------------------------------------------------------------------------------------
class Alignment(nn.Module):
    """Where a decoder looks: a softmax over the source's positions, and the memory's mean under it."""

    def keys(self, memory: Tensor) -> Tensor:                                         # (B,S,M) -> (B,S,A)
        """What scores need of the memory, worked out once a source."""
        return memory

    def scores(self, query: Tensor, keys: Tensor) -> Tensor:                          # (B,D), (B,S,A) -> (B,S)
        raise NotImplementedError

    def weights(self, query: Tensor, keys: Tensor, keep: Tensor | None = None) -> Tensor:   # (B,D), (B,S,A), (B,S) -> (B,S)
        """Each row sums to 1."""
        scores = self.scores(query, keys)
        return (scores if keep is None else scores.masked_fill(~keep, float("-inf"))).softmax(-1)

    def forward(self, query: Tensor, keys: Tensor, memory: Tensor, keep: Tensor | None = None) -> Tensor:   # -> (B,M)
        return (self.weights(query, keys, keep)[:, None] @ memory).squeeze(1)


class DotAlignment(Alignment):
    """score = h^T m (Luong, arXiv:1508.04025, eq. 8); D = M."""

    def scores(self, query, keys):
        return (keys @ query[..., None]).squeeze(-1)


class GeneralAlignment(DotAlignment):
    """score = h^T W m (Luong, eq. 8)."""

    def __init__(self, d_query: int, d_memory: int):
        super().__init__()
        self.k_proj = nn.Linear(d_memory, d_query, bias=False)

    def keys(self, memory):
        return self.k_proj(memory)


class AdditiveAlignment(Alignment):
    """score = v^T tanh(W s + U m) (Bahdanau, arXiv:1409.0473, A.1.2)."""

    def __init__(self, d_query: int, d_memory: int, d_align: int):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(d_query, d_align, bias=False), nn.Linear(d_memory, d_align, bias=False)
        self.v = nn.Linear(d_align, 1, bias=False)

    def keys(self, memory):
        return self.k_proj(memory)

    def scores(self, query, keys):
        return self.v(torch.tanh(self.q_proj(query)[:, None] + keys)).squeeze(-1)


class ConcatAlignment(AdditiveAlignment):
    """score = v^T tanh(W [h; m]) (Luong, eq. 8): the additive one, its W cut where h ends."""
