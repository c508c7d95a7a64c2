"""Pictures of what a model looks at and expects: heatmaps, the word that is studied, next tokens. PNGs, laid out in pixels.

One scale of blue that only grows darker, so that it reads in grey and to every eye (weights by their square root, or the small ones would all be
white); lines differ in mark and dash too. matplotlib (extra `plot`) is imported by the functions that draw. N words that look, M words looked at.
"""
from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hanok.errors import DataError, RequestError
from hanok.report import BLUE, CORAL, GREY, GRID, INK, MUTED, fonts, headline, picture, put_text

MOST_WORDS = 64
"""Words along one side of a picture."""
WITH_NUMBERS = 12
"""Words along one side of a matrix whose cells still have room for their numbers."""
SCALE = ("#ffffff", "#c3d5fb", "#2563eb", "#0b1f5c")
LINES = ((BLUE, "o", "-"), (CORAL, "s", "--"), ("#0f766e", "^", "-."), ("#7c3aed", "D", (0, (1, 1))))
"""Colour, mark and dash of the first curves; they come round again."""
TOP = 120
"""Pixels that the headline takes."""


def check_words(*sides: Sequence[str], names: Sequence[str] = ("text", "text")) -> None:
    """RequestError where a picture has no room for so many words; `names` say what each side is."""
    for words, name in zip(sides, names):
        if len(words) > MOST_WORDS:
            shorten = "let fewer tokens be written (max_new_tokens)" if name == "answer" else "give a shorter part of it"
            raise RequestError(f"the {name} has {len(words)} words, and a picture shows {MOST_WORDS}; {shorten}, or leave out the picture",
                               "too_long")


def plot_matrix(weights: np.ndarray, rows: Sequence[str], columns: Sequence[str], out: Path | str, *, title: str, unit: str,
                highlight: str | None = None, names: Sequence[str] = ("text", "text")) -> None:
    """(N,M) as one labelled heatmap, each cell with its percentage where there is room; the row of `highlight` stands out."""
    check_words(rows, columns, names=names)
    cell = min(72, 900 // max(len(rows), len(columns)))
    with picture(out, 100, 100) as figure:
        labels, heads = matrix_margins(figure, rows, columns, cell)
        scale = min(260, max(120, cell * len(rows)))
        width, height = max(700, 60 + labels + cell * len(columns) + 150), TOP + heads + max(scale, cell * len(rows)) + 50
        figure.set_size_inches(width / 100, height / 100)
        draw_matrix(figure, weights, rows, columns, (60 + labels, TOP + heads), cell, highlight)
        draw_scale(figure, (60 + labels + cell * len(columns) + 40, TOP + heads), scale)
        headline(figure, title, unit)


def plot_heads(weights: np.ndarray, rows: Sequence[str], columns: Sequence[str], out: Path | str, *, title: str, unit: str,
               first_layer: int = 1, names: Sequence[str] = ("text", "text")) -> None:
    """(L,H,N,M) as small multiples, one panel a head, layers from top to bottom; beside them their mean, with the words.

    A single layer's heads stand four in a row.
    """
    check_words(rows, columns, names=names)
    n_layers, n_heads, n, m = weights.shape
    across = n_heads if n_layers > 1 else min(n_heads, 4)
    down = n_layers * math.ceil(n_heads / across)
    dot = max(1, min(150 // max(n, m), 1000 // (across * m), 1500 // (down * n)))
    panel_w, panel_h, gap = dot * m, dot * n, 6
    grid_w, grid_h = across * (panel_w + gap) + gap, down * (panel_h + gap) + gap
    cell = min(56, 560 // max(n, m))
    with picture(out, 100, 100) as figure:
        labels, heads = matrix_margins(figure, rows, columns, cell)
        left, top = 110, TOP + 50
        side = left + grid_w + 90 + labels
        width, height = side + max(cell * m + 120, 260), max(top + grid_h, TOP + heads + max(110, cell * n) + 40) + 40
        figure.set_size_inches(max(width, 800) / 100, height / 100)
        mosaic = np.ones((grid_h, grid_w, 3)) * np.array([int(GRID[i:i + 2], 16) / 255 for i in (1, 3, 5)])
        colours = colour_map()(np.sqrt(weights))[..., :3]
        for i, panel in enumerate(colours.reshape(-1, *colours.shape[2:])):
            y, x = gap + i // across * (panel_h + gap), gap + i % across * (panel_w + gap)
            mosaic[y:y + panel_h, x:x + panel_w] = panel.repeat(dot, 0).repeat(dot, 1)
        axes = box(figure, left, top, grid_w, grid_h)
        axes.imshow(mosaic, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        for i in every(down, panel_h + gap):
            last = min((i + 1) * across, n_heads)
            name = str(i + 1) if n_layers > 1 else f"{i * across + 1}–{last}" if last > i * across + 1 else str(last)
            at_pixel(figure, left - 12, top + gap + i * (panel_h + gap) + panel_h / 2, name, ha="right")
        for head in every(n_heads, panel_w + gap) if n_layers > 1 else ():
            at_pixel(figure, left + gap + head * (panel_w + gap) + panel_w / 2, top - 12, str(head + 1), ha="center")
        at_pixel(figure, left + grid_w / 2, top - 36, "head" if n_layers > 1 else f"layer {first_layer}", ha="center", color=MUTED)
        at_pixel(figure, left - 72, top + grid_h / 2, "layer" if n_layers > 1 else "heads", ha="center", color=MUTED, rotation=90)
        draw_matrix(figure, weights.mean((0, 1)), rows, columns, (side, TOP + heads), cell)
        scale = min(220, max(110, cell * n))
        at_pixel(figure, side, TOP + heads + max(cell * n, scale) + 24, "the mean of these heads" if n_layers * n_heads > 1 else "the same head",
                 color=MUTED)
        draw_scale(figure, (side + cell * m + 30, TOP + heads), scale)
        headline(figure, title, unit)


@dataclass(frozen=True)
class WordPanel:
    """What a word's picture shows of one sentence."""
    text: str                                # stands in quotes
    heads: np.ndarray                        # (L,H) weights
    heads_of: str                            # what they are: 'novel' looks at 'idea'
    words: Sequence[tuple[str, float]]       # what the word looks at, strongest first
    words_of: str                            # whose weights these are: looks at (mean of all heads)
    rest: tuple[str, float] | None           # what else takes weight, and how much of it
    curves: Mapping[str, Sequence[float]]    # name -> L+1 cosines


def plot_word(panels: Sequence[WordPanel], out: Path | str, *, title: str, unit: str) -> None:
    """A row of pictures for each sentence: every head's tie, the words that are looked at, and meanings over the layers."""
    if not panels:
        raise DataError(f"{out}: there is no sentence to draw")
    has_curves = any(panel.curves for panel in panels)
    width, row = 1720 if has_curves else 1100, 430
    with picture(out, width, TOP + row * len(panels) + 10) as figure:
        for i, panel in enumerate(panels):
            top = TOP + row * i
            at_pixel(figure, 48, top + 16, fitted(figure, drawable(f"“{' '.join(panel.text.split())}”"), width - 100, 18), size=18, fontweight="bold")
            draw_heads(figure, panel, (100, top + 100), (390, 270))
            draw_words(figure, panel, (560, top + 58), 1060, 312)
            if panel.curves:
                low = min(min(values) for p in panels for values in p.curves.values())
                draw_curves(figure, panel.curves, (1170, top + 100), (320, 270), low)
        headline(figure, title, unit)


@dataclass(frozen=True)
class NextPanel:
    """One temperature's distribution over the tokens that all panels share."""
    name: str
    note: str
    probabilities: Sequence[float]
    rest: float                              # of all other tokens


def plot_next(tokens: Sequence[str], panels: Sequence[NextPanel], out: Path | str, *, title: str, unit: str) -> None:
    """Side by side, one panel a temperature: horizontal bars of the same tokens, likeliest on top."""
    if not panels or not tokens:
        raise DataError(f"{out}: got {len(tokens)} tokens and {len(panels)} temperatures; at least one of each was expected")
    bar, each = 34, 350
    with picture(out, 100, 100) as figure:
        shown = [*(fitted(figure, drawable(token), 260, 15) for token in tokens), "all others"]
        left = 60 + max(text_width(figure, token, 15) for token in shown)
        width, height = max(left + each * len(panels) + 30, 760), TOP + 74 + bar * len(shown) + 30
        figure.set_size_inches(width / 100, height / 100)
        for i, panel in enumerate(panels):
            x, y = left + each * i, TOP + 74
            shares, colours = [*panel.probabilities, panel.rest], [BLUE] * len(tokens) + [GREY]
            axes = box(figure, x, y, each - 130, bar * len(shown))
            axes.set_axis_off()
            axes.set_xlim(0, 1)
            axes.set_ylim(len(shown) - 0.5, -0.5)
            axes.barh(range(len(shown)), [1] * len(shown), height=0.66, color=GRID)
            axes.barh(range(len(shown)), shares, height=0.66, color=colours)
            for j, p in enumerate(shares):
                at_pixel(figure, x + each - 122, y + bar * (j + 0.5), share(p), size=14)
            at_pixel(figure, x, TOP + 18, panel.name, size=17, fontweight="bold")
            at_pixel(figure, x, TOP + 46, panel.note, size=14, color=MUTED)
        for j, token in enumerate(shown):
            at_pixel(figure, left - 14, TOP + 74 + bar * (j + 0.5), token, size=15, ha="right", color=MUTED if j == len(tokens) else INK)
        headline(figure, title, unit)


# ---- parts of a picture
def draw_matrix(figure: Any, weights: np.ndarray, rows: Sequence[str], columns: Sequence[str], corner: tuple[int, int], cell: int,
                highlight: str | None = None) -> None:
    """A heatmap whose cells are `cell` pixels wide, its top left corner there; rows are who looks, columns at whom."""
    (x, y), (n, m) = corner, weights.shape
    axes = box(figure, x, y, cell * m, cell * n)
    axes.imshow(np.sqrt(weights), cmap=colour_map(), vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color(GREY)
    if max(n, m) <= WITH_NUMBERS and cell >= 34:
        for i in range(n):
            for j in range(m):
                told, colour = share(weights[i, j]) if weights[i, j] else "", "white" if weights[i, j] > 0.25 else INK
                axes.text(j, i, told, color=colour, fontsize=min(13, 0.25 * cell), ha="center", va="center")
    size = label_size(cell)
    for i, word in enumerate(rows):
        style = {"fontweight": "bold", "color": BLUE} if word == highlight else {}
        at_pixel(figure, x - 10, y + cell * (i + 0.5), fitted(figure, drawable(word), 220, size), size=size, ha="right", **style)
    for j, word in enumerate(columns):
        at_pixel(figure, x + cell * (j + 0.5), y - 10, fitted(figure, drawable(word), 220, size), size=size, ha="center", va="bottom", rotation=90)
    if highlight is not None and highlight in rows:
        i = list(rows).index(highlight)
        axes.add_patch(outline(-0.5, i - 0.5, m, 1))
    labels, heads = matrix_margins(figure, rows, columns, cell)
    at_pixel(figure, x - labels - 6, y + cell * n / 2, "who looks", ha="center", color=MUTED, rotation=90)
    at_pixel(figure, x + cell * m / 2, y - heads + 8, "at whom", ha="center", color=MUTED)


def matrix_margins(figure: Any, rows: Sequence[str], columns: Sequence[str], cell: int) -> tuple[int, int]:
    """Pixels that a matrix needs left of itself and above."""
    size = label_size(cell)
    widest = [max(text_width(figure, fitted(figure, drawable(word), 220, size), size) for word in side) for side in (rows, columns)]
    return round(widest[0]) + 34, round(widest[1]) + 44


def label_size(cell: int) -> float:
    return max(7.5, min(15, 0.55 * cell))


def draw_scale(figure: Any, corner: tuple[int, int], height: int) -> None:
    """What the colours mean."""
    axes = box(figure, *corner, 16, height)
    axes.imshow(np.linspace(1, 0, 256)[:, None], cmap=colour_map(), vmin=0, vmax=1, aspect="auto", extent=(0, 1, 0, 1))
    axes.set_xticks([])
    axes.spines[:].set_color(GREY)
    axes.yaxis.tick_right()
    axes.set_yticks([np.sqrt(weight) for weight in (0, 0.05, 0.25, 0.5, 1)], ["0", "5%", "25%", "50%", "100%"])
    axes.tick_params(length=0, labelsize=11, labelcolor=MUTED)


def draw_heads(figure: Any, panel: WordPanel, corner: tuple[int, int], size: tuple[int, int]) -> None:
    """Layers x heads, the strongest three outlined and named below."""
    n_layers, n_heads = panel.heads.shape
    axes = box(figure, *corner, size[0] - 40, size[1])
    axes.imshow(np.sqrt(panel.heads), cmap=colour_map(), vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    axes.spines[:].set_color(GREY)
    layers, heads = every(n_layers, size[1] / n_layers), every(n_heads, size[0] / n_heads)
    axes.set_yticks(layers, [str(i + 1) for i in layers])
    axes.set_xticks(heads, [str(i + 1) for i in heads])
    axes.tick_params(length=0, labelsize=12, labelcolor=INK)
    order = np.argsort(-panel.heads, axis=None, kind="stable")[:3]
    for place in order:
        axes.add_patch(outline(place % n_heads - 0.5, place // n_heads - 0.5, 1, 1))
    x, y = corner
    draw_scale(figure, (x + size[0] - 26, y), size[1])
    at_pixel(figure, x - 52, y - 42, fitted(figure, drawable(panel.heads_of), size[0] + 10, 15), size=15)
    strongest = ",  ".join(f"{place // n_heads + 1}.{place % n_heads + 1} {share(panel.heads.flat[place])}" for place in order)
    at_pixel(figure, x - 52, y - 18, f"strongest: {strongest}", size=13, color=MUTED)
    at_pixel(figure, x - 44, y + size[1] / 2, "layer", ha="center", color=MUTED, rotation=90)
    at_pixel(figure, x + (size[0] - 40) / 2, y + size[1] + 38, "head", ha="center", color=MUTED)


def draw_words(figure: Any, panel: WordPanel, corner: tuple[int, int], right: int, height: int) -> None:
    """Bars of the words that are looked at, the mean of all heads."""
    x, y = corner
    words = [*panel.words[:8], *([panel.rest] if panel.rest else [])]
    shown = [fitted(figure, drawable(word), 170, 15) for word, _ in words]
    left = x + max(text_width(figure, word, 15) for word in shown) + 12
    bar = min(34, height / len(words))
    at_pixel(figure, x, y, fitted(figure, drawable(panel.words_of), right - x + 20, 15), size=15)
    axes = box(figure, left, y + 28, right - left - 70, bar * len(words))
    axes.set_axis_off()
    axes.set_xlim(0, max(weight for _, weight in words) or 1)
    axes.set_ylim(len(words) - 0.5, -0.5)
    is_rest = [panel.rest is not None and i == len(words) - 1 for i in range(len(words))]
    axes.barh(range(len(words)), [weight for _, weight in words], height=0.64, color=[GREY if rest else BLUE for rest in is_rest])
    for i, (word, (_, weight), rest) in enumerate(zip(shown, words, is_rest)):
        middle = y + 28 + bar * (i + 0.5)
        at_pixel(figure, left - 10, middle, word, size=15, ha="right", color=MUTED if rest else INK)
        reach = (right - left - 70) * weight / (max(weight for _, weight in words) or 1)
        at_pixel(figure, left + reach + 8, middle, share(weight), size=14, color=MUTED if rest else INK)


def draw_curves(figure: Any, curves: Mapping[str, Sequence[float]], corner: tuple[int, int], size: tuple[int, int], low: float) -> None:
    """Cosines over the layers, each curve named at its end."""
    (x, y), (width, height) = corner, size
    axes = box(figure, x, y, width, height)
    bottom = min(0.0, low)
    n = max(map(len, curves.values()))
    axes.set_xlim(-0.2, n - 0.8)
    axes.set_ylim(bottom - 0.02, 1.02)
    axes.grid(axis="y", color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=12, labelcolor=MUTED)
    axes.set_xticks(every(n, width / n, first=0))
    axes.set_yticks([tick / 5 for tick in range(-5, 6) if tick / 5 >= bottom])
    ends = []
    for i, (name, values) in enumerate(curves.items()):
        colour, mark, dash = LINES[i % len(LINES)]
        axes.plot(range(len(values)), values, color=colour, marker=mark, linestyle=dash, linewidth=2, markersize=5 if n <= 14 else 0)
        ends.append((float(values[-1]), name, colour))
    to_pixel = height / (1.04 - bottom)
    middles = apart([y + (1.02 - value) * to_pixel for value, _, _ in ends], 22)
    for (value, name, colour), middle in zip(ends, middles):
        label = f"{fitted(figure, drawable(name), 150, 14)} {value:.2f}"
        at_pixel(figure, x + width + 4, middle, label, size=14, color=colour, fontweight="bold")
    at_pixel(figure, x - 36, y - 42, "nearness to what stands in its place (cosine)", size=15)
    at_pixel(figure, x + width / 2, y + height + 38, "layer (0: the embedding)", ha="center", color=MUTED)


def apart(middles: Sequence[float], height: float) -> list[float]:
    """Labels of this height, moved as little as keeps them from touching: in their order, each pushed down by the one above, then all back up."""
    order = sorted(range(len(middles)), key=lambda i: middles[i])
    placed = [middles[i] for i in order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + height)
    excess = (placed[-1] - middles[order[-1]]) / 2
    placed = [value - excess for value in placed]
    result = [0.0] * len(placed)
    for i, value in zip(order, placed):
        result[i] = value
    return result


# ---- small tools
def colour_map() -> Any:
    from matplotlib.colors import LinearSegmentedColormap
    return LinearSegmentedColormap.from_list("weights", SCALE)


def outline(x: float, y: float, width: float, height: float) -> Any:
    from matplotlib.patches import Rectangle
    return Rectangle((x, y), width, height, fill=False, edgecolor=CORAL, linewidth=2, clip_on=False)


def box(figure: Any, x: float, y: float, width: float, height: float) -> Any:
    """Axes at these pixels, counted from the top left."""
    w, h = figure.bbox.width, figure.bbox.height
    return figure.add_axes((x / w, 1 - (y + height) / h, width / w, height / h))


def at_pixel(figure: Any, x: float, y: float, text: str, *, size: float = 13, **style: Any) -> Any:
    """A text at these pixels, counted from the top left."""
    style = {"color": INK, "va": "center", **style}
    return put_text(figure, x / figure.bbox.width, 1 - y / figure.bbox.height, text, fontsize=size, **style)


def text_width(figure: Any, text: str, size: float) -> float:
    """Pixels."""
    label = put_text(figure, 0, 0, text, fontsize=size)
    width = label.get_window_extent().width
    label.remove()
    return float(width)


def fitted(figure: Any, text: str, most: float, size: float) -> str:
    """The text, cut where it is wider than so many pixels."""
    if text_width(figure, text, size) <= most:
        return text
    keep = len(text)
    while keep > 1 and text_width(figure, text[:keep] + "…", size) > most:
        keep = min(keep - 1, round(keep * 0.9))
    return text[:keep] + "…"


def every(n: int, room: float, first: int = 1) -> list[int]:
    """The places of 0..n-1, counted from `first`, that can be named where each has so many pixels: all, or round numbers."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if step * room >= (20 if step == 1 else 30) or step == 1000)
    return [i for i in range(n) if (i + first) % step == 0]


def share(weight: float) -> str:
    """Two digits; what is next to nothing is told from nothing."""
    return f"{100 * weight:.0f}%" if weight >= 0.0995 or weight == 0 else f"{100 * weight:.1f}%" if weight >= 5e-4 else "<0.1%"


def drawable(text: str) -> str:
    """Spaces and ends of lines made visible, and a picture sign that no installed font has by its name: 🏠 as :house building:."""
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    text = "␣" + text[1:] if text.startswith(" ") else text
    return "".join(named(character) for character in text if unicodedata.category(character) != "Cf" and not "\ufe00" <= character <= "\ufe0f")


def named(character: str) -> str:
    if unicodedata.category(character) != "So" or known(character):
        return character
    return f":{unicodedata.name(character, f'U+{ord(character):04X}').lower()}:"


def known(character: str) -> bool:
    """Whether an installed font of ours has it."""
    from matplotlib.font_manager import findfont, get_font
    return any(get_font(findfont(name)).get_char_index(ord(character)) for name in fonts())
