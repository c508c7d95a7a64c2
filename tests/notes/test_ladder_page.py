"""What the source notes say of translation, against the numbers that `hanok ladder` measured and wrote into docs/ladder.md."""
from __future__ import annotations

from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "ladder.md"
RUNGS = ("rnn", "lstm", "bahdanau", "transformer")


def table(first: str) -> dict[str, dict[str, str]]:
    """The page's table whose first column is called so: row -> column -> cell."""
    lines = iter(PAGE.read_text(encoding="utf-8").splitlines())
    names = next(cells(line) for line in lines if line.startswith("|") and cells(line)[0] == first)
    next(lines)
    found = {}
    for line in lines:
        if not line.startswith("|"):
            return found
        found[cells(line)[0]] = dict(zip(names, cells(line)))
    return found


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def bleu() -> dict[str, list[float]]:
    """Of each rung, by the length of the source, the shortest first."""
    rows = [row for words, row in table("words").items() if words != "all"]
    return {name: [float(row[f"{name}: BLEU / chrF"].split("/")[0]) for row in rows] for name in RUNGS}


def test_without_attention_long_sources_suffer_most(bleu):
    """What is left of BLEU from the shortest sources to the longest."""
    kept = {name: scores[-1] / scores[0] for name, scores in bleu.items()}
    assert max(kept["rnn"], kept["lstm"]) < kept["bahdanau"] and kept["lstm"] < kept["transformer"]


def test_with_attention_every_length_is_translated_better(bleu):
    """From English into German, whose verbs stand elsewhere."""
    for name in ("bahdanau", "transformer"):
        assert all(scores > max(others) for scores, *others in zip(bleu[name], bleu["rnn"], bleu["lstm"]))


def test_each_step_from_rnn_to_attention_translates_better():
    overall = {name: float(row["BLEU"]) for name, row in table("rung").items()}
    assert overall["rnn"] < overall["lstm"] < min(overall["bahdanau"], overall["transformer"])
