"""Attention in words: tokens are gathered into the words that a person reads, and a word's weights are ranked.

A word that is cut into pieces looks as their mean and is looked at as their sum, so that each row still sums to 1 (as Clark et al. do,
arXiv:1906.04341, section 4.1). Special tokens and bare spaces belong to no word; they stand for themselves, since much weight rests on them.
Layers and heads are counted from 1; layer 0 is the embedding. L layers, H heads, T tokens that look, S tokens looked at, N and M their words.
"""
from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hanok.errors import RequestError
from hanok.generate.distribution import spelled
from hanok.text.tokenizer import Tokenizer

MOST_TOKENS = 256
"""Tokens of a text whose weights are held at once: L x H x T x T numbers, 71 MB for SmolLM2's 270 heads."""
VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\r": "⏎", "\t": "⇥"})


@dataclass(frozen=True)
class Words:
    """A text as tokens and as words. Words that come again are numbered: the, the (2)."""
    text: str
    tokens: tuple[str, ...]                  # the piece of text that each token covers; a special token as the vocabulary spells it
    words: tuple[str, ...]                   # in the order of the text, special tokens among them
    positions: tuple[tuple[int, ...], ...]   # of each word: its tokens
    spans: tuple[tuple[int, int], ...]       # of each word: its characters, (start, end); empty for a special token
    special: tuple[bool, ...]                # of each word: whether it is none, but a special token or a bare space
    name: str = "text"                       # which text it is: text, source or answer

    @property
    def real(self) -> list[str]:
        """The words without the special tokens."""
        return [word for word, special in zip(self.words, self.special) if not special]

    def find(self, word: str) -> int | None:
        """Where a word stands; upper and lower case are one where there is no exact match. None where it is not."""
        for known, wanted in ((self.words, word), ([known.casefold() for known in self.words], word.casefold())):
            if wanted in known:
                return known.index(wanted)
        return None

    def index(self, word: str) -> int:
        """Where a word stands. RequestError lists the words."""
        at = self.find(word)
        if at is None:
            raise RequestError(f"'{word}' is not a word of the {self.name}; its words are {', '.join(self.real)}")
        return at

    def begun_with(self, token_ids: Sequence[int], tokenizer: Tokenizer) -> Words:
        """The words behind the tokens that a decoder begins with, which are special."""
        first, n = [spelled(token_id, tokenizer) for token_id in token_ids], len(token_ids)
        return replace(self, tokens=(*first, *self.tokens), words=tuple(numbered([*first, *self.words])), spans=(*[(0, 0)] * n, *self.spans),
                       positions=(*((i,) for i in range(n)), *(tuple(i + n for i in at) for at in self.positions)),
                       special=(*[True] * n, *self.special))


@dataclass(frozen=True)
class Attention:
    """Who looks at whom: `rows` look, `columns` are looked at; of one text they are the same, of an encoder-decoder answer and source."""
    rows: Words
    columns: Words
    weights: Tensor                          # (L,H,T,S) by tokens, float32; a row sums to 1
    hidden: Tensor                           # (L+1,T,D) the vectors of the tokens that look
    is_causal: bool = False                  # no token sees what stands behind it

    @property
    def tokens(self) -> tuple[str, ...]:
        return self.rows.tokens

    @property
    def words(self) -> tuple[str, ...]:
        return self.rows.words

    @property
    def is_cross(self) -> bool:
        """Whether one text looks at another."""
        return self.rows is not self.columns

    @property
    def n_layers(self) -> int:
        return self.weights.size(0)

    @property
    def n_heads(self) -> int:
        return self.weights.size(1)

    @cached_property
    def by_word(self) -> Tensor:
        """(L,H,N,M): pieces of a word averaged where it looks, summed where it is looked at."""
        rows = torch.stack([self.weights[:, :, list(at)].mean(2) for at in self.rows.positions], 2)
        return torch.stack([rows[..., list(at)].sum(-1) for at in self.columns.positions], -1)

    def matrix(self, layer: int | None = None, head: int | None = None) -> Tensor:
        """(N,M) of one head; of the mean over heads, or over layers too, where they are not named. RequestError says how many there are."""
        weights = self.by_word
        for dim, name, number in ((0, "layer", layer), (1, "head", head)):
            most = weights.size(dim)
            if number is not None:
                if not 1 <= number <= most:
                    raise RequestError(f"there is no {name} {number}; this model has {most}, counted from 1")
                weights = weights.narrow(dim, number - 1, 1)
        return weights.mean((0, 1))

    def of_word(self, word: str, layer: int | None = None, head: int | None = None) -> list[tuple[str, float]]:
        """What a word looks at, strongest first, special tokens apart. RequestError for a word, layer or head that is not there."""
        row = self.matrix(layer, head)[self.rows.index(word)].tolist()
        seen = [(name, weight) for name, weight, special in zip(self.columns.words, row, self.columns.special) if not special]
        return sorted(seen, key=lambda pair: -pair[1])

    def onto(self, word: str, layer: int | None = None, head: int | None = None) -> list[tuple[str, float]]:
        """Who looks at a word, and with how much of its weight, strongest first, special tokens apart. RequestError as of_word's."""
        column = self.matrix(layer, head)[:, self.columns.index(word)].tolist()
        seen = [(name, weight) for name, weight, special in zip(self.rows.words, column, self.rows.special) if not special]
        return sorted(seen, key=lambda pair: -pair[1])

    def to_specials(self, word: str, layer: int | None = None, head: int | None = None) -> float:
        """The share of a word's weight that rests on special tokens."""
        row = self.matrix(layer, head)[self.rows.index(word)]
        return float(row[torch.tensor(self.columns.special)].sum())

    def between(self, word: str, other: str) -> Tensor:
        """(L,H): how strongly every head lets `word` look at `other`."""
        return self.by_word[:, :, self.rows.index(word), self.columns.index(other)]

    def heads_between(self, word: str, other: str, n: int = 3) -> list[tuple[int, int, float]]:
        """The n heads that tie `word` most strongly to `other`: (layer, head, weight)."""
        values, places = self.between(word, other).flatten().topk(min(n, self.n_layers * self.n_heads))
        return [(place // self.n_heads + 1, place % self.n_heads + 1, value) for value, place in zip(values.tolist(), places.tolist())]

    def vectors(self, word: str) -> Tensor:
        """(L+1,D): a word's vector behind the embedding and behind every layer, the mean of its tokens'."""
        return self.hidden[:, list(self.rows.positions[self.rows.index(word)])].mean(1)


def words_of(text: str, token_ids: Sequence[int], offsets: Sequence[tuple[int, int]], tokenizer: Tokenizer, name: str = "text") -> Words:
    """Gathers tokens into words; `offsets` are the characters that each covers. A token goes where most of its characters are, a space that is a
    token of its own to the word that it leads."""
    spans = list(word_spans(text))

    def owner_of(span: tuple[int, int]) -> int:
        best = max(range(len(spans)), key=lambda i: overlap(span, spans[i]), default=-1)
        if best >= 0 and overlap(span, spans[best]):
            return best
        leads = text[slice(*span)] == " "
        return next((i for i, (start, _) in enumerate(spans) if leads and start == span[1]), -1)

    owners = [owner_of(span) for span in offsets]
    tokens = tuple(text[start:end].translate(VISIBLE) if end > start else spelled(token_id, tokenizer)
                   for token_id, (start, end) in zip(token_ids, offsets))
    groups: list[tuple[int, list[int]]] = []
    for position, owner in enumerate(owners):
        if owner >= 0 and groups and groups[-1][0] == owner:
            groups[-1][1].append(position)
        else:
            groups.append((owner, [position]))
    names = [tokens[at[0]] if owner < 0 else text[slice(*spans[owner])] for owner, at in groups]
    return Words(text, tokens, tuple(numbered(names)), tuple(tuple(at) for _, at in groups),
                 tuple((0, 0) if owner < 0 else spans[owner] for owner, _ in groups), tuple(owner < 0 for owner, _ in groups), name)


def words_of_ids(token_ids: Sequence[int], tokenizer: Tokenizer, name: str = "text") -> Words:
    """The words of a text that is known by its tokens: what a model wrote."""
    stream, pieces = tokenizer.stream(), []
    for token_id in token_ids:
        pieces.append(stream.push(token_id))
    text, ends = "".join(pieces) + stream.flush(), [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    specials = set(tokenizer.specials.values())
    offsets = [(start, end if end > start or token_id in specials else min(start + 1, len(text)))     # a part of a character belongs to it
               for token_id, start, end in zip(token_ids, ends, ends[1:])]
    return words_of(text, token_ids, offsets, tokenizer, name)


def word_spans(text: str) -> Iterable[tuple[int, int]]:
    """The characters of each word, (start, end): runs of letters and digits, or of other signs; Chinese and Japanese signs one by one.

    Marks, joiners and apostrophes inside a word belong to what stands before them, so that an emoji of several signs is one word.
    """
    start, before = 0, "space"
    for i, character in enumerate(text):
        if before != "space" and belongs(character, before, text[i + 1:i + 2]):
            continue
        kind = kind_of(character)
        if kind != before or kind == "sign":
            if before != "space":
                yield start, i
            start = i
        before = kind
    if before != "space":
        yield start, len(text)


def belongs(character: str, before: str, after: str) -> bool:
    return unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf") or (character in "'’" and before == "word" and after.isalpha())


def kind_of(character: str) -> str:
    if character.isspace():
        return "space"
    if "\u3040" <= character <= "\u30ff" or "\u3400" <= character <= "\u9fff":
        return "sign"
    return "word" if character.isalnum() or character == "_" else "other"


def overlap(one: tuple[int, int], other: tuple[int, int]) -> int:
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))


def quoted(text: str, most: int | None = None) -> str:
    """A text on one line, cut where it is longer than `most` characters."""
    line = " ".join(text.split())
    return f'"{line if most is None or len(line) <= most else line[:most - 1] + "…"}"'


def numbered(names: Sequence[str]) -> list[str]:
    """A name that comes again says so: a, b, a (2)."""
    seen: Counter[str] = Counter()
    told = []
    for name in names:
        seen[name] += 1
        told.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return told
