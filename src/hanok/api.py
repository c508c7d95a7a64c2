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

from hanok.bundle.bundle import Bundle, check_tokenizer, load_bundle
from hanok.contracts import Batch, Chunk, Request, Sampling
from hanok.errors import RequestError, nearest
from hanok.evaluate.score import Score, score_text
from hanok.generate.run import run
from hanok.generate.search import keep_of, pad_rows
from hanok.nn.lower import lower
from hanok.text.chat import ChatTemplate
from hanok.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Answer:
    """What a model wrote."""
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str                       # stop or length
    n_prompt_tokens: int                     # of an encoder-decoder: of its source

    def __str__(self) -> str:
        return self.text


class LoadedModel:
    """A bundle that is ready to be used. `bundle.model` is the plain model, `model` the same weights put together for inference."""

    def __init__(self, bundle: Bundle, where: str = "this model"):
        self.bundle, self.where, self.config, self.family = bundle, where, bundle.config, bundle.family
        self.model: Any = lower(bundle.model)

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

        Options: max_new_tokens, min_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, seed,
        stop (strings), stop_ids. The prompt's special tokens are parsed. RequestError for what cannot be served.
        """
        if options.get("n", 1) != 1:
            raise RequestError("generate gives one answer; for several use generate_many([prompt], n=...)")
        return self.generate_many([prompt], **options)[0][0]

    def generate_many(self, prompts: Sequence[str], n: int = 1, **options: Any) -> list[list[Answer]]:
        """`n` answers to each prompt, all in one batch."""
        if isinstance(prompts, str):
            raise RequestError("generate_many takes a list of prompts; got one string: write [prompt]")
        if not isinstance(n, int):
            raise RequestError(f"n is {n!r}; expected a whole number")
        requests = [self.request(prompt, n=n, **options) for prompt in prompts]
        return self.answers(requests)

    def stream(self, prompt: str, **options: Any) -> Iterator[Chunk]:
        """One answer in pieces, as soon as each is certain."""
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
        """Token ids and options as a request. RequestError names an option that does not exist."""
        defaults = self.bundle.generation
        names = set(Sampling.__dataclass_fields__)
        sampling = Sampling(defaults.temperature, defaults.top_k, defaults.top_p, repetition_penalty=defaults.repetition_penalty)
        sampling = replace(sampling, **{name: value for name, value in options.items() if name in names and value is not None})
        rest = {name: value for name, value in options.items() if name not in names and value is not None}
        known = {"n", "max_new_tokens", "min_new_tokens", "stop", "stop_ids"}
        for name in rest:
            if name not in known:
                raise RequestError(f"unknown option '{name}'; {nearest(name, names | known)}")
        if isinstance(rest.get("stop"), str):
            rest["stop"] = (rest["stop"],)
        return Request(token_ids, source_ids, sampling=sampling, **{"stop_ids": defaults.stop_ids, **rest})

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Chunk]]:
        """All answers side by side, in pieces: (request number, chunk)."""
        if self.family.kind == "encoder":
            raise RequestError(f"{self.where} is an encoder ({self.family.name}): it does not write; use embed", "unsupported")
        return run(self.model, requests, self.tokenizer, self.config.max_seq_len)

    def answers(self, requests: Sequence[Request]) -> list[list[Answer]]:
        """All answers, whole."""
        pieces: list[list[list[Chunk]]] = [[[] for _ in range(request.n)] for request in requests]
        for number, chunk in self.run(requests):
            pieces[number][chunk.index].append(chunk)
        return [[whole(chunks, len(request.source_ids or request.token_ids)) for chunks in answers] for request, answers in zip(requests, pieces)]

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
        vectors = torch.empty(len(ids), self.config.d_model)
        for begin in range(0, len(order), batch_size):
            chosen = order[begin:begin + batch_size]
            vectors[chosen] = self.pooled([ids[i] for i in chosen]).float().cpu()
        return vectors

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


def whole(chunks: Sequence[Chunk], n_prompt_tokens: int) -> Answer:
    """One answer's pieces, put together."""
    token_ids = tuple(token_id for chunk in chunks for token_id in chunk.token_ids)
    return Answer("".join(chunk.text for chunk in chunks), token_ids, chunks[-1].finish_reason or "", n_prompt_tokens)


def load(path: str | Path) -> LoadedModel:
    """Opens a bundle. HanokError, in one line, for anything that is wrong with it."""
    return LoadedModel(load_bundle(path), str(path))
