"""Where numbers and samples go: trackers that are asked for, and what a model of each kind says while it learns."""
from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hanok.contracts import Batch
from hanok.errors import ConfigError
from hanok.text.tokenizer import train
from hanok.train import metrics, samples
from hanok.train.pretrain import Pretraining, prepare
from hanok.train.recipe import DataRecipe, ModelRecipe, Recipe, TokenizerRecipe, TrainRecipe
from hanok.train.resume import resume
from tiny import bundle, prose, tokenizer, write_prose
from zoo import BY_NAME

SIZES = {"d_model": 32, "n_layers": 1, "n_heads": 2, "d_ff": 64}
TRAIN = TrainRecipe(steps=12, micro_batch_size=4, warmup_steps=2, eval_every=6, eval_tokens=200, checkpoint_every=0, sample_every=6,
                    sample_prompt="the house", sample_tokens=6)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    folder = write_prose(tmp_path_factory.mktemp("text"), 3, 300)
    return Recipe(ModelRecipe("gpt2", sizes=SIZES), TokenizerRecipe(vocab_size=300), DataRecipe((str(folder),), validation=0.2, seq_len=24), TRAIN)


def events(out: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's own reading of the event files: name -> (step, value)."""
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(str(out / "tensorboard"))
    reader.Reload()
    return {name: [(event.step, event.value) for event in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


# ---- trackers
def test_tensorboard_shows_what_metrics_csv_holds_and_a_resumed_run_no_step_twice(recipe, tmp_path):
    pytest.importorskip("tensorboard")
    made = Pretraining(prepare(replace(recipe, train=replace(TRAIN, log=("tensorboard",)))), tmp_path / "run")

    def stop(step) -> None:
        if step.step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.run(stop)
    again = resume(tmp_path / "run")
    again.run()
    told = events(tmp_path / "run")
    assert told.keys() == {"loss", "validation_loss", "perplexity", "bits_per_byte", "learning_rate", "grad_norm", "tokens_per_second"}
    rows = [(int(row["step"]), float(row["loss"])) for row in again.run_folder.rows]
    assert [step for step, _ in told["loss"]] == [step for step, _ in rows] == [*range(1, 11), 12]
    assert [value for _, value in told["loss"]] == pytest.approx([value for _, value in rows], rel=1e-4)
    assert [step for step, _ in told["validation_loss"]] == [6, 12]


@pytest.mark.parametrize(("name", "install"), metrics.INSTALL.items())
def test_a_tracker_that_is_missing_names_what_to_install(name, install, recipe, tmp_path, monkeypatch):
    for module in (name, *(loaded for loaded in sys.modules if loaded.startswith(("torch.utils.tensorboard", f"{name}.")))):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as error:
        prepare(replace(recipe, data=DataRecipe(("/nowhere",)), train=replace(TRAIN, log=(name,))))
    assert str(error.value) == f"train.log names {name}, which is not installed; {install}, or leave it out"


def test_nothing_is_tracked_unless_asked_for(recipe, tmp_path):
    made = Pretraining(prepare(recipe), tmp_path / "run")
    made.run()
    assert made.trackers.all == [] and not (tmp_path / "run" / "tensorboard").exists()


# ---- samples
def test_samples_and_evaluations_change_nothing_of_what_is_learned(recipe, tmp_path):
    told = replace(recipe, model=ModelRecipe("gpt2", sizes={**SIZES, "dropout": 0.2}))
    for name, settings in (("often", TRAIN), ("never", replace(TRAIN, sample_every=0, eval_every=12))):
        Pretraining(prepare(replace(told, train=settings)), tmp_path / name).run()
    often, never = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("often", "never"))
    assert often == never and (tmp_path / "often" / "samples.md").exists() and not (tmp_path / "never" / "samples.md").exists()


def test_a_sample_is_the_models_own_answer(recipe, tmp_path):
    made = Pretraining(prepare(recipe), tmp_path / "run")
    made.run()
    last = (tmp_path / "run" / "samples.md").read_text().rpartition("## step 12\n\n")[2]
    answer = samples.sample(made.bundle(), "the house", 6)
    assert last.startswith("    the house\n") and "".join(last.split()) == "".join(f"the house -> {answer}".split())


@pytest.mark.parametrize("name", ["t5-1.1", "llama"])
def test_what_writes_writes(name):
    case = BY_NAME[name]
    told = bundle(replace(case.config, vocab_size=300), case.family, start_ids=(0,), stop_ids=())
    assert samples.sample(told, "the house", 5) == samples.sample(told, "the house", 5) != ""


def test_an_encoder_fills_its_masks_and_leaves_the_rest():
    words = tokenizer("wordpiece", 300)
    told = bundle(replace(BY_NAME["bert-mlm"].config, vocab_size=words.vocab_size), "bert", words=words)
    ids = words.encode("the [MASK] stands", parse_special=True)
    with torch.no_grad():
        guess = told.model(Batch(torch.tensor([ids])))[0, 1].argmax().item()
    assert samples.sample(told, "the [MASK] stands", 9) == words.decode([ids[0], guess, *ids[2:]])


def test_a_mask_of_another_spelling_is_one():
    words = train("bpe", [prose(300)], 300, further=["<mask>"])
    told = bundle(replace(BY_NAME["bert-mlm"].config, vocab_size=words.vocab_size), "bert", words=words)
    samples.check("the <mask> stands", words, "encoder", 99)
    assert "<mask>" not in samples.sample(told, "the <mask> stands", 9)
    with pytest.raises(ConfigError, match="'the house' has no <mask>, which an encoder would fill"):
        samples.check("the house", words, "encoder", 99)


@pytest.mark.parametrize(("prompt", "kind", "told"), [
    ("", "decoder", "train.sample_prompt is empty; give a prompt, or train.sample_every=0"),
    ("the house", "encoder", r"'the house' has no \[MASK\], which an encoder would fill"),
    ("the house " * 20, "decoder", "the model's context 8; shorten it"),
])
def test_a_prompt_that_cannot_be_asked_is_refused(prompt, kind, told):
    with pytest.raises(ConfigError, match=told):
        samples.check(prompt, tokenizer(), kind, 8)


def test_a_prompt_is_checked_before_anything_is_written(recipe, tmp_path):
    with pytest.raises(ConfigError, match="train.sample_prompt is empty"):
        Pretraining(prepare(replace(recipe, train=replace(TRAIN, sample_prompt=""))), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_refuses_to_begin_is_told_in_one_line(monkeypatch, tmp_path):
    def refuse(out, recipe, step):
        raise RuntimeError("no login\n  was found")

    monkeypatch.setitem(metrics.TRACKERS, "wandb", refuse)
    with pytest.raises(ConfigError, match=r"train.log names wandb, which did not begin: no login was found; settle that and go on with .*--resume"):
        metrics.Trackers(("wandb",), tmp_path, {}, 0)
