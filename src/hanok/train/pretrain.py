"""From raw text to a bundle: what surrounds the trainer, which knows no files.

`prepare` does all that can fail on bad input before anything is written; `Pretraining` owns the run's folder: it evaluates, records, checkpoints,
goes back past what diverged, and writes the bundle when it is done. A run that goes on (`train.resume`) is the same class, restored.
"""
from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hanok import runtime
from hanok.bundle.bundle import Bundle, write_at_top
from hanok.config import to_dict
from hanok.errors import ConfigError
from hanok.evaluate.score import Score, byte_lengths, score_batches
from hanok.report import plot_loss
from hanok.text.tokenizer import Tokenizer
from hanok.train import metrics, samples
from hanok.train.carry import Carry
from hanok.train.checkpoint import Run
from hanok.train.data_of_run import RunData, data_of
from hanok.train.optim import optimizers
from hanok.train.recipe import Recipe
from hanok.train.runs import Batches, Signals
from hanok.train.trainer import DivergedError, Step, Trainer

Say = Callable[[str], None]
MOST_ROLLBACKS = 3
"""Times that a run goes back past a batch before it gives up: what diverges more often is not the batch's fault."""
CARRY = "carry/"


def prepare(recipe: Recipe, say: Say = lambda line: None) -> RunData:
    """Reads, splits and tokenises the recipe's text, and works out the model's sizes. HanokError on bad input; nothing but caches is written."""
    settings = recipe.train
    metrics.check(settings.log)
    if recipe.tokenizer.path is not None:
        Tokenizer.load(Path(recipe.tokenizer.path))                                   # refused before any text is read
    prepared = data_of(recipe, say)
    if settings.sample_every:
        samples.check(settings.sample_prompt, prepared.tokenizer, prepared.family.kind, prepared.config.max_seq_len)
    if settings.warmup_steps > settings.steps:
        say(f"train.warmup_steps is {settings.warmup_steps} and train.steps {settings.steps}: the learning rate will not reach its peak")
    return prepared


class Pretraining:
    """A prepared run in its folder. `out` is a new folder, or a locked run that goes on from `checkpoint` (None: from its beginning)."""

    def __init__(self, prepared: RunData, out: Path | str | Run, checkpoint: Path | None = None, say: Say = lambda line: None):
        self.prepared, self.say, settings = prepared, say, prepared.recipe.train
        if settings.threads:
            torch.set_num_threads(settings.threads)
        runtime.seed_everything(settings.seed)
        self.device = runtime.device()
        self.model: Any = prepared.family.build(prepared.config).to(self.device)
        self.batches = Batches(prepared.loader(), settings.grad_accum_steps)
        self.trainer = Trainer(self.model, optimizers(self.model, settings), self.batches, settings, vocab_size=prepared.config.vocab_size,
                               device=self.device, hidden=prepared.hidden_of(self.model))
        self.lengths: np.ndarray = byte_lengths(prepared.tokenizer)
        self.validation: Score | None = None
        self.evaluated_at, self.n_rollbacks = 0, 0
        self.losses: list[float] = []                                                 # of the updates since the last row of metrics.csv
        self.run_folder = out if isinstance(out, Run) else Run.new(out, prepared.recipe, prepared.sources, prepared.tokenizer)
        if isinstance(out, Run):
            self.restore(checkpoint)
        else:
            self.run_folder.lock()
        self.trackers = metrics.Trackers(settings.log, self.run_folder.out, to_dict(prepared.recipe), self.trainer.n_steps)

    def run(self, *on_step: Callable[[Step], Any]) -> Bundle:
        """Trains to the end and writes the bundle. Interrupted, or where the loss is no number, it leaves a checkpoint and no bundle."""
        try:
            self.train(*on_step)
            return self.finish()
        finally:
            self.trackers.close()
            self.run_folder.unlock()

    def train(self, *on_step: Callable[[Step], Any]) -> None:
        """All updates that are left, and a checkpoint behind the last."""
        if self.prepared.recipe.train.on_spike == "rollback":
            self.checkpoint()                                                         # something to go back to
        with Signals() as signals:
            while not self.trainer.done:
                try:
                    self.trainer.run(self.after_step, *on_step, signals.leave_if_asked)
                except DivergedError as error:
                    self.roll_back(error)
                except KeyboardInterrupt as interrupt:
                    if signals.insisted:
                        raise                                                         # nothing whole to keep
                    raise type(interrupt)(f"what was learned so far is in {self.checkpoint()}; "
                                          f"hanok pretrain --resume {self.run_folder.out} goes on") from None
        self.checkpoint()

    def after_step(self, step: Step) -> None:
        """Evaluates, records, samples and checkpoints when it is time."""
        settings = self.prepared.recipe.train
        self.losses.append(step.loss)
        told = {name: value for name, value in dataclasses.asdict(step).items() if name != "progress"}
        told["loss"] = sum(self.losses) / len(self.losses)                            # of all updates since the last row
        if step.step % settings.eval_every == 0 or self.trainer.done:
            score = self.validation = self.evaluate()
            self.evaluated_at = step.step
            told |= {"validation_loss": score.loss, "perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte}
        if step.step <= 10 or step.step % 10 == 0 or "validation_loss" in told:
            self.run_folder.record(told)
            self.trackers.numbers(told)
            self.losses.clear()
        if settings.sample_every and step.step % settings.sample_every == 0:
            self.sample()
        if settings.checkpoint_every and step.step % settings.checkpoint_every == 0:
            self.checkpoint()

    def evaluate(self) -> Score:
        """How well the held-out text is predicted: train.eval_tokens of it, the same each time."""
        self.model.eval()
        with self.trainer.averaged():
            score = score_batches(self.prepared.reader_of(self.model), self.prepared.windows(), self.lengths, self.device)
        self.model.train()
        return score

    def sample(self) -> None:
        """What the model says to train.sample_prompt, into samples.md and for people."""
        settings, step = self.prepared.recipe.train, self.trainer.n_steps
        self.model.eval()
        with self.trainer.averaged():
            answer = samples.sample(self.bundle(), settings.sample_prompt, settings.sample_tokens)
        self.model.train()
        self.run_folder.sample(step, f"{settings.sample_prompt}\n -> {answer}")
        self.trackers.text(step, answer)
        self.say(f"step {step}: {' '.join(answer.split())}")

    # ---- checkpoints
    def checkpoint(self) -> Path:
        """Everything that the run needs to go on to the bit, in its folder."""
        tensors, plain = self.trainer.state()
        tensors |= {CARRY + name: tensor for name, tensor in self.carried().items()}
        score = self.validation
        state = {"step": self.trainer.n_steps, "recipe": to_dict(self.prepared.recipe), "tokenizer_sha256": sha256_of(self.prepared.tokenizer),
                 "validation_loss": score.loss if score is not None and self.evaluated_at == self.trainer.n_steps else None,
                 "validation": None if score is None else dataclasses.asdict(score), "losses": self.losses, "rollbacks": self.n_rollbacks,
                 "batches": self.batches.saved(), "threads": torch.get_num_threads(), "trainer": plain}
        return self.run_folder.checkpoint(tensors, state, self.prepared.recipe.train.keep_checkpoints)

    def restore(self, checkpoint: Path | None) -> None:
        """Back to where a checkpoint was written; None: the beginning, where a new run is already. ConfigError names the first thing that differs."""
        if checkpoint is not None:
            tensors, state = self.run_folder.read(checkpoint)
            carried = {name.removeprefix(CARRY): tensors.pop(name).clone() for name in list(tensors) if name.startswith(CARRY)}
            self.trainer.restore(tensors, state["trainer"])
            if state.get("threads", threads := torch.get_num_threads()) != threads:
                self.say(f"the checkpoint was made with {state['threads']} threads, this process has {threads}: equal to the bit is promised for the "
                         f"same number (OMP_NUM_THREADS={state['threads']})")
            if isinstance(self.trainer.hidden, Carry):
                self.trainer.hidden.restore(carried)
            self.batches.restore(state["batches"])
            self.losses, self.n_rollbacks = state["losses"], max(self.n_rollbacks, state["rollbacks"])
            self.validation = None if state["validation"] is None else Score(**state["validation"])
            self.evaluated_at = state["step"] if state["validation_loss"] is not None else 0
        self.run_folder.rewind(self.trainer.n_steps)

    def carried(self) -> dict[str, torch.Tensor]:
        """What a recurrent model carries from batch to batch."""
        return self.trainer.hidden.state() if isinstance(self.trainer.hidden, Carry) else {}

    def roll_back(self, error: DivergedError) -> None:
        """Back to the newest checkpoint, to go on past the batch. DivergedError where the recipe stops there, or it came too often.

        A run that stopped and is resumed draws the batch again; one that goes back has gone past it, and its checkpoint says so.
        """
        stops = self.prepared.recipe.train.on_spike == "stop"
        if not stops:
            self.batches.skip_latest()
        if stops or self.n_rollbacks == MOST_ROLLBACKS:
            self.batches.give_back()
            path, often = self.checkpoint(), f" (the run had gone back {MOST_ROLLBACKS} times)" if self.n_rollbacks else ""
            self.run_folder.amend(path, batches=self.batches.saved())                 # it may have been there
            raise DivergedError(f"{error}{often}; what was learned before it is in {path}", error.step, error.batch) from None
        self.n_rollbacks += 1
        newest = self.run_folder.checkpoints()[-1]
        self.restore(newest)
        self.run_folder.amend(newest, batches=self.batches.saved(), rollbacks=self.n_rollbacks)
        self.say(f"{error}; back to step {self.trainer.n_steps}, and on past that batch ({self.n_rollbacks} of {MOST_ROLLBACKS})")

    # ---- the end
    def bundle(self) -> Bundle:
        """What was learned so far, as a bundle."""
        told: dict[str, Any] = {"steps": self.trainer.n_steps, "tokens": self.trainer.n_tokens, "seconds": round(self.trainer.seconds, 1)}
        if self.validation is not None:
            told |= {"validation_loss": round(self.validation.loss, 4), "validation_bits_per_byte": round(self.validation.bits_per_byte, 4)}
        manifest = {"recipe": to_dict(self.prepared.recipe), "data": summary_of(self.prepared.sources), "seed": self.prepared.recipe.train.seed,
                    "metrics": told}
        return Bundle(self.prepared.family, self.prepared.config, self.model, self.prepared.tokenizer, None, self.prepared.generation, manifest)

    def finish(self) -> Bundle:
        """Writes the picture of the loss, and the bundle's files at the top of the run's folder; averaged weights are the model's from here on."""
        self.model.eval()
        if self.trainer.average:
            self.trainer.average.swap()
            self.trainer.average = None
        bundle, picture = self.bundle(), self.run_folder.out / "loss.png"
        with suppress(ConfigError):                                                   # matplotlib is not there; who asked says so
            plot_loss(self.run_folder.rows, picture, title=f"{self.prepared.family.name}, {self.trainer.n_steps} steps")
            bundle.manifest["plot"] = picture.name
        write_at_top(bundle, self.run_folder.out)
        return bundle


def sha256_of(tokenizer: Tokenizer) -> str:
    """The hash of its tokenizer.json."""
    return hashlib.sha256(tokenizer.to_json().encode()).hexdigest()


def summary_of(sources: list[dict[str, Any]], most: int = 20) -> dict[str, Any]:
    """The sources in few lines: how many, how large, one hash over all, and the first of them."""
    digest = hashlib.sha256("".join(source["sha256"] for source in sources).encode()).hexdigest()
    return {"files": len(sources), "bytes": sum(source["bytes"] for source in sources), "sha256": digest, "first": sources[:most]}
