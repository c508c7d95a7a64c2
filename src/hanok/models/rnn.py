"""Recurrent language models: Elman's RNN as Mikolov used it (2010), the LSTM as Zaremba regularised it (arXiv:1409.2329), the GRU (arXiv:1406.1078).

What they read is carried in a few vectors, so that a token costs the same wherever it stands, and no position is the last.
B batch, T positions, D d_model, V vocabulary.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hanok.contracts import Batch
from hanok.models.assembly import initialise, tie
from hanok.models.family import Family, Sizes
from hanok.nn.recurrent import GRU, LSTM, RNN, Cells, Recurrent, RecurrentState, Source, TokenEmbedding


@dataclass(frozen=True)
class RNNConfig(Sizes):
    """Sizes of a recurrent language model."""
    vocab_size: int                                      # tokens
    d_model: int                                         # width of the embedding and of each layer
    n_layers: int
    max_seq_len: int                                     # positions it is trained on; it reads on behind them
    tie_embeddings: bool = False                         # the head is the embedding (arXiv:1608.05859)
    dropout: float = 0.0                                 # probability, on what enters and leaves a layer, never from step to step


class RecurrentModel(nn.Module):
    """The contract's verbs for whatever carries cells; a subclass says how cells begin and how they read."""
    reads_source = False
    max_positions: int | None = None
    head: nn.Module

    def begin(self, source: Batch | None, batch_size: int) -> tuple[Cells, Source | None]:
        raise NotImplementedError

    def read(self, token_ids: Tensor, cells: Cells, source: Source | None, counts: Sequence[int] | None = None) -> tuple[Tensor, Cells]:
        raise NotImplementedError

    def hidden(self, batch: Batch) -> Tensor:                                         # -> (B,T,D)
        return self.read(batch.token_ids, *self.begin(batch.source, len(batch.token_ids)))[0]

    def forward(self, batch: Batch) -> Tensor:                                        # -> (B,T,V)
        return self.head(self.hidden(batch))

    @torch.no_grad()
    def start(self, source: Batch | None, batch_size: int, capacity: int) -> RecurrentState:
        """A state that has read nothing. Its size does not grow, so that any capacity is enough."""
        cells, seen = self.begin(source, batch_size)
        return RecurrentState(cells, [0] * batch_size, seen)

    @torch.no_grad()
    def step(self, token_ids: Tensor, state: RecurrentState, lengths: Sequence[int] | None = None) -> Tensor:
        """(B,T) -> (B,T,D). Row b's first `lengths[b]` tokens are real; the hidden vectors behind them mean nothing."""
        ends = state.ends(token_ids.size(1), lengths)
        counts = None if lengths is None or min(lengths) == token_ids.size(1) else lengths
        hidden, cells = self.read(token_ids, state.cells, state.source, counts)
        state.cells, state.lengths = cells, ends                                      # last: a step that raised has not happened
        return hidden


class Layers(Protocol):
    """`nn.recurrent.Recurrent`, or what reads as it does."""

    def begin(self, batch_size: int, like: Tensor) -> Cells: ...

    def read(self, x: Tensor, cells: Cells | None = None, counts: Sequence[int] | None = None) -> tuple[Tensor, Cells]: ...

    def whole(self, x: Tensor, document_ids: Tensor | None = None) -> Tensor: ...


class RecurrentLM(RecurrentModel):
    """Reads from the left and says what comes next."""
    layers: Any                                          # Layers

    def __init__(self, embed: TokenEmbedding, layers: Layers, head: nn.Module, dropout: float = 0.0):
        super().__init__()
        self.embed, self.layers, self.head, self.dropout = embed, layers, head, nn.Dropout(dropout)

    def hidden(self, batch: Batch) -> Tensor:
        """(B,T,D). Right padding needs no care: no real token stands behind a pad."""
        return self.dropout(self.layers.whole(self.embed(batch.token_ids), batch.document_ids))

    def hidden_from(self, batch: Batch, cells: Cells) -> tuple[Tensor, Cells]:
        """(B,T,D) and the cells behind each row's last real token: a row goes on from its cells, a document that begins in it from zeros."""
        out, cells = self.layers.read_on(self.embed(batch.token_ids), cells, batch.document_ids, batch.keep)
        return self.dropout(out), cells

    def begin(self, source, batch_size):
        return self.layers.begin(batch_size, self.embed.token.weight), None

    def read(self, token_ids, cells, source, counts=None):
        out, cells = self.layers.read(self.embed(token_ids), cells, counts)
        return self.dropout(out), cells


CELLS: Mapping[str, type[Recurrent]] = {"rnn": RNN, "lstm": LSTM, "gru": GRU}


def recurrent(cell: str, d_in: int, d_hidden: int, n_layers: int, dropout: float = 0.0, **more: Any) -> Recurrent:
    """Layers of that cell: rnn, lstm or gru. Dropout acts between them."""
    layers: Callable[..., Recurrent] = CELLS[cell]
    return layers(d_in, d_hidden, n_layers, batch_first=True, dropout=dropout if n_layers > 1 else 0.0, **more)


def language_model(config: Any, layers: Layers) -> RecurrentLM:
    """Embedding, layers and head."""
    embed, head = TokenEmbedding(config.vocab_size, config.d_model, config.dropout), nn.Linear(config.d_model, config.vocab_size)
    model = RecurrentLM(embed, layers, tie(head, embed) if config.tie_embeddings else head, config.dropout)
    for part in (embed, head):
        initialise(part, std=config.d_model ** -0.5)
    return model


def build(config: RNNConfig, cell: str) -> RecurrentLM:
    """A language model with fresh weights."""
    return language_model(config, recurrent(cell, config.d_model, config.d_model, config.n_layers, config.dropout))


TINY = RNNConfig(4096, 128, 2, 256)
RNN_PRESETS = {
    "tiny": TINY,
    "mikolov-2010": RNNConfig(10_000, 400, 1, 100),      # the largest net of its table 2, on the Penn Treebank's vocabulary
}
LSTM_PRESETS = {
    "tiny": TINY,
    "zaremba-medium": RNNConfig(10_000, 650, 2, 35, dropout=0.5),
    "zaremba-large": RNNConfig(10_000, 1500, 2, 35, dropout=0.65),
}
GRU_PRESETS = {
    "tiny": TINY,
    "cho-2014": RNNConfig(15_000, 1000, 1, 100),         # the decoder of arXiv:1406.1078, alone
}


def family(name: str, summary: str, presets: Mapping[str, RNNConfig]) -> Family:
    return Family(name, summary, RNNConfig, partial(build, cell=name), presets, "decoder", "causal")


RNN_FAMILY = family("rnn", "Elman's recurrent net: one vector, made anew at every token", RNN_PRESETS)
LSTM_FAMILY = family("lstm", "LSTM: a memory behind gates, the language model before the Transformer", LSTM_PRESETS)
GRU_FAMILY = family("gru", "GRU: an LSTM with two gates and one vector", GRU_PRESETS)
