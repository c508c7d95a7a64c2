"""From raw text to a bundle: what surrounds the trainer, which knows no files.

`prepare` does all that can fail on bad input before anything is written; `Pretraining` owns the run's folder: it evaluates, records, checkpoints,
goes back past what diverged, and writes the bundle when it is done. A run that goes on (`train.resume`) is the same class, restored.
"""
from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
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
from hanok.train.distributed import Ranks, for_all, for_one, reshard, whole_of
from hanok.train.optim import optimizers
from hanok.train.recipe import Recipe
from hanok.train.runs import Batches, Signals, Terminated
from hanok.train.snapshot import chance, fill, set_chance
from hanok.train.trainer import DivergedError, Step, Trainer

Say = Callable[[str], None]
MOST_ROLLBACKS = 3
"""Times that a run goes back past a batch before it gives up: what diverges more often is not the batch's fault."""
CARRY = "carry/"
DICE = ("python", "numpy")
"""Random states that are plain data, of each rank its own."""


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


def begin(recipe: Recipe, out: Path | str, say: Say = lambda line: None, ranks: Ranks | None = None) -> Pretraining:
    """A new run in the new folder `out`. Of several ranks the first reads the text and makes the folder, and the others find there what it made."""
    if ranks is None or ranks.n == 1:
        return Pretraining(prepare(recipe, say), out, say=say, ranks=ranks)
    with ranks.in_turn():
        if ranks.first:
            prepared = prepare(recipe, say)
            check_ranks(prepared, ranks)
            run = Run.new(out, recipe, prepared.sources, prepared.tokenizer)
            run.lock()
        else:
            run = Run(out)
            prepared = replace(prepare(replace(recipe, tokenizer=replace(recipe.tokenizer, path=str(run.out / "tokenizer.json")))), recipe=recipe)
    return Pretraining(prepared, run, None, say, ranks)


def check_ranks(prepared: RunData, ranks: Ranks) -> None:
    """ConfigError for a run that these ranks cannot share."""
    settings = prepared.recipe.train
    ranks.part_of(settings, prepared.recipe.data.batch_tokens)
    if ranks.n > 1 and settings.parallel == "fsdp" and prepared.recurrent:
        raise ConfigError(f"{prepared.family.name} carries a state from batch to batch, which train.parallel=fsdp does not cut up; take ddp")


class Pretraining:
    """A prepared run in its folder. `out` is a new folder, or a locked run that goes on from `checkpoint` (None: from its beginning).

    Of several `ranks` each has a Pretraining of its own; all draw, evaluate and decide together, and the first one writes and speaks.
    """

    def __init__(self, prepared: RunData, out: Path | str | Run, checkpoint: Path | None = None, say: Say = lambda line: None,
                 ranks: Ranks | None = None):
        self.ranks = ranks = Ranks(device=runtime.device()) if ranks is None else ranks
        self.prepared, self.say, settings = prepared, say if ranks.first else lambda line: None, prepared.recipe.train
        if settings.threads:
            torch.set_num_threads(settings.threads)
        runtime.seed_everything(settings.seed)
        check_ranks(prepared, ranks)
        self.device, self.part = ranks.device, ranks.part_of(settings, prepared.recipe.data.batch_tokens)
        mine = replace(prepared, recipe=replace(prepared.recipe, train=self.part))
        self.model: Any = ranks.place(prepared.family.build(prepared.config), settings.parallel)
        self.batches = Batches(mine.loader(ranks.rank, ranks.n), self.part.grad_accum_steps)
        self.trainer = Trainer(self.model, optimizers(self.model, settings), self.batches, self.part, vocab_size=prepared.config.vocab_size,
                               device=self.device, hidden=mine.hidden_of(self.model), ranks=ranks)
        ranks.own_chance(settings.seed)
        self.same_run()
        self.lengths: np.ndarray = byte_lengths(prepared.tokenizer)
        self.validation: Score | None = None
        self.evaluated_at, self.n_rollbacks = 0, 0
        self.losses: list[float] = []                                                 # of the updates since the last row of metrics.csv
        self.run_folder = out if isinstance(out, Run) else Run.new(out, prepared.recipe, prepared.sources, prepared.tokenizer)
        if isinstance(out, Run):
            self.restore(checkpoint)
        else:
            self.run_folder.lock()
        log = settings.log if ranks.first else ()
        self.trackers = metrics.Trackers(log, self.run_folder.out, to_dict(prepared.recipe), self.trainer.n_steps)

    def same_run(self) -> None:
        """ConfigError where another rank trains something else: it has another text, recipe, tokenizer or torch."""
        told = [to_dict(self.prepared.recipe), sha256_of(self.prepared.tokenizer), summary_of(self.prepared.sources)["sha256"], torch.__version__]
        what = ("recipe", "tokenizer", "text", "version of torch")
        everybody = self.ranks.gather([hashlib.sha256(repr(part).encode()).hexdigest() for part in told])
        for rank, theirs in enumerate(everybody):
            for name, one, other in zip(what, everybody[0], theirs):
                if one != other:
                    raise ConfigError(f"rank {rank} has another {name} than rank 0; start all ranks with the same command, files and versions")

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
                    self.trainer.run(self.after_step, *on_step, partial(self.leave_if_asked, signals))
                except DivergedError as error:
                    self.roll_back(error)
                except KeyboardInterrupt as interrupt:
                    if signals.insisted:
                        raise                                                         # nothing whole to keep
                    raise type(interrupt)(f"what was learned so far is in {self.checkpoint()}; "
                                          f"hanok pretrain --resume {self.run_folder.out} goes on") from None
        self.checkpoint()

    def leave_if_asked(self, signals: Signals, step: Step) -> None:
        """All ranks leave behind the same update, whichever of them heard the signal."""
        if self.ranks.n > 1:
            interrupted, terminated = self.ranks.sums(signals.asked is not None, signals.asked is Terminated)
            if interrupted:                                                           # what came since is heard behind the next update
                raise Terminated if terminated else KeyboardInterrupt
            return
        signals.leave_if_asked()

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
            if self.ranks.first:
                self.run_folder.record(told)
            self.trackers.numbers(told)
            self.losses.clear()
        if settings.sample_every and step.step % settings.sample_every == 0:
            self.sample()
        if settings.checkpoint_every and step.step % settings.checkpoint_every == 0:
            self.checkpoint()

    def evaluate(self) -> Score:
        """How well the held-out text is predicted: train.eval_tokens of it, the same each time. Ranks share it; what carries a state, each reads."""
        windows, ranks = self.prepared.windows(), self.ranks
        dealt = ranks.n > 1 and not self.prepared.recurrent
        self.model.eval()
        with self.trainer.averaged(), self.trainer.autocast():
            score = score_batches(self.prepared.reader_of(self.model), ranks.deal(windows) if dealt else windows, self.lengths, self.device)
            reshard(self.model)
        self.model.train()
        if ranks.n > 1:
            counts = ranks.sums(*((score.tokens, score.nats, score.n_bytes) if dealt or ranks.first else (0, 0.0, 0)))
            score = Score(int(counts[0]), counts[1], int(counts[2]))
        return score

    def whole(self) -> Any:
        """The model with all of its weights: on the first rank where it is cut up. All ranks ask together."""
        if not self.trainer.sharded:
            return self.model
        before = chance(self.device)
        model: Any = self.prepared.family.build(self.prepared.config)
        set_chance(before, self.device)
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                own[name].copy_(whole_of(p.to_local(), p))
            for name, buffer in self.model.named_buffers():
                model.get_buffer(name).copy_(buffer)
        return model

    def sample(self) -> None:
        """What the model says to train.sample_prompt, into samples.md and for people."""
        settings, step = self.prepared.recipe.train, self.trainer.n_steps
        self.model.eval()
        with self.trainer.averaged():
            bundle = self.bundle(self.whole().eval())
            answer = samples.sample(bundle, settings.sample_prompt, settings.sample_tokens) if self.ranks.first else ""
        self.model.train()
        if not self.ranks.first:
            return
        self.run_folder.sample(step, f"{settings.sample_prompt}\n -> {answer}")
        self.trackers.text(step, answer)
        self.say(f"step {step}: {' '.join(answer.split())}")

    # ---- checkpoints
    def checkpoint(self) -> Path:
        """Everything that the run needs to go on to the bit, in its folder."""
        tensors, plain = self.trainer.state()
        tensors |= {CARRY + name: tensor for name, tensor in self.ranks.all_rows(self.carried()).items()}
        score = self.validation
        state = {"step": self.trainer.n_steps, "recipe": to_dict(self.prepared.recipe), "tokenizer_sha256": sha256_of(self.prepared.tokenizer),
                 "validation_loss": score.loss if score is not None and self.evaluated_at == self.trainer.n_steps else None,
                 "validation": None if score is None else dataclasses.asdict(score), "losses": self.losses, "rollbacks": self.n_rollbacks,
                 "batches": self.saved_batches(), "threads": torch.get_num_threads(), "trainer": plain}
        if self.ranks.n > 1:
            state |= {"n_ranks": self.ranks.n, "ranks": self.ranks.gather({name: plain[name] for name in DICE})}
        return self.run_folder.checkpoint(tensors, state, self.prepared.recipe.train.keep_checkpoints, self.ranks)

    def saved_batches(self) -> dict[str, Any]:
        """The place in the data, as any number of ranks understands it."""
        return for_all(self.batches.saved(), self.part, self.prepared.recipe.train)

    def restore(self, checkpoint: Path | None) -> None:
        """Back to where a checkpoint was written; None: the beginning, where a new run is already. ConfigError names the first thing that differs."""
        if checkpoint is not None:
            tensors, state = self.run_folder.read(checkpoint, self.ranks)
            carried = {name: torch.empty_like(tensor, device="cpu") for name, tensor in tensors.items() if name.startswith(CARRY)}
            fill(carried, tensors)
            for name in carried:
                tensors.pop(name)
            dice, n_ranks = state.get("ranks", [{}]), state.get("n_ranks", 1)
            self.trainer.restore(tensors, {**state["trainer"], **dice[self.ranks.rank if self.ranks.rank < n_ranks else 0]})
            if self.ranks.rank >= n_ranks:
                self.ranks.own_chance(self.prepared.recipe.train.seed, state["step"])
            if n_ranks != self.ranks.n:
                self.say(f"the checkpoint was made by {n_ranks} rank{'s' * (n_ranks > 1)}, this run has {self.ranks.n}: it goes on from there, and "
                         "equal to the bit is promised for the same number")
            if state.get("threads", threads := torch.get_num_threads()) != threads:
                self.say(f"the checkpoint was made with {state['threads']} threads, this process has {threads}: equal to the bit is promised for the "
                         f"same number (OMP_NUM_THREADS={state['threads']})")
            if isinstance(self.trainer.hidden, Carry):
                self.trainer.hidden.restore(self.ranks.own_rows({name.removeprefix(CARRY): tensor for name, tensor in carried.items()}))
            self.batches.restore(for_one(state["batches"], self.part, self.prepared.recipe.train, self.batches.loader.state()))
            self.losses, self.n_rollbacks = state["losses"], max(self.n_rollbacks, state["rollbacks"])
            self.validation = None if state["validation"] is None else Score(**state["validation"])
            self.evaluated_at = state["step"] if state["validation_loss"] is not None else 0
        if self.ranks.first:
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
            self.amend(path, batches=self.saved_batches())                            # it may have been there
            raise DivergedError(f"{error}{often}; what was learned before it is in {path}", error.step, error.batch) from None
        self.n_rollbacks += 1
        newest, seconds = self.run_folder.checkpoints()[-1], self.trainer.seconds
        self.restore(newest)
        if self.trainer.recipe.seconds:
            self.trainer.seconds = seconds                                            # the clock does not go back
        self.amend(newest, batches=self.saved_batches(), rollbacks=self.n_rollbacks)
        self.say(f"{error}; back to step {self.trainer.n_steps}, and on past that batch ({self.n_rollbacks} of {MOST_ROLLBACKS})")

    def amend(self, path: Path, **changes: Any) -> None:
        """The first rank writes a checkpoint's state anew when all have read it."""
        self.ranks.gather(None)
        if self.ranks.first:
            self.run_folder.amend(path, **changes)

    # ---- the end
    def bundle(self, model: Any = None) -> Bundle:
        """What was learned so far, as a bundle; of a model that is cut up, `whole`."""
        told: dict[str, Any] = {"steps": self.trainer.n_steps, "tokens": self.trainer.n_tokens, "seconds": round(self.trainer.seconds, 1)}
        if self.validation is not None:
            told |= {"validation_loss": round(self.validation.loss, 4), "validation_bits_per_byte": round(self.validation.bits_per_byte, 4)}
        manifest = {"recipe": to_dict(self.prepared.recipe), "data": summary_of(self.prepared.sources), "seed": self.prepared.recipe.train.seed,
                    "metrics": told}
        told_of, model = self.prepared, self.model if model is None else model
        return Bundle(told_of.family, told_of.config, model, told_of.tokenizer, None, told_of.generation, manifest)

    def finish(self) -> Bundle:
        """Writes the picture of the loss, and the bundle's files at the top of the run's folder; averaged weights are the model's from here on."""
        self.model.eval()
        if self.trainer.average:
            self.trainer.average.swap()
            self.trainer.average = None
        bundle, picture = self.bundle(self.whole().eval()), self.run_folder.out / "loss.png"
        if not self.ranks.first:
            return bundle
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
