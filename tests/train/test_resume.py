"""Runs of every kind go on to the bit; a batch that makes the loss leap is gone past; signals wait for the end of an update."""
from __future__ import annotations

import csv
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hanok.bundle.bundle import is_bundle
from hanok.bundle.weights import read_safetensors
from hanok.contracts import Batch
from hanok.errors import ConfigError, DataError
from hanok.text.tokenizer import Tokenizer
from hanok.train import checkpoint, data_of_run
from hanok.train.checkpoint import Run
from hanok.train.data_of_run import RunData
from hanok.train.pretrain import MOST_ROLLBACKS, Pretraining, prepare
from hanok.train.recipe import DataRecipe, ModelRecipe, Recipe, TokenizerRecipe, TrainRecipe
from hanok.train.resume import differences, resume
from hanok.train.runs import Batches, Signals, Terminated
from hanok.train.trainer import DivergedError
from tiny import prose, write_prose
from tiny import tokenizer as words

TRAIN = TrainRecipe(steps=14, micro_batch_size=4, learning_rate=1e-2, warmup_steps=4, eval_every=6, eval_tokens=300, checkpoint_every=5, seed=3)
SIZES = {"d_model": 32, "n_layers": 1, "dropout": 0.1}
HEADS = {**SIZES, "n_heads": 2, "d_ff": 64}
KINDS = {
    "qwen3": Recipe(ModelRecipe(sizes={**HEADS, "n_kv_heads": 1}), train=replace(TRAIN, optimizer="muon", ema_decay=0.9, grad_accum_steps=2)),
    "gpt2": Recipe(ModelRecipe("gpt2", sizes=HEADS), data=DataRecipe(separate=True), train=TRAIN),
    "lstm": Recipe(ModelRecipe("lstm", sizes=SIZES), train=TRAIN),
    "bert": Recipe(ModelRecipe("bert", sizes=HEADS), TokenizerRecipe(kind="wordpiece"), train=TRAIN),
    "t5": Recipe(ModelRecipe("t5", sizes={**HEADS, "n_decoder_layers": 1}), TokenizerRecipe(n_sentinels=9), train=TRAIN),
    "bahdanau": Recipe(ModelRecipe("bahdanau", sizes={**SIZES, "d_embed": 32, "d_hidden": 32}), data=DataRecipe(("pairs.tsv",)), train=TRAIN),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = write_prose(tmp_path_factory.mktemp("text"), 3, 300)
    lines = prose(900, seed=9).replace(".\n", " ").split()
    (folder / "pairs.tsv").write_text("source\ttarget\n" + "".join(
        f"{' '.join(lines[i:i + 4])}\t{' '.join(reversed(lines[i:i + 4]))}\n" for i in range(0, 800, 4)), encoding="utf-8")
    return folder


def recipe_of(kind: str, text: Path) -> Recipe:
    told = KINDS[kind]
    source = str(text / "pairs.tsv" if told.data.sources else text)
    return replace(told, tokenizer=replace(told.tokenizer, vocab_size=300), data=replace(told.data, sources=(source,), validation=0.2, seq_len=24))


@pytest.fixture(scope="module")
def prepared(text) -> RunData:
    return prepare(recipe_of("gpt2", text))


def changed(prepared: RunData, **settings) -> RunData:
    return replace(prepared, recipe=replace(prepared.recipe, train=replace(prepared.recipe.train, **settings)))


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def numbers(out: Path) -> list[dict[str, str]]:
    """metrics.csv without the clock."""
    with open(out / "metrics.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name not in ("seconds", "tokens_per_second")} for row in csv.DictReader(file)]


def stop_at(n: int):
    def callback(step) -> None:
        if step.step == n:
            raise KeyboardInterrupt
    return callback


# ---- every kind of run
@pytest.mark.parametrize("kind", KINDS)
def test_some_updates_and_the_rest_are_all_updates_to_the_bit(kind: str, text: Path, tmp_path: Path):
    prepared = changed(prepare(recipe_of(kind, text)), steps=20)
    Pretraining(prepared, tmp_path / "whole").run()
    with pytest.raises(KeyboardInterrupt, match="step-00000016; hanok pretrain --resume .* goes on"):
        Pretraining(prepared, tmp_path / "cut").run(stop_at(16))                      # 13 to 16 wait for their row in metrics.csv
    torch.manual_seed(99), np.random.seed(99)                                         # another process knows nothing of this one's chance
    resume(tmp_path / "cut").run()
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole") and resume(tmp_path / "cut") is None
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")


def test_the_averaged_weights_are_what_is_evaluated_and_written(text, tmp_path):
    made = Pretraining(prepare(recipe_of("qwen3", text)), tmp_path / "run")
    bundle = made.run()
    last = made.run_folder.read(made.run_folder.checkpoints()[-1])[0]
    written = read_safetensors(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(written[name], last.get(f"ema/{name}", last[f"model/{name}"])) for name in written)
    assert not torch.equal(written["embed.token.weight"], last["model/embed.token.weight"])
    assert torch.equal(dict(bundle.model.named_parameters())["embed.token.weight"], written["embed.token.weight"])
    assert made.evaluate() == made.validation


def test_what_a_recurrent_model_carries_is_in_the_checkpoint(text, tmp_path):
    made = Pretraining(prepare(recipe_of("lstm", text)), tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        made.run(stop_at(3))
    tensors, _ = made.run_folder.read(made.run_folder.checkpoints()[-1])
    assert {name for name in tensors if name.startswith("carry/")} == {"carry/cells/0", "carry/cells/1", "carry/documents"}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(name, prepared, tmp_path):
    Pretraining(prepared, tmp_path / "whole").run()
    with pytest.raises(KeyboardInterrupt):
        Pretraining(prepared, tmp_path / "run").run(stop_at(12))
    file = tmp_path / "run" / "checkpoints" / "step-00000012" / name
    file.write_bytes(file.read_bytes()[:-9])
    told: list[str] = []
    again = resume(tmp_path / "run", say=told.append)
    line = next(line for line in told if str(file) in line)
    assert line.endswith("; going back to step-00000010") and "fetch it again" not in line and again.trainer.n_steps == 10
    assert not file.parent.exists(), "or the run could not write it when it comes there again"
    again.run()
    assert weights(tmp_path / "run") == weights(tmp_path / "whole") and numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        (path / "model.safetensors").write_bytes(b"")
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(DataError, match="no checkpoint of .* is whole: bring one back, or remove them all"):
        resume(tmp_path / "run")


def test_a_run_keeps_its_tokenizer_from_the_beginning(prepared, tmp_path, monkeypatch):
    out, mine = tmp_path / "run", tmp_path / "run" / "tokenizer.json"
    with pytest.raises(KeyboardInterrupt):
        Pretraining(prepared, out).run(stop_at(3))
    whole = mine.read_bytes()
    assert Tokenizer.load(out).to_json() == prepared.tokenizer.to_json()
    with pytest.raises(ConfigError, match=r"is not the one that the checkpoint was made with \(tokenizer.vocab_size 300 -> 310\), .*begin a new run"):
        resume(out, ["tokenizer.vocab_size=310"], force=True)
    words("bpe", 320).save(out)
    with pytest.raises(ConfigError, match=r"tokenizer.json was changed: it is not the tokenizer that .*step-00000003 was made with; bring"):
        resume(out)
    mine.unlink()
    resume(out).run_folder.unlock()                                                   # trained anew, and the same
    mine.write_bytes(whole)
    monkeypatch.setattr(data_of_run, "train_tokenizer", None)                         # nobody trains
    resume(out).run()
    assert is_bundle(out) and mine.read_bytes() == whole


def test_another_number_of_threads_is_told(prepared, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Pretraining(prepared, tmp_path / "run").run(stop_at(3))
    run = Run(tmp_path / "run")
    (path,) = run.checkpoints()
    n = torch.get_num_threads()
    assert run.state(path)["threads"] == n
    for saved, lines in ((n, []), (n + 1, [f"the checkpoint was made with {n + 1} threads, this process has {n}: equal to the bit is promised for "
                                           f"the same number (OMP_NUM_THREADS={n + 1})"])):
        run.amend(path, threads=saved)
        told: list[str] = []
        resume(tmp_path / "run", say=told.append).run_folder.unlock()
        assert [line for line in told if line.startswith("the checkpoint was")] == lines


def test_a_finished_run_whose_bundle_was_not_written_yet_writes_it(prepared, tmp_path):
    Pretraining(prepared, tmp_path / "run").run()
    before = weights(tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()                                       # killed while the files were moved
    resume(tmp_path / "run").run()
    assert is_bundle(tmp_path / "run") and weights(tmp_path / "run") == before


def test_nobody_resumes_what_is_still_running(prepared, tmp_path):
    def meanwhile(step) -> None:
        if step.step == 6:
            before = (tmp_path / "run" / "metrics.csv").read_bytes()
            with pytest.raises(DataError, match="run: another process is training here; wait for it, or end it first"):
                resume(tmp_path / "run")
            assert (tmp_path / "run" / "metrics.csv").read_bytes() == before

    Pretraining(prepared, tmp_path / "run").run(meanwhile)
    assert is_bundle(tmp_path / "run") and resume(tmp_path / "run") is None and resume(tmp_path / "run") is None


# ---- past a batch
class Poison:
    """A model whose hidden vectors are no numbers for some batches, told by their number."""

    def __init__(self, made: Pretraining, *numbers: int):
        self.made, self.hidden, self.numbers = made, made.trainer.hidden, numbers
        made.trainer.hidden = self

    def __call__(self, batch: Batch) -> torch.Tensor:
        return self.hidden(batch) * (torch.nan if self.made.batches.latest[-1] in self.numbers else 1.0)


def test_a_run_goes_back_and_past_what_diverged(prepared, tmp_path):
    told: list[str] = []
    made = Pretraining(changed(prepared, on_spike="rollback"), tmp_path / "run", say=told.append)
    Poison(made, 7, 11)
    made.run()
    assert [line[line.index("back to"):] for line in told] == ["back to step 5, and on past that batch (1 of 3)",
                                                               "back to step 10, and on past that batch (2 of 3)"]
    assert told[0].startswith("the loss of step 8 is nan; ") and "the batch is at number 7, epoch " in told[0]

    around = Pretraining(prepared, tmp_path / "around")
    around.batches.skipped = {7, 11}
    around.run()
    assert weights(tmp_path / "run") == weights(tmp_path / "around")
    steps = [line.partition(",")[0] for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == [*map(str, range(1, 11)), "12", "14"]


def test_a_run_that_went_past_a_batch_goes_on_to_the_bit(prepared, tmp_path):
    rolling = changed(prepared, on_spike="rollback")
    for name, callbacks in (("whole", []), ("cut", [stop_at(9)])):
        made = Pretraining(rolling, tmp_path / name)
        Poison(made, 6)
        try:
            made.run(*callbacks)
        except KeyboardInterrupt:
            assert name == "cut"
    again = resume(tmp_path / "cut")
    assert again.n_rollbacks == 1 and again.batches.skipped == {6}
    again.run()
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_before_the_first_checkpoint_it_goes_back_to_the_beginning(prepared, tmp_path):
    told: list[str] = []
    made = Pretraining(changed(prepared, on_spike="rollback", checkpoint_every=0), tmp_path / "run", say=told.append)
    Poison(made, 2)
    made.run()
    assert "back to step 0, and on past that batch" in told[0] and made.trainer.n_steps == 14


def test_the_clock_does_not_go_back(prepared, tmp_path):
    made = Pretraining(changed(prepared, on_spike="rollback", checkpoint_every=0, seconds=1000.0), tmp_path / "run")
    Poison(made, 5)
    seen: list[float] = []
    made.run(lambda step: seen.append(step.seconds))
    assert len(seen) > 14 and seen == sorted(seen)


def test_three_times_are_enough(prepared, tmp_path):
    made = Pretraining(changed(prepared, on_spike="rollback"), tmp_path / "run")
    Poison(made, *range(6, 100))
    often = r"step 7 is nan.* \(the run had gone back 3 times\); what was learned before it is in .*step-00000006"
    with pytest.raises(DivergedError, match=often) as error:
        made.run()
    assert MOST_ROLLBACKS == 3 and error.value.step == 7 and not is_bundle(tmp_path / "run")


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "lstm"])
def test_a_run_that_stopped_draws_the_batch_again_and_goes_on_to_the_bit(kind, text, tmp_path):
    """With dropout, whose random numbers the update had drawn; with micro-batches; with a carried state."""
    prepared = prepare(recipe_of(kind, text))
    n = prepared.recipe.train.grad_accum_steps
    Pretraining(prepared, tmp_path / "whole").run()
    made = Pretraining(prepared, tmp_path / "run")
    poison = Poison(made, 7 * n - 1)
    accumulate = made.trainer.accumulate

    def spoilt(*arguments):
        loss, norm = accumulate(*arguments)
        return (float("nan") if made.batches.latest[-1] in poison.numbers else loss), norm

    made.trainer.hidden, made.trainer.accumulate = poison.hidden, spoilt              # a Carry is known by its kind
    with pytest.raises(DivergedError, match=r"what was learned before it is in .*step-00000006"):
        made.run()
    again = resume(tmp_path / "run")
    assert again.trainer.n_steps == 6 and again.batches.n_drawn == 6 * n and not again.batches.skipped
    again.run()
    assert weights(tmp_path / "run") == weights(tmp_path / "whole") and numbers(tmp_path / "run") == numbers(tmp_path / "whole")


@pytest.mark.parametrize("at", [5, 7])
def test_a_rollback_that_gave_up_has_gone_past_the_batch(at, prepared, tmp_path):
    """Right behind a checkpoint, and between two."""
    made = Pretraining(changed(prepared, on_spike="rollback"), tmp_path / "run")
    made.n_rollbacks = MOST_ROLLBACKS
    Poison(made, at)
    with pytest.raises(DivergedError):
        made.run()
    again = resume(tmp_path / "run")
    assert again.trainer.n_steps == again.batches.n_drawn == at and again.batches.skipped == {at}
    again.run()
    around = Pretraining(prepared, tmp_path / "around")
    around.batches.skipped = {at}
    around.run()
    assert weights(tmp_path / "run") == weights(tmp_path / "around")


def test_a_rollback_stands_in_its_checkpoint(prepared, tmp_path):
    """Killed before the next one, the run does not meet the batch again."""
    made = Pretraining(changed(prepared, on_spike="rollback"), tmp_path / "run")
    Poison(made, 6)
    with pytest.raises(KeyboardInterrupt):
        made.run(stop_at(7))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000007")
    again = resume(tmp_path / "run")
    assert again.trainer.n_steps == 5 and again.batches.skipped == {6} and again.n_rollbacks == 1


class Counter:
    """Batches that are only numbers."""

    def __init__(self) -> None:
        self.n = 0

    def __next__(self) -> Batch:
        self.n += 1
        return Batch(torch.tensor([[self.n - 1]]))

    def state(self) -> dict[str, int]:
        return {"epoch": 0, "window": self.n, "seed": 1}

    def restore(self, state) -> None:
        self.n = state["window"]


def test_batches_are_gone_past_and_found_again():
    batches = Batches(Counter(), at_a_time=2)

    def draw(n: int) -> list[int]:
        return [next(batches).token_ids.item() for _ in range(n)]

    assert draw(4) == [0, 1, 2, 3] and batches.state() == {"number": 4, "epoch": 0, "window": 4}
    saved = batches.saved()
    assert draw(4) == [4, 5, 6, 7]
    batches.skip_latest()
    batches.restore(saved)
    assert draw(3) == [4, 5, 8]
    batches.give_back()
    assert draw(2) == [5, 8] and batches.saved() == {"number": 9, "skipped": [6, 7], "loader": {"epoch": 0, "window": 9, "seed": 1}}
    other = Batches(Counter())
    other.restore(batches.saved())
    assert next(other).token_ids.item() == 9 and other.skipped == {6, 7}


# ---- signals
@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_waits_its_echo_too_and_a_third_one_insists(number, kind):
    before = signal.getsignal(number)
    for patience, n_waiting in ((1e9, 2), (0.0, 1)):                                  # a second one that comes late insists
        with Signals(patience) as signals:
            for _ in range(n_waiting):
                os.kill(os.getpid(), number)                                          # nothing happens yet
                with pytest.raises(kind):
                    signals.leave_if_asked()
                assert not signals.insisted
            with pytest.raises(kind, match="left at once, in the middle of an update or of a checkpoint"):
                os.kill(os.getpid(), number)
                signal.pause()
            assert signals.insisted
    assert signal.getsignal(number) is before
    with Signals() as signals:
        signals.leave_if_asked()


@pytest.mark.parametrize(("n_signals", "kept"), [(1, 8), (2, 8), (3, 5)])
def test_an_echo_loses_nothing_and_a_third_signal_keeps_nothing_of_an_update(n_signals, kept, prepared, tmp_path):
    made = Pretraining(prepared, tmp_path / "run")
    hidden = made.trainer.hidden

    def several(batch: Batch) -> torch.Tensor:
        if made.batches.n_drawn == 8:
            for _ in range(n_signals):
                os.kill(os.getpid(), signal.SIGINT)
        return hidden(batch)

    made.trainer.hidden = several
    with pytest.raises(KeyboardInterrupt, match="what was learned so far is in" if n_signals < 3 else "left at once"):
        made.run()
    assert made.run_folder.checkpoints()[-1].name == f"step-{kept:08d}"


def test_an_echo_while_the_checkpoint_is_written_does_not_lose_it(prepared, tmp_path, monkeypatch):
    made = Pretraining(prepared, tmp_path / "run")
    write = checkpoint.write_safetensors

    def twice(path, tensors):
        if path.name == "model.safetensors":
            os.kill(os.getpid(), signal.SIGTERM)
        write(path, tensors)

    def first(step) -> None:
        if step.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
            monkeypatch.setattr(checkpoint, "write_safetensors", twice)

    with pytest.raises(Terminated, match="step-00000007"):
        made.run(first)
    assert made.run_folder.checkpoints()[-1].name == "step-00000007"


# ---- what is told
def test_differences_are_named_by_table_and_field():
    a = {"train": {"steps": 1, "seconds": 2.0}, "model": {"sizes": {"d_ff": 3}}, "data": {"sources": ["a"]}}
    b = {"train": {"steps": 2}, "model": {"sizes": {"d_ff": 3, "d_model": 4}}, "data": {"sources": ["a", "b"]}}
    assert differences(a, a) == []
    assert differences(a, b) == ["train.steps 1 -> 2", "train.seconds 2.0 -> nothing", "model.sizes.d_model nothing -> 4",
                                 "data.sources ['a'] -> ['a', 'b']"]


def test_many_differences_are_counted(prepared, tmp_path):
    Pretraining(prepared, tmp_path / "run").run()
    with pytest.raises(ConfigError, match=r": train.steps 14 -> 15, .*train.beta2 0.99 -> 0.5 and 2 more; put it back"):
        resume(tmp_path / "run", ["train.steps=15", "train.eps=1e-7", "train.clip=2", "train.beta1=0.5", "train.beta2=0.5", "train.floor=0.5",
                                  "train.decay=0.5"])


def test_other_rows_a_batch_do_not_fit_the_loaders_place(prepared, tmp_path):
    Pretraining(prepared, tmp_path / "run").run()
    with pytest.raises(ConfigError, match="global_batch_size 4, this loader has 2"):
        resume(tmp_path / "run", ["train.micro_batch_size=2", "train.steps=20"], force=True)


def test_a_source_that_became_a_folder_is_told(text, tmp_path):
    (tmp_path / "a.txt").write_text((text / "0.txt").read_text())
    recipe = recipe_of("gpt2", text)
    recipe = replace(recipe, data=replace(recipe.data, sources=(str(tmp_path / "a.txt"),)))
    Pretraining(prepare(recipe), tmp_path / "run").run(lambda step: None)
    (tmp_path / "run" / "config.json").unlink()
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.txt").mkdir()
    (tmp_path / "a.txt" / "b.txt").write_text("x")
    with pytest.raises(DataError, match=r"a.txt is gone, .*b.txt is new"):
        resume(tmp_path / "run")


def test_the_live_line_of_a_run_is_said(prepared, tmp_path):
    said = SimpleNamespace(lines=[])
    made = Pretraining(changed(prepared, sample_every=7, sample_prompt="the house", sample_tokens=5), tmp_path / "run", say=said.lines.append)
    made.run()
    assert [line.partition(":")[0] for line in said.lines] == ["step 7", "step 14"]
    told = (tmp_path / "run" / "samples.md").read_text()
    assert told.startswith("## step 7\n\n    the house\n     -> ") and told.count("## step") == 2
