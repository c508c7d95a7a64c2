"""A run's folder: its recipe, its numbers, and checkpoints from which a run goes on as if it had never stopped."""
from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hanok.bundle.weights import assign, parameters, read_safetensors
from hanok.config import from_dict, read_toml
from hanok.data.corpus import build_corpus
from hanok.data.loader import Loader
from hanok.data.sources import Document
from hanok.errors import DataError
from hanok.train.checkpoint import COLUMNS, Run
from hanok.train.optim import adamw
from hanok.train.recipe import DataRecipe, ModelRecipe, Recipe, TokenizerRecipe, TrainRecipe
from hanok.train.trainer import Trainer
from tiny import CONFIG, model, prose, tokenizer

RECIPE = Recipe(ModelRecipe("llama", "tiny", {"d_model": 32, "tie_embeddings": False}), TokenizerRecipe(kind="unigram", path="a b\\\"한.json"),
                DataRecipe(("one.txt", "zwei/"), validation=0.125, seq_len=None), TrainRecipe(steps=8, seconds=2.5, learning_rate=1e-5))
SOURCES = [{"path": "one.txt", "bytes": 5, "sha256": "ab"}, {"path": "zwei/\n.md", "bytes": 7, "sha256": "cd"}]


def run(out: Path) -> Run:
    return Run(out, RECIPE, SOURCES)


def numbers(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_new_run_keeps_its_recipe(tmp_path):
    run(tmp_path / "deep" / "run")
    told = read_toml(tmp_path / "deep" / "run" / "recipe.toml")
    assert told.pop("sources") == {"one.txt": "ab", "zwei/\n.md": "cd"}
    assert from_dict(Recipe, told) == RECIPE
    assert (tmp_path / "deep" / "run" / "metrics.csv").read_text() == ",".join(COLUMNS) + "\n"


def test_an_occupied_folder_is_refused_and_not_touched(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(DataError, match="is not empty; choose another folder"):
        run(tmp_path)
    with pytest.raises(DataError, match="mine is a file; a new folder was expected"):
        run(tmp_path / "mine")
    with pytest.raises(DataError, match="run: a part of this path is a file, not a folder"):
        run(tmp_path / "mine" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_numbers_stand_in_their_columns(tmp_path):
    made = run(tmp_path / "run")
    made.record({"step": 1, "tokens": 123456789, "seconds": 0.123456789, "loss": 5.5, "learning_rate": 1e-05, "grad_norm": 2.0,
                 "tokens_per_second": 1234567.8})
    made.record({"step": 2, "loss": 4.0, "validation_loss": 4.25, "bits_per_byte": 1 / 3})
    assert made.rows[1]["bits_per_byte"] == 1 / 3
    first, second = numbers(tmp_path / "run" / "metrics.csv")
    assert tuple(first) == COLUMNS == ("step", "tokens", "seconds", "loss", "validation_loss", "bits_per_byte", "learning_rate", "grad_norm",
                                       "tokens_per_second")
    assert first["tokens"] == "123456789" and first["seconds"] == "0.123457" and first["learning_rate"] == "1e-05" and first["validation_loss"] == ""
    assert second["bits_per_byte"] == "0.333333" and second["tokens"] == ""
    (tmp_path / "run" / "metrics.csv").unlink()
    (tmp_path / "run" / "metrics.csv").mkdir()
    with pytest.raises(DataError, match="metrics.csv: this is a folder; a file was expected"):
        made.record({"step": 3})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build_corpus([Document("x", prose(900))], tokenizer(), tmp_path_factory.mktemp("corpus") / "x")


def trainer(corpus, tied: bool = True) -> Trainer:
    recipe = replace(RECIPE.train, seconds=None, learning_rate=1e-2, warmup_steps=2)
    net = model(replace(CONFIG, tie_embeddings=tied))
    loader = Loader(corpus, seq_len=16, batch_size=4)
    return Trainer(net, adamw(net, learning_rate=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1), loader, recipe, vocab_size=300)


def save(made: Trainer, folder: Run, **options) -> Path:
    return folder.checkpoint(made.model, made.optimizer, {"step": made.n_steps, "tokens": made.n_tokens, "loader": made.batches.state()}, **options)


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_never_stopped(tmp_path, corpus, tied):
    made = trainer(corpus, tied)
    for _ in range(4):
        made.step()
    path = save(made, run(tmp_path / "run"))
    assert sorted(file.name for file in path.iterdir()) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    went_on = [made.step() for _ in range(4)]

    again = trainer(corpus, tied)
    assign(again.model, {name: tensor.clone() for name, tensor in read_safetensors(path / "model.safetensors").items()}, str(path))
    optimizer = again.optimizer = adamw(again.model, learning_rate=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    tensors = read_safetensors(path / "optimizer.safetensors")
    for name, parameter in again.model.named_parameters():
        optimizer.state[parameter] = {key: tensors.pop(f"{name}/{key}").clone() for key in ("step", "exp_avg", "exp_avg_sq")}
    assert not tensors                                                                # each belongs to one parameter
    state = json.loads((path / "state.json").read_text())
    again.batches.restore(state["loader"])
    again.n_steps, again.n_tokens = state["step"], state["tokens"]
    for before, after in zip(went_on, [again.step() for _ in range(4)]):
        assert (after.step, after.tokens, after.loss, after.grad_norm) == (before.step, before.tokens, before.loss, before.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(parameters(made.model).values(), parameters(again.model).values(), strict=True))


def test_the_newest_two_are_kept(tmp_path, corpus):
    made, folder = trainer(corpus), run(tmp_path / "run")
    seen = []
    for n in (0, 9, 10, 99, 100, 12345):
        made.n_steps = n
        save(made, folder)
        seen.append(sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()))
    assert seen == [["step-00000000"], ["step-00000000", "step-00000009"], ["step-00000009", "step-00000010"], ["step-00000010", "step-00000099"],
                    ["step-00000099", "step-00000100"], ["step-00000100", "step-00012345"]]
    made.n_steps = 12346
    save(made, folder, keep=1)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00012346"]
    assert save(made, folder) == tmp_path / "run" / "checkpoints" / "step-00012346"   # the same step again is the same checkpoint


def test_before_the_first_step_there_is_a_checkpoint_too(tmp_path, corpus):
    path = save(trainer(corpus), run(tmp_path / "run"))
    assert read_safetensors(path / "optimizer.safetensors") == {} and "embed.token.weight" in read_safetensors(path / "model.safetensors")


def test_a_checkpoint_that_fails_leaves_the_older_ones(tmp_path, corpus):
    made, folder = trainer(corpus), run(tmp_path / "run")
    save(made, folder)
    made.step()
    with pytest.raises(TypeError):
        folder.checkpoint(made.model, made.optimizer, {"step": 1, "what JSON does not know": object()})
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000000"]
