"""How well a model predicts text, exactly: each token counted once, loss in nats, bits per byte over the bytes of the tokens that were scored.

Text longer than the context is read in windows that overlap by half, so that every token but the first few has half a context before it.
B batch, T positions, V vocabulary.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hanok.contracts import IGNORE_INDEX, Batch, Model
from hanok.errors import ConfigError, DataError
from hanok.nn.loss import chunk_tokens, token_cross_entropy
from hanok.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Score:
    """What was measured."""
    tokens: int                                          # that were predicted
    nats: float                                          # of all of them together
    n_bytes: int                                         # that they stand for

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(1, self.n_bytes)

    def to_dict(self) -> dict[str, float]:
        return {"tokens": self.tokens, "loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte, "bytes": self.n_bytes}


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """(V,) The bytes that each token stands for; specials stand for none."""
    return np.array([len(tokenizer.token_bytes(token_id)) for token_id in range(tokenizer.vocab_size)], dtype=np.int64)


@torch.no_grad()
def score_batches(model: Model, batches: Iterable[Batch], lengths: np.ndarray, device: torch.device | str = "cpu") -> Score:
    """The score of all targets of these batches; `lengths` are a tokenizer's byte_lengths."""
    tokens, nats, n_bytes = 0, 0.0, 0
    for batch in batches:
        batch = batch.to(device)
        assert batch.targets is not None
        head: Any = model.head
        total, n = token_cross_entropy(model.hidden(batch), batch.targets, head, chunk_size=chunk_tokens(len(lengths)))
        counted = batch.targets[batch.targets != IGNORE_INDEX].cpu().numpy()
        tokens, nats, n_bytes = tokens + n, nats + total.item(), n_bytes + int(lengths[counted].sum())
    return Score(tokens, nats, n_bytes)


def strided(token_ids: Sequence[int], window: int) -> Iterator[Batch]:
    """One row a batch: windows of `window` tokens that advance by half; each asks for what no earlier one asked for. ConfigError: no room for two."""
    if window < 2:
        raise ConfigError(f"a context of {window} cannot predict one token from another; at least 2 are needed")
    asked = 1                                            # the first token is context only
    for start in range(0, len(token_ids), window // 2):
        ids = torch.tensor([token_ids[start:start + window]])
        targets = torch.full_like(ids, IGNORE_INDEX)
        new = asked - start - 1                          # the position that predicts the first token not yet asked for
        targets[0, new:-1] = ids[0, new + 1:]
        asked = start + ids.size(1)
        yield Batch(ids, targets=targets)
        if asked == len(token_ids):
            return


def score_text(model: Model, tokenizer: Tokenizer, text: str, max_seq_len: int, device: torch.device | str = "cpu") -> Score:
    """The score of a text, without special tokens. DataError where there is nothing to predict."""
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise DataError(f"the text has {len(ids)} token{'s' * (len(ids) != 1)}; at least 2 are needed to predict one from another")
    return score_batches(model, strided(ids, max_seq_len), byte_lengths(tokenizer), device)
