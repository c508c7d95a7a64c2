"""One word in several sentences: what it looks at, which heads tie it to what, and towards which meaning its vector moves, layer by layer.

A meaning is a word put in the studied word's place in the same sentence; the cosine of the two vectors at that place says how alike they are there.
What is told at the end is worked out from the numbers, for and against: weights say who looks at whom, not what becomes of it.
L layers, H heads, D d_model.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity

from hanok.attention_view import Attention
from hanok.errors import RequestError

SAME = 1e-5
"""The share of its largest number by which one vector may differ from itself: kernels choose other sums for other row counts."""
Look = Callable[[str], Attention]
"""A text -> who looks at whom in it."""


@dataclass(frozen=True)
class InSentence:
    """The studied word in one sentence."""
    attention: Attention
    word: str                                # as it stands there
    partner: str | None                      # the word that one head ties it to most strongly; where there are other sentences, one of its own
    behind: tuple[str, ...]                  # of a causal model: the words that it cannot see
    meanings: dict[str, Tensor]              # (L+1,) cosines with each meaning in its place
    cut_difference: float | None             # of a causal model: the largest change in its vectors when what stands behind it is cut off, a share

    @property
    def text(self) -> str:
        return self.attention.rows.text

    def tie(self, other: str) -> tuple[float, tuple[int, int, float]]:
        """How strongly the word looks at another: on average, and in the head that does so most (layer, head, weight)."""
        return float(self.attention.between(self.word, other).mean()), self.attention.heads_between(self.word, other, 1)[0]

    @property
    def link(self) -> tuple[str, str] | None:
        """Who looks at whom: the word at its partner; in a causal model the word behind that looks back most, where there is one."""
        if self.behind:
            return max(self.behind, key=lambda other: float(self.attention.between(other, self.word).mean())), self.word
        return None if self.partner is None else (self.word, self.partner)

    def rank(self, other: str) -> int:
        """1 for the word that it looks at most, itself left out."""
        ranked = [name for name, _ in self.attention.of_word(self.word) if name != self.word]
        return ranked.index(other) + 1

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        told: dict[str, Any] = {
            "text": self.text, "word": self.word, "looks_at": [{"word": name, "weight": w} for name, w in self.attention.of_word(self.word)],
            "to_special_tokens": self.attention.to_specials(self.word), "cannot_see": list(self.behind)}
        if self.link is not None:
            told["link"] = {"looks": self.link[0], "at": self.link[1], "heads": [
                {"layer": layer, "head": head, "weight": w} for layer, head, w in self.attention.heads_between(*self.link)]}
        if self.meanings:
            told["meanings"] = {name: values.tolist() for name, values in self.meanings.items()}
        return told


@dataclass(frozen=True)
class WordStudy:
    """What was seen of a word in all sentences."""
    word: str
    sentences: tuple[InSentence, ...]
    alike: Tensor | None                     # (L+1,) cosines of its vectors in the first two sentences

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"word": self.word, "sentences": [sentence.to_dict() for sentence in self.sentences],
                "alike": None if self.alike is None else self.alike.tolist(), "findings": self.findings()}

    def verdicts(self) -> list[str]:
        """The findings that say of a claim whether it holds."""
        return [line for line in self.findings() if line.startswith(("Holds", "Does not hold", "Cannot hold"))]

    def findings(self) -> list[str]:
        """Plain sentences, each from the numbers: what is tied to what, what follows order alone, and what becomes of the meaning."""
        told = [line for sentence in self.sentences for line in behind(sentence, "Cannot hold: in" if len(self.sentences) == 2 else "In")]
        if not any(sentence.behind for sentence in self.sentences):
            told += compared(*self.sentences) if len(self.sentences) == 2 and all(sentence.partner for sentence in self.sentences) else []
            told += [line for sentence in self.sentences for line in by_order(sentence)]
        told += [nearest_meaning(sentence) for sentence in self.sentences if sentence.meanings]
        if len(self.sentences) == 2 and len(self.sentences[0].meanings) > 1:
            told += [moved(*self.sentences)]
        if self.alike is not None:
            causes = "what stands before it" if self.sentences[0].attention.is_causal else "its sentences"
            told.append(f"The two vectors of '{self.word}' have a cosine of {self.alike[0]:.3f} at the embedding and {self.alike[-1]:.3f} behind the "
                        f"last layer: {causes} {'moved' if self.alike[-1] < self.alike[0] - 5e-4 else 'did not move'} them apart.")
        return told


def study(look: Look, texts: Sequence[str], word: str, meanings: Sequence[str] = ()) -> WordStudy:
    """Looks at `word` in each text, and at each meaning in its place. RequestError where a text lacks the word."""
    seen = [look(text) for text in texts]
    names = [attention.rows.words[attention.rows.index(word)] for attention in seen]
    sentences = []
    for i, (attention, name) in enumerate(zip(seen, names)):
        others = {known.casefold() for j, other in enumerate(seen) if j != i for known in other.columns.real}
        at = attention.rows.index(name)
        hidden_words = attention.columns.words[at + 1:] if attention.is_causal else ()
        real = set(attention.columns.real)
        sentences.append(InSentence(
            attention, name, partner_of(attention, name, others), tuple(other for other in hidden_words if other in real),
            {meaning: cosines(attention.vectors(name), in_place(look, attention, name, meaning)) for meaning in dict.fromkeys(meanings)},
            cut_difference(look, attention, name) if hidden_words else None))
    alike = cosines(seen[0].vectors(names[0]), seen[1].vectors(names[1])) if len(seen) > 1 and not seen[0].is_cross else None
    return WordStudy(word, tuple(sentences), alike)


def partner_of(attention: Attention, word: str, others: set[str]) -> str | None:
    """The word that one head ties `word` to most strongly, if there is any but itself and what the other sentences hold too."""
    first = attention.columns.real[:1] if attention.is_causal else []                 # what has nothing to look at looks there
    own = [name for name in attention.columns.real if (attention.is_cross or name != word) and name.casefold() not in others and name not in first]
    strengths = {name: float(attention.between(word, name).max()) for name in own}
    best = max(own, key=lambda name: strengths[name], default=None)
    return best if best is not None and strengths[best] > 0 else None


def in_place(look: Look, attention: Attention, word: str, meaning: str) -> Tensor:
    """(L+1,D): the vectors of `meaning` where `word` stood. RequestError where it is no word, or the model reads no text of its own."""
    if attention.is_cross:
        raise RequestError("a meaning is put in the place of a word that is read, and an encoder-decoder writes these; leave meanings out",
                           "unsupported")
    start, end = attention.rows.spans[attention.rows.index(word)]
    text = attention.rows.text
    other = look(text[:start] + meaning + text[end:])
    places = [i for i, (begin, stop) in enumerate(other.rows.spans) if begin < start + len(meaning) and stop > start]
    if not meaning.strip() or not places:
        raise RequestError(f"the meaning {meaning!r} leaves nothing in the place of '{word}'; a word was expected")
    tokens = [token for i in places for token in other.rows.positions[i]]
    return other.hidden[:, tokens].mean(1)


def cut_difference(look: Look, attention: Attention, word: str) -> float:
    """The largest difference between a word's vectors with and without what stands behind it, as a share of the largest number in them."""
    at = attention.rows.index(word)
    shorter = look(attention.rows.text[:attention.rows.spans[at][1]])
    if at >= len(shorter.rows.words):
        return float("nan")
    whole = attention.vectors(word)
    return float((shorter.vectors(shorter.rows.words[at]) - whole).abs().max() / whole.abs().max())


def cosines(one: Tensor, other: Tensor) -> Tensor:                                    # 2 x (L+1,D) -> (L+1,)
    return cosine_similarity(one, other, dim=-1)


# ---- in plain sentences ------------------------------------------------------------------------------------------
def percent(share: float) -> str:
    """0.0527 -> 5.3%."""
    return f"{100 * share:.0f}%" if share >= 0.0995 or share == 0 else f"{100 * share:.1f}%" if share >= 5e-4 else "under 0.1%"


def quoted(text: str, most: int = 40) -> str:
    """A text on one line, cut where it is long."""
    line = " ".join(text.split())
    return f'"{line if len(line) <= most else line[:most - 1] + "…"}"'


def behind(sentence: InSentence, begin: str) -> list[str]:
    """What a causal model's word cannot see, and who looks back at it."""
    if not sentence.behind:
        return []
    assert sentence.link is not None
    attention, word, other = sentence.attention, sentence.word, sentence.link[0]
    forward = float(attention.between(word, other).max())
    back, (layer, head, most) = float(attention.between(other, word).mean()), attention.heads_between(other, word, 1)[0]
    n = attention.n_layers * attention.n_heads
    difference = sentence.cut_difference or 0.0
    same = "the same vector" if difference < SAME else "another"
    return [f"{begin} {quoted(sentence.text)} '{word}' cannot see '{other}', which stands behind it: weight {forward:g} in all "
            f"{n} heads. It is '{other}' that looks at '{word}': {percent(back)} of its weight on average, {percent(most)} in head {layer}.{head}.",
            f"Only what stands before '{word}' can change it: cut off behind it, the sentence gives {same} (the difference is {difference:.1g} of "
            "its largest number)."]


def compared(one: InSentence, other: InSentence) -> list[str]:
    """Whether the word is tied more strongly to its partner in the first sentence than to its partner in the second."""
    assert one.partner is not None and other.partner is not None
    (mean, top), (other_mean, other_top) = one.tie(one.partner), other.tie(other.partner)
    ties = f"'{one.word}' is tied more strongly to '{one.partner}' than to '{other.partner}'"

    def verdict(where: str, a: float, b: float, more: str = "") -> str:
        return f"{'Holds' if a > b else 'Does not hold'} {where}: {ties}: {percent(a)} of its weight against {percent(b)}{more}."

    n = one.attention.n_layers * one.attention.n_heads
    return [verdict(f"on the average of all {n} heads", mean, other_mean,
                    f"; it ranks {one.rank(one.partner)} and {other.rank(other.partner)} among the other words"),
            verdict("in the strongest head for each", top[2], other_top[2], f" (heads {top[0]}.{top[1]} and {other_top[0]}.{other_top[1]})")]


def by_order(sentence: InSentence) -> list[str]:
    """Whether the partner's strongest head looks as far to the side from every word: then it follows order, not meaning."""
    if sentence.partner is None or sentence.attention.is_cross:
        return []
    layer, head, weight = sentence.tie(sentence.partner)[1]
    words, matrix = sentence.attention.rows, sentence.attention.matrix(layer, head)
    at, step = words.index(sentence.word), words.index(sentence.partner) - words.index(sentence.word)
    shares = [float(matrix[i, i + step]) for i in range(len(words.words))
              if i != at and 0 <= i + step < len(words.words) and not words.special[i] and not words.special[i + step]]
    if not shares:
        return []
    mean = sum(shares) / len(shares)
    distance = f"the word {abs(step)} places {'on' if step > 0 else 'back'}"
    side = {1: "the next word", -1: "the word before"}.get(step, distance)
    verdict = ("it follows order, whatever the words mean" if mean >= weight / 2 else "it does not do so by order alone")
    return [f"Head {layer}.{head}, which ties '{sentence.word}' to '{sentence.partner}' ({percent(weight)}), gives {side} {percent(mean)} from the "
            f"other words of {quoted(sentence.text)}: {verdict}."]


def nearest_meaning(sentence: InSentence) -> str:
    """The meaning that the word's vector is nearest to behind the last layer, and at the embedding."""
    ranked = sorted(((float(values[-1]), name) for name, values in sentence.meanings.items()), reverse=True)
    first = max(sentence.meanings, key=lambda name: float(sentence.meanings[name][0]))
    told = ", ".join(f"'{name}' {value:.3f}" for value, name in ranked)
    where = f"In {quoted(sentence.text)} '{sentence.word}'"
    if len(ranked) == 1:
        return f"{where} ends with a cosine of {told} in its place."
    change = "so it was at the embedding" if ranked[0][1] == first else f"at the embedding it was '{first}'"
    return f"{where} ends nearest to '{ranked[0][1]}' (cosines: {told}); {change}."


def moved(one: InSentence, other: InSentence) -> str:
    """How the first sentence, beside the second, moves the word towards the first meaning, and away from the last."""
    changes = {name: one.meanings[name] - other.meanings[name] for name in one.meanings}
    last = ", ".join(f"'{name}' {float(change[-1]):+.3f}" for name, change in changes.items())
    wanted, *_, unwanted = changes
    gain = changes[wanted] - changes[unwanted]                                        # (L+1,)
    best, n = int(gain.argmax()), len(gain) - 1
    most = f", most behind layer {best} ({float(gain[best]):+.3f})" if gain[best] > 0 else ""
    layers = f"it does behind {int((gain[1:] > 0).sum())} of {n} layers{most}"
    return (f"{'Holds' if float(gain[-1]) > 0 else 'Does not hold'} behind the last layer: beside {quoted(other.text)}, {quoted(one.text)} moves "
            f"'{one.word}' more towards '{wanted}' than towards '{unwanted}' (changes of cosine: {last}); {layers}.")
