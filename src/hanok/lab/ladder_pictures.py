"""The ladder in one picture: translation by the length of the source, training speed by the length of a row, recall by distance, and what reaches an
answer over that distance before training; a line a rung.

Lines differ in mark and dash too, so that they can be told apart in grey. matplotlib (extra `plot`) is imported by `report.picture`.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hanok.pictures import LINES, TOP, apart, at_pixel, box, fitted
from hanok.report import GREY, GRID, MUTED, count, fonts, headline, picture

WIDTH, HEIGHT, ROW = 400, 360, 520
LABELS = 190
"""Pixels of a panel's plot, of its row of the picture, and of what stands right of it."""
ACROSS = 2
"""Panels side by side."""
LEAST_MOVED = 1e-9
"""What stands for nothing at all on a logarithmic axis."""


@dataclass(frozen=True)
class Panel:
    """One of the four: what it shows, and for each rung its values at the places that `places` name."""
    title: str
    below: str                               # what the places are
    places: Sequence[str]
    curves: Mapping[str, Sequence[float]]
    told: Callable[[float], str]             # a value in words
    logarithmic: bool = False
    level: tuple[float, str] | None = None   # a line across, and its name


def panels(results: Mapping[str, Any]) -> list[Panel]:
    """What there is to see in a ladder's results."""
    rungs, speeds = results["rungs"], results["speed"]["tokens_per_second"]
    first = next(iter(rungs.values()))
    buckets = [f"{bucket['first']}+" if bucket["last"] is None else f"–{bucket['last']}" for bucket in first["translation"]["by_length"]]
    scores = {name: [bucket["quality"]["bleu"] for bucket in rung["translation"]["by_length"]] for name, rung in rungs.items()}
    recalled = {name: [100 * accuracy for _, accuracy in rung["recall"]["accuracy"]] for name, rung in rungs.items()}
    return [
        Panel("translation: BLEU", "words of the source", buckets, scores, "{:.1f}".format),
        Panel("training: tokens a second", "tokens a row, as many in an update", list(next(iter(speeds.values()))),
              {name: list(rates.values()) for name, rates in speeds.items()}, count, logarithmic=True),
        Panel("recall: right answers", "tokens between pairs and question", [str(distance) for distance, _ in first["recall"]["accuracy"]], recalled,
              "{:.0f}%".format, level=(100 * first["recall"]["chance"], "guessing")),
        Panel("before training: what reaches the answer", "tokens between pairs and question",
              [str(distance) for distance, _ in first["recall"]["influence"]],
              {name: [max(moved, LEAST_MOVED) for _, moved in rung["recall"]["influence"]] for name, rung in rungs.items()}, "{:.0e}".format,
              logarithmic=True),
    ]


def plot_ladder(results: Mapping[str, Any], out: Path | str, *, title: str, unit: str) -> None:
    """The results of `Ladder.climb` as a PNG."""
    drawn = panels(results)
    with picture(out, 60 + ACROSS * (WIDTH + LABELS + 60), TOP + -(-len(drawn) // ACROSS) * ROW) as figure:
        for i, panel in enumerate(drawn):
            draw(figure, panel, 80 + i % ACROSS * (WIDTH + LABELS + 60), TOP + 60 + i // ACROSS * ROW)
        headline(figure, title, unit)


def draw(figure: Any, panel: Panel, x: float, y: float) -> None:
    """A panel whose plot has its top left corner there; each curve is named at its end."""
    axes, xs = box(figure, x, y, WIDTH, HEIGHT), range(len(panel.places))
    axes.set_xlim(-0.2, len(xs) - 0.8)
    axes.grid(axis="y", color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, which="both", labelsize=12, labelcolor=MUTED, labelfontfamily=fonts())
    axes.set_xticks(xs, panel.places)
    values = [value for curve in panel.curves.values() for value in curve]
    if panel.logarithmic:
        axes.set_yscale("log")
        axes.set_ylim(0.8 * min(values), 1.25 * max(values))
    else:
        axes.set_ylim(0, 1.05 * max(*values, panel.level[0] if panel.level else 0, 1))
    axes.yaxis.set_major_formatter(lambda value, _: panel.told(value))
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    if panel.level:
        axes.axhline(panel.level[0], color=GREY, linewidth=1.5)
        axes.annotate(panel.level[1], (0, panel.level[0]), (0, 4), textcoords="offset points", color=MUTED, fontsize=11, fontfamily=fonts())
    ends = []
    for i, (name, curve) in enumerate(panel.curves.items()):
        colour, mark, dash = LINES[i % len(LINES)]
        axes.plot(xs, curve, color=colour, marker=mark, linestyle=dash, linewidth=2, markersize=6)
        pixel = axes.transData.transform((xs[-1], curve[-1]))[1]
        ends.append((figure.bbox.height - pixel, f"{name} {panel.told(curve[-1])}", colour))
    for (_, label, colour), middle in zip(ends, apart([pixel for pixel, _, _ in ends], 22)):
        at_pixel(figure, x + WIDTH + 6, middle, fitted(figure, label, LABELS, 14), size=14, color=colour, fontweight="bold")
    at_pixel(figure, x - 40, y - 30, panel.title, size=16, fontweight="bold")
    at_pixel(figure, x + WIDTH / 2, y + HEIGHT + 40, panel.below, ha="center", color=MUTED)
