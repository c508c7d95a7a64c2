"""The ladder's parts: what is split, asked and measured; that it goes on where it was interrupted; and that its sentences follow from its numbers."""
from __future__ import annotations

import copy
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hanok import report
from hanok.api import load
from hanok.config import write_json
from hanok.contracts import IGNORE_INDEX
from hanok.data.pairs import TextPair
from hanok.errors import ConfigError, DataError
from hanok.lab import ladder as rooms
from hanok.lab import ladder_report, recall, speed
from hanok.lab.ladder import RUNGS, Budget, Ladder, check, cut, parameters, same_ladder, translations
from hanok.lab.ladder_pictures import plot_ladder
from hanok.models import catalog
from hanok.train.recipe import Recipe, read_recipe
from pairs import RECIPES, small_recipes, some_pairs


# ---- the recipes
def test_the_recipes_are_comparable_and_commented():
    recipes = {name: read_recipe(RECIPES / f"{name}.toml") for name in RUNGS}
    check(recipes)
    sizes = parameters(recipes)
    assert max(sizes.values()) / min(sizes.values()) < 1.1 and min(sizes.values()) > 1_000_000
    assert {name: (recipe.model.family, recipe.model.sizes.get("cell")) for name, recipe in recipes.items()} == {
        "rnn": ("rnn_encoder_decoder", "rnn"), "lstm": ("rnn_encoder_decoder", "lstm"), "bahdanau": ("bahdanau", None),
        "transformer": ("transformer", None)}
    for name in RUNGS:
        lines = (RECIPES / f"{name}.toml").read_text(encoding="utf-8").splitlines()
        fields = [line for line in lines if line and line[0] not in "#["]
        assert len(fields) > 15 and not [line for line in fields if not re.fullmatch(r"\w+ = [^#]+ # \S.{5,}", line)]


def test_rungs_that_read_differently_are_refused():
    recipes = small_recipes()
    other = {**recipes, "lstm": replace(recipes["lstm"], tokenizer=replace(recipes["lstm"].tokenizer, vocab_size=301))}
    with pytest.raises(ConfigError, match="the recipe of lstm has another"):
        check(other)
    with pytest.raises(ConfigError, match="the rung rnn is a qwen3, which does not translate"):
        check({"rnn": Recipe()})


# ---- the split
def test_no_test_source_was_learned_from():
    pairs = [*some_pairs(400), *(TextPair("the  House stands", "x", f"f{i}") for i in range(40))]
    train, test = cut(pairs, 0)
    assert {pair.group for pair in train}.isdisjoint(pair.group for pair in test) and test
    known = {" ".join(pair.source.split()).casefold() for pair in train}
    assert not [pair for pair in test if " ".join(pair.source.split()).casefold() in known]
    assert cut(list(reversed(pairs)), 0)[1] != [] and cut(pairs, 0) == (train, test) and cut(pairs, 1)[1] != test


def test_too_few_pairs():
    with pytest.raises(DataError, match="got 99 pairs with a source and a target; a ladder needs 100 at least"):
        cut(some_pairs(99), 0)


# ---- recall
@given(st.integers(1, 5), st.integers(0, 40), st.integers(1, recall.N_PAIRS), st.integers(0, 99))
def test_a_question_has_the_answer_that_its_pair_gave(n_rows: int, distance: int, n_pairs: int, seed: int):
    batch = recall.batch_of(n_rows, distance, np.random.default_rng(seed), n_pairs)
    assert batch.source_ids.shape == (n_rows, n_pairs + distance) and batch.token_ids.shape == batch.targets.shape == (n_rows, 2 * n_pairs)
    assert (batch.source_ids[:, n_pairs:] >= recall.NOISE).all() and (batch.source_ids < recall.VOCAB_SIZE).all()
    for source, asked, answers in zip(batch.source_ids.tolist(), batch.token_ids.tolist(), batch.targets.tolist()):
        told = dict(divmod(pair - recall.PAIRS, recall.N_VALUES) for pair in source[:n_pairs])
        assert len(told) == n_pairs and asked[1::2] == [recall.ASK] * n_pairs and answers[::2] == [IGNORE_INDEX] * n_pairs
        assert [told[key - recall.KEYS] for key in asked[::2]] == [value - recall.VALUES for value in answers[1::2]]


class Knows:
    """Names the value of the pair that it is asked for, up to a distance; behind it any value that it read."""

    def __init__(self, reach: int):
        self.reach = reach

    def __call__(self, batch):
        n_pairs = batch.token_ids.size(1) // 2
        keys, values = (batch.source_ids[:, :n_pairs] - recall.PAIRS).div(recall.N_VALUES, rounding_mode="floor"), \
            (batch.source_ids[:, :n_pairs] - recall.PAIRS) % recall.N_VALUES
        remembers = batch.source_ids.size(1) - n_pairs <= self.reach
        logits = torch.zeros(*batch.token_ids.shape, recall.VOCAB_SIZE)
        for row in range(len(keys)):
            for t in range(1, 2 * n_pairs, 2):
                at = (keys[row] == batch.token_ids[row, t - 1] - recall.KEYS).nonzero()[0, 0] if remembers else 0
                logits[row, t, recall.VALUES + values[row, at]] = 1
        return logits


def test_accuracy_by_distance_tells_who_remembers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recall, "N_ROWS", 64)
    found = dict(recall.accuracy(Knows(16), "cpu", 0))
    assert list(found) == list(recall.DISTANCES) and all(found[distance] == 1 for distance in (4, 8, 16))
    assert all(abs(found[distance] - recall.CHANCE) < 0.01 for distance in (32, 64, 128, 256))


def test_narrow_models_keep_their_layers_and_learn():
    config = recall.narrowed(catalog.preset("transformer", "base"))
    assert (config.d_model, config.d_ff, config.n_layers, config.vocab_size, config.dropout) == (64, 128, 6, recall.VOCAB_SIZE, 0.0)
    torch.manual_seed(0)
    small = replace(recall.narrowed(catalog.preset("transformer", "tiny")), n_layers=1, n_decoder_layers=1)
    losses: list[float] = []
    done: list[float] = []

    def heard(step) -> None:
        losses.append(step.loss)
        done.append(step.progress)

    recipe = replace(small_recipes()["transformer"].train, steps=25)
    _, rate, steps, seconds = recall.learn(lambda: catalog.family("transformer").build(small), recipe, "cpu", heard)
    assert done == sorted(done) and done[24] == 0.5 and done[-1] == 1                 # one bar for both rates
    assert steps == 25 and len(losses) == 50 and seconds > 0 and losses[24] < losses[0] - 1
    slower = sum(losses[23:25]) > sum(losses[48:])                                    # of its last tenth
    assert rate == recipe.learning_rate * (0.25 if slower else 1)


def test_what_other_pairs_change_is_what_a_model_hears(monkeypatch: pytest.MonkeyPatch):
    def hears(batch):
        logits = torch.zeros(*batch.token_ids.shape, 1)
        return logits + batch.source_ids[:, 0, None, None] if batch.source_ids.size(1) <= 4 + 16 else logits + batch.source_ids[:, 4, None, None]

    monkeypatch.setattr(recall, "N_ROWS", 16)
    found = dict(recall.influence(hears, "cpu", 0))
    assert all(found[distance] > 1 for distance in (4, 8, 16)) and all(found[distance] == 0 for distance in (32, 64, 128, 256))


def test_one_pair_is_told_by_who_cannot_tell_two_apart(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recall, "N_ROWS", 256)
    found = dict(recall.accuracy_by_pairs(Knows(0), "cpu", 0))                        # always names the first pair's value
    assert list(found) == [1, 2, 3, 4] and found[1] == 1
    assert all(abs(found[n] - 1 / n) < 0.01 for n in (2, 3, 4))


# ---- speed
@pytest.mark.parametrize("length", [1, 8, 512])
def test_every_update_has_as_many_tokens(length: int):
    batch = speed.random_batch(300, length, 2048)
    assert batch.token_ids.shape == batch.source_ids.shape == batch.targets.shape == (2048 // length, length)
    assert batch.token_ids.max() < 300 and not torch.equal(batch.token_ids, batch.source_ids)


def test_speed_is_told_for_each_model_and_length():
    recipes = small_recipes()
    config = replace(catalog.preset("rnn_encoder_decoder", "tiny"), vocab_size=64, d_model=16)
    done: list[int] = []
    told = speed.tokens_per_second({"a": lambda: catalog.family("rnn_encoder_decoder").build(config)}, {"a": recipes["rnn"].train}, 64, "cpu",
                                   lengths=(4, 16), n_tokens=64, rounds=2, on_length=done.append)
    assert told.keys() == {"a"} and list(told["a"]) == [4, 16] and all(rate > 0 for rate in told["a"].values()) and done == [1, 2]


# ---- a ladder of two rungs
@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a ladder was begun."""
    for room, name, value in ((speed, "LENGTHS", (4, 16)), (speed, "TOKENS", 64), (recall, "DISTANCES", (2, 4)), (recall, "N_ROWS", 8)):
        monkeypatch.setattr(room, name, value)
    train, test = cut(some_pairs(300), 0)
    (tmp_path / "data").mkdir()
    for name, pairs in (("train", train), ("test", test)):
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in pairs))
    write_json(tmp_path / rooms.RESULTS, {"settings": {"seed": 0}, "data": {"train": len(train), "test": len(test)}})
    return tmp_path


def two_rungs(folder: Path, steps: int = 4) -> Ladder:
    recipes, test = small_recipes(), cut(some_pairs(300), 0)[1]
    return Ladder(folder, {name: recipes[name] for name in ("lstm", "transformer")}, Budget(None, steps), 0, 1, test, quiet=True)


def test_an_interrupted_ladder_goes_on_with_what_is_missing(two: Path, monkeypatch: pytest.MonkeyPatch):
    said = report.Progress.update

    def stops(self, completed, **more):
        if self.description == "transformer: training" and completed == 50:
            raise KeyboardInterrupt
        said(self, completed, **more)

    monkeypatch.setattr(report.Progress, "update", stops)
    with pytest.raises(KeyboardInterrupt):
        two_rungs(two).climb()
    before = json.loads((two / rooms.RESULTS).read_text())
    assert before["rungs"]["lstm"].keys() == {"training", "translation"} and "transformer" not in before["rungs"] and "speed" not in before
    assert not (two / "transformer" / "config.json").exists() and (two / "transformer" / "recipe.toml").exists()
    monkeypatch.setattr(report.Progress, "update", said)
    weights = (two / "lstm" / "model.safetensors").stat().st_mtime_ns
    results = two_rungs(two).climb()
    assert (two / "lstm" / "model.safetensors").stat().st_mtime_ns == weights
    assert results["rungs"]["lstm"]["training"] == before["rungs"]["lstm"]["training"]
    assert [rung["training"]["steps"] for rung in results["rungs"].values()] == [4, 4] and results == json.loads((two / rooms.RESULTS).read_text())
    assert {rung["recall"]["steps"] for rung in results["rungs"].values()} == {4}
    assert results["speed"]["tokens_per_second"].keys() == {"lstm", "transformer"}
    assert len({(two / name / "tokenizer.json").read_bytes() for name in ("lstm", "transformer", ".")}) == 1
    again = (two / rooms.RESULTS).stat().st_mtime_ns
    monkeypatch.setattr(rooms, "load", None)                                          # nothing is opened again
    assert two_rungs(two).climb()["rungs"] == results["rungs"] and (two / rooms.RESULTS).stat().st_mtime_ns >= again


def test_translations_come_in_the_order_of_their_sources(two: Path):
    ladder = two_rungs(two, steps=30)
    ladder.share_tokenizer()
    ladder.train("lstm", ladder.recipes["lstm"])
    model, sources = load(two / "lstm", rows=rooms.ROWS), [pair.source for pair in ladder.test] + ["rain", "the house stands on a stone and " * 4]
    found = translations(model, sources)
    assert len(found) == len(sources) > rooms.ROWS
    for i in (0, 3, len(sources) - 2, len(sources) - 1):
        n_tokens = len(model.tokenizer.encode(sources[i]))
        answer = model.generate(sources[i], temperature=0.0, max_new_tokens=2 * n_tokens + 16)
        assert found[i] == (answer.text.strip(), answer.finish_reason)


def test_another_ladder_is_not_gone_on_with(tmp_path: Path):
    write_json(tmp_path / rooms.RESULTS, {"settings": {"seconds": 600.0, "seed": 0}})
    same_ladder(tmp_path, {"seconds": 600.0, "seed": 0})
    with pytest.raises(ConfigError, match=r"begun with other settings \(seconds 600.0 -> 300.0\); go on with those, or choose another folder"):
        same_ladder(tmp_path, {"seconds": 300.0, "seed": 0})


# ---- what the numbers say
def made_up(recalled: dict[str, tuple[float, float]], chrf: dict[str, tuple[float, float]], rates: dict[str, tuple[float, float]], pairs: int = 50):
    """Results with these values at the nearest and farthest, shortest and longest."""
    def quality(value: float) -> dict:
        return {"pairs": pairs, "bleu": value / 2, "chrf": value}

    rungs = {name: {
        "training": {"parameters": 1000, "steps": 9, "tokens": 99, "seconds": 1.0, "validation_loss": 2.0},
        "recall": {"accuracy": [[4, recalled[name][0]], [256, recalled[name][1]]], "n_questions": 1024, "chance": 0.25, "parameters": 9, "steps": 9,
                   "seconds": 1.0, "learning_rate": 0.002, "by_pairs": [[1, 1.0], [2, 0.5]], "influence": [[4, 0.5], [256, 0.0005]]},
        "translation": {"quality": quality(40.0), "by_length": [{"first": 1, "last": 5, "quality": quality(chrf[name][0])},
                                                                 {"first": 41, "last": None, "quality": quality(chrf[name][1])}],
                        "signatures": {"bleu": "b", "chrf": "c"}, "too_long": 3, "cut_short": 2}} for name in RUNGS}
    return {"rungs": rungs, "speed": {"tokens": 64, "tokens_per_second": {name: {"8": rates[name][0], "512": rates[name][1]} for name in RUNGS}},
            "settings": {"steps": 9, "seconds": None}, "data": {"train": 90, "test": 9}, "machine": {"threads": 1, "device": "cpu", "torch": "2"}}


AS_THE_NOTES_HAVE_IT = {
    "recalled": {"rnn": (0.9, 0.3), "lstm": (1.0, 0.6), "bahdanau": (1.0, 1.0), "transformer": (1.0, 0.99)},
    "chrf": {"rnn": (50, 20), "lstm": (52, 25), "bahdanau": (55, 50), "transformer": (60, 56)},
    "rates": {"rnn": (900, 300), "lstm": (800, 200), "bahdanau": (300, 30), "transformer": (700, 600)}}


def verdicts(**changes) -> list[str]:
    told = copy.deepcopy(AS_THE_NOTES_HAVE_IT)
    for name, values in changes.items():
        told[name] |= values
    return [claim.verdict for claim in ladder_report.claims(made_up(**told))]


def test_verdicts_follow_from_the_numbers():
    assert verdicts() == ["shown"] * 3
    same = dict.fromkeys(RUNGS, (0.9, 0.9))
    assert verdicts(recalled=same, chrf=dict.fromkeys(RUNGS, (50, 45)), rates=dict.fromkeys(RUNGS, (100, 90))) == ["contradicted"] * 3
    assert verdicts(recalled={"lstm": (1.0, 0.99)})[0] == "in part" == verdicts(recalled={"transformer": (1.0, 0.5)})[0]
    assert verdicts(recalled={"rnn": (0.26, 0.25)})[0] == "shown" and verdicts(recalled={"rnn": (0.26, 0.25), "lstm": (0.1, 0.1)})[0] == "undecided"
    assert verdicts(chrf={"lstm": (52, 50)})[1] == "in part" and verdicts(rates={"lstm": (800, 790)})[2] == "in part"
    assert verdicts(recalled={"rnn": (0.9, 0.88), "lstm": (0.9, 0.89)})[0] == "contradicted"      # no more than chance makes


def test_the_sentences_hold_the_numbers_they_rest_on():
    told = [str(claim) for claim in ladder_report.claims(made_up(**AS_THE_NOTES_HAVE_IT))]
    assert "Shown by these numbers: rnn answers 90 % right at a distance of 4 tokens and 30 % at 256" in told[0]
    assert "from 52.0 to 25.0 for lstm (it keeps 48 %)" in told[1] and "sources of 1 to 5 words to those of 41 or more" in told[1]
    assert "bahdanau trains on 300 tokens a second at a length of 8 and on 30 at 512 (10 % of it)" in told[2]
    lost = copy.deepcopy(AS_THE_NOTES_HAVE_IT)
    lost["recalled"]["rnn"] = (0.25, 0.25)
    assert "rnn answers 25 % right even at 4" in (said := str(ladder_report.fading(made_up(**lost)))) and "of a single pair it answers 100 %" in said
    few = ladder_report.bottleneck(made_up(**AS_THE_NOTES_HAVE_IT, pairs=29))
    assert few.verdict == "undecided" and few.numbers == "fewer than two lengths have 30 test pairs"


def test_the_page_and_the_picture(tmp_path: Path):
    results = made_up(**AS_THE_NOTES_HAVE_IT)
    page = ladder_report.markdown({**results, "picture": True})
    assert page.count("\n| rnn ") == 1 and "| 41 or more |    50 |" in page and "![translation, speed and recall](ladder.png)" in page
    assert "3 sources were longer than the context and left out. Answers that did not end by themselves: rnn 2, lstm 2" in page
    assert "has 0 % more parameters than the smallest: comparable" in page and "sacrebleu's `b`, chrF `c`" in page
    assert "|      256 | 5.0e-04 |" in page and "rnn's falls from 4 tokens to 256 by a factor of 1.0K, and after training 30 % of its answers" in page
    results["rungs"]["rnn"]["training"]["parameters"] = 1200
    assert "has 20 % more parameters than the smallest: not comparable" in ladder_report.markdown(results)
    plot_ladder(results, tmp_path / "ladder.png", title="a", unit="b")
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG") and "ladder.png" not in ladder_report.markdown(results)
