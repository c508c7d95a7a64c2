"""Settings keep their values on every way round (plain data, TOML, JSON, the command line's strings), and what is wrong is told by name."""
from __future__ import annotations

import json
import math
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanok.config import convert, from_dict, override, read_json, read_toml, to_dict, toml, write_json
from hanok.errors import ConfigError
from hanok.models import catalog
from hanok.models.llama import LlamaConfig, RopeScaling
from hanok.train.recipe import DataRecipe, ModelRecipe, Recipe, TokenizerRecipe, TrainRecipe

text = st.text(st.characters(codec="utf-8"), max_size=12)
scalars = st.one_of(st.integers(), st.booleans(), text, st.floats(allow_nan=False))
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
share, positive = st.floats(0.01, 0.99), st.integers(1, 2 ** 63)
recipes = st.builds(
    Recipe,
    st.builds(ModelRecipe, text, text, st.dictionaries(names, st.one_of(scalars, st.lists(st.integers(), max_size=3)), max_size=4)),
    st.builds(TokenizerRecipe, st.none() | text, st.sampled_from(["bpe", "wordpiece", "unigram"]), positive, positive),
    st.builds(DataRecipe, st.lists(text, max_size=3).map(tuple), text, share, st.none() | positive, st.booleans()),
    st.builds(TrainRecipe, steps=positive, seconds=st.none() | st.floats(1e-9, 1e300), learning_rate=st.floats(1e-300, 1e300), floor=share,
              beta1=share, seed=st.integers(0, 2 ** 63), checkpoint_every=positive))
tables = st.recursive(scalars | st.lists(scalars, max_size=3), lambda inner: st.dictionaries(names, inner, min_size=1, max_size=3), max_leaves=8)


@dataclass(frozen=True)
class Inner:
    size: int = 3


@dataclass(frozen=True)
class Settings:
    count: int
    rate: float = 0.5
    name: str = "x"
    on: bool = False
    kind: Literal["small", "large"] = "small"
    many: tuple[int, ...] = ()
    inner: Inner = field(default_factory=Inner)
    maybe: float | None = None
    path: str | None = None
    free: dict[str, Any] = field(default_factory=dict)


def refused(data: dict[str, Any], cls: type = Settings) -> str:
    with pytest.raises(ConfigError) as error:
        from_dict(cls, data)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- round trips

@given(recipes)
def test_a_recipe_is_the_same_after_toml_and_json(recipe):
    data = to_dict(recipe)
    assert from_dict(Recipe, data) == recipe
    assert from_dict(Recipe, tomllib.loads(toml(data))) == recipe
    assert from_dict(Recipe, json.loads(json.dumps(data))) == recipe


@pytest.mark.parametrize("family", catalog.FAMILIES)
def test_every_preset_is_the_same_after_toml(family):
    config = catalog.FAMILIES[family].config
    for preset in catalog.FAMILIES[family].presets.values():
        again = from_dict(config, tomllib.loads(toml(to_dict(preset))))
        assert again == preset
        hints = get_type_hints(config)
        assert all(type(getattr(again, f.name)) is hints[f.name] for f in fields(config) if hints[f.name] in (int, float, str, bool))


@given(recipes)
def test_what_the_command_line_spells_becomes_what_it_means(recipe):
    train = [f"train.{name}={','.join(value) if isinstance(value, list) else value}" for name, value in to_dict(recipe.train).items()]
    told = override(to_dict(Recipe()), [*train, f"tokenizer.vocab_size={recipe.tokenizer.vocab_size}", f"data.separate={recipe.data.separate}"])
    got = from_dict(Recipe, told)
    assert got.train == recipe.train
    assert got.tokenizer.vocab_size == recipe.tokenizer.vocab_size and got.data.separate is recipe.data.separate


@given(st.dictionaries(names, tables, max_size=4))
def test_any_table_is_the_same_after_toml(data):
    assert tomllib.loads(toml(data)) == data


def test_toml_leaves_out_what_is_not_there_and_keeps_tables_behind_values():
    assert toml({"inner": {"a": 1, "none": None}, "b": [1.5, "x"], "on": True, "empty": {}}) == 'b = [1.5, "x"]\non = true\n\n[inner]\na = 1'
    assert math.isnan(tomllib.loads(toml({"x": math.nan}))["x"])


def test_files_are_the_same_after_a_round_trip(tmp_path: Path):
    data = {"name": "누가", "x": [1, 2.5, None], "inner": {"on": True}}
    write_json(tmp_path / "a.json", data)
    assert read_json(tmp_path / "a.json") == data
    assert (tmp_path / "a.json").read_text().endswith("}\n") and "누가" in (tmp_path / "a.json").read_text()
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(tmp_path / "bom.json") == {}


def test_none_is_left_out_and_tuples_become_lists():
    assert to_dict(Settings(1, many=(1, 2))) == {
        "count": 1, "rate": 0.5, "name": "x", "on": False, "kind": "small", "many": [1, 2], "inner": {"size": 3}, "free": {}}
    assert to_dict(LlamaConfig(1, 2, 3, 4, 5, 6, 7, rope_scaling=RopeScaling("linear", 2.0)))["rope_scaling"]["factor"] == 2.0


# ---- types

@pytest.mark.parametrize(("hint", "value", "expected"), [
    (int, "12", 12), (int, " 12 ", 12), (int, "-3", -3), (int, "1e3", 1000), (int, 2.0, 2), (int, "9007199254740993", 9007199254740993),
    (int, 2 ** 80, 2 ** 80), (float, "1e-3", 1e-3), (float, 3, 3.0), (float, "3", 3.0), (float, "inf", math.inf), (bool, "yes", True),
    (bool, "OFF", False), (bool, True, True), (str, "", ""), (str, "5", "5"), (int | None, None, None), (int | None, "none", None),
    (float | None, "2", 2.0), (str | None, "none", "none"), (tuple[int, ...], "1,2", (1, 2)), (tuple[int, ...], [], ()),
    (tuple[str, ...], "a,b", ("a", "b")), (list[float], [1], [1.0]), (Literal["a", "b"], "b", "b"), (dict[str, Any], {"a": 1}, {"a": 1}),
    (Inner, {"size": "4"}, Inner(4)), (Inner | None, {"size": 4}, Inner(4)), (Inner, Inner(5), Inner(5)),
])
def test_a_value_becomes_its_type(hint, value, expected):
    got = convert(value, hint, "x")
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(("hint", "value", "expected"), [
    (int, "x", "a whole number"), (int, 2.5, "a whole number"), (int, True, "a whole number"), (int, None, "a whole number"),
    (int, math.inf, "a whole number"), (int, math.nan, "a whole number"), (int, "inf", "a whole number"), (int, [1], "a whole number"),
    (float, False, "a number"), (float, "1,5", "a number"), (float, {}, "a number"), (float, 10 ** 400, "a number"), (bool, 1, "true or false"),
    (bool, "2", "true or false"), (str, 5, "text"), (str, None, "text"), (tuple[int, ...], 5, "a list"), (tuple[int, ...], {"a": 1}, "a list"),
    (tuple[int, ...], ["x"], "a whole number"), (Literal["small", "large"], "smal", "did you mean 'small'?"),
    (Literal["small", "large"], 7, "choose from large, small"), (Literal["small", "large"], ["small"], "small"), (dict[str, Any], 5, "a table"),
    (Inner, 5, "a table of settings"), (Inner, {"siz": 1}, "did you mean 'size'?"), (float | None, "much", "a number"),
])
def test_another_type_is_refused_naming_the_setting(hint, value, expected):
    with pytest.raises(ConfigError) as error:
        convert(value, hint, "train.x")
    assert str(error.value).startswith("train.x") and expected in str(error.value) and "\n" not in str(error.value)


def test_unknown_and_missing_settings_are_named():
    assert refused({"count": 1, "rat": 2}) == "Settings: unknown setting 'rat'; did you mean 'rate'?"
    assert "choose from count, free, inner, kind, many, maybe, name, on, path, rate" in refused({"count": 1, "zzzz": 2})
    assert refused({}) == "Settings: 'count' is missing; it has no default"
    assert refused({"count": 1, "inner": {"sise": 2}}) == "Settings.inner: unknown setting 'sise'; did you mean 'size'?"
    assert "Settings: got [], expected a table" in refused([])


def test_every_field_of_a_recipe_is_refused_when_it_has_another_type():
    for part in (ModelRecipe, TokenizerRecipe, DataRecipe, TrainRecipe):
        for f in fields(part):
            assert f"{part.__name__}.{f.name}" in refused({f.name: {"a": object()} if f.name != "sizes" else 7}, part)


@pytest.mark.parametrize(("change", "told"), [
    ({"steps": 0}, "train.steps is 0"), ({"micro_batch_size": 0}, "train.micro_batch_size is 0"), ({"grad_accum_steps": -1}, "steps is -1"),
    ({"eval_every": 0}, "train.eval_every is 0"), ({"eval_tokens": 0}, "train.eval_tokens is 0"), ({"seconds": 0.0}, "train.seconds is 0.0"),
    ({"learning_rate": -1.0}, "train.learning_rate is -1.0"), ({"learning_rate": math.nan}, "train.learning_rate is nan"), ({"clip": -1}, "clip"),
    ({"beta1": 1.0}, "train.beta1 is 1.0"), ({"beta2": -0.1}, "train.beta2 is -0.1"), ({"floor": 1.5}, "train.floor is 1.5"),
    ({"weight_decay": -0.1}, "train.weight_decay"), ({"checkpoint_every": -1}, "train.checkpoint_every is -1"), ({"seed": -1}, "train.seed is -1"),
    ({"threads": -1}, "train.threads is -1"), ({"warmup_steps": -1}, "train.warmup_steps is -1"), ({"eps": 0.0}, "train.eps is 0.0"),
])
def test_a_training_that_cannot_be_is_refused_when_it_is_told(change, told):
    message = refused({"train": change}, Recipe)
    assert told in message and "expected" in message


# ---- override

def test_override_puts_values_in_their_places_and_leaves_the_data_alone():
    data = {"a": {"b": 1, "c": [1]}, "d": 2}
    assert override(data, ["a.b= 5 ", "e.f.g=x=y", "d=", " d =7"]) == {"a": {"b": "5", "c": [1]}, "d": "7", "e": {"f": {"g": "x=y"}}}
    assert data == {"a": {"b": 1, "c": [1]}, "d": 2}


@pytest.mark.parametrize(("setting", "told"), [
    ("train.steps", "expected name=value"), ("=5", "expected name=value"), (" =5", "expected name=value"), ("d.x=1", "'d' is a value, not a table"),
])
def test_override_refuses_what_is_no_setting(setting, told):
    with pytest.raises(ConfigError, match=told):
        override({"d": 2}, [setting])


def test_a_misspelled_override_names_the_nearest():
    with pytest.raises(ConfigError, match=r"recipe\.train: unknown setting 'learnin_rate'; did you mean 'learning_rate'\?"):
        from_dict(Recipe, override(to_dict(Recipe()), ["train.learnin_rate=1"]), "recipe")


# ---- broken files

@pytest.mark.parametrize(("content", "told"), [
    ('{"a": 1,}', "line 1, column"), ("[1]", "got a list, expected a JSON object"), ("", "line 1, column 1"), ("[" * 100_000, "nested too deeply"),
    ('{"a": ' + "9" * 5000 + "}", "it should be JSON"), ('{"a":\n\n x}', "line 3, column 2"),
])
def test_broken_json_is_told_in_one_line(content, told, tmp_path: Path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ConfigError, match=told) as error:
        read_json(tmp_path / "a.json")
    assert "a.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("content", "told"), [
    ("a = ", "end of document"), ("a = 1\na = 2", "it should be TOML"), ("a = " + "[" * 100_000, "nested too deeply"),
    ("a = " + "9" * 5000, "it should be TOML"),
])
def test_broken_toml_is_told_in_one_line(content, told, tmp_path: Path):
    (tmp_path / "a.toml").write_text(content)
    with pytest.raises(ConfigError, match=told) as error:
        read_toml(tmp_path / "a.toml")
    assert "a.toml" in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "a.toml").write_text("a = 1")
    assert read_toml(tmp_path / "a.toml") == {"a": 1}
