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

from hanok.attention_view import Attention, quoted
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
    is_looked_at: bool = False               # a word of an encoder-decoder's source: words of the answer look at it

    @property
    def text(self) -> str:
        return self.attention.columns.text if self.is_looked_at else self.attention.rows.text

    def looks(self, layer: int | None = None, head: int | None = None) -> list[tuple[str, float]]:
        """What the word looks at, strongest first, without what it cannot see; of a source's word, who looks at it."""
        if self.is_looked_at:
            return self.attention.onto(self.word, layer, head)
        return [(name, weight) for name, weight in self.attention.of_word(self.word, layer, head) if name not in self.behind]

    def pair(self, other: str) -> tuple[str, str]:
        """The word and another: who looks, and at whom."""
        return (other, self.word) if self.is_looked_at else (self.word, other)

    def tie(self, other: str) -> tuple[float, tuple[int, int, float]]:
        """How strongly the two are tied: on average, and in the head that does so most (layer, head, weight)."""
        return float(self.attention.between(*self.pair(other)).mean()), self.attention.heads_between(*self.pair(other), 1)[0]

    @property
    def link(self) -> tuple[str, str] | None:
        """Who looks at whom: the word at its partner; in a causal model the word behind that looks back most, where there is one."""
        if self.behind:
            return max(self.behind, key=lambda other: float(self.attention.between(other, self.word).mean())), self.word
        return None if self.partner is None else self.pair(self.partner)

    @property
    def heads(self) -> tuple[Tensor, str]:
        """(L,H) weights of the link, and what they are; without a link, of what there is."""
        if self.link is not None:
            return self.attention.between(*self.link), f"how strongly '{self.link[0]}' looks at '{self.link[1]}'"
        if self.is_looked_at:
            at = self.attention.columns.index(self.word)
            return self.attention.by_word[..., at].mean(-1), f"how strongly the answer looks at '{self.word}'"
        if self.attention.is_cross:
            return self.attention.by_word[:, :, self.attention.rows.index(self.word)].amax(-1), f"the most that '{self.word}' gives to one word"
        return self.attention.between(self.word, self.word), f"how strongly '{self.word}' looks at itself"

    def rank(self, other: str) -> int:
        """1 for the word that it looks at most, or that looks at it most, itself left out."""
        ranked = [name for name, _ in self.looks() if self.attention.is_cross or name != self.word]
        return ranked.index(other) + 1

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        told: dict[str, Any] = {
            "text": self.text, "word": self.word,
            "looked_at_by" if self.is_looked_at else "looks_at": [{"word": name, "weight": w} for name, w in self.looks()],
            "cannot_see": list(self.behind)}
        if not self.is_looked_at:
            told["to_special_tokens"] = self.attention.to_specials(self.word)
        if self.attention.is_cross:
            told |= {"source": self.attention.columns.text, "answer": self.attention.rows.text}
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
            told += compared(*self.sentences) if comparable(self.sentences) else []
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
    """Looks at `word` in each text, and at each meaning in its place; of an encoder-decoder the word may be one of the source, or of the answer.

    Where both have it, it is that of the side that `texts` give. RequestError where a text lacks the word.
    """
    seen = [look(text) for text in texts]
    found = [found_in(attention, text, word) for attention, text in zip(seen, texts)]
    names = [name for name, _ in found]
    sentences = []
    for i, (attention, text, (name, is_looked_at)) in enumerate(zip(seen, texts, found)):
        others = {known.casefold() for j, (other, (_, looked_at)) in enumerate(zip(seen, found)) if j != i
                  for known in (other.rows if looked_at else other.columns).real}
        is_read = not attention.is_cross and attention.rows.text == text              # what a model wrote cannot be written otherwise
        hidden_words = attention.columns.words[attention.rows.index(name) + 1:] if attention.is_causal else ()
        real = set(attention.columns.real)
        if meanings and not is_read:
            raise RequestError("a meaning is put in the place of a word that is read, and this one is at an encoder-decoder's answer; look at the "
                               "source alone (side source), or leave meanings out", "unsupported")
        sentences.append(InSentence(
            attention, name, partner_of(attention, name, others, is_looked_at), tuple(other for other in hidden_words if other in real),
            {meaning: cosines(attention.vectors(name), in_place(look, attention, name, meaning)) for meaning in dict.fromkeys(meanings)},
            cut_difference(look, attention, name) if hidden_words and is_read else None, is_looked_at))
    alike = cosines(seen[0].vectors(names[0]), seen[1].vectors(names[1])) if len(seen) > 1 and not seen[0].is_cross else None
    return WordStudy(word, tuple(sentences), alike)


def found_in(attention: Attention, text: str, word: str) -> tuple[str, bool]:
    """The word as it stands there, and whether it is one of a source that an answer looks at. RequestError lists the words of both."""
    if not attention.is_cross:
        return attention.rows.words[attention.rows.index(word)], False
    source, answer = attention.columns, attention.rows
    for words in (source, answer) if source.text == text else (answer, source):
        if (at := words.find(word)) is not None:
            if words is source and not answer.real:
                raise RequestError(f"the answer has no words that could look at '{word}', only special tokens; give one: source and text")
            return words.words[at], words is source
    raise RequestError(f"'{word}' is neither a word of the source ({', '.join(source.real)}) nor of the answer ({', '.join(answer.real)})")


def partner_of(attention: Attention, word: str, others: set[str], is_looked_at: bool = False) -> str | None:
    """The word that one head ties `word` to most strongly, if there is any but itself and what the other sentences hold too."""
    first = attention.columns.real[:1] if attention.is_causal else []                 # what has nothing to look at looks there
    candidates = (attention.rows if is_looked_at else attention.columns).real
    own = [name for name in candidates if (attention.is_cross or name != word) and name.casefold() not in others and name not in first]
    strengths = {name: float(attention.between(*((name, word) if is_looked_at else (word, name))).max()) for name in own}
    best = max(own, key=lambda name: strengths[name], default=None)
    return best if best is not None and strengths[best] > 0 else None


def in_place(look: Look, attention: Attention, word: str, meaning: str) -> Tensor:
    """(L+1,D): the vectors of `meaning` where `word` stood. RequestError where it is no word."""
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


def named(text: str) -> str:
    """A text as findings call it."""
    return quoted(text, 40)


def behind(sentence: InSentence, begin: str) -> list[str]:
    """What a causal model's word cannot see, and who looks back at it."""
    if not sentence.behind:
        return []
    assert sentence.link is not None
    attention, word, other = sentence.attention, sentence.word, sentence.link[0]
    forward = float(attention.between(word, other).max())
    back, (layer, head, most) = float(attention.between(other, word).mean()), attention.heads_between(other, word, 1)[0]
    n = attention.n_layers * attention.n_heads
    shares = f"{percent(back)} of its weight on average, {percent(most)} in head {layer}.{head}" if n > 1 else f"{percent(back)} of its weight"
    told = [f"{begin} {named(sentence.text)} '{word}' cannot see '{other}', which stands behind it: weight {forward:g} in {all_heads(n)}. "
            f"It is '{other}' that looks at '{word}': {shares}."]
    if (difference := sentence.cut_difference) is not None:
        same = "the same vector" if difference < SAME else "another"
        told.append(f"Only what stands before '{word}' can change it: cut off behind it, the sentence gives {same} (the difference is "
                    f"{difference:.1g} of its largest number).")
    return told


def all_heads(n: int) -> str:
    return f"all {n} heads" if n > 1 else "the only head"


def comparable(sentences: Sequence[InSentence]) -> bool:
    """Whether there are two, each with a partner of the word on the same side."""
    return len(sentences) == 2 and all(sentence.partner for sentence in sentences) and sentences[0].is_looked_at == sentences[1].is_looked_at


def compared(one: InSentence, other: InSentence) -> list[str]:
    """Whether the word is tied more strongly to its partner in the first sentence than to its partner in the second."""
    assert one.partner is not None and other.partner is not None
    (mean, top), (other_mean, other_top) = one.tie(one.partner), other.tie(other.partner)
    ties = f"'{one.word}' is tied more strongly to '{one.partner}' than to '{other.partner}'"
    whose = "their" if one.is_looked_at else "its"

    def verdict(where: str, a: float, b: float, more: str = "") -> str:
        return f"{'Holds' if a > b else 'Does not hold'} {where}: {ties}: {percent(a)} of {whose} weight against {percent(b)}{more}."

    n = one.attention.n_layers * one.attention.n_heads
    ranks = f"; {'they rank' if one.is_looked_at else 'it ranks'} {one.rank(one.partner)} and {other.rank(other.partner)} among the other words"
    if n == 1:
        return [verdict("in the only head", mean, other_mean, ranks)]
    return [verdict(f"on the average of all {n} heads", mean, other_mean, ranks),
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
            f"other words of {named(sentence.text)}: {verdict}."]


def nearest_meaning(sentence: InSentence) -> str:
    """The meaning that the word's vector is nearest to behind the last layer, and at the embedding."""
    ranked = sorted(((float(values[-1]), name) for name, values in sentence.meanings.items()), reverse=True)
    first = max(sentence.meanings, key=lambda name: float(sentence.meanings[name][0]))
    told = ", ".join(f"'{name}' {value:.3f}" for value, name in ranked)
    where = f"In {named(sentence.text)} '{sentence.word}'"
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
    return (f"{'Holds' if float(gain[-1]) > 0 else 'Does not hold'} behind the last layer: beside {named(other.text)}, {named(one.text)} moves "
            f"'{one.word}' more towards '{wanted}' than towards '{unwanted}' (changes of cosine: {last}); {layers}.")
