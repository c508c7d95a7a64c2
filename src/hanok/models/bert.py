"""BERT (arXiv:1810.04805): a bidirectional encoder with segments, norms behind each sublayer and learned positions.

With or without the head that fills masked positions, the pooler over [CLS], and the next-sentence head; MiniLM and E5 are BERTs without heads.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import nn

from hanok.models.assembly import EncoderLM, initialise
from hanok.models.family import REQUIRED, Family, HFTable, Sizes, Weight, dense, same
from hanok.nn.attention import SelfAttention
from hanok.nn.layers import MLP, PostNorm, SegmentEmbedding, activation
from hanok.nn.position import Learned, Position
from hanok.nn.stack import Block, Stack


@dataclass(frozen=True)
class BertConfig(Sizes):
    """Sizes of a BERT."""
    vocab_size: int                                      # tokens
    d_model: int                                         # width of the residual stream
    n_layers: int
    n_heads: int
    d_ff: int                                            # width of the feed-forward net
    max_seq_len: int                                     # positions that exist
    n_segments: int = 2                                  # sentences that are told apart
    activation: Literal["relu", "gelu", "gelu_tanh"] = "gelu"
    norm_eps: float = 1e-12
    mlm_head: bool = True                                # says what stands at a masked position
    pooler: bool = False                                 # tanh(linear([CLS]))
    next_sentence_head: bool = False                     # linear(pooled) -> 2
    dropout: float = 0.1                                 # probability, on embeddings and on what a sublayer adds
    attention_dropout: float = 0.1                       # probability, on attention weights


def build(config: BertConfig) -> EncoderLM:
    """A BERT with fresh weights; without an MLM head its logits are its hidden vectors."""
    norm = partial(nn.LayerNorm, config.d_model, eps=config.norm_eps)
    embed = SegmentEmbedding(nn.Embedding(config.vocab_size, config.d_model), Learned(config.max_seq_len, config.d_model),
                             n_segments=config.n_segments, norm=norm(), dropout=config.dropout)
    blocks = [Block(lambda: PostNorm(norm(), config.dropout), SelfAttention(config.d_model, config.n_heads, dropout=config.attention_dropout),
                    MLP(config.d_model, config.d_ff, activation(config.activation))) for _ in range(config.n_layers)]
    head: nn.Module = nn.Identity()
    if config.mlm_head:
        decoder = nn.Linear(config.d_model, config.vocab_size)
        decoder.weight = embed.token.weight
        head = nn.Sequential(nn.Linear(config.d_model, config.d_model), activation(config.activation), norm(), decoder)
    extras: dict[str, nn.Module] = {}
    if config.pooler:
        extras["pooler"] = nn.Sequential(nn.Linear(config.d_model, config.d_model), nn.Tanh())
    if config.next_sentence_head:
        extras["next_sentence"] = nn.Linear(config.d_model, 2)
    model = EncoderLM(embed, Stack(blocks, Position()), head, extras)
    initialise(model)
    return model


# ---- Hugging Face ------------------------------------------------------------------------------------------
def bert_weights(config: BertConfig, prefix: str) -> list[Weight]:
    weights = same((f"{prefix}embeddings.word_embeddings.weight", "embed.token.weight"),
                   (f"{prefix}embeddings.position_embeddings.weight", "embed.position.table.weight"),
                   (f"{prefix}embeddings.token_type_embeddings.weight", "embed.segment.weight"))
    weights += dense(f"{prefix}embeddings.LayerNorm", "embed.norm")
    for i in range(config.n_layers):
        theirs, ours = f"{prefix}encoder.layer.{i}.", f"stack.blocks.{i}."
        for part in ("query", "key", "value"):
            weights += dense(f"{theirs}attention.self.{part}", f"{ours}attention.{part[0]}_proj")
        weights += dense(f"{theirs}attention.output.dense", f"{ours}attention.out_proj")
        weights += dense(f"{theirs}attention.output.LayerNorm", f"{ours}residual.0.norm")
        weights += dense(f"{theirs}intermediate.dense", f"{ours}ffn.up") + dense(f"{theirs}output.dense", f"{ours}ffn.down")
        weights += dense(f"{theirs}output.LayerNorm", f"{ours}residual.1.norm")
    if config.pooler:
        weights += dense(f"{prefix}pooler.dense", "pooler.0")
    if config.mlm_head:
        weights += dense("cls.predictions.transform.dense", "head.0") + dense("cls.predictions.transform.LayerNorm", "head.2")
        weights += same(("cls.predictions.bias", "head.3.bias"))
    if config.next_sentence_head:
        weights += dense("cls.seq_relationship", "next_sentence")
    return weights


def parts(names: set[str]) -> dict[str, Any]:
    """Which heads a file holds; the class that its config names is often another."""
    return {"mlm_head": any(n.startswith("cls.predictions.transform") for n in names), "pooler": any("pooler.dense" in n for n in names),
            "next_sentence_head": any("seq_relationship" in n for n in names)}


def repeats(config: BertConfig) -> dict[str, str]:
    return {"cls.predictions.decoder.weight": "embed.token.weight", "cls.predictions.decoder.bias": "head.3.bias"} if config.mlm_head else {}


SPELLED = {"gelu": "gelu", "relu": "relu", "gelu_tanh": "gelu_new"}


def read(data: dict[str, Any]) -> dict[str, Any]:
    spelled = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
    return {**data, "hidden_act": spelled.get(data.get("hidden_act", "gelu"), data.get("hidden_act", "gelu"))}


def table(architecture: str, prefix: str, requires: dict[str, Any]) -> HFTable:
    settings = {
        "vocab_size": ("vocab_size", REQUIRED), "hidden_size": ("d_model", REQUIRED), "num_hidden_layers": ("n_layers", REQUIRED),
        "num_attention_heads": ("n_heads", REQUIRED), "intermediate_size": ("d_ff", REQUIRED), "max_position_embeddings": ("max_seq_len", 512),
        "type_vocab_size": ("n_segments", 2), "hidden_act": ("activation", "gelu"), "layer_norm_eps": ("norm_eps", 1e-12),
        "hidden_dropout_prob": ("dropout", 0.1), "attention_probs_dropout_prob": ("attention_dropout", 0.1),
    }
    return HFTable(
        "bert", architecture, settings, partial(bert_weights, prefix=prefix),
        fixed={"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False, "tie_word_embeddings": True},
        neutral=frozenset({"initializer_range", "classifier_dropout", "gradient_checkpointing", "directionality", "pooler_fc_size",
                           "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type", "model_max_length"}),
        requires=requires, repeats=repeats, buffers=(r".*position_ids",), optional_prefix=prefix,
        renamed=((r"^bert\.", prefix), (r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
        read=read, write=lambda config: {"hidden_act": SPELLED[config.activation]}, from_weights=parts)


PRESETS = {
    "tiny": BertConfig(4096, 128, 4, 4, 512, 256, dropout=0.0, attention_dropout=0.0),
    "minilm-l6": BertConfig(30522, 384, 6, 12, 1536, 512, mlm_head=False, pooler=True),
    "bert-base": BertConfig(30522, 768, 12, 12, 3072, 512, pooler=True, next_sentence_head=True),
    "bert-large": BertConfig(30522, 1024, 24, 16, 4096, 512, pooler=True, next_sentence_head=True),
}
BERT = Family(
    "bert", "BERT: a bidirectional encoder that fills in masked words", BertConfig, build, PRESETS, "encoder", "masked",
    hf=(table("BertModel", "", {"mlm_head": False, "pooler": True, "next_sentence_head": False}),
        table("BertForMaskedLM", "bert.", {"mlm_head": True, "pooler": False, "next_sentence_head": False}),
        table("BertForPreTraining", "bert.", {"mlm_head": True, "pooler": True, "next_sentence_head": True})))
