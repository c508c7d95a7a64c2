"""Requests to answers, for everything that generates: one prefill a request, one row an answer, text as soon as it is certain.

A request's n answers are copies of one prefilled row. Prefill works out the logits of each prompt's last position only. Rows of different lengths
step together; a finished row leaves the batch. B rows, D d_model, V vocabulary.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hanok.contracts import Chunk, Generator, Request, State
from hanok.errors import RequestError
from hanok.generate import sampling as choice
from hanok.generate.search import last, pad_rows, source_of
from hanok.text.tokenizer import StreamDecoder, Tokenizer


class StopMatcher:
    """Text that may still become part of a stop string is held back; what is given out is certain."""

    def __init__(self, stops: Sequence[str]):
        self.stops, self.held = [stop for stop in stops if stop], ""

    def push(self, text: str) -> tuple[str, bool]:
        """What is now certain, and whether a stop string was met."""
        text = self.held + text
        found = [place for place in (text.find(stop) for stop in self.stops) if place >= 0]
        if found:
            self.held = ""
            return text[:min(found)], True
        keep = max((n for stop in self.stops for n in range(1, min(len(stop), len(text)) + 1) if text.endswith(stop[:n])), default=0)
        self.held = text[len(text) - keep:]
        return text[:len(text) - keep], False

    def flush(self) -> str:
        held, self.held = self.held, ""
        return held


@dataclass
class Row:
    """One answer while it is written."""
    request: Request
    number: int                                          # which request
    index: int                                           # which of its answers
    decoder: StreamDecoder | None
    stops: StopMatcher
    budget: int                                          # tokens that it may have
    generator: torch.Generator
    counts: Counter[int] = field(default_factory=Counter)
    n_tokens: int = 0
    pending: list[int] = field(default_factory=list)     # ids since the last chunk

    def take(self, token_id: int) -> Chunk | None:
        """The chunk that this token makes certain; None while nothing is. A finish reason ends the row."""
        if token_id in self.request.stop_ids and self.n_tokens >= self.request.min_new_tokens:
            return self.finish("stop")
        self.n_tokens += 1
        self.counts[token_id] += 1
        self.pending.append(token_id)
        text, stopped = self.stops.push(self.decoder.push(token_id) if self.decoder else "")
        if stopped:
            return self.chunk(text, "stop")
        if self.n_tokens >= self.budget:
            return self.finish("length", text)
        return self.chunk(text) if text or self.decoder is None else None

    def finish(self, reason: str, text: str = "") -> Chunk:
        rest, stopped = self.stops.push(self.decoder.flush() if self.decoder else "")
        return self.chunk(text + rest + ("" if stopped else self.stops.flush()), "stop" if stopped else reason)

    def chunk(self, text: str, reason: str | None = None) -> Chunk:
        ids, self.pending = tuple(self.pending), []
        return Chunk(self.index, text, ids, reason)


def check(model: Generator, request: Request, max_seq_len: int | None) -> int:
    """The tokens that an answer may have. RequestError for what cannot be served; a prompt that fills the context names both lengths."""
    for name, expected in (("n", int), ("max_new_tokens", int), ("min_new_tokens", int), ("stop_ids", Sequence), ("stop", Sequence)):
        value = getattr(request, name)
        if not isinstance(value, expected) or isinstance(value, bool):
            raise RequestError(f"{name} is {value!r}; expected {'a whole number' if expected is int else 'a list'}")
    choice.check(request.sampling)
    if not request.token_ids:
        raise RequestError("the prompt is empty; give at least one token")
    if model.reads_source and not request.source_ids:
        raise RequestError("an encoder-decoder answers a source, and this request has none")
    if request.n < 1 or request.max_new_tokens < 1:
        raise RequestError(f"n is {request.n} and max_new_tokens {request.max_new_tokens}; expected 1 or more of each")
    if max_seq_len is None:
        return request.max_new_tokens
    for name, ids, most in (("prompt", request.token_ids, max_seq_len - 1), ("source", request.source_ids or (), max_seq_len)):
        n = len(ids)
        if n > most:
            raise RequestError(f"the {name} has {n} tokens, the model's context {max_seq_len}; shorten it by at least {n - most}", "too_long")
    return min(request.max_new_tokens, max_seq_len - len(request.token_ids))


def run(model: Generator, requests: Sequence[Request], tokenizer: Tokenizer | None = None,
        max_seq_len: int | None = None) -> Iterator[tuple[int, Chunk]]:
    """Writes all answers side by side: yields (request number, chunk) as text becomes certain; each answer's last chunk bears its finish reason.

    Without a tokenizer chunks carry token ids only. Closing the iterator stops the work. RequestError before anything is computed.
    """
    budgets = [check(model, request, max_seq_len) for request in requests]
    rows = [Row(request, number, index, tokenizer.stream() if tokenizer else None, StopMatcher(request.stop), budget,
                choice.generator_of(request.sampling.seed, index))
            for number, (request, budget) in enumerate(zip(requests, budgets)) for index in range(request.n)]
    if not rows:
        return
    with torch.inference_mode():
        state, hidden = prefill(model, requests, budgets)
        if len(rows) > len(requests):
            numbers = [row.number for row in rows]
            state, hidden = state.select(numbers), hidden[numbers]
    while rows:
        with torch.inference_mode():
            chosen = choose(model.head(hidden), rows)
        chunks = [row.take(token_id) for row, token_id in zip(rows, chosen)]
        yield from ((row.number, chunk) for row, chunk in zip(rows, chunks) if chunk is not None)
        alive = [i for i, chunk in enumerate(chunks) if chunk is None or chunk.finish_reason is None]
        if not alive:
            return
        with torch.inference_mode():
            if len(alive) < len(rows):
                state, rows, chosen = state.select(alive), [rows[i] for i in alive], [chosen[i] for i in alive]
            hidden = model.step(torch.tensor(chosen, device=hidden.device)[:, None], state)[:, -1]


def prefill(model: Generator, requests: Sequence[Request], budgets: Sequence[int]) -> tuple[State, Tensor]:
    """A state that has read every prompt, and the hidden vector of each prompt's last token: (B,D)."""
    device = next(model.parameters()).device                                          # type: ignore[attr-defined]
    token_ids, lengths = pad_rows([request.token_ids for request in requests], device=device)
    source = source_of([request.source_ids or () for request in requests], device) if model.reads_source else None
    state = model.start(source, len(requests), max(n + budget for n, budget in zip(lengths, budgets)))
    return state, last(model.step(token_ids, state, lengths), lengths)


def choose(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """The next token of each row: (B,V) -> B ids."""
    if all(choice.is_plain_greedy(row.request.sampling) and row.n_tokens >= row.request.min_new_tokens for row in rows):
        return logits.argmax(-1).tolist()
    chosen = []
    for row, line in zip(rows, logits):
        if row.n_tokens < row.request.min_new_tokens:
            barred = [token_id for token_id in row.request.stop_ids if 0 <= token_id < len(line)]
            line = line.index_fill(0, torch.tensor(barred, dtype=torch.long, device=line.device), float("-inf"))
        chosen.append(choice.choose(line, row.request.sampling, row.generator, row.request.token_ids, row.counts))
    return chosen
