"""hanok from Python: `m = hanok.load(path)`, then generate, stream, chat, score, embed. The command line calls these and adds nothing.

>>> m = hanok.load("runs/mine")
>>> m.generate("def ", max_new_tokens=32).text
"""
from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hanok.attention_view import MOST_TOKENS, Attention, Words, words_of, words_of_ids
from hanok.bundle.bundle import Bundle, check_tokenizer, load_bundle
from hanok.contracts import Batch, Chunk, Request, Sampling
from hanok.errors import RequestError, nearest
from hanok.evaluate.score import Score, score_text
from hanok.generate.distribution import NextTokens, next_tokens
from hanok.generate.run import check, run
from hanok.generate.search import keep_of, pad_rows
from hanok.nn.lower import lower
from hanok.probe import has_attention, probe
from hanok.text.chat import ChatTemplate
from hanok.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]
SIDES = ("cross", "source", "answer")
"""What can be looked at in an encoder-decoder: the answer at its source, the source at itself, the answer at itself."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote."""
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str                       # stop or length
    n_prompt_tokens: int                     # of an encoder-decoder: of its source
    score: float | None = None               # of a beam: its log-probability / length^length_penalty; None without beams

    def __str__(self) -> str:
        return self.text


class LoadedModel:
    """A bundle that is ready to be used. `bundle.model` is the plain model, `model` the same weights put together for inference, `rows` at a time."""

    def __init__(self, bundle: Bundle, where: str = "this model", rows: int = 1):
        self.bundle, self.where, self.config, self.family = bundle, where, bundle.config, bundle.family
        self.model: Any = lower(bundle.model, rows)

    @property
    def tokenizer(self) -> Tokenizer:
        """ConfigError where the bundle has none."""
        return check_tokenizer(self.bundle, self.where)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.bundle.model.parameters()).device

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template. RequestError where the bundle has none."""
        if self.bundle.chat_template is None:
            raise RequestError(f"{self.where} has no chat_template.jinja: it was not trained to chat; use generate", "unsupported")
        words, ends = self.tokenizer, self.bundle.generation.stop_ids
        plain, framed = words.encode("a"), words.encode("a", add_special=True)
        begins = framed[:1] if framed[:1] != plain[:1] else []
        named = (("bos_token", begins), ("eos_token", ends))
        return ChatTemplate(self.bundle.chat_template, words, {name: words.token(ids[0]) for name, ids in named if ids})

    # ---- writing ---------------------------------------------------------------------------------------------
    def generate(self, prompt: str, **options: Any) -> Answer:
        """One answer to a prompt. For an encoder-decoder the prompt is the source.

        Options: max_new_tokens, min_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty,
        no_repeat_ngram_size, seed, stop (strings), stop_ids, n_beams (beam search: the likeliest answers, each with its score), length_penalty,
        beyond_context. The prompt's special tokens are parsed. RequestError for what cannot be served.
        """
        if options.get("n", 1) != 1:
            raise RequestError("generate gives one answer; for several use generate_many([prompt], n=...)")
        return self.generate_many([prompt], **options)[0][0]

    def generate_many(self, prompts: Sequence[str], n: int = 1, **options: Any) -> list[list[Answer]]:
        """`n` answers to each prompt, all in one batch. With n_beams its n best, best first: one prompt after the other, its beams in one batch."""
        if isinstance(prompts, str):
            raise RequestError("generate_many takes a list of prompts; got one string: write [prompt]")
        if not isinstance(n, int):
            raise RequestError(f"n is {n!r}; expected a whole number")
        requests = [self.request(prompt, n=n, **options) for prompt in prompts]
        return self.answers(requests)

    def stream(self, prompt: str, **options: Any) -> Iterator[Chunk]:
        """One answer in pieces, as soon as each is certain; with n_beams that is at the end."""
        return (chunk for _, chunk in self.run([self.request(prompt, **options)]))

    def chat(self, messages: Messages | str, **options: Any) -> Answer:
        """The assistant's next message, after `messages` ({"role", "content"}; a string is one user's message). Content parses no special tokens."""
        return self.answers([self.chat_request(messages, **options)])[0][0]

    def stream_chat(self, messages: Messages | str, **options: Any) -> Iterator[Chunk]:
        """The assistant's next message in pieces."""
        return (chunk for _, chunk in self.run([self.chat_request(messages, **options)]))

    def request(self, prompt: str, **options: Any) -> Request:
        """A prompt as a request, with the bundle's defaults."""
        ids = self.tokenizer.encode(prompt, parse_special=True, add_special=self.bundle.generation.add_special)
        if getattr(self.model, "reads_source", False):
            return self.asked(self.bundle.generation.start_ids or (self.bundle.generation.pad_id,), ids, **options)
        return self.asked(ids, None, **options)

    def chat_request(self, messages: Messages | str, **options: Any) -> Request:
        """Messages as a request."""
        said = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return self.asked(self.template.encode(said, add_generation_prompt=True), None, **options)

    def asked(self, token_ids: Sequence[int], source_ids: Sequence[int] | None, /, **options: Any) -> Request:
        """Token ids and options as a request; beams leave the bundle's own temperature aside. RequestError names an option that does not exist."""
        defaults = self.bundle.generation
        names = set(Sampling.__dataclass_fields__)
        sampling = Sampling(defaults.temperature, defaults.top_k, defaults.top_p, repetition_penalty=defaults.repetition_penalty)
        sampling = replace(sampling, **{name: value for name, value in options.items() if name in names and value is not None})
        rest = {name: value for name, value in options.items() if name not in names and value is not None}
        if rest.get("n_beams", 1) != 1 and options.get("temperature") is None:
            sampling = replace(sampling, temperature=0.0)
        known = {"n", "max_new_tokens", "min_new_tokens", "stop", "stop_ids", "n_beams", "length_penalty", "beyond_context"}
        for name in rest:
            if name not in known:
                raise RequestError(f"unknown option '{name}'; {nearest(name, names | known)}")
        if "length_penalty" in rest and rest.get("n_beams", 1) == 1:
            raise RequestError("a length penalty was given, and it scores beams, of which there are none; ask for 2 beams or more, or leave it out")
        if isinstance(rest.get("stop"), str):
            rest["stop"] = (rest["stop"],)
        return Request(token_ids, source_ids, sampling=sampling, **{"stop_ids": defaults.stop_ids, **rest})

    def check(self, request: Request) -> None:
        """RequestError for a request that this model cannot serve."""
        if self.family.kind == "encoder":
            raise RequestError(f"{self.where} is an encoder ({self.family.name}): it does not write; use embed", "unsupported")
        check(self.model, request, self.config.max_seq_len)

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Chunk]]:
        """All answers side by side, in pieces: (request number, chunk)."""
        for request in requests:
            self.check(request)
        return run(self.model, requests, self.tokenizer, self.config.max_seq_len)

    def answers(self, requests: Sequence[Request]) -> list[list[Answer]]:
        """All answers, whole."""
        pieces: list[list[list[Chunk]]] = [[[] for _ in range(request.n)] for request in requests]
        for number, chunk in self.run(requests):
            pieces[number][chunk.index].append(chunk)
        return [[whole(chunks, len(request.source_ids or request.token_ids)) for chunks in answers if chunks]
                for request, answers in zip(requests, pieces)]

    # ---- reading -----------------------------------------------------------------------------------------------
    def score(self, text: str) -> Score:
        """How well the model predicts a text: tokens, loss (nats a token), perplexity, bits_per_byte.

        No special tokens are added; the first token is context only; windows of the context's length advance by half of it, and every other token
        is scored once. RequestError for models that do not predict what comes next.
        """
        if self.family.objective != "causal":
            raise RequestError(f"{self.where} is a {self.family.name}: it does not predict a text's next token, so it cannot score it", "unsupported")
        return score_text(self.model, self.tokenizer, text, self.config.max_seq_len, self.device)

    @torch.inference_mode()
    def next_tokens(self, prompt: str, temperatures: Sequence[float] = (1.0,), *, top: int = 10, top_k: int = 0,
                    top_p: float = 1.0) -> list[NextTokens]:
        """What the model expects after a prompt, at each temperature: the `top` likeliest tokens, their probabilities, the entropy in bits.

        For an encoder-decoder the prompt is the source. RequestError for an encoder, and for a prompt that is empty or beyond the context.
        """
        if self.family.kind == "encoder":
            raise RequestError(f"{self.where} is an encoder ({self.family.name}): it does not say what comes next; use attention or embed",
                               "unsupported")
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token")
        request, most = self.request(prompt), self.config.max_seq_len
        n = len(request.source_ids or request.token_ids)
        if n > most:
            raise RequestError(f"the prompt has {n} tokens, the model's context {most}; shorten it by at least {n - most}", "too_long")
        hidden = self.model.hidden(self.batch(request.token_ids, request.source_ids))     # (1,T,D)
        return next_tokens(self.model.head(hidden[0, -1]).cpu(), self.tokenizer, temperatures, top, top_k, top_p)

    def attention(self, text: str, source: str | None = None, *, side: str | None = None, max_new_tokens: int | None = None) -> Attention:
        """Who looks at whom in a text, in every head of every layer: `of_word(word)` ranks what a word looks at, `between(word, other)` is (L,H).

        For an encoder-decoder `text` is the source, and the answer that the model writes (the likeliest token each time, `max_new_tokens` of them at
        most; None: 32) looks at it, a row for each token that is written next; with a `source`, `text` is what is written. `onto(word)` ranks who
        looks at a word of the source. The sides "source" and "answer", in place of "cross", let each look at itself, a row for each token that is
        read. RequestError for an empty text, one that is too long, a side without attention, and what a model has no use for.
        """
        if not getattr(self.model, "reads_source", False):
            for name, given in (("the source", source), ("the side", side), ("max_new_tokens", max_new_tokens)):
                if given is not None:
                    raise RequestError(f"{name} was given, and {self.where} is a {self.family.name}: it reads one text; leave {name} out")
            ids, words = self.read(text, "text")
            seen = probe(self.bundle.model, self.batch(ids))
            return Attention(words, words, stacked(seen.self_attention), stacked(seen.hidden), self.family.kind == "decoder")
        if side not in (None, *SIDES):
            raise RequestError(f"unknown side '{side}'; {nearest(str(side), SIDES)}")
        if max_new_tokens is not None and (source is not None or side == "source"):
            raise RequestError("max_new_tokens was given, and the model need not write: it was given the answer, or none is looked at; leave it out")
        if side == "source":
            return self.source_at_itself(text, source)
        return self.answer_at(side or "cross", text, source, 32 if max_new_tokens is None else max_new_tokens)

    def source_at_itself(self, text: str, source: str | None) -> Attention:
        """An encoder's own attention."""
        encoder: Any = self.bundle.model.encoder
        if source is not None:
            raise RequestError("the source alone is looked at, and a source and a text were given; give the source as the text, or another side")
        if not has_attention(encoder):
            raise RequestError(f"the encoder of {self.where} ({self.family.name}) has no attention of its own; leave the side out", "unsupported")
        ids, words = self.read(text, "source")
        seen = probe(encoder, self.batch(ids))
        return Attention(words, words, stacked(seen.self_attention), stacked(seen.hidden))

    def answer_at(self, side: str, text: str, source: str | None, max_new_tokens: int) -> Attention:
        """A decoder's attention, at the source or at what it has read itself."""
        start = list(self.bundle.generation.start_ids or (self.bundle.generation.pad_id,))
        source_ids, columns = self.read(text if source is None else source, "source")
        if source is not None:
            ids, rows = self.read(text, "text", len(start) if side == "answer" else len(start) - 1)
            rows = replace(rows, name="answer")
        elif max_new_tokens > MOST_TOKENS:
            raise RequestError(f"max_new_tokens is {max_new_tokens}; attention is looked at in {MOST_TOKENS} tokens at most", "too_long")
        else:
            ids = list(self.generate(text, temperature=0.0, max_new_tokens=max_new_tokens).token_ids)
            rows = words_of_ids(ids, self.tokenizer, "answer")
            if not ids:
                raise RequestError("the model answers this source with nothing; give the text that it should write: source and text")
        if side == "answer":
            seen, rows = probe(self.bundle.model, self.batch([*start, *ids], source_ids)), rows.begun_with(start, self.tokenizer)
            if not seen.self_attention:
                raise RequestError(f"the decoder of {self.where} ({self.family.name}) has no attention of its own; leave the side out", "unsupported")
            return Attention(rows, rows, stacked(seen.self_attention), stacked(seen.hidden), True)
        seen = probe(self.bundle.model, self.batch([*start, *ids[:-1]], source_ids))
        return Attention(rows, columns, stacked(seen.cross_attention)[:, :, -len(ids):], stacked(seen.hidden)[:, -len(ids):])

    def read(self, text: str, name: str, n_before: int = 0) -> tuple[list[int], Words]:
        """A text as the model reads it, `n_before` tokens before it: token ids, and their words."""
        if not text.strip():
            raise RequestError(f"the {name} is empty; a few words were expected")
        ids, offsets = self.tokenizer.encode_with_offsets(text, add_special=self.bundle.generation.add_special)
        most = self.config.max_seq_len - n_before
        if len(ids) > most:
            raise RequestError(f"the {name} has {len(ids)} tokens, the model's context {most}; shorten it by at least {len(ids) - most}", "too_long")
        if len(ids) > MOST_TOKENS:
            raise RequestError(f"the {name} has {len(ids)} tokens; attention is looked at in {MOST_TOKENS} at most: give a part of it", "too_long")
        return ids, words_of(text, ids, offsets, self.tokenizer, name)

    def batch(self, token_ids: Sequence[int], source_ids: Sequence[int] | None = None) -> Batch:
        """One row."""
        source = None if source_ids is None else torch.tensor([source_ids], device=self.device)
        return Batch(torch.tensor([token_ids], device=self.device), source_ids=source)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], batch_size: int = 32) -> Tensor:
        """A vector of length 1 for each text: (N,D), pooled from the last hidden vectors as generation.json says (mean, where it says nothing).

        A text beyond the context is cut there. RequestError for an empty text.
        """
        generation = self.bundle.generation
        if batch_size < 1:
            raise RequestError(f"batch_size is {batch_size}; expected 1 or more")
        if isinstance(texts, str):
            raise RequestError("embed takes a list of texts; got one string: write [text]")
        specials = set(self.tokenizer.specials.values())
        ids = [cut(row, self.config.max_seq_len, specials) for row in self.tokenizer.encode_batch(texts, add_special=generation.add_special)]
        empty = next((i for i, row in enumerate(ids) if not row), None)
        if empty is not None:
            raise RequestError(f"text {empty} is empty; nothing can be said of it")
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))                        # rows of like length pad each other least
        parts = [self.pooled([ids[i] for i in order[begin:begin + batch_size]]) for begin in range(0, len(order), batch_size)]
        vectors = torch.cat(parts).float().cpu() if parts else torch.empty(0, self.config.d_model)
        return vectors[torch.tensor(order, dtype=torch.long).argsort()]

    def pooled(self, rows: list[list[int]]) -> Tensor:                                    # -> (B,D)
        token_ids, lengths = pad_rows(rows, self.bundle.generation.pad_id, self.device)
        keep = keep_of(lengths, self.device)
        reader = getattr(self.model, "encoder", self.model)
        hidden = reader.hidden(Batch(token_ids, keep=keep))                               # (B,T,D)
        match self.bundle.generation.pooling:
            case "first":
                vectors = hidden[:, 0]
            case "last":
                vectors = hidden[torch.arange(len(rows)), torch.tensor(lengths) - 1]
            case _:
                weight = torch.ones_like(token_ids) if keep is None else keep
                vectors = (hidden * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
        return torch.nn.functional.normalize(vectors, dim=-1)


def cut(row: list[int], most: int, specials: Collection[int]) -> list[int]:
    """A row's first `most` tokens; the special one that ends it ([SEP], </s>) stays its end."""
    end = row[-1:] if len(row) > most and row[-1] in specials else []
    return row[:most - len(end)] + end


def stacked(layers: Sequence[Tensor]) -> Tensor:
    """The first row of every layer: L x (B,...) -> (L,...), in float32 on the CPU."""
    return torch.stack([layer[0] for layer in layers]).float().cpu()


def whole(chunks: Sequence[Chunk], n_prompt_tokens: int) -> Answer:
    """One answer's pieces, put together."""
    token_ids = tuple(token_id for chunk in chunks for token_id in chunk.token_ids)
    return Answer("".join(chunk.text for chunk in chunks), token_ids, chunks[-1].finish_reason or "", n_prompt_tokens, chunks[-1].score)


def load(path: str | Path, rows: int = 1) -> LoadedModel:
    """Opens a bundle. HanokError, in one line, for anything that is wrong with it.

    `rows`: how many answers (or beams) will be written side by side. Above 1 a CPU gets a copy of the weights that is laid out for that: twice the
    memory, and 4 to 16 rows in 0.7 of the time.
    """
    if rows < 1:
        raise RequestError(f"rows is {rows}; expected 1 or more")
    return LoadedModel(load_bundle(path), str(path), rows)
