"""hanok attend BUNDLE --text TEXT

Attention in words, on the terminal and as a picture. With --word one word is followed through its sentences, and at the end stands what the numbers
say of it, for and against.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from hanok.cli.output import Json, emit, next_commands, say, shown, typed

BAR = 30
"""Signs of a bar that means all of the weight."""
MOST_COLUMNS = 9
"""Layers that a table of the terminal shows side by side."""


def attend(
    bundle: Annotated[str, Parameter(help="A bundle's folder, or the name of a pulled model.")],
    *,
    text: Annotated[list[str], Parameter(negative="", allow_leading_hyphen=True, help="What the model reads; several times with --word, to compare "
                                                                                      "sentences. For an encoder-decoder, the source.")],
    word: Annotated[str | None, Parameter(allow_leading_hyphen=True, help="The word that is followed: what it looks at, which heads tie it to what. "
                                                                          "One of an encoder-decoder's source: which words of the answer look at it; "
                                                                          "where both have it, that of --text.")] = None,
    layer: Annotated[int | None, Parameter(help="One layer, counted from 1.")] = None,
    head: Annotated[int | None, Parameter(help="One head of that layer, counted from 1.")] = None,
    meaning: Annotated[list[str] | None, Parameter(negative="", help="Put in the word's place, layer by layer the nearness of its vector to the "
                                                                     "word's; the first should fit the first sentence, the last the other.")] = None,
    source: Annotated[str | None, Parameter(allow_leading_hyphen=True, help="Of an encoder-decoder: what it reads; --text is then what it writes, "
                                                                            "instead of its own answer.")] = None,
    side: Annotated[Literal["cross", "source", "answer"] | None, Parameter(show_default=False, help="Of an encoder-decoder: the answer at its "
                                                                           "source (cross, the default), the source at itself, or the answer at "
                                                                           "itself.")] = None,
    max_new_tokens: Annotated[int | None, Parameter(show_default=False, help="Of an encoder-decoder's own answer, the likeliest token each time; "
                                                                             "32 by default.")] = None,
    out: Annotated[Path | None, Parameter(help="The picture, a PNG; without it everything stays on the terminal.")] = None,
    json: Json = False,
) -> None:
    """Show who looks at whom: a model's attention in words, head by head, and what becomes of a word.

    Layers and heads are counted from 1. Pieces of a word look as their mean and are looked at as their sum. Weights say where a model looks, not
    what it makes of it.
    """
    from hanok.api import load
    from hanok.bundle.pull import find
    from hanok.errors import RequestError
    from hanok.report import check_picture
    meanings = list(meaning or ())
    if out is not None:
        check_picture(out)
    if head is not None and layer is None:
        raise RequestError(f"--head {head} needs --layer: every layer has its own heads")
    if word is None and (len(text) > 1 or meanings):
        what = f"{len(text)} texts were" if len(text) > 1 else "--meaning was"
        raise RequestError(f"{what} given, and no word to follow; say which with --word")
    model = load(find(bundle))
    name = typed(bundle)

    def look(line: str) -> Any:
        return model.attention(line, source, side=side, max_new_tokens=max_new_tokens)

    if word is None:
        document = of_text(look(text[0]), layer, head, out, json)
        following = f'hanok attend {name} --text "..." --word WORD --out word.png'
    else:
        document = of_word(look, text, word, meanings, layer, head, out, json)
        following = f'hanok attend {name} --text "..." --layer 1 --head 1 --out head.png'
    if json:
        emit({"bundle": str(bundle), **document, "picture": None if out is None else str(out)})
        return
    say(f"the picture is {shown(out)}" if out is not None else "no picture was asked for; --out FILE.png draws one")
    next_commands(following, f'hanok next {name} --prompt "..."' if model.family.kind != "encoder" else f"hanok show {name}")


# ---- a text ------------------------------------------------------------------------------------------------------
def of_text(attention: Any, layer: int | None, head: int | None, out: Path | None, quiet: bool) -> dict[str, Any]:
    """All words of one text: the picture, the terminal's table, and both as data."""
    from hanok import pictures, report
    from hanok.attention_view import quoted
    weights = attention.matrix(layer, head)
    rows, columns = attention.rows, attention.columns
    names = rows.name, columns.name
    if out is not None and head is not None:
        pictures.plot_matrix(weights.numpy(), rows.words, columns.words, out, title=f"Head {layer}.{head}",
                             unit="how much of its weight each word gives to each", names=names)
    elif out is not None:
        first = (layer or 1) - 1
        chosen = attention.by_word[first:first + 1] if layer else attention.by_word
        pictures.plot_heads(chosen.numpy(), rows.words, columns.words, out, title="Who looks at whom", first_layer=first + 1,
                            unit="one small square a head: rows look, columns are looked at", names=names)
    if not quiet:
        if attention.is_cross:
            print(f"{quoted(columns.text)} → {quoted(rows.text)}\n")
        table = []
        for word, special, line in zip(rows.words, rows.special, weights.tolist()):
            others = [(weight, name) for name, weight, no_word in zip(columns.words, line, columns.special) if not no_word and
                      (attention.is_cross or name != word)]
            if not special and others:
                weight, name = max(others)
                table.append([word, name, told(weight), bar(weight)] if weight > 0 else [word, f"only {itself(attention)}", "", ""])
        if table:
            print(report.table(["word", "looks most at", "weight", ""], table, align="llrl"), end="\n\n")
        left_out = " and ".join(["itself"] * (not attention.is_cross) + ["special tokens"])
        print(f"({which(attention, layer, head)}; {left_out} left out)" if table else "there is no other word to look at")
    return {"text": rows.text, "tokens": list(rows.tokens), "words": list(rows.words), "looked_at": list(columns.words),
            "layers": attention.n_layers, "heads": attention.n_heads, "layer": layer, "head": head, "weights": weights.tolist()}


# ---- a word ------------------------------------------------------------------------------------------------------
def of_word(look: Any, texts: Sequence[str], word: str, meanings: Sequence[str], layer: int | None, head: int | None, out: Path | None,
            quiet: bool) -> dict[str, Any]:
    """One word in its sentences: the picture, the terminal's tables and findings, and all of it as data."""
    from hanok.word_study import study
    seen = study(look, texts, word, meanings)
    for sentence in seen.sentences:
        sentence.attention.matrix(layer, head)               # a layer or head that is not there is told before anything is drawn
    if out is not None:
        draw(seen, out, layer, head)
    if not quiet:
        for sentence in seen.sentences:
            tell(sentence, layer, head)
        findings = seen.findings()
        alone = "There is no other word, and nothing to compare it with."
        if seen.sentences[0].attention.is_cross:
            alone = "There is no other sentence to compare it with; --text gives one more."
        print("\n- ".join(["What the numbers say:", *findings] if findings else [alone]))
    return seen.to_dict()


def draw(seen: Any, out: Path, layer: int | None = None, head: int | None = None) -> None:
    """The study as a picture: one head of one text as a matrix, else a row for each sentence."""
    from hanok import pictures
    first = seen.sentences[0]
    if head is not None and len(seen.sentences) == 1:
        pictures.plot_matrix(first.attention.matrix(layer, head).numpy(), first.attention.rows.words, first.attention.columns.words, out,
                             title=f"Head {layer}.{head}", unit="how much of its weight each word gives to each",
                             highlight=None if first.is_looked_at else first.word, names=(first.attention.rows.name, first.attention.columns.name))
        return
    panels = []
    for sentence in seen.sentences:
        heads, heads_of = sentence.heads
        curves = {name: values.tolist() for name, values in sentence.meanings.items()}
        if seen.alike is not None:
            curves[f"other '{sentence.word}'"] = seen.alike.tolist()
        panels.append(pictures.WordPanel(
            both(sentence)[1:-1], heads.numpy(), heads_of, sentence.looks(layer, head),
            f"{'who looks at' if sentence.is_looked_at else 'what'} '{sentence.word}'{'' if sentence.is_looked_at else ' looks at'} "
            f"({which(sentence.attention, layer, head)})",
            rest(sentence, layer, head), curves if sentence.meanings else {}))
    pictures.plot_word(panels, out, title=f"The word '{seen.word}'", unit="every head's tie, what it looks at" + (
        ", and what stands near it layer by layer" if first.meanings else ""))


def tell(sentence: Any, layer: int | None, head: int | None) -> None:
    """A sentence's part of the terminal."""
    from hanok import report
    attention = sentence.attention
    print(both(sentence))
    looks, special = sentence.looks(layer, head), rest(sentence, layer, head)
    rows = [[name, told(weight), bar(weight)] for name, weight in (*looks, *([special] if special else []))]
    head_of_table = f"'{sentence.word}' is looked at by" if sentence.is_looked_at else f"'{sentence.word}' looks at"
    print(report.table([head_of_table, "weight", which(attention, layer, head)], rows, align="lrl"))
    if sentence.link is not None and attention.n_layers * attention.n_heads > 1:
        strongest = ", ".join(f"{at}.{number} {told(weight)}" for at, number, weight in attention.heads_between(*sentence.link, 4))
        print(f"heads in which '{sentence.link[0]}' looks at '{sentence.link[1]}' most (layer.head): {strongest}")
    if attention.is_causal and attention.columns.real:
        first = attention.columns.real[0]
        print(f"'{first}' stands first: it sees only {itself(attention)}" if first == sentence.word else
              f"'{first}' stands first, where a causal model rests what it has no use for: {told(dict(looks).get(first, 0.0))}")
    if sentence.meanings:
        n = len(next(iter(sentence.meanings.values())))
        layers = sorted({round(i * (n - 1) / (MOST_COLUMNS - 1)) for i in range(MOST_COLUMNS)}) if n > MOST_COLUMNS else list(range(n))
        print(report.table(["in its place, cosine behind layer", *map(str, layers)],
                           [[name, *(f"{float(values[i]):.3f}" for i in layers)] for name, values in sentence.meanings.items()],
                           align="l" + "r" * len(layers)))
    print()


def rest(sentence: Any, layer: int | None, head: int | None) -> tuple[str, float] | None:
    """Special tokens, and their share of the word's weight; None where there are none, and of a word that is looked at."""
    attention = sentence.attention
    if sentence.is_looked_at:
        return None
    names = [name for name, special in zip(attention.columns.words, attention.columns.special) if special]
    return (" ".join(names[:3]) + " …" * (len(names) > 3), attention.to_specials(sentence.word, layer, head)) if names else None


def which(attention: Any, layer: int | None, head: int | None) -> str:
    """Whose weights they are."""
    if head is not None:
        return f"head {layer}.{head}"
    n, whose = (attention.n_heads, f"layer {layer}'s ") if layer is not None else (attention.n_layers * attention.n_heads, "")
    return f"mean of {whose}{n} heads" if n > 1 else f"{whose or 'the '}only head"


def itself(attention: Any) -> str:
    """What a word sees that has nothing before it."""
    return "itself and special tokens" if any(attention.columns.special) else "itself"


def both(sentence: Any) -> str:
    """The sentence on one line; of an encoder-decoder what was read, and what was written."""
    from hanok.attention_view import quoted
    attention = sentence.attention
    return f"{quoted(attention.columns.text)} → {quoted(attention.rows.text)}" if attention.is_cross else quoted(sentence.text)


def told(weight: float) -> str:
    return f"{100 * weight:.1f}%"


def bar(weight: float) -> str:
    return "█" * round(BAR * weight) or "▏"
