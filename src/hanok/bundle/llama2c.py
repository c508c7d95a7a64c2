"""llama2.c's .bin files: a header of seven sizes, then the weights in an order that the version fixes. They are memory-mapped.

Version 0 has no magic number and tells by a negative vocabulary that the head is not tied; 1 is fp32; 2 is int8 in groups that share a scale (Q8_0).
Its rotary turns neighbouring numbers, as GGUF's llama does, so that the weights take GGUF's names and go through its table.
Source: github.com/karpathy/llama2.c, export.py, run.c, runq.c, tokenizer.py.
"""
from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hanok.bundle.bundle import Bundle, Generation, empty_model
from hanok.bundle.weights import assign, refuse_pickle
from hanok.disk import disk_error, sha256
from hanok.errors import TokenizerError, WeightsError
from hanok.models import catalog
from hanok.models.llama import LlamaConfig
from hanok.text.gguf_vocab import BYTE, CONTROL, NORMAL, UNKNOWN, tokenizer_from_gguf
from hanok.text.tokenizer import Tokenizer

MAGIC = 0x616B3432
HEADER_BYTES = {0: 28, 1: 256, 2: 256}
NAMES = "dim hidden_dim n_layers n_heads n_kv_heads vocab_size seq_len".split()
ONCE = {"token_embd", "output_norm", "output", "rotary"}
_LATER = "attn_norm ffn_norm output_norm token_embd attn_q attn_k attn_v attn_output ffn_gate ffn_down ffn_up output".split()
ORDER = {0: "token_embd attn_norm attn_q attn_k attn_v attn_output ffn_norm ffn_gate ffn_down ffn_up output_norm rotary output".split(),
         1: _LATER, 2: _LATER}
"""Parts in the file's order, by GGUF's names; those that are not in ONCE stand once a layer. `rotary` follows from the sizes and is passed over."""
BEGIN, END, FIRST_BYTE = 1, 2, 3
"""llama2.c's own ids: a text's beginning, which also ends an answer, its end, and the first of 256 byte tokens."""


class File:
    """An open file: `version`, `config`, `group` (weights a scale, of version 2) and its tensors by GGUF's names.

    WeightsError where the header is no such model's, or promises other than the file's length.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            size = path.stat().st_size
            self.data = np.memmap(path, np.uint8, "c") if size else np.empty(0, np.uint8)
        except OSError as error:
            raise disk_error(path, error) from None
        head = self.data[:256].tobytes().ljust(256, b"\0")
        magic, self.version = struct.unpack_from("<Ii", head)
        if magic != MAGIC:
            self.version = 0
        elif self.version not in (1, 2):
            raise WeightsError(f"{path} is a llama2.c file of version {self.version}, expected 1 or 2, or the older form that tells none; "
                               "export it as one of them")
        sizes = struct.unpack_from("<7i", head, 8 if self.version else 0)
        tied = bool(head[36]) if self.version else sizes[5] > 0
        self.group: int = struct.unpack_from("<i", head, 37)[0]
        self.config = self._config(sizes, tied, head)
        expected = HEADER_BYTES[self.version] + sum(self._n_bytes(part) * (1 if part in ONCE else self.config.n_layers) for part in self.parts)
        if expected != size:
            told = ", ".join(f"{name} {n}" for name, n in zip(NAMES, sizes))
            raise WeightsError(f"{path} has {size} bytes, expected {expected} for a llama2.c model of version {self.version} and {told}; "
                               "fetch it again")

    @property
    def parts(self) -> list[str]:
        return [part for part in ORDER[self.version] if part != "output" or not self.config.tie_embeddings]

    def shape(self, part: str) -> tuple[int, ...]:
        """Of one tensor of this part."""
        c = self.config
        kv_width = c.d_model // c.n_heads * c.n_kv_heads
        return {"token_embd": (c.vocab_size, c.d_model), "output": (c.vocab_size, c.d_model), "attn_k": (kv_width, c.d_model),
                "attn_v": (kv_width, c.d_model), "attn_q": (c.d_model, c.d_model), "attn_output": (c.d_model, c.d_model),
                "ffn_gate": (c.d_ff, c.d_model), "ffn_up": (c.d_ff, c.d_model), "ffn_down": (c.d_model, c.d_ff),
                "rotary": (2, c.max_seq_len, c.d_model // c.n_heads // 2)}.get(part, (c.d_model,))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor in fp32: a view of the file, or dequantised."""
        at = HEADER_BYTES[self.version]
        for part in self.parts:
            for name in [part] if part in ONCE else [f"blk.{i}.{part}" for i in range(self.config.n_layers)]:
                raw = self.data[at:at + self._n_bytes(part)]
                at += len(raw)
                if part != "rotary":
                    yield f"{name}.weight", self._tensor(raw, self.shape(part))

    def _tensor(self, raw: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        if not self._is_quantised(shape):
            return torch.from_numpy(raw.view("<f4").reshape(shape))
        n = math.prod(shape)
        scales = raw[n:].view("<f4")
        return torch.from_numpy((raw[:n].view("i1").reshape(-1, self.group) * scales[:, None]).astype(np.float32).reshape(shape))

    def _n_bytes(self, part: str) -> int:
        n = math.prod(self.shape(part))
        return n + 4 * (n // self.group) if self._is_quantised(self.shape(part)) else 4 * n

    def _is_quantised(self, shape: tuple[int, ...]) -> bool:
        return self.version == 2 and len(shape) > 1

    def _config(self, sizes: tuple[int, ...], tied: bool, head: bytes) -> LlamaConfig:
        dim, hidden, n_layers, n_heads, n_kv_heads, vocab_size, seq_len = sizes
        if self.version == 0:
            vocab_size = abs(vocab_size)
        fits = min(dim, hidden, n_layers, n_heads, n_kv_heads, vocab_size, seq_len) > 0 and dim % (2 * n_heads) == 0 and n_heads % n_kv_heads == 0
        if fits and self.version == 2:
            fits = self.group > 0 and dim % self.group == 0
        if not fits:
            if head.startswith((b"PK", b"\x80")):
                refuse_pickle(self.path)
            told = ", ".join(f"{name} {n}" for name, n in zip(NAMES, sizes))
            raise WeightsError(f"{self.path} is no llama2.c model: its header says {told}, which do not fit together; is it the right file?")
        return LlamaConfig(vocab_size=vocab_size, d_model=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, d_ff=hidden,
                           max_seq_len=seq_len, norm_eps=1e-5, tie_embeddings=tied)


def import_llama2c(path: Path) -> Bundle:
    """A llama2.c file as a bundle without a tokenizer, in fp32. WeightsError names what does not fit."""
    file = File(path)
    family = catalog.family("llama")
    model, theirs = empty_model(family, file.config), dict(file.tensors())
    weights = family.gguf[0].weights(file.config)
    ours = {name: tensor for weight in weights for name, tensor in zip(weight.ours, weight.layout.unpack(theirs[weight.theirs]))}
    assign(model, ours, str(path))
    return Bundle(family, file.config, model.eval(), generation=Generation(stop_ids=(BEGIN, END)),
                  manifest={"parent": {"format": "llama2.c", "version": file.version, "sha256": sha256(path)}})


def tokenizer_from_llama2c(data: bytes, name: str = "tokenizer.bin") -> Tokenizer:
    """llama2.c's tokenizer.bin: the longest token's bytes, then a score, a length and the bytes of each token. TokenizerError where it breaks off."""
    tokens: list[str] = []
    scores: list[float] = []
    at = 4
    while at < len(data):
        score, n_bytes = struct.unpack("<fi", data[at:at + 8].ljust(8, b"\0"))
        at += 8 + n_bytes
        if n_bytes < 0 or at > len(data):
            raise TokenizerError(f"{name}: token {len(tokens)} of {n_bytes} bytes ends at byte {at}, the file at {len(data)}; "
                                 "a whole tokenizer.bin of llama2.c was expected")
        tokens.append(data[at - n_bytes:at].decode("utf-8", "replace"))
        scores.append(score)
    last = FIRST_BYTE + 256
    if len(tokens) < last or (tokens[BEGIN].strip(), tokens[END].strip()) != ("<s>", "</s>"):
        raise TokenizerError(f"{name}: {len(tokens)} tokens that do not begin with <unk>, <s>, </s> and 256 bytes; "
                             "llama2.c's tokenizer.bin was expected")
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(tokens) - last)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(token.replace(" ", "▁") for token in tokens[last:])]
    told = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types,
            "bos_token_id": BEGIN, "eos_token_id": END, "unknown_token_id": 0}
    return tokenizer_from_gguf({f"tokenizer.ggml.{key}": value for key, value in told.items()})
