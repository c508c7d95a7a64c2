"""The Transformer of 2017 ("Attention Is All You Need", arXiv:1706.03762): encoder and decoder, norms behind each
sublayer, sinusoidal positions, ReLU.

Sines stand before cosines, as Marian (and so Hugging Face's class) lays them out. The three embeddings are one matrix (section 3.4).
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import nn

from hanok.models.assembly import Encoder, Seq2Seq
from hanok.models.family import REQUIRED, ROW, Family, HFTable, Sizes, Weight, dense, same
from hanok.nn.attention import CrossAttention, SelfAttention
from hanok.nn.layers import MLP, Embedding, PostNorm, activation
from hanok.nn.position import Position, Sinusoidal
from hanok.nn.stack import Block, Stack


@dataclass(frozen=True)
class TransformerConfig(Sizes):
    """Sizes of a 2017 Transformer (table 3 of the paper)."""
    vocab_size: int                                      # tokens, of both languages together
    d_model: int                                         # width of the residual stream
    n_layers: int                                        # of the encoder
    n_decoder_layers: int
    n_heads: int                                         # in both
    d_ff: int                                            # width of the feed-forward nets
    max_seq_len: int = 512                               # positions it is trained for; its sines allow more
    activation: Literal["relu", "gelu", "silu"] = "relu"
    norm_eps: float = 1e-5
    scale_embedding: bool = True                         # by sqrt(d_model) (section 3.4)
    dropout: float = 0.1                                 # probability, on embeddings and on what a sublayer adds (section 5.4)
    attention_dropout: float = 0.0                       # probability, on attention weights


def build(config: TransformerConfig) -> Seq2Seq:
    """A Transformer with fresh weights (Glorot; the embedding with d_model^-1/2, so that scaling makes it 1)."""
    norm = partial(nn.LayerNorm, config.d_model, eps=config.norm_eps)
    sizes: dict[str, Any] = {"dropout": config.attention_dropout}
    token = nn.Embedding(config.vocab_size, config.d_model)

    def block(*cross: CrossAttention) -> Block:
        return Block(lambda: PostNorm(norm(), config.dropout), SelfAttention(config.d_model, config.n_heads, **sizes),
                     MLP(config.d_model, config.d_ff, activation(config.activation)), *cross)

    def embed() -> Embedding:
        scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        return Embedding(token, Sinusoidal(config.d_model), scale=scale, dropout=config.dropout)

    encoder = Encoder(embed(), Stack([block() for _ in range(config.n_layers)], Position()))
    decoder = Stack([block(CrossAttention(config.d_model, config.n_heads, **sizes)) for _ in range(config.n_decoder_layers)], Position())
    head = nn.Linear(config.d_model, config.vocab_size)
    head.weight = token.weight
    model = Seq2Seq(encoder, embed(), decoder, head)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.normal_(token.weight, std=config.d_model ** -0.5)
    return model


# ---- Hugging Face's Marian -------------------------------------------------------------------------------------
def marian_weights(config: TransformerConfig) -> list[Weight]:
    weights = [*same(("model.shared.weight", "embed.token.weight")), Weight("final_logits_bias", ("head.bias",), ROW)]
    for side, stack, n_layers, last in (("encoder", "encoder.stack", config.n_layers, 1), ("decoder", "stack", config.n_decoder_layers, 2)):
        for i in range(n_layers):
            theirs, ours = f"model.{side}.layers.{i}.", f"{stack}.blocks.{i}."
            looks = [("self_attn", "attention"), ("encoder_attn", "cross")][:last]
            for j, (their_part, our_part) in enumerate(looks):
                for p in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    weights += dense(f"{theirs}{their_part}.{p}", f"{ours}{our_part}.{p}")
                weights += dense(f"{theirs}{their_part}_layer_norm", f"{ours}residual.{j}.norm")
            weights += dense(f"{theirs}final_layer_norm", f"{ours}residual.{last}.norm")
            weights += dense(f"{theirs}fc1", f"{ours}ffn.up") + dense(f"{theirs}fc2", f"{ours}ffn.down")
    return weights


SPELLED = {"relu": "relu", "gelu": "gelu", "silu": "swish"}


def read(data: dict[str, Any]) -> dict[str, Any]:
    data = dict(data)
    for what in ("attention_heads", "ffn_dim"):
        sides = {data.get(f"{side}_{what}", data.get(f"encoder_{what}")) for side in ("encoder", "decoder")}
        if len(sides) == 1:
            data.pop(f"decoder_{what}", None)
    if data.get("decoder_vocab_size") in (None, data.get("vocab_size")):
        data.pop("decoder_vocab_size", None)
    name = data.get("activation_function", "gelu")
    return {**data, "activation_function": {"swish": "silu"}.get(name, name)}


def write(config: TransformerConfig) -> dict[str, Any]:
    return {"decoder_attention_heads": config.n_heads, "decoder_ffn_dim": config.d_ff, "activation_function": SPELLED[config.activation],
            "decoder_vocab_size": config.vocab_size, "is_encoder_decoder": True, "num_hidden_layers": config.n_layers}


TABLE = HFTable(
    "marian", "MarianMTModel",
    {"vocab_size": ("vocab_size", REQUIRED), "d_model": ("d_model", REQUIRED), "encoder_layers": ("n_layers", REQUIRED),
     "decoder_layers": ("n_decoder_layers", REQUIRED), "encoder_attention_heads": ("n_heads", REQUIRED), "encoder_ffn_dim": ("d_ff", REQUIRED),
     "max_position_embeddings": ("max_seq_len", 1024), "activation_function": ("activation", "gelu"),
     "scale_embedding": ("scale_embedding", False), "dropout": ("dropout", 0.1), "attention_dropout": ("attention_dropout", 0.0)},
    marian_weights,
    fixed={"share_encoder_decoder_embeddings": True, "tie_word_embeddings": True, "static_position_embeddings": True, "normalize_before": False,
           "normalize_embedding": False, "add_final_layer_norm": False, "add_bias_logits": False, "extra_pos_embeddings": 0},
    neutral=frozenset({"init_std", "encoder_layerdrop", "decoder_layerdrop", "activation_dropout", "num_hidden_layers", "classifier_dropout",
                       "is_decoder", "classif_dropout", "gradient_checkpointing", "is_encoder_decoder"}),
    requires={"norm_eps": 1e-5},
    repeats=lambda config: dict.fromkeys(
        ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"), "embed.token.weight"),
    buffers=(r"model\.(en|de)coder\.embed_positions\.weight",), read=read, write=write)

PRESETS = {
    "tiny": TransformerConfig(4096, 128, 3, 3, 4, 512, 256, dropout=0.0),
    "base": TransformerConfig(37000, 512, 6, 6, 8, 2048),
    "big": TransformerConfig(37000, 1024, 6, 6, 16, 4096, dropout=0.3),
}
TRANSFORMER = Family("transformer", "the Transformer of 2017: an encoder-decoder for translation", TransformerConfig, build, PRESETS,
                     "encoder-decoder", "seq2seq", hf=(TABLE,))
