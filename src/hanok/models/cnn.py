"""A language model of gated convolutions (Dauphin et al., arXiv:1612.08083): no recurrence, so that a text is read in parallel; no attention, so that
it sees n_layers * (kernel_size - 1) + 1 tokens and not one more.
"""
from __future__ import annotations

from dataclasses import dataclass

from hanok.models.family import Family, Sizes
from hanok.models.rnn import RecurrentLM, language_model
from hanok.nn.convolution import GatedConvolutions


@dataclass(frozen=True)
class CNNConfig(Sizes):
    """Sizes of a gated convolutional language model."""
    vocab_size: int                                      # tokens
    d_model: int                                         # width of the embedding and of each layer
    n_layers: int
    max_seq_len: int                                     # positions it is trained on; it reads on behind them
    kernel_size: int = 4                                 # tokens that a convolution sees, oneself included
    tie_embeddings: bool = False                         # the head is the embedding
    dropout: float = 0.0                                 # probability, on embeddings and on what a layer adds


def build(config: CNNConfig) -> RecurrentLM:
    """A language model with fresh weights."""
    return language_model(config, GatedConvolutions(config.d_model, config.n_layers, config.kernel_size, config.dropout))


PRESETS = {
    "tiny": CNNConfig(4096, 128, 6, 256),
    "gcnn-8": CNNConfig(267_735, 900, 8, 512),           # table 1's smallest for WikiText-103; its embedding is narrower there
}
CNN = Family("cnn", "gated convolutions over the last few tokens: parallel as a Transformer, short of sight", CNNConfig, build, PRESETS,
             "decoder", "causal")
