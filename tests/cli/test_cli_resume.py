"""A run that was killed goes on as if nothing had happened, to the bit; what does not fit any more is named, and nothing is touched."""
from __future__ import annotations

import csv
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Shell, settings
from terminal import Ended, ended, start, tree, wait_for
from test_cli_machine import Disk

STEPS = 60
HOW = settings(f"train.steps={STEPS}", "train.checkpoint_every=10", "train.eval_every=15", "train.warmup_steps=5", "train.optimizer=muon",
               "train.ema_decay=0.9", "train.micro_batch_size=2", "train.grad_accum_steps=2", "model.sizes.dropout=0.1")
TIMES = ("seconds", "tokens_per_second")


@pytest.fixture(scope="session")
def whole(home: Path, env: dict[str, str], text: Path, nursery) -> Path:
    """A run that nobody interrupted."""
    (home / "runs").mkdir()
    assert Shell(nursery, env, home / "runs")("pretrain", text, "--out", "whole", *HOW).status == 0
    return home / "runs" / "whole"


@pytest.fixture
def run(whole: Path, shell: Shell, text: Path) -> Path:
    """A run of its own that was interrupted at its newest checkpoint but one: what is behind it is taken away."""
    out = Path(shutil.copytree(whole, shell.cwd / "run"))
    for path in [path for path in out.iterdir() if path.name not in ("checkpoints", "metrics.csv", "recipe.toml", "tokenizer.json")]:
        path.unlink()
    shutil.rmtree(sorted((out / "checkpoints").iterdir())[-1])
    return out


def same(out: Path, whole: Path) -> None:
    """Fails unless both runs are the same, to the bit, but for the clock."""
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert numbers(out) == numbers(whole)
    assert tree(out).keys() == tree(whole).keys()


def numbers(out: Path) -> list[dict[str, str]]:
    with open(out / "metrics.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def cut(arguments: list[object], out: Path, when: Callable[[], object], how: signal.Signals, shell: Shell) -> Ended:
    """A run that a signal ends as soon as `when`; whether it comes in time is for the machine to decide."""
    for _ in range(5):
        child = start(*arguments, env=shell.env, cwd=shell.cwd)
        wait_for(when, child)
        child.send_signal(how)
        end = ended(child)
        if end.status:
            return end
        shutil.rmtree(out)
    raise AssertionError("the run was always faster")


def step(out: Path, n: int) -> Callable[[], bool]:
    return lambda: any(int(path.name[5:]) >= n for path in (out / "checkpoints").glob("step-*")) if out.exists() else False


# ---- to the bit
def test_killed_twice_and_resumed_it_is_the_same_to_the_bit(shell: Shell, text: Path, whole: Path):
    out = shell.cwd / "run"
    assert cut(["pretrain", text, "--out", "run", *HOW], out, step(out, 10), signal.SIGKILL, shell).status == -signal.SIGKILL
    child = start("pretrain", "--resume", "run", env=shell.env, cwd=shell.cwd)
    wait_for(step(out, 30), child)
    child.kill()
    assert ended(child).status in (-signal.SIGKILL, 0)
    end = shell("pretrain", "--resume", "run")
    assert end.status == 0 and "Traceback" not in end.err
    same(out, whole)


def test_killed_before_the_first_checkpoint_it_begins_at_step_0(shell: Shell, text: Path, whole: Path):
    how, out = [*HOW, *settings("train.checkpoint_every=0")[-2:]], shell.cwd / "run"
    told = ["pretrain", text, "--out", "run", *how]
    assert cut(told, out, lambda: out.exists() and (out / "metrics.csv").read_text().count("\n") > 3, signal.SIGKILL, shell).status == -signal.SIGKILL
    assert not list((out / "checkpoints").iterdir())
    end = shell("pretrain", "--resume", "run")
    assert end.status == 0 and "going on from step 0 of run" in end.err
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes() and numbers(out) == numbers(whole)


@pytest.mark.parametrize(("how", "status", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")])
def test_a_signal_leaves_a_checkpoint_at_the_last_update(how: signal.Signals, status: int, word: str, shell: Shell, text: Path, whole: Path):
    out = shell.cwd / "run"
    end = cut(["pretrain", text, "--out", "run", "--quiet", *HOW], out, step(out, 10), how, shell)
    newest = sorted((out / "checkpoints").iterdir())[-1]
    assert (end.status, end.out) == (status, "")
    assert end.lines == [f"hanok: {word}; what was learned so far is in run/checkpoints/{newest.name}; hanok pretrain --resume run goes on"]
    assert f"going on from step {int(newest.name[5:])} of run" in shell("pretrain", "--resume", "run").err
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes() and numbers(out) == numbers(whole)


def test_it_finds_its_text_from_another_folder(run: Path, shell: Shell, whole: Path):
    (shell.cwd / "elsewhere").mkdir()
    there = Shell(shell.nursery, shell.env, shell.cwd / "elsewhere")
    assert there("pretrain", "--resume", "../run", "--quiet").status == 0
    same(run, whole)


# ---- what is finished
def test_a_finished_run_says_so(shell: Shell, whole: Path):
    before = tree(whole)
    end = shell("pretrain", "--resume", whole)
    assert end.status == 0 and end.out == "" and f"is finished: {STEPS} steps; nothing is left to do" in end.lines[0]
    told = shell("pretrain", "--resume", whole, "--json").json()
    assert (told["family"], told["steps"]) == ("qwen3", STEPS) and tree(whole) == before


def test_a_finished_run_goes_on_by_force(whole: Path, shell: Shell):
    out = Path(shutil.copytree(whole, shell.cwd / "run"))
    before = tree(out)
    told = shell("pretrain", "--resume", "run", "--steps", 65).refused()
    assert f"train.steps {STEPS} -> 65" in told and "--force" in told and tree(out) == before
    end = shell("pretrain", "--resume", "run", "--steps", 65, "--force", "--json")
    assert end.json()["steps"] == 65 and f"taken as edited: train.steps {STEPS} -> 65" in end.err
    assert [row["step"] for row in numbers(out)][-2:] == [str(STEPS), "65"] and "steps = 65" in (out / "recipe.toml").read_text()
    assert shell("pretrain", "--resume", "run").status == 0


# ---- what does not fit
def test_an_edited_recipe_is_told_and_taken_by_force(run: Path, shell: Shell):
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("\nlearning_rate = 0.0025", "\nlearning_rate = 0.002").replace("clip = 1.0", "clip = 0.5"))
    told = shell.refused("pretrain", "--resume", "run")
    changes = "train.learning_rate 0.0025 -> 0.002, train.clip 1.0 -> 0.5"
    assert f"the recipe is not the one that the checkpoint was made with: {changes}; put it back" in told
    assert f"taken as edited: {changes}" in shell("pretrain", "--resume", "run", "--force").err
    assert shell("show", "run").status == 0 and numbers(run)[-1]["step"] == str(STEPS)


@pytest.mark.parametrize(("edit", "told"), [
    ("train.stepz = 3", ["recipe.toml", "unknown setting 'stepz'", "did you mean 'steps'?"]), ("[[[", ["recipe.toml: ", "it should be TOML"]),
])
def test_a_recipe_that_is_broken(edit: str, told: list[str], run: Path, shell: Shell):
    recipe = run / "recipe.toml"
    recipe.write_text(f"{edit}\n{recipe.read_text()}" if "[" in edit else recipe.read_text().replace("[train]", "[train]\nstepz = 3"))
    line = shell.refused("pretrain", "--resume", "run")
    assert not [part for part in told if part not in line], line


def test_another_architecture_is_told_by_its_first_difference(run: Path, shell: Shell):
    before = tree(run)
    told = shell("pretrain", "--resume", "run", "--force", "--quiet", "--set", "model.sizes.d_ff=48").refused()
    assert "gate.weight is (64, 32) in the checkpoint, (48, 32) in this run" in told and tree(run) == before


def test_another_tokenizer_is_told(run: Path, shell: Shell):
    before = tree(run)
    told = shell("pretrain", "--resume", "run", "--force", "--quiet", "--set", "tokenizer.vocab_size=290").refused()
    assert "the tokenizer of the recipe is not the one that the checkpoint was made with (tokenizer.vocab_size " in told and "-> 290), " in told
    assert told.endswith("put it back, or begin a new run") and tree(run) == before


@pytest.fixture
def own(shell: Shell, text: Path) -> Iterator[Path]:
    """A folder of texts, and an interrupted run that learns from it."""
    folder = shell.cwd / "texts"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.txt").write_text(f"{name} " + text.read_text())
    assert shell("pretrain", "texts", "--out", "run", "--quiet", *settings("train.steps=2", "train.warmup_steps=1")).status == 0
    (shell.cwd / "run" / "config.json").unlink()
    return folder


@pytest.mark.parametrize(("change", "told"), [
    ("changed", "texts/a.txt has changed; bring it back"), ("gone", "texts/a.txt is gone; bring it back"),
    ("all gone", "texts is gone, and the run learns from it"), ("new", "texts/c.txt is new; bring it back"),
])
def test_another_text_is_told(change: str, told: str, own: Path, shell: Shell):
    match change:
        case "changed":
            (own / "a.txt").write_text("another text\n" * 100)
        case "gone":
            (own / "a.txt").unlink()
        case "all gone":
            shutil.rmtree(own)
        case "new":
            (own / "c.txt").write_text("one more text\n" * 100)
    assert told in shell.refused("pretrain", "--resume", "run")


def test_the_same_text_is_found(own: Path, shell: Shell):
    assert shell("pretrain", "--resume", "run", "--quiet").status == 0 and (shell.cwd / "run/config.json").exists()


# ---- the machine
def test_a_disk_that_fills_up_keeps_the_last_good_checkpoint(run: Path, whole: Path, shell: Shell, tmp_path: Path):
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    size = sum(path.stat().st_size for path in (run / "checkpoints" / kept[-1]).iterdir())
    there = sum(-(-path.stat().st_size // 4096) * 4096 for path in run.rglob("*") if path.is_file())
    disk = Disk(tmp_path / "small disk", int((there + 0.6 * size) / 1024))
    try:
        if not disk.is_mounted:
            pytest.skip("no disk of its own")
        shutil.copytree(run, disk.folder / "run")
        told = shell("pretrain", "--resume", disk.folder / "run", "--quiet").refused()
        assert "the disk is full" in told and "nothing was left half-written" in told
        assert sorted(path.name for path in (disk.folder / "run" / "checkpoints").iterdir()) == kept
        shutil.rmtree(run)
        shutil.copytree(disk.folder / "run", run)
    finally:
        disk.close()
    assert f"going on from step {int(kept[-1][5:])}" in shell("pretrain", "--resume", "run").err
    same(run, whole)


def test_a_damaged_checkpoint_is_named(run: Path, shell: Shell):
    newest = sorted((run / "checkpoints").iterdir())[-1]
    (newest / "model.safetensors").write_bytes((newest / "model.safetensors").read_bytes()[:-9])
    told = shell("pretrain", "--resume", "run", "--quiet").refused()
    assert f"run/checkpoints/{newest.name}/model.safetensors is cut short" in told and "no checkpoint of run is whole: bring one back" in told
    assert "fetch it again" not in told
    shutil.rmtree(newest)
    assert "going on from step 0" in shell("pretrain", "--resume", "run").err
