"""Requests to answers, for everything that generates: one prefill a request, one row an answer, text as soon as it is certain.

A request's n answers are copies of one prefilled row. Prefill works out the logits of each prompt's last position only. Rows of different lengths
step together; a finished row leaves the batch. Requests with beams follow, one after the other. B rows, V vocabulary.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hanok.contracts import Chunk, Generator, Request
from hanok.errors import RequestError
from hanok.generate import beam
from hanok.generate import sampling as choice
from hanok.generate.search import prefill
from hanok.text.tokenizer import StreamDecoder, Tokenizer

MOST_PENALTY = 10
"""The largest length_penalty either way: beyond it a length to that power is soon no number, and length alone decides long before."""


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
    ngrams: choice.Ngrams
    counts: Counter[int] = field(default_factory=Counter)
    n_tokens: int = 0
    pending: list[int] = field(default_factory=list)     # ids since the last chunk

    def take(self, token_id: int) -> Chunk | None:
        """The chunk that this token makes certain; None while nothing is. A finish reason ends the row."""
        if token_id in self.request.stop_ids and self.n_tokens >= self.request.min_new_tokens:
            return self.finish("stop")
        self.n_tokens += 1
        self.counts[token_id] += 1
        self.ngrams.push(token_id)
        self.pending.append(token_id)
        text, stopped = self.stops.push(self.decoder.push(token_id) if self.decoder else "")
        if stopped:
            return self.chunk(text, "stop")
        if self.n_tokens >= self.budget:
            return self.finish("length", text)
        return self.chunk(text) if text or self.decoder is None else None

    def take_all(self, answer: beam.Finished) -> Chunk:
        """A finished beam as one chunk, cut at its first stop string; its score is that of all its tokens."""
        text, stopped = "", False
        for token_id in answer.token_ids:
            self.pending.append(token_id)
            piece, stopped = self.stops.push(self.decoder.push(token_id) if self.decoder else "")
            text += piece
            if stopped:
                break
        return replace(self.chunk(text, "stop") if stopped else self.finish(answer.finish_reason, text), score=answer.score)

    def barred(self) -> Collection[int]:
        """What may not come next."""
        repeated, early = self.ngrams.barred(), self.n_tokens < self.request.min_new_tokens
        return {*repeated, *self.request.stop_ids} if early else repeated

    def finish(self, reason: str, text: str = "") -> Chunk:
        rest, stopped = self.stops.push(self.decoder.flush() if self.decoder else "")
        return self.chunk(text + rest + ("" if stopped else self.stops.flush()), "stop" if stopped else reason)

    def chunk(self, text: str, reason: str | None = None) -> Chunk:
        ids, self.pending = tuple(self.pending), []
        return Chunk(self.index, text, ids, reason)


def check(model: Generator, request: Request, max_seq_len: int | None) -> int:
    """The tokens that an answer may have. RequestError for what cannot be served; a prompt that fills the context names both lengths."""
    for names, expected, told in ((("n", "max_new_tokens", "min_new_tokens", "n_beams"), int, "a whole number"),
                                  (("length_penalty",), int | float, "a number"), (("stop_ids", "stop"), Sequence, "a list"),
                                  (("beyond_context",), bool, "True or False")):
        for name in names:
            value = getattr(request, name)
            if not isinstance(value, expected) or isinstance(value, bool) != (expected is bool):
                raise RequestError(f"{name} is {value!r}; expected {told}")
    choice.check(request.sampling)
    check_beams(request)
    if not request.token_ids:
        raise RequestError("the prompt is empty; give at least one token")
    if model.reads_source and not request.source_ids:
        raise RequestError("an encoder-decoder answers a source, and this request has none")
    if request.n < 1 or request.max_new_tokens < 1:
        raise RequestError(f"n is {request.n} and max_new_tokens {request.max_new_tokens}; expected 1 or more of each")
    if max_seq_len is None:
        return request.max_new_tokens
    if request.beyond_context:
        n, most = len(request.token_ids), model.max_positions
        if most is not None and n + request.max_new_tokens > most:
            raise RequestError(f"the prompt's {n} and {request.max_new_tokens} new tokens are beyond the {most} positions that this model learned, "
                               "and no more exist; ask for fewer, or leave beyond_context out", "too_long")
        return request.max_new_tokens
    for name, ids, most in (("prompt", request.token_ids, max_seq_len - 1), ("source", request.source_ids or (), max_seq_len)):
        n = len(ids)
        if n > most:
            raise RequestError(f"the {name} has {n} tokens, the model's context {max_seq_len}; shorten it by at least {n - most}", "too_long")
    return min(request.max_new_tokens, max_seq_len - len(request.token_ids))


def check_beams(request: Request) -> None:
    """RequestError for beams that cannot be."""
    if request.n_beams < 1:
        raise RequestError(f"n_beams is {request.n_beams}; expected 1 (no beam search) or more")
    if not abs(request.length_penalty) <= MOST_PENALTY:
        raise RequestError(f"length_penalty is {request.length_penalty}; expected a number from -{MOST_PENALTY} to {MOST_PENALTY} (0 = off)")
    if request.n_beams > 1 and request.n > request.n_beams:
        raise RequestError(f"n is {request.n} and n_beams {request.n_beams}; expected no more answers than beams")
    if request.n_beams > 1 and request.sampling.temperature != 0:
        raise RequestError(f"temperature is {request.sampling.temperature} with {request.n_beams} beams, and beams draw nothing; give one of them up")


def may_pass(request: Request, max_seq_len: int | None) -> bool:
    """Whether the prompt with its answer, or the source, may go past the trained context."""
    longest = max(len(request.token_ids) + request.max_new_tokens, len(request.source_ids or ()))
    return request.beyond_context and max_seq_len is not None and longest > max_seq_len


def run(model: Generator, requests: Sequence[Request], tokenizer: Tokenizer | None = None,
        max_seq_len: int | None = None) -> Iterator[tuple[int, Chunk]]:
    """Writes all answers side by side: yields (request number, chunk) as text becomes certain; each answer's last chunk bears its finish reason.

    With beams an answer is one chunk, with its score: its text is cut at the first stop string once all of it is there, the best comes first, and
    there are fewer than n only where fewer exist. Without a tokenizer chunks carry token ids only. Closing the iterator stops the work. RequestError
    before anything is computed.
    """
    budgets = [check(model, request, max_seq_len) for request in requests]

    def row_of(number: int, index: int) -> Row:
        request = requests[number]
        return Row(request, number, index, tokenizer.stream() if tokenizer else None, StopMatcher(request.stop), budgets[number],
                   choice.generator_of(request.sampling.seed, index), choice.Ngrams(request.sampling.no_repeat_ngram_size, request.token_ids))

    plain = [number for number, request in enumerate(requests) if request.n_beams == 1]
    if plain:
        yield from abreast(model, [[row_of(number, index) for index in range(requests[number].n)] for number in plain])
    for number, request in enumerate(requests):
        if request.n_beams > 1:
            for index, answer in enumerate(beam.search(model, request, budgets[number])):
                yield number, row_of(number, index).take_all(answer)


def abreast(model: Generator, answers: Sequence[Sequence[Row]]) -> Iterator[tuple[int, Chunk]]:
    """Writes the rows of some requests side by side."""
    rows = [row for of_one in answers for row in of_one]
    with torch.inference_mode():
        state, hidden = prefill(model, [of_one[0].request for of_one in answers], [of_one[0].budget for of_one in answers])
        if len(rows) > len(answers):
            copies = [i for i, of_one in enumerate(answers) for _ in of_one]
            state, hidden = state.select(copies), hidden[copies]
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


def choose(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """The next token of each row: (B,V) -> B ids."""
    if all(choice.is_plain_greedy(row.request.sampling) and row.n_tokens >= row.request.min_new_tokens for row in rows):
        return logits.argmax(-1).tolist()
    return [choice.choose(line, row.request.sampling, row.generator, row.request.token_ids, row.counts, row.barred())
            for row, line in zip(rows, logits)]
