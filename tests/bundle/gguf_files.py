"""Models as GGUF files, written as llama.cpp's converter writes them: names, permuted q and k, rope factors.

Sources: llama.cpp's convert_hf_to_gguf.py (permute, rope_freqs) and the GGUF specification.
"""
from __future__ import annotations

import json
import math
from pathlib import Path

import gguf
import numpy as np
import torch

from hanok.bundle.weights import parameters
from hanok.models.gpt import GPTConfig
from hanok.models.llama import LlamaConfig
from hanok.text.tokenizer import Tokenizer

NAMES = {"residual.0.norm": "attn_norm", "residual.1.norm": "ffn_norm", "attention.q_proj": "attn_q", "attention.k_proj": "attn_k",
         "attention.v_proj": "attn_v", "attention.out_proj": "attn_output", "attention.q_norm": "attn_q_norm", "attention.k_norm": "attn_k_norm",
         "ffn.gate": "ffn_gate", "ffn.up": "ffn_up", "ffn.down": "ffn_down"}
TOP = {"embed.token": "token_embd", "stack.final_norm": "output_norm", "head": "output", "embed.position.table": "position_embd"}


def theirs(ours: str) -> str:
    """llama.cpp's name of one of our tensors."""
    part, _, kind = ours.rpartition(".")
    if part in TOP:
        return f"{TOP[part]}.{kind}"
    _, _, layer, part = part.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def permute(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """As LlamaModel.permute of the converter does it."""
    return weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def rope_factors(config: LlamaConfig) -> np.ndarray:
    """As the converter works out rope_freqs.weight for Llama 3."""
    scaling, factors = config.rope_scaling, []
    for i in range(0, config.d_head, 2):
        wave = 2 * math.pi * config.rope_theta ** (i / config.d_head)
        low, high, old = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_seq_len
        if wave < old / high:
            factors.append(1.0)
        elif wave > old / low:
            factors.append(scaling.factor)
        else:
            smooth = (old / wave - low) / (high - low)
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(factors, np.float32)


def metadata_of(config: LlamaConfig, arch: str) -> dict[str, object]:
    """The architecture's keys as the converter writes them."""
    told = {"block_count": config.n_layers, "context_length": config.max_seq_len, "embedding_length": config.d_model, "vocab_size": config.vocab_size,
            "feed_forward_length": config.d_ff, "attention.head_count": config.n_heads, "attention.head_count_kv": config.n_kv_heads,
            "attention.layer_norm_rms_epsilon": config.norm_eps, "rope.freq_base": config.rope_theta}
    if config.d_head:
        told |= {"attention.key_length": config.d_head, "attention.value_length": config.d_head, "rope.dimension_count": config.d_head}
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        told |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        told["rope.scaling.original_context_length"] = scaling.original_max_seq_len
    return {f"{arch}.{name}": value for name, value in told.items()}


def gpt2_metadata_of(config: GPTConfig) -> dict[str, object]:
    """As GPT2Model of the converter writes them."""
    told = {"block_count": config.n_layers, "context_length": config.max_seq_len, "embedding_length": config.d_model,
            "feed_forward_length": config.d_ff, "attention.head_count": config.n_heads, "attention.layer_norm_epsilon": config.norm_eps}
    return {f"gpt2.{name}": value for name, value in told.items()}


def gpt2_tensors_of(net: torch.nn.Module, config: GPTConfig) -> dict[str, np.ndarray]:
    """Our tensors under llama.cpp's names: q, k and v below each other in one, matrices as (out, in)."""
    held = {name: tensor.detach().numpy() for name, tensor in parameters(net).items()}
    out = {theirs(name): array for name, array in held.items() if not any(f".{p}_proj." in name for p in "qkv")}
    for i in range(config.n_layers):
        for kind in ("weight", "bias"):
            out[f"blk.{i}.attn_qkv.{kind}"] = np.concatenate([held[f"stack.blocks.{i}.attention.{p}_proj.{kind}"] for p in "qkv"])
    return out


def words_of(words: Tokenizer, pre: str = "qwen2", eos: str = "<|endoftext|>") -> dict[str, object]:
    """The keys of a byte-level BPE."""
    bpe = json.loads(words.to_json())["model"]
    tokens = [words.token(i) for i in range(words.vocab_size)]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3 if token in words.specials else 1 for token in tokens],
            "tokenizer.ggml.merges": [" ".join(merge) for merge in bpe["merges"]], "tokenizer.ggml.eos_token_id": words.id_of(eos)}


def tensors_of(net: torch.nn.Module, config: LlamaConfig, permuted: bool) -> dict[str, np.ndarray]:
    """Our tensors under llama.cpp's names."""
    out = {}
    for name, tensor in parameters(net).items():
        array = tensor.detach().numpy()
        if permuted and "q_proj" in name:
            array = permute(array, config.n_heads)
        if permuted and "k_proj" in name:
            array = permute(array, config.n_kv_heads)
        out[theirs(name)] = array
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        out["rope_freqs.weight"] = rope_factors(config)
    return out


def write(path: Path, arch: str, metadata: dict[str, object], tensors: dict[str, object], **options) -> Path:
    """A GGUF file. A tensor is an array, or a pair of quantised bytes and their type; metadata that is None is left out."""
    writer = gguf.GGUFWriter(path, arch, **options)
    for name, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)
    for name, tensor in tensors.items():
        array, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, np.ascontiguousarray(array), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def written(path: Path, net: torch.nn.Module, config: LlamaConfig, arch: str = "llama", *, permuted: bool | None = None, metadata=None, tensors=None,
            **options) -> Path:
    """A model as a file; `metadata` and `tensors` change what it holds (None takes away)."""
    made = tensors_of(net, config, arch == "llama" if permuted is None else permuted) | (tensors or {})
    kept = {name: tensor for name, tensor in made.items() if tensor is not None}
    return write(path, arch, metadata_of(config, arch) | (metadata or {}), kept, **options)
