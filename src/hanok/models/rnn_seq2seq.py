"""The encoder-decoder of Sutskever et al. (arXiv:1409.3215): one recurrent net reads, its last state is all that the writing one gets to know.

That state is the bottleneck which alignment (bahdanau.py, luong.py) opens. B batch, T positions, S source positions, D d_model.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from hanok.contracts import Batch
from hanok.errors import RequestError
from hanok.models.assembly import tie
from hanok.models.family import Family, Sizes
from hanok.models.rnn import RecurrentModel, recurrent
from hanok.nn.recurrent import Cells, Recurrent, Source, TokenEmbedding


@dataclass(frozen=True)
class EncoderDecoderConfig(Sizes):
    """Sizes of a recurrent encoder-decoder."""
    vocab_size: int                                      # tokens, of both languages together
    d_model: int                                         # width of embeddings and layers
    n_layers: int                                        # of the encoder, and of the decoder
    max_seq_len: int                                     # positions it is trained on
    cell: Literal["rnn", "lstm", "gru"] = "lstm"
    tie_embeddings: bool = False                         # the head is the decoder's embedding
    dropout: float = 0.0                                 # probability, on what enters and leaves a layer


class RecurrentEncoder(nn.Module):
    """Reads a source; a backward direction begins at each row's last real token."""

    def __init__(self, embed: TokenEmbedding, layers: Recurrent):
        super().__init__()
        self.embed, self.layers = embed, layers

    def forward(self, source: Batch) -> tuple[Tensor, Cells]:
        """The last layer at each position, (B,S,*), and the cells behind each row's last real token."""
        counts = None if source.keep is None else source.keep.sum(1).tolist()
        return self.layers.read(self.embed(source.token_ids), None, counts)

    def hidden(self, batch: Batch) -> Tensor:                                         # -> (B,S,*)
        return self(batch)[0]


class RecurrentSeq2Seq(RecurrentModel):
    """What reads a source before it writes; `remember` says what is kept of it."""
    reads_source = True
    encoder: RecurrentEncoder

    def hidden(self, batch: Batch) -> Tensor:                                         # -> (B,T,D)
        if batch.document_ids is not None:
            raise RequestError("answers to several sources are packed into one row; give each answer a row of its own", "unsupported")
        return super().hidden(batch)

    def begin(self, source: Batch | None, batch_size: int) -> tuple[Cells, Source | None]:
        if source is None:
            raise RequestError("an encoder-decoder answers a source, and there is none; give source_ids")
        return self.remember(source)

    def remember(self, source: Batch) -> tuple[Cells, Source | None]:
        raise NotImplementedError


class EncoderDecoder(RecurrentSeq2Seq):
    """The encoder's last state starts the decoder."""

    def __init__(self, encoder: RecurrentEncoder, embed: TokenEmbedding, layers: Recurrent, head: nn.Module, dropout: float = 0.0):
        super().__init__()
        self.encoder, self.embed, self.layers, self.head, self.dropout = encoder, embed, layers, head, nn.Dropout(dropout)

    def remember(self, source):
        return self.encoder(source)[1], None

    def read(self, token_ids: Tensor, cells: Cells, source: Source | None, counts: Sequence[int] | None = None) -> tuple[Tensor, Cells]:
        out, cells = self.layers.read(self.embed(token_ids), cells, counts)
        return self.dropout(out), cells


def uniform(model: nn.Module, bound: float, d_model: int) -> None:
    """All weights from -bound to bound where d_model is 1000, as it is in the papers; narrower layers get as much from larger ones."""
    bound *= (1000 / d_model) ** 0.5
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -bound, bound)


def build(config: EncoderDecoderConfig) -> EncoderDecoder:
    """An encoder-decoder with fresh weights (section 3.4: uniform, up to 0.08)."""
    def embed() -> TokenEmbedding:
        return TokenEmbedding(config.vocab_size, config.d_model, config.dropout)

    def layers() -> Recurrent:
        return recurrent(config.cell, config.d_model, config.d_model, config.n_layers, config.dropout)

    head, target = nn.Linear(config.d_model, config.vocab_size), embed()
    encoder = RecurrentEncoder(embed(), layers())
    model = EncoderDecoder(encoder, target, layers(), tie(head, target) if config.tie_embeddings else head, config.dropout)
    uniform(model, 0.08, config.d_model)
    return model


PRESETS = {
    "tiny": EncoderDecoderConfig(4096, 128, 2, 256),
    "sutskever-2014": EncoderDecoderConfig(80_000, 1000, 4, 100),      # the target's words; its source had 160,000
}
RNN_ENCODER_DECODER = Family(
    "rnn_encoder_decoder", "Sutskever's encoder-decoder: an LSTM's last state is all that the other learns of a source", EncoderDecoderConfig, build,
    PRESETS, "encoder-decoder", "seq2seq")
