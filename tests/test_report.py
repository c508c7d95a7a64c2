"""What people look at, looked at by machines: widths, pixels, lines."""
from __future__ import annotations

import io
import json
import logging
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from hanok.errors import ConfigError, DataError
from hanok.report import BLUE, CORAL, GREY, Progress, card, count, markdown_table, plot_bars, plot_loss, rate, seconds, size, table

# ---- numbers in words

@pytest.mark.parametrize("n, told", [(0, "0"), (999, "999"), (1000, "1.0K"), (134_515_008, "134.5M"), (999_960, "1.0M"), (999_940, "999.9K"),
                                     (7_615_616_512, "7.6B"), (3e16, "30000.0T"), (52.13, "52.1")])
def test_count(n: float, told: str):
    assert count(n) == told


@pytest.mark.parametrize("n, told", [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (538_060_032, "513.1 MiB"), (1024 ** 3 - 1, "1.0 GiB")])
def test_size(n: int, told: str):
    assert size(n) == told


@pytest.mark.parametrize("duration, told", [(0.0123, "12 ms"), (0.9996, "1.0 s"), (3.21, "3.2 s"), (9.96, "10 s"), (59.7, "1 min 0 s"),
                                            (127.3, "2 min 7 s"), (3599.8, "1 h 0 min"), (3 * 3600 + 299, "3 h 4 min"), (90_000, "1 d 1 h")])
def test_seconds(duration: float, told: str):
    assert seconds(duration) == told


def test_rate():
    assert rate(12_345, "tokens") == "12.3K tokens/s"
    assert rate(3 * 1024 ** 2, "bytes") == "3.0 MiB/s"


# ---- tables

def test_table_stands_in_columns():
    assert table(["이름", "bits"], [["한국어 모델", 1.10234], ["gzip", 12.0]]) == (
        "이름           bits\n"
        "───────────  ──────\n"
        "한국어 모델   1.102\n"
        "gzip         12.000")


words = st.text(alphabet="ab |한글é\n", max_size=6)


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(words | st.integers() | st.none(), min_size=n, max_size=n), min_size=1, max_size=5)))
def test_every_line_of_a_markdown_table_has_one_width_and_its_cells(rows: list[list]):
    lines = markdown_table(["h"] * len(rows[0]), rows).split("\n")
    assert len(lines) == len(rows) + 2
    assert len({cell_len(line) for line in lines}) == 1
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(rows[0]) + 1}


def test_markdown_table():
    assert markdown_table(["a|b", "n"], [["x\ny", 5]]) == "| a\\|b |   n |\n| ---- | --: |\n| x y  |   5 |"


def test_align_is_obeyed_and_checked():
    assert table(["name", "n"], [["ab", 5]], align="rl").split("\n")[-1] == "  ab  5"
    assert table(["name"], [["ab"]], align="c").split("\n")[-1] == " ab"
    with pytest.raises(ValueError, match="2 cells under 1 headers"):
        table(["a"], [["x", "y"]])
    with pytest.raises(ValueError, match="one of l, r, c"):
        table(["a"], [["x"]], align="lr")
    assert table(["a", "b"], []) == "a  b\n─  ─"


# ---- card

def a_card(**changes) -> str:
    asked = {
        "title": "Small\nPython", "family": "llama", "sizes": {"parameters": 5_242_880, "rope_theta": 10000.0, "norm_eps": 1e-5, "window": None},
        "metrics": {"bits per byte": 1.10234, "steps": 4000},
        "lineage": {"parent": None, "data": [{"file": "py_train.txt", "sha256": "0a" * 32}], "seeds": [1, 2], "notes": {},
                    "versions": {"torch": "2.13"}},
        "usage": ["hanok generate . --prompt 'def main'", "hanok score . held_out.txt"], "licence": "Apache-2.0", "plot": "loss.png",
    }
    return card(**asked | changes)


def test_card_tells_everything_it_was_given():
    text = a_card()
    assert text.startswith("---\nlicense: apache-2.0\nlibrary_name: hanok\n---\n\n# Small Python\n\nA `llama` model of 5.2M parameters.")
    for line in ("| parameters | 5,242,880 |", "| rope_theta |    10,000 |", "| norm_eps   |     1e-05 |", "| bits per byte | 1.102 |",
                 "- data:", "  - 1:", "    - file: `py_train.txt`", f"    - sha256: `{'0a' * 32}`", "- seeds: 1, 2", "- versions:", "  - torch: 2.13",
                 "hanok score . held_out.txt"):
        assert line in text.split("\n")
    assert "](<loss.png>)" in text
    assert not re.search("None|notes|window|parent", text)
    assert re.findall("^## (.*)", text, re.M) == ["What it is", "How it was made", "Its numbers", "How to run it", "What it is not"]
    assert text == a_card() and text.endswith(".\n") and "\n\n\n" not in text


def test_card_leaves_out_what_is_not_known():
    text = a_card(sizes={}, metrics={}, lineage={}, usage=[], plot=None)
    assert re.findall("^## (.*)", text, re.M) == ["What it is not"]
    assert "A `llama` model. " in text


@pytest.mark.parametrize("licence, lines", [("MIT", "license: mit"), ("", "license: unknown"),
                                            ('Llama "3": community', 'license: other\nlicense_name: "Llama \\"3\\": community"')])
def test_front_matter_is_yaml(licence: str, lines: str):
    assert a_card(licence=licence).startswith(f"---\n{lines}\nlibrary_name: hanok\n---\n")


# ---- progress

class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_log_gets_a_line_every_tenth_and_no_control_codes():
    stream, clock = io.StringIO(), Clock()
    with Progress("pretrain", 10_000, stream=stream, clock=clock) as progress:
        for step in range(1, 10_001):
            clock.now += 0.001
            progress.update(step, loss=3 - step / 10_000, tokens="12.3K/s")
    lines = stream.getvalue().splitlines()
    assert lines[1] == "pretrain  2,000/10,000 (20%)  1.0K steps/s  8.0 s left  loss 2.800  tokens 12.3K/s"
    assert lines[-1] == "pretrain  10,000/10,000 (100%)  1.0K steps/s  took 10 s  loss 2.000  tokens 12.3K/s"
    assert len(lines) == 10 and "\x1b" not in stream.getvalue()


def test_log_gets_a_line_when_a_minute_has_passed_and_one_at_the_end():
    stream, clock = io.StringIO(), Clock()
    with Progress("tune", 1_000_000, stream=stream, clock=clock) as progress:
        for _ in range(25):
            clock.now += 6
            progress.advance()
    assert [line.split("  ")[1] for line in stream.getvalue().splitlines()] == ["10/1,000,000 (0%)", "20/1,000,000 (0%)", "25/1,000,000 (0%)"]


def test_an_unknown_total_counts_on():
    stream, clock = io.StringIO(), Clock()
    with Progress("read", unit="documents", stream=stream, clock=clock) as progress:
        for _ in range(3):
            clock.now += 40
            progress.advance(1000)
    assert stream.getvalue() == "read  2,000  25 documents/s\nread  3,000  25 documents/s\n"


def test_bytes_callback_tells_each_file():
    stream, clock = io.StringIO(), Clock()
    with Progress(unit="bytes", stream=stream, clock=clock, every_percent=50) as progress:
        told = progress.bytes_callback()
        for done in range(5):
            clock.now += 1
            told(done * 2 ** 20, 4 * 2 ** 20, "model.safetensors")
        told(512, None, "config.json")
    assert stream.getvalue().splitlines() == [
        "model.safetensors  2.0 MiB/4.0 MiB (50%)  1.0 MiB/s  2.0 s left",
        "model.safetensors  4.0 MiB/4.0 MiB (100%)  1.0 MiB/s  took 4.0 s",
        "config.json  512 B",
    ]


def test_a_terminal_gets_a_bar_and_lines_above_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with Progress("pretrain [x]", 4, stream=stream) as progress:
        for step in range(1, 5):
            progress.update(step, loss=1.0)
            if step == 2:
                progress.print("saved [bold] 2")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "saved [bold] 2\n" in plain and "━" in plain
    assert re.search(r"pretrain \[x\] ━+ 4/4 \(100%\)", plain) and "loss 1.000" in plain
    assert not re.search(r"^pretrain \[x\]  4/4", plain, re.M)


def test_print_goes_between_plain_lines():
    stream = io.StringIO()
    with Progress("p", 2, stream=stream, clock=Clock()) as progress:
        progress.update(1)
        progress.print("saved [1]")
        progress.update(2)
    assert stream.getvalue() == "p  1/2 (50%)\nsaved [1]\np  2/2 (100%)  took 0 ms\n"


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_quiet_prints_nothing(stream: io.StringIO):
    with Progress("pretrain", 2, quiet=True, stream=stream) as progress:
        progress.update(1, loss=2.0)
        progress.print("saved")
        progress.bytes_callback()(10, 10, "file")
    assert stream.getvalue() == ""


def test_an_error_passes_through_and_what_was_reached_is_told():
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress("p", 1000, stream=stream, clock=Clock()) as progress:
        progress.update(7)
        raise KeyboardInterrupt
    assert stream.getvalue() == "p  7/1,000 (1%)\n"


# ---- plots

def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread
    return (imread(path)[..., :3] * 255).round().astype(int)


def coloured(picture: np.ndarray, colour: str) -> np.ndarray:
    return (picture == [int(colour[i:i + 2], 16) for i in (1, 3, 5)]).all(-1)


def a_run(n: int, validation: bool = True) -> list[dict[str, float]]:
    draw = np.random.default_rng(0)
    rows = [{"step": s, "tokens": 512 * s, "seconds": s / 9, "loss": 3 + 6 * math.exp(-s / 30) + draw.normal(0, 0.05), "learning_rate": 1e-3}
            for s in range(1, n + 1)]
    for row in rows[19::20] if validation else []:
        row["validation_loss"] = row["loss"] + 0.1
    return rows


def test_plot_loss_draws_both_curves_at_its_size(tmp_path: Path):
    plot_loss(a_run(200), tmp_path / "a.png", title="A run")
    plot_loss(a_run(200, validation=False), tmp_path / "b.png", title="A run")
    both, one = pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png")
    assert both.shape == one.shape == (700, 1200, 3)
    assert coloured(both, BLUE).sum() > 1000 and coloured(both, CORAL).sum() > 1000
    assert coloured(one, BLUE).sum() > 1000 and not coloured(one, CORAL).any()


def test_plot_loss_falls_to_the_right(tmp_path: Path):
    plot_loss(a_run(200, validation=False), tmp_path / "a.png", title="")
    rows, columns = np.nonzero(coloured(pixels(tmp_path / "a.png"), BLUE)[:, :1010])
    heights = [rows[(columns > x) & (columns < x + 60)].mean() for x in (200, 400, 900)]
    assert heights[0] < heights[1] < heights[2]


def test_plot_loss_forgets_what_a_resumed_run_did_again(tmp_path: Path):
    run = a_run(60)
    plot_loss(run, tmp_path / "a.png", title="t")
    plot_loss([*run[:30], *({**row, "loss": 9.0} for row in run[20:30]), *run[20:]], tmp_path / "b.png", title="t")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("rows", [
    [{"step": 1, "loss": 2.3}],
    [{"step": 0, "loss": 0.0, "tokens": 0}, {"step": 1, "loss": 0.0, "tokens": 0}],
    [{"step": "1", "loss": "2.5", "validation_loss": ""}, {"step": "2", "loss": "nan", "validation_loss": "2.25"}],
    [{"step": s, "loss": 2.0, "tokens": 3 * s if s % 2 else None} for s in range(8)],
], ids=["one row", "zeros", "text of a CSV", "tokens now and then"])
def test_plot_loss_takes_thin_rows(tmp_path: Path, rows: list[dict]):
    plot_loss(rows, tmp_path / "a.png", title="$\\frac{$ no formula", bits_per_byte=True)
    assert coloured(pixels(tmp_path / "a.png"), BLUE).any()


@pytest.mark.parametrize("rows", [[], [{"step": 1, "loss": math.nan}], [{"loss": 1.0}]])
def test_plot_loss_refuses_rows_without_a_loss(tmp_path: Path, rows: list[dict]):
    with pytest.raises(DataError, match="finite loss"):
        plot_loss(rows, tmp_path / "a.png", title="t")
    assert not list(tmp_path.iterdir())


def test_plot_bars_are_as_long_as_their_values(tmp_path: Path):
    plot_bars(["gzip", "a model", "xz"], [2.0, 0.5, 1.5], tmp_path / "a.png", title="t", unit="bits per byte", highlight="a model")
    picture = pixels(tmp_path / "a.png")
    lengths = np.r_[sorted(set(coloured(picture, GREY).sum(1)), reverse=True)[:2], coloured(picture, BLUE).sum(1).max()]
    assert picture.shape == (150 + 3 * 66, 1200, 3)
    assert lengths[0] > 500
    assert lengths / lengths[0] == pytest.approx([1, 0.75, 0.25], abs=0.01)


def test_plot_bars_keeps_long_names_in_the_picture(tmp_path: Path):
    plot_bars(["a very long name " * 8, "$b$"], [12_000, 0], tmp_path / "a.png", title="a long title " * 12, unit="tokens/s")
    picture = pixels(tmp_path / "a.png")
    assert (picture[:, :30] == 255).all() and (picture[:, -30:] == 255).all()


@pytest.mark.parametrize("names, values", [([], []), (["a"], [1.0, 2.0]), (["a"], [math.nan]), (["a"], [-1.0])])
def test_plot_bars_refuses_what_has_no_length(tmp_path: Path, names: list[str], values: list[float]):
    with pytest.raises(DataError, match="finite value of 0 or more"):
        plot_bars(names, values, tmp_path / "a.png", title="t", unit="u")


def test_a_missing_glyph_is_one_line_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "hanok"):
        plot_bars(["\U0001f9ff\U000e0fff"], [1.0], tmp_path / "a.png", title="\U000e0fff", unit="u")
    assert len(caplog.records) == 1 and "no installed font" in caplog.text
    assert (tmp_path / "a.png").exists()


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"pip install 'hanok\[plot\]'"):
        plot_loss(a_run(3), tmp_path / "a.png", title="t")


def test_a_start_up_pays_for_neither_rich_nor_matplotlib_and_a_plot_not_for_pyplot(tmp_path: Path):
    program = f"""
import json, sys
from hanok import report
before = [name for name in ("rich", "matplotlib", "torch") if name in sys.modules]
report.plot_bars(["a"], [1.0], {str(tmp_path / "a.png")!r}, title="t", unit="u")
import matplotlib
print(json.dumps([before, "matplotlib.pyplot" in sys.modules]))
"""
    ran = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == [[], False]
