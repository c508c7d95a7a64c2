"""What a model expects next: the distribution that sampling draws from, laid open.

Its entropy in bits says how open the question is: 0 where one token has all of the probability (as greedy decoding takes it), 1 for a fair coin.
V vocabulary.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hanok.contracts import Sampling
from hanok.errors import RequestError
from hanok.generate import sampling as choice
from hanok.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class NextTokens:
    """The likeliest next tokens at one temperature."""
    temperature: float                       # 0: greedy
    tokens: tuple[str, ...]                  # likeliest first; the text that each adds, a special token as it is spelled
    token_ids: tuple[int, ...]
    probabilities: tuple[float, ...]
    rest: float                              # the probability of all other tokens together
    entropy: float                           # bits, over all tokens

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        named = zip(self.tokens, self.token_ids, self.probabilities)
        return {"temperature": self.temperature, "entropy_bits": self.entropy, "rest": self.rest,
                "tokens": [{"token": token, "id": token_id, "probability": p} for token, token_id, p in named]}


def next_tokens(logits: Tensor, tokenizer: Tokenizer, temperatures: Sequence[float], top: int, top_k: int = 0,
                top_p: float = 1.0) -> list[NextTokens]:
    """(V,) logits -> one distribution a temperature, all of the same `top` likeliest tokens. RequestError for settings that cannot be."""
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise RequestError(f"top is {top!r}; expected 1 token or more")
    if not temperatures:
        raise RequestError("no temperature was given; expected one or more (1: the model's own distribution)")
    settings = [Sampling(temperature, top_k, top_p) for temperature in temperatures]
    for setting in settings:
        choice.check(setting)
    shown = logits.float().topk(min(top, logits.numel())).indices
    tokens = tuple(spelled(token_id, tokenizer) for token_id in shown.tolist())
    told = []
    for setting in settings:
        p = probabilities(logits, setting)
        few = p[shown].tolist()
        told.append(NextTokens(float(setting.temperature), tokens, tuple(shown.tolist()), tuple(few), max(0.0, 1 - sum(few)), entropy(p)))
    return told


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:                      # (V,) -> (V,), in double precision
    """Each token's chance to be chosen; 0 for what temperature, top_k or top_p leave out."""
    spread = torch.zeros_like(logits, dtype=torch.float64)
    if sampling.temperature == 0:
        spread[logits.argmax()] = 1.0
        return spread
    p, ids = choice.candidates(logits, sampling)
    spread[ids] = p.double()
    return spread / spread.sum()


def entropy(p: Tensor) -> float:
    """-sum p log2 p, in bits."""
    return float(-torch.special.xlogy(p, p).sum() / torch.log(torch.tensor(2.0, dtype=p.dtype))) + 0.0


def spelled(token_id: int, tokenizer: Tokenizer) -> str:
    """The text that a token adds; a special token, and one that adds none, as the vocabulary spells it."""
    if token_id >= tokenizer.vocab_size:
        return f"(no token {token_id})"                                               # a model may have more rows than its tokenizer has tokens
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace") or tokenizer.token(token_id)
