"""A tiny random model of every entry of the catalog, with its Hugging Face twin where one exists. Each case declares what applies to it."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

from hanok.models import catalog
from hanok.models.bahdanau import BahdanauConfig
from hanok.models.bert import BertConfig
from hanok.models.cnn import CNNConfig
from hanok.models.gpt import GPTConfig
from hanok.models.llama import LlamaConfig, RopeScaling
from hanok.models.luong import LuongConfig
from hanok.models.mistral import MistralConfig
from hanok.models.rnn import RNNConfig
from hanok.models.rnn_seq2seq import EncoderDecoderConfig
from hanok.models.speedrun import SpeedrunConfig
from hanok.models.t5 import T5Config
from hanok.models.transformer import TransformerConfig

V, D, H, L, F, C = 97, 32, 4, 3, 64, 64
"""Vocabulary, width, heads, layers, feed-forward width, context."""


@dataclass(frozen=True)
class Case:
    name: str
    family: str
    config: Any
    twin: Callable[[], nn.Module] | None = None          # a Hugging Face model of the same sizes
    still: str = field(default="\0")                     # parameters of the twin that follow from its config and must not be shaken
    forgets: bool = True                                 # its state can be truncated
    has_capacity: bool = True                            # its state has a size, and refuses more

    @property
    def generates(self) -> bool:
        return catalog.FAMILIES[self.family].kind != "encoder"

    @property
    def reads_source(self) -> bool:
        return catalog.FAMILIES[self.family].kind == "encoder-decoder"

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return jitter(catalog.FAMILIES[self.family].build(self.config)).eval()

    def build_twin(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return jitter(self.twin(), self.still).eval()


def jitter(model: nn.Module, still: str = "\0") -> nn.Module:
    """Fresh models are nearly symmetric (ones, zeros, 0.02); noise makes every weight matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if still not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name == "final_logits_bias":
                buffer.add_(torch.randn_like(buffer))
    return model


def llama_twin(rope: dict[str, Any] | None = None, tied: bool = False):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=V, hidden_size=D, num_attention_heads=H, num_key_value_heads=2, num_hidden_layers=L, intermediate_size=F, rms_norm_eps=1e-6,
        max_position_embeddings=C, tie_word_embeddings=tied, rope_parameters=rope or {"rope_type": "default", "rope_theta": 10_000.0}))


def qwen2_twin(tied: bool):
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=V, hidden_size=D, num_attention_heads=H, num_key_value_heads=2, num_hidden_layers=L, intermediate_size=F,
        max_position_embeddings=C, tie_word_embeddings=tied))


def mistral_twin(window: int | None):
    return transformers.MistralForCausalLM(transformers.MistralConfig(
        vocab_size=V, hidden_size=D, num_attention_heads=H, num_key_value_heads=2, num_hidden_layers=L, intermediate_size=F,
        max_position_embeddings=C, sliding_window=window))


def bert_twin(kind: str):
    return getattr(transformers, kind)(transformers.BertConfig(
        vocab_size=V, hidden_size=D, num_attention_heads=H, num_hidden_layers=L, intermediate_size=F, max_position_embeddings=C))


def t5_twin(feed_forward: str, tied: bool):
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=V, d_model=D, d_kv=12, d_ff=F, num_layers=L, num_decoder_layers=2, num_heads=H, feed_forward_proj=feed_forward,
        tie_word_embeddings=tied, decoder_start_token_id=0))


def marian_twin():
    return transformers.MarianMTModel(transformers.MarianConfig(
        vocab_size=V, d_model=D, encoder_layers=L, decoder_layers=2, encoder_attention_heads=H, decoder_attention_heads=H, encoder_ffn_dim=F,
        decoder_ffn_dim=F, activation_function="relu", scale_embedding=True, max_position_embeddings=C, pad_token_id=V - 1, eos_token_id=V - 2,
        forced_eos_token_id=None, decoder_start_token_id=0))


LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16}
SIZES = (V, D, L, H)
recurrent = partial(Case, forgets=False, has_capacity=False)
CASES = [
    Case("llama", "llama", LlamaConfig(*SIZES, 2, F, C, d_head=8, tie_embeddings=False), llama_twin),
    Case("llama-tied", "llama", LlamaConfig(*SIZES, 2, F, C, d_head=8), lambda: llama_twin(tied=True)),
    Case("llama-linear-rope", "llama", LlamaConfig(*SIZES, 2, F, C, d_head=8, rope_scaling=RopeScaling("linear", 4.0), tie_embeddings=False),
         lambda: llama_twin({"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0})),
    Case("llama-llama3-rope", "llama",
         LlamaConfig(*SIZES, 2, F, C, d_head=8, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 16), tie_embeddings=False),
         lambda: llama_twin(LLAMA3_ROPE)),
    Case("qwen3", "qwen3", LlamaConfig(*SIZES, 2, F, C, d_head=16, qk_norm=True), lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=V, hidden_size=D, num_attention_heads=H, num_key_value_heads=2, head_dim=16, num_hidden_layers=L, intermediate_size=F,
        max_position_embeddings=C, tie_word_embeddings=True))),
    Case("qwen2", "qwen2", LlamaConfig(*SIZES, 2, F, C, tie_embeddings=False), lambda: qwen2_twin(tied=False)),
    Case("qwen2-tied", "qwen2", LlamaConfig(*SIZES, 2, F, C), lambda: qwen2_twin(tied=True)),
    Case("mistral", "mistral", MistralConfig(*SIZES, 2, F, C, d_head=8, tie_embeddings=False, window=5), lambda: mistral_twin(5)),
    Case("mistral-unbound", "mistral", MistralConfig(*SIZES, 2, F, C, d_head=8, tie_embeddings=False), lambda: mistral_twin(None)),
    Case("gpt1", "gpt1", GPTConfig(*SIZES, 4 * D, C), lambda: transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(
        vocab_size=V, n_embd=D, n_head=H, n_layer=L, n_positions=C))),
    Case("gpt2", "gpt2", GPTConfig(*SIZES, F, C), lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=V, n_embd=D, n_head=H, n_layer=L, n_inner=F, n_positions=C))),
    Case("speedrun", "speedrun", SpeedrunConfig(*SIZES, F, C, gram_rows=(V * (V + 1), 50))),
    Case("speedrun-hashed", "speedrun", SpeedrunConfig(*SIZES, F, C, gram_rows=(60, 50, 40))),
    Case("gpt-relu", "gpt", GPTConfig(*SIZES, F, C, activation="relu")),
    Case("gpt-gelu", "gpt", GPTConfig(*SIZES, F, C, activation="gelu")),
    Case("bert", "bert", BertConfig(*SIZES, F, C, mlm_head=False, pooler=True), lambda: bert_twin("BertModel")),
    Case("bert-mlm", "bert", BertConfig(*SIZES, F, C), lambda: bert_twin("BertForMaskedLM")),
    Case("bert-pretraining", "bert", BertConfig(*SIZES, F, C, pooler=True, next_sentence_head=True), lambda: bert_twin("BertForPreTraining")),
    Case("t5-1.0", "t5", T5Config(V, D, L, 2, H, 12, F), lambda: t5_twin("relu", True)),
    Case("t5-1.1", "t5", T5Config(V, D, L, 2, H, 12, F, gated=True, activation="gelu_tanh", scale_head=False),
         lambda: t5_twin("gated-gelu", False)),
    Case("transformer", "transformer", TransformerConfig(V, D, L, 2, H, F, C), marian_twin, still="embed_positions"),
    recurrent("rnn", "rnn", RNNConfig(V, D, 2, C)),
    recurrent("rnn-tied", "rnn", RNNConfig(V, D, 1, C, tie_embeddings=True)),
    recurrent("lstm", "lstm", RNNConfig(V, D, 2, C, dropout=0.1)),
    recurrent("gru", "gru", RNNConfig(V, D, 2, C)),
    recurrent("cnn", "cnn", CNNConfig(V, D, L, C, dropout=0.1)),
    recurrent("cnn-tied", "cnn", CNNConfig(V, D, 2, C, kernel_size=2, tie_embeddings=True)),
    recurrent("rnn-encoder-decoder", "rnn_encoder_decoder", EncoderDecoderConfig(V, D, 2, C)),
    recurrent("gru-encoder-decoder", "rnn_encoder_decoder", EncoderDecoderConfig(V, D, 1, C, "gru", tie_embeddings=True)),
    recurrent("bahdanau", "bahdanau", BahdanauConfig(V, D, 24, 40, 2, C)),
    *(recurrent(f"luong-{score}", "luong", LuongConfig(V, D, 2, C, score)) for score in ("dot", "general", "concat")),
]
BY_NAME = {case.name: case for case in CASES}
