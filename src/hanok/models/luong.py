"""Luong et al. (arXiv:1508.04025): stacked LSTMs; the decoder's top looks at the whole source after each word, by one of three scores.

What it found and what it is become the attentional vector tanh(W [context; h]) (eq. 5), which the head reads and which is fed into the next step
(section 3.3). B batch, T positions, L layers, D d_model.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hanok.contracts import Batch
from hanok.models.assembly import tie
from hanok.models.bahdanau import chosen, reading
from hanok.models.family import Family, Sizes
from hanok.models.rnn import recurrent
from hanok.models.rnn_seq2seq import RecurrentEncoder, RecurrentSeq2Seq, uniform
from hanok.nn.recurrent import Alignment, Cells, ConcatAlignment, DotAlignment, GeneralAlignment, LSTMCell, Source, TokenEmbedding


@dataclass(frozen=True)
class LuongConfig(Sizes):
    """Sizes of a Luong."""
    vocab_size: int                                      # tokens, of both languages together
    d_model: int                                         # width of embeddings, layers and the attentional vector
    n_layers: int                                        # of the encoder, and of the decoder
    max_seq_len: int                                     # positions it is trained on
    score: Literal["dot", "general", "concat"] = "general"
    tie_embeddings: bool = False                         # the head is the decoder's embedding
    dropout: float = 0.0                                 # probability, on what enters a layer and on the attentional vector


SCORES: Mapping[str, Callable[[int], Alignment]] = {
    "dot": lambda d: DotAlignment(), "general": lambda d: GeneralAlignment(d, d), "concat": lambda d: ConcatAlignment(d, d, d)}


class Luong(RecurrentSeq2Seq):
    """The alignment asks with the top cell after a token was read."""

    def __init__(self, encoder: RecurrentEncoder, embed: TokenEmbedding, alignment: Alignment, head: nn.Module, n_layers: int, dropout: float = 0.0):
        super().__init__()
        d = embed.token.embedding_dim
        self.encoder, self.embed, self.alignment, self.head, self.dropout = encoder, embed, alignment, head, nn.Dropout(dropout)
        self.token_gates = nn.Linear(d, 4 * d)
        self.gates = nn.ModuleList(nn.Linear(d, 4 * d, bias=i > 0) for i in range(n_layers))    # of what is fed back, then of the layer below
        self.cells = nn.ModuleList(LSTMCell(d) for _ in range(n_layers))
        self.combine = nn.Linear(2 * d, d, bias=False)

    def remember(self, source: Batch) -> tuple[Cells, Source]:
        """Each layer begins where the encoder's ended; nothing has been fed yet."""
        memory, (h, c) = self.encoder(source)
        return (h, c, torch.zeros_like(h[:1])), Source(memory, self.alignment.keys(memory), source.keep)

    def read(self, token_ids: Tensor, cells: Cells, source: Source | None, counts: Sequence[int] | None = None) -> tuple[Tensor, Cells]:
        assert source is not None
        (*hs,), (*cs,), feed = cells[0].unbind(0), cells[1].unbind(0), cells[2][0]    # L x (B,D), L x (B,D), (B,D)
        first, found = self.token_gates(self.embed(token_ids)), []
        for t, real in enumerate(reading(token_ids, counts)):
            h = feed
            for i, (enter, cell) in enumerate(zip(self.gates, self.cells)):
                gates = enter(h) + first[:, t] if i == 0 else enter(self.dropout(h))
                h, c = cell(gates, hs[i], cs[i])
                hs[i], cs[i] = chosen(real, h, hs[i]), chosen(real, c, cs[i])
            context = self.alignment(h, source.keys, source.memory, source.keep)
            found.append(self.combine(torch.cat([context, h], -1)).tanh())
            feed = chosen(real, found[-1], feed)
        return self.dropout(torch.stack(found, 1)), (torch.stack(hs), torch.stack(cs), feed[None])


def build(config: LuongConfig) -> Luong:
    """A Luong with fresh weights (section 4.1: uniform, up to 0.1)."""
    def embed() -> TokenEmbedding:
        return TokenEmbedding(config.vocab_size, config.d_model, config.dropout)

    encoder = RecurrentEncoder(embed(), recurrent("lstm", config.d_model, config.d_model, config.n_layers, config.dropout))
    target, head = embed(), nn.Linear(config.d_model, config.vocab_size)
    model = Luong(encoder, target, SCORES[config.score](config.d_model), tie(head, target) if config.tie_embeddings else head, config.n_layers,
                  config.dropout)
    uniform(model, 0.1, config.d_model)
    return model


PRESETS = {
    "tiny": LuongConfig(4096, 128, 2, 256),
    "luong-2015": LuongConfig(50_000, 1000, 4, 50, dropout=0.2),
}
LUONG = Family("luong", "stacked LSTMs with global attention and input feeding", LuongConfig, build, PRESETS, "encoder-decoder", "seq2seq")
