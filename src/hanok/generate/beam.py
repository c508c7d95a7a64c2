"""Beam search (Graves, arXiv:1211.3711; Sutskever et al., arXiv:1409.3215, 3.2): the n_beams likeliest beginnings go on side by side as rows.

Candidates, scores and the moment to stop are those of `transformers` 5 with early_stopping=False. A state is only ever asked to `select`, so that
recurrent models search as well. R running beams, V vocabulary.
"""
from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hanok.contracts import Generator, Request
from hanok.generate import sampling as choice
from hanok.generate.search import prefill


@dataclass
class Beam:
    """A beginning that may go on."""
    ngrams: choice.Ngrams
    token_ids: tuple[int, ...] = ()
    score: float = 0.0                       # the sum of its tokens' log-probabilities, in nats
    counts: Counter[int] = field(default_factory=Counter)

    def grown(self, token_id: int, score: float) -> Beam:
        twin = Beam(self.ngrams.copy(), (*self.token_ids, token_id), score, self.counts.copy())
        twin.ngrams.push(token_id)
        twin.counts[token_id] += 1
        return twin


@dataclass(frozen=True)
class Finished:
    """A whole answer."""
    token_ids: tuple[int, ...]               # without the stop id that ended it
    score: float                             # log-probability / length^length_penalty; a stop id counts in both
    finish_reason: str                       # stop or length


@torch.inference_mode()
def search(model: Generator, request: Request, budget: int) -> list[Finished]:
    """The `request.n` best answers of at most `budget` tokens, best first; fewer only where fewer exist.

    Penalties and what is barred act on log-probabilities. A candidate that ends is kept if it is among the n_beams best of its step; the search is
    over when n_beams answers are kept and the best running beam, were it to end now, would not be better than the worst of them.
    """
    n_beams, stop_ids, finished = request.n_beams, set(request.stop_ids), list[Finished]()
    state, hidden = prefill(model, [request], [budget])
    running = [Beam(choice.Ngrams(request.sampling.no_repeat_ngram_size, request.token_ids))]
    for length in range(1, budget + 1):
        norm = length ** request.length_penalty
        going: list[tuple[int, int, float]] = []                                      # (row, token, score)
        for place, (row, token_id, score) in enumerate(best(log_probabilities(model.head(hidden), running, request), n_beams * (1 + len(stop_ids)))):
            stopped = token_id in stop_ids and length > request.min_new_tokens
            if not stopped and length < budget:
                going.append((row, token_id, score))
            elif place < n_beams:
                written = running[row].token_ids
                finished.append(Finished(written if stopped else (*written, token_id), score / norm, "stop" if stopped else "length"))
        finished = sorted(finished, key=lambda answer: -answer.score)[:n_beams]
        if not going or (len(finished) == n_beams and going[0][2] / norm <= finished[-1].score):
            break
        rows, going = [row for row, _, _ in going[:n_beams]], going[:n_beams]
        if rows != list(range(len(running))):
            state = state.select(rows)
        running = [running[row].grown(token_id, score) for row, token_id, score in going]
        hidden = model.step(torch.tensor([[token_id] for _, token_id, _ in going], device=hidden.device), state)[:, -1]
    return finished[:request.n]


def log_probabilities(logits: Tensor, running: list[Beam], request: Request) -> Tensor:   # (R,V) -> (R,V)
    """Of each beam followed by each token, in nats."""
    scores = logits.float().log_softmax(-1)
    early = request.stop_ids if len(running[0].token_ids) < request.min_new_tokens else ()
    if early or not choice.is_plain(request.sampling):
        scores = torch.stack([
            choice.bar(choice.penalise(line, request.sampling, request.token_ids, beam.counts), {*beam.ngrams.barred(), *early})
            for line, beam in zip(scores, running)])
    return scores + torch.tensor([beam.score for beam in running], device=scores.device)[:, None]


def best(scores: Tensor, n: int) -> list[tuple[int, int, float]]:
    """The n best (row, token, score) that are possible at all, best first."""
    top = scores.flatten().topk(min(n, scores.numel()))
    return [(*divmod(place, scores.size(-1)), score) for place, score in zip(top.indices.tolist(), top.values.tolist()) if score > -math.inf]
