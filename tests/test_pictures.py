"""Pictures looked at by machines: a darker cell for every larger weight, labels that do not touch, room for one word and for sixty-four."""
from __future__ import annotations

import io
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanok import pictures, report
from hanok.errors import DataError, RequestError
from hanok.pictures import NextPanel, WordPanel, apart, check_words, drawable, every, fitted, plot_heads, plot_matrix, plot_next, plot_word, share

LONG = [f"word{i}" for i in range(30)]


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread
    return imread(io.BytesIO(path.read_bytes()), format="png")[..., :3]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list:
    """Every figure that is drawn, to ask where its texts are."""
    from contextlib import contextmanager
    drawn = []

    @contextmanager
    def keeping(*arguments):
        with report.picture(*arguments) as figure:
            drawn.append(figure)
            yield figure

    monkeypatch.setattr(pictures, "picture", keeping)
    return drawn


def texts(figure) -> list:
    from matplotlib.text import Text
    return [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]


def assert_readable(figure):
    """No text leaves the picture, and none lies on another."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
    width, height = figure.bbox.width, figure.bbox.height
    for text, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, (text, box, width, height)
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        across, down = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert not (across > 3 and down > 3), (one, other, a, b)


def rows_of(n: int, m: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(m, 0.3), n)


# ---- heatmaps
@pytest.mark.parametrize("words", [["one"], ["a", "b"], ["한옥은", "🏠", "돌"], LONG, [f"extraordinarily{i}" for i in range(64)]],
                         ids=["one", "two", "Korean", "thirty", "sixty-four"])
def test_labels_do_not_touch(words, tmp_path: Path, figures: list):
    n = len(words)
    plot_matrix(rows_of(n, n), words, words, tmp_path / "m.png", title="Head 1.2", unit="of each word", highlight=words[0])
    plot_heads(np.stack([rows_of(n, n, i) for i in range(6)]).reshape(2, 3, n, n), words, words, tmp_path / "h.png", title="Who", unit="heads")
    for figure in figures:
        assert_readable(figure)
        told = [text.get_text() for text in texts(figure)]
        assert {"who looks", "at whom"} <= set(told)


@pytest.mark.parametrize("n_layers, n_heads", [(1, 1), (30, 9), (6, 12), (48, 25)])
def test_any_number_of_heads(n_layers, n_heads, tmp_path: Path, figures: list):
    weights = np.stack([rows_of(4, 4, i) for i in range(n_layers * n_heads)]).reshape(n_layers, n_heads, 4, 4)
    plot_heads(weights, list("abcd"), list("abcd"), tmp_path / "h.png", title="Who", unit="heads")
    assert_readable(figures[0])
    plot_word([WordPanel("a b c d", weights[:, :, 0, 1], "'a' looks at 'b'", [("b", 0.5)], "what 'a' looks at", None, {})], tmp_path / "w.png",
              title="a", unit="heads")
    assert_readable(figures[1])


def test_more_weight_is_darker_for_every_eye(tmp_path: Path):
    """In grey and by each colour alone, from white to nearly black."""
    colours = pictures.colour_map()(np.linspace(0, 1, 100))[:, :3]
    grey = colours @ [0.299, 0.587, 0.114]
    assert (np.diff(grey) < 0).all() and grey[0] > 0.99 and grey[-1] < 0.2
    weights = np.array([[0.0, 0.04, 0.16], [0.36, 0.64, 1.0]])
    plot_matrix(weights, ["x", "y"], ["a", "b", "c"], tmp_path / "m.png", title="t", unit="u")
    picture = pixels(tmp_path / "m.png")
    found = {tuple(pixel) for pixel in (255 * picture).round().astype(int).reshape(-1, 3).tolist()}
    for weight in weights.flat:
        assert pictures.colour_map()(np.sqrt(weight), bytes=True)[:3] in found


def test_a_panel_holds_its_heads_weights(tmp_path: Path, figures: list):
    """The mosaic's dots, read back from the figure, are the weights of layer 2, head 3."""
    weights = np.stack([rows_of(3, 3, i) for i in range(8)]).reshape(2, 4, 3, 3)
    plot_heads(weights, list("abc"), list("abc"), tmp_path / "h.png", title="t", unit="u")
    mosaic = figures[0].axes[0].images[0].get_array()
    dot = (mosaic.shape[0] - 6 * 3) // 6
    middle = [6 + (dot * 3 + 6) * i + dot // 2 for i in range(4)]
    read = np.array([[mosaic[middle[1] + i * dot, middle[2] + j * dot] for j in range(3)] for i in range(3)])
    assert np.allclose(read, pictures.colour_map()(np.sqrt(weights[1, 2]))[..., :3], atol=1e-6)


def test_rows_and_columns_may_be_other_words(tmp_path: Path, figures: list):
    plot_matrix(rows_of(2, 5), ["wir", "gehen"], ["we", "go", "now", ".", "</s>"], tmp_path / "m.png", title="t", unit="u")
    plot_heads(np.stack([rows_of(2, 5)] * 2)[None], ["wir", "gehen"], ["we", "go", "now", ".", "</s>"], tmp_path / "h.png", title="t", unit="u")
    for figure in figures:
        assert_readable(figure)


def test_a_text_beyond_the_picture_is_refused(tmp_path: Path):
    words = ["w"] * 65
    with pytest.raises(RequestError, match="the text has 65 words, and a picture shows 64") as told:
        plot_matrix(rows_of(65, 65), words, words, tmp_path / "m.png", title="t", unit="u")
    assert told.value.kind == "too_long" and not list(tmp_path.iterdir())
    with pytest.raises(RequestError, match="the source has 65 words"):
        check_words(["a"], words, names=("answer", "source"))
    with pytest.raises(RequestError, match=r"the answer has 65 words, and a picture shows 64; let fewer tokens be written \(max_new_tokens\)"):
        plot_heads(rows_of(65, 2)[None, None], words, ["a", "b"], tmp_path / "m.png", title="t", unit="u", names=("answer", "source"))


@pytest.mark.parametrize("name", ["notes.txt", "paper.pdf", "png", "a.png.bak"])
def test_what_is_no_png_is_not_replaced_by_one(name, tmp_path: Path):
    out = tmp_path / name
    out.write_text("mine")
    for draw in (lambda: plot_matrix(rows_of(2, 2), ["a", "b"], ["a", "b"], out, title="t", unit="u"),
                 lambda: plot_next(["a"], [NextPanel("t", "n", [0.5], 0.5)], out, title="t", unit="u"),
                 lambda: report.plot_bars(["a"], [1.0], out, title="t", unit="u")):
        with pytest.raises(DataError, match=r"pictures are PNG files; give a name that ends in \.png$"):
            draw()
    assert out.read_text() == "mine" and list(tmp_path.iterdir()) == [out]
    report.plot_bars(["a"], [1.0], tmp_path / "A.PNG", title="t", unit="u")


# ---- a word
@pytest.mark.parametrize("n_curves", [0, 1, 4])
@pytest.mark.parametrize("n_sentences", [1, 3])
def test_a_words_picture_is_readable(n_curves, n_sentences, tmp_path: Path, figures: list):
    curves = {f"meaning {i}": [0.2 + 0.01 * i, 0.5, 0.6 - 0.01 * i] for i in range(n_curves)}
    panel = WordPanel("Attention is a novel idea", rows_of(6, 12), "how strongly 'novel' looks at 'idea'",
                      [("Attention", 0.08), ("idea", 0.05), ("한옥은", 0.0)], "what 'novel' looks at (mean of 72 heads)", ("[CLS] [SEP]", 0.87),
                      curves)
    plot_word([panel] * n_sentences, tmp_path / "w.png", title="The word 'novel'", unit="ties")
    assert_readable(figures[0])
    told = [text.get_text() for text in texts(figures[0])]
    order = np.argsort(-rows_of(6, 12), axis=None)[:1]
    assert any(f"strongest: {order[0] // 12 + 1}.{order[0] % 12 + 1} " in text for text in told)
    assert told.count("[CLS] [SEP]") == n_sentences and told.count("87%") == n_sentences


def test_curves_differ_in_more_than_colour():
    assert len({mark for _, mark, _ in pictures.LINES}) == len({dash for *_, dash in pictures.LINES}) == len(pictures.LINES)


def test_nothing_to_draw_is_told(tmp_path: Path):
    for act in (lambda: plot_word([], tmp_path / "w.png", title="t", unit="u"), lambda: plot_next([], [], tmp_path / "n.png", title="t", unit="u")):
        with pytest.raises(DataError):
            act()
    assert not list(tmp_path.iterdir())


# ---- next tokens
def test_next_tokens_side_by_side(tmp_path: Path, figures: list):
    panels = [NextPanel(f"temperature {t}", "12.46 bits: as among 5,633 alike", [0.9, 0.0994, 0.0004], 0.0002) for t in (0, 0.5, 2)]
    plot_next([" Paris", "\n", "$x$"], panels, tmp_path / "n.png", title="What comes next?", unit="after “The capital of France is”")
    assert_readable(figures[0])
    told = [text.get_text() for text in texts(figures[0])]
    assert {"␣Paris", "⏎", "$x$", "all others"} <= set(told) and told.count("90%") == 3 and told.count("9.9%") == 3 and told.count("<0.1%") == 6
    bars = [axes.patches for axes in figures[0].axes]
    assert all([round(bar.get_width(), 4) for bar in patches[4:]] == [0.9, 0.0994, 0.0004, 0.0002] for patches in bars)


# ---- small tools
@given(st.lists(st.floats(0, 300), min_size=1, max_size=6), st.floats(1, 40))
def test_labels_are_moved_apart_and_keep_their_order(middles, height):
    moved = apart(middles, height)
    order = sorted(range(len(middles)), key=lambda i: middles[i])
    assert all(moved[b] - moved[a] >= height - 1e-6 for a, b in zip(order, order[1:]))
    if all(middles[b] - middles[a] >= height for a, b in zip(order, order[1:])):
        assert moved == pytest.approx(middles)


@given(st.integers(1, 200), st.floats(0.5, 60), st.sampled_from([0, 1]))
def test_ticks_have_room(n, room, first):
    places = every(n, room, first)
    assert all(0 <= i < n for i in places) and all((b - a) * room >= 20 for a, b in zip(places, places[1:]))
    if room >= 20:
        assert places == list(range(n))


@pytest.mark.parametrize("weight, told", [(0, "0%"), (1e-6, "<0.1%"), (0.0005, "0.1%"), (0.0526, "5.3%"), (0.0994, "9.9%"), (0.0996, "10%"),
                                          (1, "100%")])
def test_shares(weight, told):
    assert share(weight) == told


def test_what_no_font_has_is_named():
    assert drawable(" a\nb") == "␣a⏎b" and drawable("한 é →") == "한 é →"
    assert drawable("🏠\ufe0f") in ("🏠", ":house building:") and drawable("x\u200dy") == "xy"


def test_a_text_is_cut_to_its_room(tmp_path: Path):
    with report.picture(tmp_path / "x.png", 400, 300) as figure:
        assert fitted(figure, "short", 200, 12) == "short"
        cut = fitted(figure, "w" * 200, 120, 12)
        assert cut.endswith("…") and 2 < len(cut) < 40 and pictures.text_width(figure, cut, 12) <= 120


def test_a_missing_matplotlib_names_the_extra(tmp_path: Path):
    program = ("import sys; sys.modules['matplotlib'] = None; from hanok.pictures import plot_matrix; from hanok.errors import ConfigError\n"
               "import numpy as np\n"
               "try: plot_matrix(np.ones((1, 1)), ['a'], ['a'], 'x.png', title='', unit='')\n"
               "except ConfigError as error: print(error)")
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert "pip install 'hanok[plot]'" in ended.stdout and not list(tmp_path.iterdir())
