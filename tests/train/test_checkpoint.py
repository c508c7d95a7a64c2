"""A run's folder: its recipe, its numbers and samples, and checkpoints from which a trainer goes on as if it had never stopped."""
from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hanok.bundle.weights import parameters, read_safetensors
from hanok.config import from_dict, read_toml
from hanok.data.corpus import build_corpus
from hanok.data.loader import Loader
from hanok.data.sources import Document
from hanok.errors import DataError, WeightsError
from hanok.train.checkpoint import COLUMNS, Run
from hanok.train.optim import optimizers
from hanok.train.recipe import DataRecipe, ModelRecipe, Recipe, TokenizerRecipe, TrainRecipe
from hanok.train.runs import Batches
from hanok.train.trainer import Trainer
from tiny import CONFIG, model, prose, tokenizer

RECIPE = Recipe(ModelRecipe("llama", "tiny", {"d_model": 32, "tie_embeddings": False}), TokenizerRecipe(kind="unigram", path="a b\\\"한.json"),
                DataRecipe(("one.txt", "zwei/"), validation=0.125, seq_len=None),
                TrainRecipe(steps=8, seconds=2.5, learning_rate=1e-2, warmup_steps=2, log=("tensorboard",)))
SOURCES = [{"path": "one.txt", "bytes": 5, "sha256": "ab"}, {"path": "zwei/\n.md", "bytes": 7, "sha256": "cd"}]


def run(out: Path) -> Run:
    return Run.new(out, RECIPE, SOURCES, tokenizer())


def numbers(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- recipe, numbers, samples
def test_a_new_run_keeps_its_recipe(tmp_path):
    made = run(tmp_path / "deep" / "run")
    told = read_toml(tmp_path / "deep" / "run" / "recipe.toml")
    assert told.pop("sources") == {"one.txt": "ab", "zwei/\n.md": "cd"} and told.pop("begun") == {"folder": str(Path.cwd())}
    assert from_dict(Recipe, told) == RECIPE
    assert made.told() == (told, {"one.txt": "ab", "zwei/\n.md": "cd"}, str(Path.cwd()))
    assert (tmp_path / "deep" / "run" / "metrics.csv").read_text() == ",".join(COLUMNS) + "\n"
    assert names(tmp_path / "deep" / "run") == ["checkpoints", "metrics.csv", "recipe.toml", "tokenizer.json"]


def test_an_occupied_folder_is_refused_and_not_touched(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(DataError, match="is not empty; choose another folder"):
        run(tmp_path)
    with pytest.raises(DataError, match="mine is a file; a new folder was expected"):
        run(tmp_path / "mine")
    with pytest.raises(DataError, match="run: a part of this path is a file, not a folder"):
        run(tmp_path / "mine" / "run")
    assert names(tmp_path) == ["mine"]


def test_what_is_no_run_says_so(tmp_path):
    for name, told in (("nothing", "there is nothing of that name"), (".", "it has no recipe.toml")):
        with pytest.raises(DataError, match=f"is no run: {told}; begin one with `hanok pretrain TEXT --out"):
            Run(tmp_path / name)


def test_numbers_stand_in_their_columns(tmp_path):
    made = run(tmp_path / "run")
    made.record({"step": 1, "tokens": 123456789, "seconds": 0.123456789, "loss": 5.5, "learning_rate": 1e-05, "grad_norm": 2.0,
                 "tokens_per_second": 1234567.8})
    made.record({"step": 2, "loss": 4.0, "validation_loss": 4.25, "perplexity": 70.1, "bits_per_byte": 1 / 3})
    assert made.rows[1]["bits_per_byte"] == 1 / 3
    first, second = numbers(tmp_path / "run" / "metrics.csv")
    assert tuple(first) == COLUMNS == ("step", "tokens", "seconds", "loss", "validation_loss", "perplexity", "bits_per_byte", "learning_rate",
                                       "grad_norm", "tokens_per_second")
    assert first["tokens"] == "123456789" and first["seconds"] == "0.123457" and first["learning_rate"] == "1e-05" and first["validation_loss"] == ""
    assert second["bits_per_byte"] == "0.333333" and second["perplexity"] == "70.1" and second["tokens"] == ""
    (tmp_path / "run" / "metrics.csv").unlink()
    (tmp_path / "run" / "metrics.csv").mkdir()
    with pytest.raises(DataError, match="metrics.csv: this is a folder; a file was expected"):
        made.record({"step": 3})


def test_going_back_forgets_what_was_told_since_and_what_was_left_unfinished(tmp_path):
    made = run(tmp_path / "run")
    for step in (1, 2, 10):
        made.record({"step": step, "loss": float(step)})
        made.sample(step, f"step {step} says\n## step 99\n")
    with open(tmp_path / "run" / "metrics.csv", "a") as file:
        file.write("20,640,1.25,2.")                                                  # killed while it wrote
    (tmp_path / "run" / "checkpoints" / ".step-00000020.0123456789abcdef").mkdir()
    (tmp_path / "run" / "bundle.new").mkdir()
    (tmp_path / "run" / "bundle.new" / "config.json").write_text("{}")
    (tmp_path / "run" / ".loss.png.0123456789abcdef").write_text("x")
    (tmp_path / "run" / ".mine").write_text("x")
    again = Run(tmp_path / "run")
    again.rewind(2)
    assert [row["step"] for row in numbers(tmp_path / "run" / "metrics.csv")] == ["1", "2"] == [row["step"] for row in again.rows]
    assert (tmp_path / "run" / "samples.md").read_text() == "".join(
        f"## step {step}\n\n    step {step} says\n    ## step 99\n\n" for step in (1, 2))
    assert names(tmp_path / "run") == [".mine", "checkpoints", "metrics.csv", "recipe.toml", "samples.md", "tokenizer.json"]
    assert names(tmp_path / "run" / "checkpoints") == []
    again.record({"step": 3})
    assert [row["step"] for row in numbers(tmp_path / "run" / "metrics.csv")] == ["1", "2", "3"]
    again.rewind(0)
    assert numbers(tmp_path / "run" / "metrics.csv") == [] == again.rows and (tmp_path / "run" / "samples.md").read_text() == ""


# ---- checkpoints
@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build_corpus([Document("x", prose(900))], tokenizer(), tmp_path_factory.mktemp("corpus") / "x")


def trainer(corpus, tied: bool = True) -> Trainer:
    net, recipe = model(replace(CONFIG, tie_embeddings=tied)), replace(RECIPE.train, seconds=None)
    return Trainer(net, optimizers(net, recipe), Batches(Loader(corpus, seq_len=16, batch_size=4)), recipe, vocab_size=300)


def save(made: Trainer, folder: Run, keep: int = 2, **more) -> Path:
    tensors, plain = made.state()
    return folder.checkpoint(tensors, {"step": made.n_steps, "trainer": plain, "batches": made.batches.saved(), **more}, keep)


@pytest.mark.parametrize("tied", [True, False])
def test_a_trainer_goes_on_from_its_checkpoint_as_if_it_had_never_stopped(tmp_path, corpus, tied):
    made = trainer(corpus, tied)
    for _ in range(4):
        made.step()
    path = save(made, run(tmp_path / "run"))
    assert names(path) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    saved = read_safetensors(path / "model.safetensors")
    assert saved.keys() == parameters(made.model).keys()
    went_on = [made.step() for _ in range(4)]

    again = trainer(corpus, tied)
    tensors, state = Run(tmp_path / "run").read(path)
    again.restore(tensors, state["trainer"])
    again.batches.restore(state["batches"])
    for before, after in zip(went_on, [again.step() for _ in range(4)]):
        assert (after.step, after.tokens, after.loss, after.grad_norm) == (before.step, before.tokens, before.loss, before.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(parameters(made.model).values(), parameters(again.model).values(), strict=True))


def test_the_newest_two_are_kept(tmp_path, corpus):
    made, folder = trainer(corpus), run(tmp_path / "run")
    seen = []
    for n in (0, 9, 10, 99, 100, 12345):
        made.n_steps = n
        save(made, folder)
        seen.append(names(tmp_path / "run" / "checkpoints"))
    assert seen == [["step-00000000"], ["step-00000000", "step-00000009"], ["step-00000009", "step-00000010"], ["step-00000010", "step-00000099"],
                    ["step-00000099", "step-00000100"], ["step-00000100", "step-00012345"]]
    made.n_steps = 12346
    save(made, folder, keep=1)
    assert names(tmp_path / "run" / "checkpoints") == ["step-00012346"]
    assert save(made, folder) == tmp_path / "run" / "checkpoints" / "step-00012346"   # the same step again is the same checkpoint


def test_the_best_by_validation_stays(tmp_path, corpus):
    made, folder = trainer(corpus), run(tmp_path / "run")
    for n, loss in ((1, 3.0), (2, 2.0), (3, None), (4, 2.5), (5, 2.25)):
        made.n_steps = n
        save(made, folder, validation_loss=loss)
    assert names(tmp_path / "run" / "checkpoints") == ["step-00000002", "step-00000004", "step-00000005"]
    made.n_steps = 6
    save(made, folder, validation_loss=1.0)
    assert [path.name for path in folder.checkpoints()] == ["step-00000005", "step-00000006"]


def test_before_the_first_step_there_is_a_checkpoint_too(tmp_path, corpus):
    path = save(trainer(corpus), run(tmp_path / "run"))
    assert "embed.token.weight" in read_safetensors(path / "model.safetensors")
    assert not [name for name in read_safetensors(path / "optimizer.safetensors") if name.startswith("optimizer/")]


def test_a_checkpoint_that_fails_leaves_the_older_ones(tmp_path, corpus):
    made, folder = trainer(corpus), run(tmp_path / "run")
    save(made, folder)
    made.step()
    with pytest.raises(TypeError):
        save(made, folder, keep=1, what_JSON_does_not_know=object())
    assert names(tmp_path / "run" / "checkpoints") == ["step-00000000"]


def test_a_damaged_checkpoint_is_named(tmp_path, corpus):
    path = save(trainer(corpus), run(tmp_path / "run"))
    whole = (path / "optimizer.safetensors").read_bytes()
    (path / "optimizer.safetensors").write_bytes(whole[:-5])
    with pytest.raises(WeightsError, match="step-00000000/optimizer.safetensors is cut short"):
        Run(tmp_path / "run").read(path)


def test_a_state_is_plain_json(tmp_path, corpus):
    made = trainer(corpus)
    made.step()
    state = json.loads((save(made, run(tmp_path / "run")) / "state.json").read_text())
    assert state["trainer"]["step"] == 1 and state["batches"]["number"] == 1 and state["batches"]["loader"]["window"] == 4
