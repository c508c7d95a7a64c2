"""From raw text to a bundle: read, split, tokenizer, corpus, model, training.

`prepare` does all that can fail on bad input before anything is written; `Pretraining` owns the run's folder.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hanok import runtime
from hanok.bundle.bundle import Bundle, Generation, empty_model, write_at_top
from hanok.config import from_dict, to_dict
from hanok.data.corpus import Corpus, cached_corpus
from hanok.data.loader import Loader, windows
from hanok.data.objectives import causal
from hanok.data.sources import Document, hash_sources, read_documents, split
from hanok.errors import ConfigError, DataError
from hanok.evaluate.score import Score, byte_lengths, score_batches
from hanok.models import catalog
from hanok.models.family import Family
from hanok.report import plot_loss
from hanok.text.tokenizer import Tokenizer
from hanok.text.tokenizer import train as train_tokenizer
from hanok.train.checkpoint import Run
from hanok.train.optim import adamw
from hanok.train.recipe import Recipe
from hanok.train.trainer import DivergedError, Step, Trainer

Say = Callable[[str], None]


@dataclass
class Prepared:
    """Everything that a run begins with."""
    recipe: Recipe
    family: Family
    config: Any
    tokenizer: Tokenizer
    train: Corpus
    validation: Corpus
    sources: list[dict[str, Any]]
    documents: list[Document]
    held_out: list[Document]


def prepare(recipe: Recipe, say: Say = lambda line: None) -> Prepared:
    """Reads, splits and tokenises the recipe's text, and works out the model's sizes. HanokError on bad input; nothing but caches is written."""
    family = catalog.family(recipe.model.family)
    if family.objective != "causal":
        able = ", ".join(f.name for f in catalog.FAMILIES.values() if f.objective == "causal")
        raise ConfigError(f"{family.name} does not learn from the next token of plain text; families that do are {able}")
    preset = catalog.preset(family.name, recipe.model.preset)
    empty_model(family, from_dict(family.config, {**to_dict(preset), **recipe.model.sizes}, "model.sizes"))      # refused before any text is read
    documents = list(read_documents(recipe.data.sources, encoding=recipe.data.encoding))
    train, held_out = split(documents, recipe.data.validation, recipe.train.seed)
    n_bytes = sum(len(document.text.encode()) for document in documents)
    say(f"read {len(documents):,} documents, {n_bytes / 1e6:.1f} MB; held out {len(held_out):,} for validation")
    tokenizer = tokenizer_of(recipe, train, say)
    sizes = {**to_dict(preset), "vocab_size": tokenizer.vocab_size, "max_seq_len": recipe.data.seq_len or preset.max_seq_len, **recipe.model.sizes}
    config: Any = from_dict(family.config, sizes, "model.sizes")
    if recipe.data.seq_len and recipe.data.seq_len > config.max_seq_len:
        raise ConfigError(f"data.seq_len is {recipe.data.seq_len}, model.sizes.max_seq_len {config.max_seq_len}; a row has to fit into the context")
    if config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(f"model.sizes.vocab_size is {config.vocab_size}, the tokenizer has {tokenizer.vocab_size} tokens; leave it out")
    sources = hash_sources([Path(source) for source in recipe.data.sources])
    corpora = corpus_of(train, tokenizer, sources), corpus_of(held_out, tokenizer, sources)
    if len(corpora[1]) < 2:
        raise DataError("the validation text is a single token; give more text or a larger data.validation")
    return Prepared(recipe, family, config, tokenizer, *corpora, sources, train, held_out)


def tokenizer_of(recipe: Recipe, documents: Iterable[Document], say: Say) -> Tokenizer:
    """The recipe's tokenizer: its file, or a new one trained on the beginning of the training text."""
    told = recipe.tokenizer
    if told.path is not None:
        return Tokenizer.load(Path(told.path))
    texts, budget = [], told.train_bytes
    for document in documents:
        text = document.text.encode()[:budget]
        if not text:
            break
        texts.append(text.decode(errors="ignore"))
        budget -= len(text)
    tokenizer = train_tokenizer(told.kind, texts, told.vocab_size)
    say(f"trained a {told.kind} tokenizer of {tokenizer.vocab_size:,} tokens")
    return tokenizer


def corpus_of(documents: list[Document], tokenizer: Tokenizer, sources: list[dict[str, Any]]) -> Corpus:
    """The documents as token shards below HANOK_HOME; the same text and tokenizer are encoded once."""
    digest = hashlib.sha256(json.dumps([tokenizer.to_json(), [hashlib.sha256(d.text.encode()).hexdigest() for d in documents]]).encode()).hexdigest()
    return cached_corpus(documents, tokenizer, runtime.cache_dir("corpora") / digest[:32])


class Pretraining:
    """A prepared run in its folder: trains, evaluates, records, and writes the bundle when it is done."""

    def __init__(self, prepared: Prepared, out: Path | str):
        self.prepared, recipe = prepared, prepared.recipe
        if recipe.train.threads:
            torch.set_num_threads(recipe.train.threads)
        runtime.seed_everything(recipe.train.seed)
        self.device = runtime.device()
        self.model: Any = prepared.family.build(prepared.config).to(self.device)
        settings = recipe.train
        self.loader = Loader(prepared.train, seq_len=recipe.data.seq_len or prepared.config.max_seq_len, batch_size=settings.micro_batch_size,
                             seed=settings.seed, objective=partial(causal, separate=recipe.data.separate))
        self.optimizer = adamw(self.model, learning_rate=settings.learning_rate, betas=(settings.beta1, settings.beta2), eps=settings.eps,
                               weight_decay=settings.weight_decay)
        self.trainer = Trainer(self.model, self.optimizer, self.loader, settings, vocab_size=prepared.config.vocab_size, device=self.device)
        self.lengths: np.ndarray = byte_lengths(prepared.tokenizer)
        self.validation: Score | None = None
        self.losses: list[float] = []
        self.run_folder = Run(out, recipe, prepared.sources)

    def run(self, *on_step: Callable[[Step], Any]) -> Bundle:
        """Trains to the end and writes the bundle. Interrupted, or where the loss is no number, it leaves a checkpoint and no bundle."""
        try:
            self.trainer.run(self.after_step, *on_step)
            self.checkpoint()
            return self.finish()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"what was learned so far is in {self.checkpoint()}") from None
        except DivergedError as error:
            raise DivergedError(f"{error}; what was learned before it is in {self.checkpoint()}") from None

    def after_step(self, step: Step) -> None:
        """Evaluates, records and checkpoints when it is time."""
        settings = self.prepared.recipe.train
        self.losses.append(step.loss)
        told = {name: value for name, value in dataclasses.asdict(step).items() if name != "progress"}
        told["loss"] = sum(self.losses) / len(self.losses)                            # of all updates since the last row
        if step.step % settings.eval_every == 0 or self.trainer.done:
            self.validation = self.evaluate()
            told |= {"validation_loss": self.validation.loss, "bits_per_byte": self.validation.bits_per_byte}
        if step.step <= 10 or step.step % 10 == 0 or "validation_loss" in told:
            self.run_folder.record(told)
            self.losses.clear()
        if settings.checkpoint_every and step.step % settings.checkpoint_every == 0:
            self.checkpoint()

    def evaluate(self) -> Score:
        """The validation text's first train.eval_tokens tokens, in whole windows."""
        self.model.eval()
        recipe = self.prepared.recipe
        batches = windows(self.prepared.validation, self.loader.seq_len, recipe.train.eval_tokens, batch_size=recipe.train.micro_batch_size,
                          objective=partial(causal, separate=recipe.data.separate))
        score = score_batches(self.model, batches, self.lengths, self.device)
        self.model.train()
        return score

    def checkpoint(self) -> Path:
        state = {"step": self.trainer.n_steps, "tokens": self.trainer.n_tokens, "seconds": self.trainer.seconds, "loader": self.loader.state()}
        return self.run_folder.checkpoint(self.model, self.optimizer, state)

    def bundle(self) -> Bundle:
        """What was learned so far, as a bundle."""
        tokenizer = self.prepared.tokenizer
        end = self.prepared.train.info.end_id
        metrics = {"steps": self.trainer.n_steps, "tokens": self.trainer.n_tokens, "seconds": round(self.trainer.seconds, 1)}
        if self.validation is not None:
            metrics |= {"validation_loss": round(self.validation.loss, 4), "validation_bits_per_byte": round(self.validation.bits_per_byte, 4)}
        manifest = {"recipe": to_dict(self.prepared.recipe), "data": summary_of(self.prepared.sources), "seed": self.prepared.recipe.train.seed,
                    "metrics": metrics}
        return Bundle(self.prepared.family, self.prepared.config, self.model, tokenizer, None,
                      Generation(stop_ids=() if end is None else (end,), pad_id=end or 0), manifest)

    def finish(self) -> Bundle:
        """Writes the picture of the loss, and the bundle's files at the top of the run's folder."""
        bundle, picture = self.bundle(), self.run_folder.out / "loss.png"
        with suppress(ConfigError):                                                   # matplotlib is not there; who asked says so
            plot_loss(self.run_folder.rows, picture, title=f"{self.prepared.family.name}, {self.trainer.n_steps} steps")
            bundle.manifest["plot"] = picture.name
        write_at_top(bundle, self.run_folder.out)
        return bundle


def summary_of(sources: list[dict[str, Any]], most: int = 20) -> dict[str, Any]:
    """The sources in few lines: how many, how large, one hash over all, and the first of them."""
    digest = hashlib.sha256("".join(source["sha256"] for source in sources).encode()).hexdigest()
    return {"files": len(sources), "bytes": sum(source["bytes"] for source in sources), "sha256": digest, "first": sources[:most]}
