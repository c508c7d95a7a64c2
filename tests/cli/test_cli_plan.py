"""hanok plan, hanok pretrain --minutes, and runs that are too large."""
from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Shell, settings

from hanok.config import read_toml
from hanok.train.checkpoint import Run

SMALL = ["--set", "data.seq_len=32", "--set", "tokenizer.vocab_size=300"]


def test_a_plan_of_a_size_says_what_it_costs_and_what_to_type(shell: Shell, text: Path):
    ended = shell("plan", text, "--params", "120K", "--tokens", "1M", *SMALL)
    for name in ("parameters", "tokens", "steps", "memory", "disk", "time", "expected loss"):
        assert f"\n{name} " in ended.out, ended
    assert f"hanok pretrain {text} --out DIR --set model.sizes." in ended.next_commands()[0]
    told = shell("plan", text, "--params", "120K", "--tokens", "1M", "--json", *SMALL).json()
    assert told["recipe"]["data"]["seq_len"] == 32 and 60e3 < told["parameters"] < 240e3 and told["tokens"] == pytest.approx(1e6, rel=0.01)
    assert told["seconds"] == pytest.approx(told["steps"] * told["step_seconds"]) and told["sgemm_gflops"] > 0
    assert set(told) >= {"memory_bytes", "disk_bytes", "bits_per_byte", "bits_per_byte_deviation", "epochs"}
    assert not list(shell.cwd.iterdir())                                              # nothing was written


@pytest.mark.parametrize(("arguments", "told"), [
    (["--minutes", "2", "--params", "1M"], "--minutes chooses the size and the tokens itself"), (["--params", "many"], "--params many: expected a"),
    (["--device-memory", "0"], "--device-memory 0: expected a quantity, for example 8GB"), (["--minutes", "0"], "--minutes 0: expected more than 0"),
    (["--family", "t5"], "no plan chooses the sizes of a t5"), (["--family", "qwen4"], "unknown family 'qwen4'; "),
    (["--set", "train.stepz=3"], "unknown setting 'stepz'"), (["--params", "300M", "--device-memory", "500MB", *SMALL], "this run needs at least ")])
def test_a_plan_that_cannot_be(arguments: list[str], told: str, shell: Shell):
    assert told in shell.refused("plan", *arguments)


def test_a_run_by_the_clock_prints_its_plan_and_ends_in_time(shell: Shell, text: Path):
    ended = shell("pretrain", text, "--out", "run", "--minutes", "0.02", *SMALL)
    assert ended.status == 0 and "\nexpected loss  " in ended.err and ended.err.index("expected loss") < ended.err.index("training")
    recipe = read_toml(shell.cwd / "run" / "recipe.toml")
    assert recipe["train"]["seconds"] == pytest.approx(1.2) and recipe["data"]["seq_len"] == 32
    run = Run(shell.cwd / "run")
    state = run.state(run.checkpoints()[-1])["trainer"]
    assert state["seconds"] >= 1.2 or state["step"] >= recipe["train"]["steps"]
    assert shell("pretrain", "--resume", "run").lines[0].startswith("run is finished")


def test_steps_and_sizes_that_are_given_hold_under_minutes(shell: Shell, text: Path):
    ended = shell("pretrain", text, "--out", "run", "--minutes", "5", "--steps", "3", *settings())
    recipe = read_toml(shell.cwd / "run" / "recipe.toml")
    assert ended.status == 0 and (recipe["train"]["steps"], recipe["model"]["sizes"]["d_model"]) == (3, 32)
    assert "minutes" in shell.refused("pretrain", "--resume", "run", "--minutes", "3")


def test_a_run_that_memory_will_not_hold_is_refused_before_it_starts(shell: Shell, text: Path):
    line = shell.refused("pretrain", text, "--out", "run", "--set", "model.sizes.d_model=65536", "--set", "model.sizes.n_heads=512",
                         "--set", "model.sizes.n_kv_heads=512", "--set", "model.sizes.d_ff=65536")
    assert "this run needs at least " in line and "are enough with --set " in line
