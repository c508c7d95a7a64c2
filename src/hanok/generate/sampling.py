"""How the next token is chosen from logits: pure functions, applied in the order in which `transformers` applies them.

Penalties first (repetition: CTRL, arXiv:1909.05858; presence and frequency: the OpenAI API's), then what is barred (repeated n-grams:
arXiv:1705.04304, 2.5; stop ids that come too early), temperature, top-k, nucleus (arXiv:1904.09751), min-p (arXiv:2407.01082). Each row draws from a
generator of its own, so that a neighbour in the batch changes nothing. V vocabulary.
"""
from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from hanok.contracts import Sampling
from hanok.errors import RequestError

FEW = 256
"""Candidates that are sorted first when a nucleus is looked for; sorting a whole vocabulary costs milliseconds."""
SMALLEST = torch.finfo(torch.float32).tiny
"""The temperature below which fp32 would divide by zero."""
WHOLE = ("seed", "top_k", "no_repeat_ngram_size")


def check(sampling: Sampling) -> None:
    """RequestError for a setting that no distribution can follow."""
    for name, value in vars(sampling).items():
        if isinstance(value, bool) or not isinstance(value, int if name in WHOLE else int | float):
            raise RequestError(f"{name} is {value!r}; expected {'a whole number' if name in WHOLE else 'a number'}")
    for name, good, expected in (
        ("temperature", 0 <= sampling.temperature < math.inf, "0 (greedy) or more"), ("top_k", sampling.top_k >= 0, "0 (all) or more"),
        ("top_p", 0 < sampling.top_p <= 1, "above 0, at most 1"), ("min_p", 0 <= sampling.min_p <= 1, "from 0 to 1"),
        ("repetition_penalty", 0 < sampling.repetition_penalty < math.inf, "above 0 (1 = off)"),
        ("presence_penalty", math.isfinite(sampling.presence_penalty), "a finite number (0 = off)"),
        ("frequency_penalty", math.isfinite(sampling.frequency_penalty), "a finite number (0 = off)"),
        ("no_repeat_ngram_size", sampling.no_repeat_ngram_size >= 0, "0 (off) or more"),
    ):
        if not good:
            raise RequestError(f"{name} is {getattr(sampling, name)}; expected {expected}")


def is_plain(sampling: Sampling) -> bool:
    """Whether the logits stay as they are until temperature."""
    return (sampling.repetition_penalty == 1 and sampling.presence_penalty == 0 and sampling.frequency_penalty == 0
            and sampling.no_repeat_ngram_size == 0)


def is_plain_greedy(sampling: Sampling) -> bool:
    """Whether the likeliest token is all that is asked for."""
    return sampling.temperature == 0 and is_plain(sampling)


class Ngrams:
    """What followed each n-1 tokens of a row, so that no n tokens in a row come twice. A token costs the same however long the row is. n = 0: off."""

    def __init__(self, n: int, token_ids: Iterable[int] = ()):
        self.n = n
        self.tail: tuple[int, ...] = ()                  # the last n-1 tokens
        self.followers: dict[tuple[int, ...], set[int]] = {}
        for token_id in token_ids if n else ():
            self.push(token_id)

    def push(self, token_id: int) -> None:
        if self.n:
            if len(self.tail) == self.n - 1:
                self.followers.setdefault(self.tail, set()).add(token_id)
            self.tail = (*self.tail, token_id)[-self.n + 1:] if self.n > 1 else ()

    def barred(self) -> Collection[int]:
        """The tokens that would repeat an n-gram."""
        return self.followers.get(self.tail, ())

    def copy(self) -> Ngrams:
        twin = Ngrams(self.n)
        twin.tail, twin.followers = self.tail, {tail: set(followers) for tail, followers in self.followers.items()}
        return twin


def penalise(logits: Tensor, sampling: Sampling, prompt_ids: Sequence[int], counts: Mapping[int, int]) -> Tensor:
    """(V,) logits with the penalties for tokens of the prompt and of the answer (`counts`: token -> times)."""
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt_ids, *counts}), dtype=torch.long, device=logits.device)
        values = logits[seen]
        logits = logits.scatter(0, seen, torch.where(values < 0, values * sampling.repetition_penalty, values / sampling.repetition_penalty))
    if counts and (sampling.presence_penalty or sampling.frequency_penalty):
        seen, times = torch.tensor(list(counts), device=logits.device), torch.tensor(list(counts.values()), device=logits.device)
        logits = logits.scatter_add(0, seen, -(sampling.presence_penalty + sampling.frequency_penalty * times).to(logits.dtype))
    return logits


def bar(logits: Tensor, barred: Collection[int]) -> Tensor:
    """(V,) logits without the barred tokens. Where nothing else would be left, nothing is barred."""
    ids = [token_id for token_id in barred if 0 <= token_id < len(logits)]
    if not ids:
        return logits
    left = logits.index_fill(0, torch.tensor(ids, device=logits.device), -math.inf)
    return left if left.max() > -math.inf else logits


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities (N,) and token ids (N,) of the tokens that temperature, top_k, top_p and min_p leave: likeliest first, or all V in order."""
    logits = (logits.float() - logits.max()) / max(sampling.temperature, SMALLEST)    # at most 0: no temperature makes it overflow
    wanted = min(sampling.top_k or logits.numel(), logits.numel())
    probabilities, ids = logits.softmax(-1), None
    if sampling.top_p < 1 or sampling.min_p > 0:
        top, ids = probabilities.topk(min(FEW, wanted))
        if wanted > FEW and not _enough(top, sampling):
            top, ids = probabilities.topk(wanted)
    else:
        top, ids = probabilities.topk(wanted) if wanted < logits.numel() else (probabilities, torch.arange(wanted, device=logits.device))
    if sampling.top_k:
        top = top / (top.sum() if top.numel() == wanted else probabilities.topk(wanted).values.sum())
    if sampling.top_p < 1:
        before = top.cumsum(-1) - top
        top, ids = top[before < sampling.top_p], ids[before < sampling.top_p]
        top = top / top.sum()
    if sampling.min_p > 0:
        kept = top >= sampling.min_p * top.max()
        top, ids = top[kept], ids[kept]
    return top / top.sum(), ids


def _enough(top: Tensor, sampling: Sampling) -> bool:
    """Whether every token that could be kept is among these, the likeliest ones."""
    return bool(sampling.top_p < 1 and not sampling.top_k and top.sum() >= sampling.top_p) or bool(top[-1] < sampling.min_p * top[0])


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator, prompt_ids: Sequence[int], counts: Mapping[int, int],
           barred: Collection[int] = ()) -> int:
    """The next token's id, from (V,) logits."""
    logits = bar(penalise(logits, sampling, prompt_ids, counts), barred)
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities, ids = candidates(logits, sampling)
    return int(ids[torch.multinomial(probabilities.cpu(), 1, generator=generator)])


def generator_of(seed: int, index: int) -> torch.Generator:
    """The random numbers of answer `index` of a request with this seed. A hash, since torch's CPU generator looks at 32 bits of a seed only."""
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
