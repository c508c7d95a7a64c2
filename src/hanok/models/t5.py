"""T5 1.0 and 1.1 (arXiv:1910.10683; 1.1: gated GELU, arXiv:2002.05202, and an untied head): an encoder-decoder whose order is a learned score bias.

RMSNorm before each sublayer, no biases, unscaled attention scores; 1.0 ties the head to the embedding and scales before it.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import nn

from hanok.models.assembly import Encoder, Seq2Seq
from hanok.models.family import REQUIRED, Family, HFTable, Sizes, Weight, same
from hanok.nn.attention import CrossAttention, SelfAttention
from hanok.nn.layers import MLP, Embedding, GatedMLP, PreNorm, ScaledHead, activation
from hanok.nn.position import Position, RelativeBias
from hanok.nn.stack import Block, Stack


@dataclass(frozen=True)
class T5Config(Sizes):
    """Sizes of a T5."""
    vocab_size: int                                      # tokens
    d_model: int                                         # width of the residual stream
    n_layers: int                                        # of the encoder
    n_decoder_layers: int
    n_heads: int
    d_head: int                                          # numbers a head; heads need not fill d_model
    d_ff: int                                            # width of the feed-forward net
    max_seq_len: int = 512                               # positions it is trained for; its bias allows more
    n_buckets: int = 32                                  # distances that are told apart
    max_distance: int = 128                              # tokens; all beyond share a bucket
    gated: bool = False                                  # 1.1: gate and up
    activation: Literal["relu", "gelu", "gelu_tanh", "silu"] = "relu"
    norm_eps: float = 1e-6
    tie_embeddings: bool = True                          # the head is the embedding (1.0)
    scale_head: bool = True                              # its input is scaled by d_model^-1/2 (1.0)
    dropout: float = 0.1                                 # probability, on embeddings and on what a sublayer adds


def build(config: T5Config) -> Seq2Seq:
    """A T5 with fresh weights, drawn as Mesh TensorFlow draws them (unscaled scores need small queries)."""
    sizes: dict[str, Any] = {"d_head": config.d_head, "qkv_bias": False, "out_bias": False, "scale": 1.0}
    norm = partial(nn.RMSNorm, config.d_model, eps=config.norm_eps)
    token = nn.Embedding(config.vocab_size, config.d_model)

    def block(*cross: CrossAttention) -> Block:
        act = activation(config.activation)
        ffn = GatedMLP(config.d_model, config.d_ff, act) if config.gated else MLP(config.d_model, config.d_ff, act, bias=False)
        return Block(lambda: PreNorm(norm(), config.dropout), SelfAttention(config.d_model, config.n_heads, **sizes), ffn, *cross)

    def embed() -> Embedding:
        return Embedding(token, Position(), dropout=config.dropout)

    def bias(bidirectional: bool) -> RelativeBias:
        return RelativeBias(config.n_heads, config.n_buckets, config.max_distance, bidirectional)

    encoder = Encoder(embed(), Stack([block() for _ in range(config.n_layers)], bias(True), norm()))
    decoder = Stack([block(CrossAttention(config.d_model, config.n_heads, **sizes)) for _ in range(config.n_decoder_layers)], bias(False), norm())
    head = nn.Linear(config.d_model, config.vocab_size, bias=False)
    if config.tie_embeddings:
        head.weight = token.weight
    model = Seq2Seq(encoder, embed(), decoder, ScaledHead(head, config.d_model ** -0.5 if config.scale_head else 1.0))
    initialise(model, config)
    return model


def initialise(model: Seq2Seq, config: T5Config) -> None:
    d = config.d_model
    for part in model.modules():
        if isinstance(part, SelfAttention | CrossAttention):
            draw(part.q_proj, (d * config.d_head) ** -0.5)
            draw(part.k_proj, d ** -0.5)
            draw(part.v_proj, d ** -0.5)
            draw(part.out_proj, (config.n_heads * config.d_head) ** -0.5)
        elif isinstance(part, MLP | GatedMLP):
            for entrance in (part.up, *([part.gate] if isinstance(part, GatedMLP) else [])):
                draw(entrance, d ** -0.5)
            draw(part.down, config.d_ff ** -0.5)
        elif isinstance(part, RelativeBias):
            draw(part.table, d ** -0.5)
        elif isinstance(part, ScaledHead) and not config.tie_embeddings:
            draw(part.linear, d ** -0.5)
    draw(model.embed.token, 1.0)


def draw(module: nn.Linear | nn.Embedding, std: float) -> None:
    nn.init.normal_(module.weight, std=std)


# ---- Hugging Face ------------------------------------------------------------------------------------------
def t5_weights(config: T5Config) -> list[Weight]:
    weights = same(("shared.weight", "embed.token.weight"))
    if not config.tie_embeddings:
        weights += same(("lm_head.weight", "head.linear.weight"))
    for side, stack, n_layers, last in (("encoder", "encoder.stack", config.n_layers, 1), ("decoder", "stack", config.n_decoder_layers, 2)):
        weights += same((f"{side}.final_layer_norm.weight", f"{stack}.final_norm.weight"),
                        (f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", f"{stack}.position.table.weight"))
        for i in range(n_layers):
            theirs, ours = f"{side}.block.{i}.layer.", f"{stack}.blocks.{i}."
            looks = [("0.SelfAttention", "attention"), ("1.EncDecAttention", "cross")][:last]
            for their_part, our_part in looks:
                weights += same(*((f"{theirs}{their_part}.{t}.weight", f"{ours}{our_part}.{o}_proj.weight")
                                  for t, o in zip("qkvo", ("q", "k", "v", "out"))))
            weights += same(*((f"{theirs}{j}.layer_norm.weight", f"{ours}residual.{j}.norm.weight") for j in range(last + 1)))
            feed = [("wi_0", "gate"), ("wi_1", "up")] if config.gated else [("wi", "up")]
            weights += same(*((f"{theirs}{last}.DenseReluDense.{t}.weight", f"{ours}ffn.{o}.weight") for t, o in [*feed, ("wo", "down")]))
    return weights


ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu": "gelu_tanh"}          # T5's "gated-gelu" means the approximation
SPELLED = {"gelu_tanh": "gelu", "relu": "relu", "silu": "silu"}


def read(data: dict[str, Any]) -> dict[str, Any]:
    data = dict(data)
    feed = data.pop("feed_forward_proj", "relu")
    data.pop("dense_act_fn", None), data.pop("is_gated_act", None)
    name = feed.removeprefix("gated-")
    # Classes before 5.0 scale where they tie; since then all tie unless the file holds a head, and a setting of its own says whether they scale.
    scaled = data.pop("scale_decoder_outputs", None)
    scaled = data.get("tie_word_embeddings", True) if scaled is None else scaled
    if not scaled:
        data.pop("tie_word_embeddings", None)
    return {**data, "scale_decoder_outputs": scaled, "gated": feed != name, "activation": ACTIVATIONS.get(name, name) if feed != name else name,
            "num_decoder_layers": data.get("num_decoder_layers") or data.get("num_layers")}


def write(config: T5Config) -> dict[str, Any]:
    feed = f"gated-{SPELLED[config.activation]}" if config.gated else config.activation
    return {"feed_forward_proj": feed, "is_encoder_decoder": True, "tie_word_embeddings": config.scale_head}


TABLE = HFTable(
    "t5", "T5ForConditionalGeneration",
    {"vocab_size": ("vocab_size", REQUIRED), "d_model": ("d_model", REQUIRED), "num_layers": ("n_layers", REQUIRED),
     "num_decoder_layers": ("n_decoder_layers", REQUIRED), "num_heads": ("n_heads", REQUIRED), "d_kv": ("d_head", 64), "d_ff": ("d_ff", REQUIRED),
     "n_positions": ("max_seq_len", 512), "relative_attention_num_buckets": ("n_buckets", 32),
     "relative_attention_max_distance": ("max_distance", 128), "gated": ("gated", False), "activation": ("activation", "relu"),
     "layer_norm_epsilon": ("norm_eps", 1e-6), "tie_word_embeddings": ("tie_embeddings", True), "scale_decoder_outputs": ("scale_head", True),
     "dropout_rate": ("dropout", 0.1)},
    t5_weights, fixed={"is_decoder": False},
    neutral=frozenset({"initializer_factor", "classifier_dropout", "output_past", "task_specific_params", "is_encoder_decoder"}),
    repeats=lambda config: dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
                                          *(["lm_head.weight"] if config.tie_embeddings else [])), "embed.token.weight"),
    read=read, write=write, from_weights=lambda names: {"tie_embeddings": "lm_head.weight" not in names})

PRESETS = {
    "tiny": T5Config(4096, 128, 3, 3, 4, 32, 512, 256, dropout=0.0),
    "t5-small": T5Config(32128, 512, 6, 6, 8, 64, 2048),
    "t5-base": T5Config(32128, 768, 12, 12, 12, 64, 3072),
    "t5-v1_1-small": T5Config(32128, 512, 8, 8, 6, 64, 1024, gated=True, activation="gelu_tanh", tie_embeddings=False, scale_head=False),
    "t5-v1_1-base": T5Config(32128, 768, 12, 12, 12, 64, 2048, gated=True, activation="gelu_tanh", tie_embeddings=False, scale_head=False),
}
T5 = Family("t5", "T5: an encoder-decoder with a learned distance bias", T5Config, build, PRESETS, "encoder-decoder", "seq2seq", hf=(TABLE,))
