"""What people look at: numbers in words, tables, progress, plots and the card of a bundle.

matplotlib (extra `plot`) and rich are imported by the functions that draw, so that a start-up never pays for them; plots use a Figure of
their own and leave pyplot alone. A Korean syllable is two columns wide in a terminal (Unicode's East Asian Width, UAX 11), and tables know it.
"""
from __future__ import annotations

import json
import math
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from hanok.disk import new_file
from hanok.errors import ConfigError, DataError
from hanok.runtime import interactive, logger

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e8ebef"
BLUE, PALE_BLUE, CORAL, GREY = "#2563eb", "#c3d5fb", "#e4572e", "#c9d1da"
FONTS = ("Inter", "Noto Sans", "Helvetica Neue", "Segoe UI", "DejaVu Sans",
         "Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "Apple SD Gothic Neo", "Malgun Gothic")
"""In order of preference; each glyph comes from the first that has it."""


# ---- numbers in words
def count(n: float) -> str:
    """134_515_008 -> 134.5M."""
    return _scaled(n, 1000, ("", "K", "M", "B", "T"))


def size(n_bytes: float) -> str:
    """538_060_032 -> 513.1 MiB."""
    return _scaled(n_bytes, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    power = 0
    while power < len(units) - 1 and abs(round(value, 1)) >= base:
        value, power = value / base, power + 1
    return f"{value:{'.1f' if power else '.0f' if value >= 100 else '.3g'}}{units[power]}"


def seconds(duration: float) -> str:
    """127.3 -> 2 min 7 s; never more than two units."""
    if duration < 0.9995:
        return f"{1000 * duration:.0f} ms"
    if duration < 9.95:
        return f"{duration:.1f} s"
    whole = round(duration)
    for length, unit, below, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= length:
            return f"{whole // length} {unit} {whole % length // below} {part}"
    return f"{whole} s"


def rate(per_second: float, unit: str) -> str:
    """(12_345, "tokens") -> 12.3K tokens/s; the unit "bytes" counts in KiB, MiB."""
    return f"{size(per_second)}/s" if unit == "bytes" else f"{count(per_second)} {unit}/s"


# ---- tables
def table(headers: Sequence[str], rows: Sequence[Sequence[Any]], *, align: str = "") -> str:
    """Plain text for a monospaced screen. `align` has a letter a column (l, r, c); without it numbers stand right and text left.

    Floats get three decimals; give text where that is wrong. ValueError if a row has not one cell a header.
    """
    align = _align(headers, rows, align)
    head, *body = _columns(headers, rows, align)
    rule = ["─" * _width(cell) for cell in head]
    return "\n".join("  ".join(line).rstrip() for line in (head, rule, *body))


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[Any]], *, align: str = "") -> str:
    """The same as a Markdown table, its source aligned too."""
    align = _align(headers, rows, align)
    escaped = [[_cell(cell).replace("|", "\\|") for cell in row] for row in rows]
    head, *body = _columns([h.replace("|", "\\|") for h in headers], escaped, align, least=3)
    marks = {"l": lambda n: "-" * n, "r": lambda n: "-" * (n - 1) + ":", "c": lambda n: ":" + "-" * (n - 2) + ":"}
    rule = [marks[letter](_width(cell)) for letter, cell in zip(align, head)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))


def _align(headers: Sequence[str], rows: Sequence[Sequence[Any]], align: str) -> str:
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"a row of {len(row)} cells under {len(headers)} headers: {row!r}")
    if not align:
        numeric = [bool(column) and all(isinstance(cell, int | float) for cell in column) for column in zip(*rows)]
        align = "".join("r" if right else "l" for right in numeric or [False] * len(headers))
    if len(align) != len(headers) or set(align) - set("lrc"):
        raise ValueError(f"align '{align}' for {len(headers)} columns; one of l, r, c for each was expected")
    return align


def _columns(headers: Sequence[str], rows: Sequence[Sequence[Any]], align: str, least: int = 1) -> list[list[str]]:
    """Headers and rows as text, each column padded to its widest cell."""
    lines = [[_cell(cell) for cell in line] for line in (headers, *rows)]
    widths = [max(least, *map(_width, column)) for column in zip(*lines)]
    return [[_pad(cell, width, letter) for cell, width, letter in zip(line, widths, align)] for line in lines]


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else " ".join(str(value).splitlines())


def _pad(text: str, width: int, letter: str) -> str:
    room = width - _width(text)
    left = {"l": 0, "r": room, "c": room // 2}[letter]
    return " " * left + text + " " * (room - left)


def _width(text: str) -> int:
    from rich.cells import cell_len
    return cell_len(text)


# ---- the card of a bundle
def card(*, title: str, family: str, sizes: Mapping[str, Any], metrics: Mapping[str, Any], lineage: Mapping[str, Any], usage: Sequence[str],
         licence: str, plot: str | None = None) -> str:
    """The README.md of a bundle: what it is, how it was made, its numbers, how to run it, what it is not.

    `sizes["parameters"]` is told in words too; `lineage` (parent, data with hashes, seeds, versions, ...) may be nested; `usage` are command
    lines; `plot` is a picture's path beside the card. The same arguments give the same text.
    """
    parameters = f" of {count(sizes['parameters'])} parameters" if "parameters" in sizes else ""
    parts = [
        _front_matter(licence),
        "# " + " ".join(title.split()),
        f"A `{family}` model{parameters}. This folder is a hanok bundle: weights, configuration and tokenizer in one place, read as they are by "
        "every hanok verb.",
        "## What it is\n\n" + _facts("size", sizes) if sizes else "",
        "## How it was made\n\n" + _bullets(lineage) if lineage else "",
        "## Its numbers\n\n" + _facts("measure", metrics) if metrics else "",
        f"![Training and validation loss over the steps of training](<{plot}>)" if plot else "",
        "## How to run it\n\n```bash\n" + "\n".join(usage) + "\n```" if usage else "",
        "## What it is not\n\n"
        "- A source of facts: it says what is likely after the text that it was trained on, true or not. Check what matters.\n"
        "- A judge of people, or a giver of medical, legal or financial advice.\n"
        "- Tested for safety or fairness, unless a number above says so. It repeats the prejudices of its training text.\n"
        "- Proven beyond its numbers: they hold for the text that they were measured on, and for no other language or domain.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(licence: str) -> str:
    """YAML as model hubs read it: an identifier in lower case, or `other` and its name."""
    licence = licence.strip()
    if re.fullmatch(r"[A-Za-z0-9.+-]+", licence):
        named = f"license: {licence.lower()}"
    elif licence:
        named = f"license: other\nlicense_name: {json.dumps(licence, ensure_ascii=False)}"
    else:
        named = "license: unknown"
    return f"---\n{named}\nlibrary_name: hanok\n---"


def _facts(name: str, values: Mapping[str, Any]) -> str:
    def told(value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return str(value)
        return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"
    return markdown_table([name, "value"], [[key, told(value)] for key, value in values.items() if value is not None], align="lr")


def _bullets(data: Mapping[str, Any], indent: str = "") -> str:
    lines = []
    for name, value in data.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}- {name}:", _bullets(value, indent + "  ")] if value else []
        elif isinstance(value, list | tuple) and any(isinstance(part, Mapping) for part in value):
            lines += [f"{indent}- {name}:", _bullets({str(i): part for i, part in enumerate(value, 1)}, indent + "  ")]
        elif isinstance(value, list | tuple):
            lines.append(f"{indent}- {name}: {', '.join(map(_plain, value))}")
        elif value is not None:
            lines.append(f"{indent}- {name}: {_plain(value)}")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    """One line; hashes, and what Markdown would read as its own signs, as code."""
    text = " ".join(str(value).split())
    return f"`{text}`" if re.search(r"[0-9a-f]{32}|[_*<\[]", text) and "`" not in text else text


# ---- progress
class Progress:
    """Long work on standard error: a bar where a person looks at it, else a plain line now and then, so that logs stay readable.

    `unit` is what is counted: "steps" (or any other word), "bytes", or "percent". `total` None = nobody knows. Into a log goes
    a line when `every_percent` of the work or `every_seconds` have passed since the last, and one at the end. `quiet` prints nothing at all.
    """

    def __init__(self, description: str = "", total: float | None = None, *, unit: str = "steps", quiet: bool = False, stream: IO[str] | None = None,
                 every_percent: float = 10, every_seconds: float = 60, clock: Callable[[], float] = time.monotonic):
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar
        from rich.table import Column
        self.unit, self.quiet = unit, quiet
        self.every_percent, self.every_seconds, self.clock = every_percent, every_seconds, clock
        self._stream = stream or sys.stderr
        console = Console(file=self._stream, highlight=False)
        self._drawn = not quiet and interactive(self._stream) and not console.is_dumb_terminal
        self._bar = Bar(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(24, complete_style="blue", finished_style="green"),
            TextColumn("{task.fields[told]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=console, disable=not self._drawn, get_time=clock, speed_estimate_period=300,
        )
        self._tasks: dict[str, Any] = {}                     # description -> rich's task id
        self._said: dict[str, tuple[float, float]] = {}      # description -> what was completed, and when, at its last line
        self.description = description
        if description:
            self._entry(description, total)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name, (said, _) in self._said.items():
            if self._entry(name).completed != said:
                self._say(name)
        self._bar.stop()

    def update(self, completed: float, *, total: float | None = None, **fields: Any) -> None:
        """`completed` units are done in all. `fields` (loss=3.214, tokens="12.3K/s") stand behind the numbers, floats with three decimals."""
        self._update(self.description, completed, total, fields)

    def advance(self, n: float = 1, **fields: Any) -> None:
        """`n` more units are done."""
        self._update(self.description, self._entry(self.description).completed + n, None, fields)

    def print(self, text: str) -> None:
        """A line above the bar."""
        if self._drawn:
            self._bar.console.print(text, markup=False, soft_wrap=True)
        elif not self.quiet:
            self._stream.write(text + "\n")
            self._stream.flush()

    def bytes_callback(self) -> Callable[[int, int | None, str], None]:
        """A function of (bytes done, bytes in all or None, name): one bar a name, as downloads report."""
        return lambda done, total, name: self._update(name, done, total, {})

    def _entry(self, name: str, total: float | None = None) -> Any:
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, total=total, told="", shown={})
            self._said[name] = (0, self.clock())
        return self._bar.tasks[self._tasks[name]]

    def _update(self, name: str, completed: float, total: float | None, fields: Mapping[str, Any]) -> None:
        entry, (said, when) = self._entry(name, total), self._said[name]
        self._bar.update(entry.id, completed=completed, total=total, shown=fields)
        if self._drawn:
            self._bar.update(entry.id, told=self._told(name))
        ends = entry.finished and said < entry.total
        if ends or 100 * (completed - said) >= self.every_percent * (entry.total or math.inf) or self.clock() - when >= self.every_seconds:
            self._say(name)

    def _told(self, name: str) -> str:
        """1,200/10,000 (12%)  52.1 steps/s  2 min 49 s left  loss 3.214."""
        entry = self._entry(name)
        number = size if self.unit == "bytes" else lambda n: f"{n:,.0f}"
        speed = entry.finished_speed or entry.speed
        if self.unit == "percent":
            parts = [f"{entry.completed:.0f}%"]
        else:
            parts = [number(entry.completed) + (f"/{number(entry.total)} ({entry.percentage:.0f}%)" if entry.total else "")]
            parts += [rate(speed, self.unit)] if speed else []
        if entry.finished:
            parts.append(f"took {seconds(entry.finished_time)}")
        elif entry.time_remaining is not None:
            parts.append(f"{seconds(entry.time_remaining)} left")
        parts += [f"{key.replace('_', ' ')} {_cell(value)}" for key, value in entry.fields["shown"].items()]
        return "  ".join(parts)

    def _say(self, name: str) -> None:
        self._said[name] = (self._entry(name).completed, self.clock())
        if not self._drawn:
            self.print(f"{name}  {self._told(name)}".strip())


# ---- plots
def plot_loss(rows: Sequence[Mapping[str, Any]], out: Path | str, *, title: str, bits_per_byte: bool = False) -> None:
    """The training curve as a PNG of 1200 x 700: loss thin and smoothed, validation as points, over steps and tokens.

    `rows` are those of metrics.csv (step, loss; validation_loss and tokens where they are known); `bits_per_byte` says in which unit the losses
    already are (False: nats per token). Losses above the 95th percentile, the fall of the first steps, may leave the picture at its top.
    DataError if no row has a step and a finite loss.
    """
    by_step = {step: row for row in rows if math.isfinite(step := _number(row, "step"))}
    steps = np.array(sorted(by_step))
    tokens, loss, validation = (np.array([_number(by_step[step], key) for step in steps]) for key in ("tokens", "loss", "validation_loss"))
    trained, validated = np.isfinite(loss), np.isfinite(validation)
    if not trained.any():
        raise DataError(f"{out}: got {len(rows)} rows without a finite loss; a training curve needs at least one")
    loss, validation = loss[trained], validation[validated]
    smooth = _smoothed(loss)
    shown = np.concatenate([loss[loss <= np.quantile(loss, 0.95 if len(loss) >= 50 else 1)], validation[len(validation) // 2:], smooth[-1:]])
    room = 0.06 * np.ptp(shown) or 0.05 * abs(shown[0]) or 1
    low, high = shown.min() - room, shown.max() + room

    with picture(out, 1200, 700) as figure:
        axes = figure.add_subplot()
        axes.grid(axis="y", color=GRID, linewidth=1)
        axes.set_axisbelow(True)
        axes.locator_params(axis="y", nbins=6)
        axes.set_xlim((steps[0], steps[-1]) if len(steps) > 1 else (steps[0] - 1, steps[0] + 1))
        axes.set_ylim(low, high)
        axes.plot(steps[trained], loss, color=PALE_BLUE, linewidth=1.2)
        axes.plot(steps[trained], smooth, color=BLUE, linewidth=2.6, solid_capstyle="round", marker="o" if len(loss) == 1 else None)
        within = validation <= high
        axes.plot(steps[validated][within], validation[within], color=CORAL, linewidth=1.6, marker="o", markersize=6.5, markeredgecolor="white",
                  clip_on=False, zorder=4)

        ends = [("training", smooth[-1], BLUE), *(("validation", value, CORAL) for value in validation[-1:])]
        for (name, value, colour), y in zip(ends, _apart([value for _, value, _ in ends], low, high, 0.145 * (high - low))):
            put_text(axes, 1.015, y, f"{name}\n{value:.3f}", transform=axes.get_yaxis_transform(), color=colour, fontsize=16, fontweight="bold",
                  va="center", linespacing=1.25)
        _axis_of_steps(axes, steps, tokens)
        headline(figure, title, "loss in bits per byte" if bits_per_byte else "loss in nats per token")


def plot_bars(names: Sequence[str], values: Sequence[float], out: Path | str, *, title: str, unit: str, highlight: Sequence[str] | str = ()) -> None:
    """Horizontal bars as a PNG 1200 wide, the first on top, each with its value at the end; those named by `highlight` are coloured.

    DataError if there is nothing to draw, names and values are not equally many, or a value is negative or not finite.
    """
    if len(values) == 0 or len(names) != len(values) or not all(0 <= value < math.inf for value in values):
        raise DataError(f"{out}: got {len(names)} names and the values {list(values)}; a finite value of 0 or more for each name was expected")
    chosen = {highlight} if isinstance(highlight, str) else set(highlight)
    height = 150 + 66 * len(values)
    with picture(out, 1200, height) as figure:
        axes = figure.add_axes((0.03, 30 / height, 0.94, (height - 150) / height))
        axes.set_axis_off()
        axes.barh(range(len(values)), values, height=0.62, color=[BLUE if name in chosen else GREY for name in names])
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.set_xlim(0, max(values) or 1)
        labels = []
        for y, (name, value) in enumerate(zip(names, values)):
            style = {"color": INK, "fontsize": 17, "va": "center", "fontweight": "bold" if name in chosen else "normal", "fontfamily": fonts()}
            beside = {"textcoords": "offset points", "parse_math": False, **style}
            labels.append(axes.annotate(name, (0, y), (-14, 0), ha="right", **beside))
            axes.annotate(f"{value:.3f}" if max(values) < 100 else f"{value:,.0f}", (value, y), (10, 0), **beside)
        widest = max(label.get_window_extent().width for label in labels) / 1200
        left = 0.05 + min(widest, 0.5)
        axes.set_position((left, 30 / height, 0.88 - left, (height - 150) / height))
        for label in labels:
            label.set_fontsize(17 * 0.5 / max(widest, 0.5))
        headline(figure, title, unit)


def check_picture(out: Path | str) -> None:
    """DataError for a name that promises no PNG: what another program wrote there is not replaced by one."""
    if Path(out).suffix.lower() != ".png":
        raise DataError(f"{out}: pictures are PNG files; give a name that ends in .png")


@contextmanager
def picture(out: Path | str, width: int, height: int) -> Iterator[Any]:
    """A Figure of so many pixels, written as a PNG when the block ends. Characters that no installed font has are told in the log."""
    check_picture(out)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("a plot was asked for, but matplotlib is not installed; pip install 'hanok[plot]'") from None
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", "Glyph .* missing from font")
        yield figure
        with new_file(out) as handle:
            figure.savefig(handle, format="png", metadata={"Software": None})
    if any("missing from font" in str(warning.message) for warning in caught):
        logger.warning("%s: no installed font has all its characters; install one that has (for Korean: Noto Sans CJK KR)", out)


def fonts() -> list[str]:
    from matplotlib.font_manager import get_font_names
    installed = set(get_font_names())
    return [font for font in FONTS if font in installed]


def put_text(owner: Any, x: float, y: float, text: str, **style: Any) -> Any:
    """A text that means what it says: dollar signs make no formulas."""
    return owner.text(x, y, text, fontfamily=fonts(), parse_math=False, **style)


def headline(figure: Any, title: str, unit: str) -> None:
    height = figure.bbox.height
    label = put_text(figure, 0.03, 1 - 46 / height, title, color=INK, fontsize=23, fontweight="bold", va="center")
    label.set_fontsize(23 * min(1, 0.92 * figure.bbox.width / max(label.get_window_extent().width, 1)))
    put_text(figure, 0.03, 1 - 88 / height, unit, color=MUTED, fontsize=16, va="center")


def _axis_of_steps(axes: Any, steps: np.ndarray, tokens: np.ndarray) -> None:
    """Steps below the picture; below them tokens, where they grow with the steps."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator
    known = np.isfinite(tokens)
    axes.set_position((0.075, 0.125, 0.775, 0.685))
    rulers: list[tuple[Any, float, str, Callable[[float], str]]] = [(axes, -0.052, "steps", lambda n: f"{n:,.0f}")]
    if known.sum() > 1 and (np.diff(tokens[known]) > 0).all():
        axes.set_position((0.075, 0.175, 0.775, 0.635))
        there, back = (steps[known], tokens[known]), (tokens[known], steps[known])
        ruler = axes.secondary_xaxis(-0.085, functions=(lambda x: _line_through(x, *there), lambda x: _line_through(x, *back)))
        rulers.append((ruler, -0.137, "tokens", lambda n: re.sub(r"\.0(?=\D)", "", count(n))))
    for ruler, y, name, form in rulers:
        ruler.spines[:].set_visible(False)
        ruler.tick_params(length=0, pad=8, labelsize=15, labelcolor=MUTED, labelfontfamily=fonts())
        ruler.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10], integer=True))
        ruler.xaxis.set_major_formatter(FuncFormatter(lambda x, _, form=form: form(x)))
        put_text(axes, 1.155, y, name, transform=axes.transAxes, color=MUTED, fontsize=15, va="center", ha="right")


def _line_through(x: Any, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Linear between the points, and on beyond the outer ones."""
    x = np.asarray(x, float)
    i = np.clip(np.searchsorted(xs, x) - 1, 0, len(xs) - 2)
    return ys[i] + (x - xs[i]) * (ys[i + 1] - ys[i]) / (xs[i + 1] - xs[i])


def _smoothed(values: np.ndarray) -> np.ndarray:
    """The mean under a bell over a twentieth of the curve, the bell cut off at both ends."""
    reach = len(values) // 40
    bell = np.hanning(2 * reach + 3)[1:-1]
    inside = slice(reach, reach + len(values))
    return np.convolve(values, bell)[inside] / np.convolve(np.ones(len(values)), bell)[inside]


def _apart(values: Sequence[float], low: float, high: float, height: float) -> np.ndarray:
    """The middles of one or two labels of this height: as near to their values as they can be without touching, or leaving [low, high]."""
    middles = np.array(values)
    if len(values) == 2 and abs(gap := middles[0] - middles[1]) < height:
        middles = middles.mean() + (height / 2 if gap > 0 else -height / 2) * np.array([1, -1])
    return middles + max(low + height / 2 - middles.min(), 0) - max(middles.max() + height / 2 - high, 0)


def _number(row: Mapping[str, Any], key: str) -> float:
    value = row.get(key)
    return math.nan if value is None or value == "" else float(value)
