"""RNNsearch (Bahdanau et al., arXiv:1409.0473): a bidirectional GRU reads; a GRU writes and looks at all of the source before each word.

What it says comes from [cell, token, context] through a maxout (A.2.2), whose width is d_model. B batch, T positions, D d_model.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hanok.contracts import Batch
from hanok.models.assembly import initialise
from hanok.models.family import Family, Sizes
from hanok.models.rnn import recurrent
from hanok.models.rnn_seq2seq import RecurrentEncoder, RecurrentSeq2Seq
from hanok.nn.recurrent import AdditiveAlignment, Cells, GRUCell, Recurrent, Source, TokenEmbedding


@dataclass(frozen=True)
class BahdanauConfig(Sizes):
    """Sizes of an RNNsearch (the paper's letters in brackets)."""
    vocab_size: int                                      # tokens, of both languages together
    d_model: int                                         # width of the maxout that the head reads (l)
    d_embed: int                                         # width of a token's vector (m)
    d_hidden: int                                        # width of the cell, of each direction of the encoder, and of the alignment (n)
    n_layers: int                                        # of the encoder; the paper has one
    max_seq_len: int                                     # positions it is trained on
    dropout: float = 0.0                                 # probability, on embeddings, between layers and before the head


class Bahdanau(RecurrentSeq2Seq):
    """The alignment asks with the cell before a token is read; so does the readout."""

    def __init__(self, encoder: RecurrentEncoder, config: BahdanauConfig):
        super().__init__()
        n, d_memory = config.d_hidden, 2 * config.d_hidden
        self.encoder, self.embed = encoder, TokenEmbedding(config.vocab_size, config.d_embed, config.dropout)
        self.bridge, self.alignment = nn.Linear(n, n), AdditiveAlignment(n, d_memory, n)
        self.token_gates, self.context_gates, self.cell = nn.Linear(config.d_embed, 3 * n), nn.Linear(d_memory, 3 * n, bias=False), GRUCell(n)
        self.readout = nn.Linear(n + config.d_embed + d_memory, 2 * config.d_model)
        self.dropout, self.head = nn.Dropout(config.dropout), nn.Linear(config.d_model, config.vocab_size)

    def remember(self, source: Batch) -> tuple[Cells, Source]:
        """The backward direction has just read the source's first word: the decoder begins from there."""
        memory, (last,) = self.encoder(source)
        return (self.bridge(last[-1]).tanh()[None],), Source(memory, self.alignment.keys(memory), source.keep)

    def read(self, token_ids: Tensor, cells: Cells, source: Source | None, counts: Sequence[int] | None = None) -> tuple[Tensor, Cells]:
        assert source is not None
        tokens, h = self.embed(token_ids), cells[0][0]                                # (B,T,m), (B,n)
        gates, befores, contexts = self.token_gates(tokens), [], []
        for t, real in enumerate(reading(token_ids, counts)):
            context = self.alignment(h, source.keys, source.memory, source.keep)      # (B,2n)
            befores.append(h)
            contexts.append(context)
            h = chosen(real, self.cell(gates[:, t] + self.context_gates(context), h), h)
        seen = torch.cat([torch.stack(befores, 1), tokens, torch.stack(contexts, 1)], -1)
        return self.dropout(self.readout(seen).unflatten(-1, (-1, 2)).amax(-1)), (h[None],)


def reading(token_ids: Tensor, counts: Sequence[int] | None) -> Sequence[Tensor | None]:
    """For each of T columns which rows read it: (B,1), or None where all do."""
    if counts is None:
        return [None] * token_ids.size(1)
    columns = torch.arange(token_ids.size(1), device=token_ids.device)
    return (columns[:, None] < torch.tensor(counts, device=token_ids.device))[..., None].unbind(0)


def chosen(real: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """`new` in the rows that read; the others wait."""
    return new if real is None else torch.where(real, new, old)


def build(config: BahdanauConfig) -> Bahdanau:
    """An RNNsearch with fresh weights (B.1: orthogonal between the steps, narrow normals elsewhere)."""
    layers: Recurrent = recurrent("gru", config.d_embed, config.d_hidden, config.n_layers, config.dropout, bidirectional=True)
    model = Bahdanau(RecurrentEncoder(TokenEmbedding(config.vocab_size, config.d_embed, config.dropout), layers), config)
    initialise(model, std=0.01)
    nn.init.zeros_(model.alignment.v.weight)
    for square in model.cell.h_proj.weight.detach().chunk(3):
        nn.init.orthogonal_(square)
    return model


PRESETS = {
    "tiny": BahdanauConfig(4096, 128, 128, 128, 1, 256),
    "rnnsearch-50": BahdanauConfig(30_000, 500, 620, 1000, 1, 50),
}
BAHDANAU = Family("bahdanau", "RNNsearch: the decoder learns where to look in the source, word by word", BahdanauConfig, build, PRESETS,
                  "encoder-decoder", "seq2seq")
