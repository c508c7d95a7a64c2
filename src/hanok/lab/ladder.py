"""The ladder from RNN to Transformer: four models on the same pairs, tokenizer and minutes; how well they translate, how fast they learn, how far
they remember.

A rung is a recipe and, when it is trained, a bundle of its own. What was measured stands in ladder.json after each part, so that a ladder that was
interrupted goes on with what is missing. Each part trains by `train.trainer` alone.
"""
from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hanok import report, runtime
from hanok.api import LoadedModel, load
from hanok.bundle.bundle import empty_model
from hanok.config import from_dict, read_json, to_dict, write_json
from hanok.data.pairs import TextPair, split_pairs
from hanok.errors import ConfigError, DataError
from hanok.evaluate.translation import score_translations, scorers
from hanok.lab import recall, speed
from hanok.models import catalog
from hanok.text.tokenizer import Tokenizer
from hanok.train.pretrain import Pretraining, Say, prepare
from hanok.train.recipe import Recipe
from hanok.train.resume import resume

RUNGS = ("rnn", "lstm", "bahdanau", "transformer")
TEST_SHARE, MOST_TEST, LEAST_PAIRS = 0.05, 2000, 100
"""Of the groups that are held out for the test; pairs of them that are translated; pairs in all below which nothing can be learned."""
TEST_SEED = 1_000_003
"""Added to the run's seed: the validation data is drawn by that seed too, and has to be drawn among what is left."""
ROWS = 16
"""Sources that are translated side by side."""
RECALL_SHARE = 0.3
"""Of a rung's training time, what it gets to learn to recall."""
RESULTS = "ladder.json"


@dataclass(frozen=True)
class Budget:
    """What each rung gets: time in updates, or updates."""
    seconds: float | None                    # of training; None: `steps` decide
    steps: int = 10 ** 9                     # optimizer updates at most

    def share(self, part: float) -> Budget:
        return self if self.seconds is None else Budget(part * self.seconds, self.steps)


def cut(pairs: Sequence[TextPair], seed: int) -> tuple[list[TextPair], list[TextPair]]:
    """What is trained on (a part of it validates), and the test: other groups (files), without a source that the first has. DataError: too few."""
    if len(pairs) < LEAST_PAIRS:
        raise DataError(f"got {len(pairs)} pairs with a source and a target; a ladder needs {LEAST_PAIRS} at least: give a larger file")
    train, test = split_pairs(pairs, TEST_SHARE, seed + TEST_SEED)
    return train, random.Random(seed).sample(test, min(MOST_TEST, len(test)))


def check(recipes: Mapping[str, Recipe]) -> None:
    """ConfigError for rungs that are no encoder-decoders, or would not read the same tokens."""
    scorers()
    first = next(iter(recipes.values()))
    for name, recipe in recipes.items():
        if catalog.family(recipe.model.family).kind != "encoder-decoder":
            raise ConfigError(f"the rung {name} is a {recipe.model.family}, which does not translate; give it an encoder-decoder (`hanok families`)")
        if recipe.tokenizer != first.tokenizer or recipe.data != first.data:
            raise ConfigError(f"the recipe of {name} has another [tokenizer] or [data] than that of {next(iter(recipes))}; all rungs read the same")


def told_by(recipes: Mapping[str, Recipe], budget: Budget, seed: int, threads: int, sha256: str) -> dict[str, Any]:
    """What a ladder is begun with, and must still be when it goes on."""
    return {"pairs_sha256": sha256, "seconds": budget.seconds, "steps": budget.steps, "seed": seed, "threads": threads,
            "recipes": {name: to_dict(recipe) for name, recipe in recipes.items()}}


class Ladder:
    """A ladder in its folder: data/{train,test}.jsonl (group, source, target) and ladder.json with what was told and measured so far."""

    def __init__(self, folder: Path, recipes: Mapping[str, Recipe], budget: Budget, seed: int, threads: int, test: Sequence[TextPair],
                 say: Say = lambda line: None, quiet: bool = False):
        self.folder, self.budget, self.seed, self.test, self.say, self.quiet = folder, budget, seed, test, say, quiet
        self.recipes = {name: self.ready(recipe, seed, threads) for name, recipe in recipes.items()}
        self.results: dict[str, Any] = {"rungs": {}, **read_json(folder / RESULTS)}
        self.device = runtime.device()
        if threads:
            torch.set_num_threads(threads)

    def ready(self, recipe: Recipe, seed: int, threads: int) -> Recipe:
        """A rung's recipe on the ladder's data, tokenizer and time."""
        data = replace(recipe.data, sources=(str(self.folder / "data" / "train.jsonl"),), source_column="source", target_column="target",
                       group_column="group", columns=())
        train = replace(recipe.train, steps=self.budget.steps, seconds=self.budget.seconds, seed=seed, threads=threads)
        return replace(recipe, data=data, train=train, tokenizer=replace(recipe.tokenizer, path=str(self.folder / "tokenizer.json")))

    def climb(self) -> dict[str, Any]:
        """Everything that is not there yet; the results."""
        self.share_tokenizer()
        for name, recipe in self.recipes.items():
            self.part(name, "training", partial(self.train, name, recipe))
            self.part(name, "translation", partial(self.translate, name))
        for name, recipe in self.recipes.items():
            self.part(name, "recall", partial(self.recall, name, recipe))
        if "speed" not in self.results:
            self.results["speed"] = self.speed()
        self.results["machine"] = {"threads": torch.get_num_threads(), "device": str(self.device), "torch": torch.__version__}
        self.save()
        return self.results

    def part(self, name: str, part: str, work: Callable[[], dict[str, Any]]) -> None:
        """Measures it unless it was measured, and keeps it."""
        rung = self.results["rungs"].setdefault(name, {})
        if part not in rung:
            rung[part] = work()
            self.save()

    def save(self) -> None:
        """Kept, and from here on as it is for who reads the file: keys are text, tuples are lists."""
        write_json(self.folder / RESULTS, self.results)
        self.results = read_json(self.folder / RESULTS)

    def share_tokenizer(self) -> None:
        """One tokenizer, trained on the training pairs."""
        if not (self.folder / "tokenizer.json").is_file():
            first = next(iter(self.recipes.values()))
            prepare(replace(first, tokenizer=replace(first.tokenizer, path=None)), self.say).tokenizer.save(self.folder)

    # ---- the parts -----------------------------------------------------------------------------------------------
    def train(self, name: str, recipe: Recipe) -> dict[str, Any]:
        """A rung's bundle; one that was begun goes on."""
        folder = self.folder / name
        run = resume(folder, say=self.say) if (folder / "recipe.toml").is_file() else Pretraining(prepare(recipe, self.say), folder, say=self.say)
        if run is not None:
            with self.bar(f"{name}: training") as on_step:
                run.run(on_step)
        bundle = load(folder).bundle
        return {"family": bundle.family.name, "parameters": sum(p.numel() for p in bundle.model.parameters()), **bundle.manifest["metrics"]}

    def translate(self, name: str) -> dict[str, Any]:
        """The test set by greedy search, scored."""
        model = load(self.folder / name, rows=ROWS)
        test = readable(self.test, model.tokenizer, min(config.max_seq_len for config in self.configs(model.tokenizer.vocab_size).values()))
        with report.Progress(f"{name}: translating", total=len(test), unit="pairs", quiet=self.quiet) as bar:
            answers = translations(model, [pair.source for pair in test], bar.advance)
        told = score_translations([pair.source for pair in test], [text for text, _ in answers], [pair.target for pair in test])
        return {**asdict(told), "too_long": len(self.test) - len(test), "cut_short": sum(reason == "length" for _, reason in answers)}

    def recall(self, name: str, recipe: Recipe) -> dict[str, Any]:
        """How often it finds a value again, by distance."""
        budget = self.budget.share(RECALL_SHARE)
        config = recall.narrowed(self.configs(recall.VOCAB_SIZE)[name])

        def build() -> Any:
            runtime.seed_everything(self.seed)
            return catalog.family(recipe.model.family).build(config)

        fresh = build().to(self.device).eval()
        told = replace(recipe.train, steps=budget.steps, seconds=budget.seconds, label_smoothing=0.0)
        with self.bar(f"{name}: recalling") as on_step:
            model, rate, steps, seconds = recall.learn(build, told, self.device, on_step)
        model.eval()
        return {"parameters": sum(p.numel() for p in model.parameters()), "steps": steps, "seconds": round(seconds, 1), "learning_rate": rate,
                "n_questions": recall.N_QUESTIONS, "chance": recall.CHANCE, "accuracy": recall.accuracy(model, self.device, self.seed),
                "by_pairs": recall.accuracy_by_pairs(model, self.device, self.seed), "influence": recall.influence(fresh, self.device, self.seed)}

    def speed(self) -> dict[str, Any]:
        """Training tokens a second, by length."""
        vocab_size = Tokenizer.load(self.folder / "tokenizer.json").vocab_size
        configs = self.configs(vocab_size, max(speed.LENGTHS))
        builders = {name: partial(catalog.family(recipe.model.family).build, configs[name]) for name, recipe in self.recipes.items()}
        with report.Progress("speed by length", total=len(speed.LENGTHS), unit="lengths", quiet=self.quiet) as bar:
            told = speed.tokens_per_second(builders, {name: recipe.train for name, recipe in self.recipes.items()}, vocab_size, self.device,
                                           lengths=speed.LENGTHS, rounds=min(speed.ROUNDS, self.budget.steps), on_length=bar.update)
        return {"tokens": 2 * speed.TOKENS, "tokens_per_second": told}

    # ---- tools ---------------------------------------------------------------------------------------------------
    def configs(self, vocab_size: int, max_seq_len: int | None = None) -> dict[str, Any]:
        """Each rung's sizes with this vocabulary."""
        found: dict[str, Any] = {}
        for name, recipe in self.recipes.items():
            family = catalog.family(recipe.model.family)
            sizes = {**to_dict(catalog.preset(family.name, recipe.model.preset)), **recipe.model.sizes, "vocab_size": vocab_size}
            longest = {} if max_seq_len is None else {"max_seq_len": max_seq_len}
            found[name] = from_dict(family.config, {**sizes, **longest}, "model.sizes")
        return found

    @contextmanager
    def bar(self, title: str) -> Iterator[Callable[[Any], None]]:
        """A bar that moves by a run's steps."""
        with report.Progress(title, total=100, unit="percent", quiet=self.quiet) as bar:
            yield lambda step: bar.update(100 * step.progress, step=str(step.step), loss=step.loss)


def parameters(recipes: Mapping[str, Recipe]) -> dict[str, int]:
    """Each rung's parameters with the tokenizer that its recipe asks for, counted without memory."""
    found = {}
    for name, recipe in recipes.items():
        family = catalog.family(recipe.model.family)
        sizes = {**to_dict(catalog.preset(family.name, recipe.model.preset)), "vocab_size": recipe.tokenizer.vocab_size, **recipe.model.sizes}
        found[name] = sum(p.numel() for p in empty_model(family, from_dict(family.config, sizes, "model.sizes")).parameters())
    return found


def readable(pairs: Sequence[TextPair], tokenizer: Tokenizer, max_seq_len: int) -> list[TextPair]:
    """The pairs whose source every rung can read. DataError: none."""
    lengths = [len(ids) for ids in tokenizer.encode_batch([pair.source for pair in pairs], add_special=True)]
    kept = [pair for pair, n in zip(pairs, lengths) if 0 < n <= max_seq_len]
    if not kept:
        raise DataError(f"no source of the test set has at most {max_seq_len} tokens; give a larger model.sizes.max_seq_len")
    return kept


def translations(model: LoadedModel, sources: Sequence[str], advance: Callable[[int], Any] = lambda n: None) -> list[tuple[str, str]]:
    """Greedy translations, ROWS side by side, sources of like length together: text and finish reason of each, in the order of `sources`.

    An answer may have twice its source's tokens and 16 more.
    """
    lengths = [len(ids) for ids in model.tokenizer.encode_batch(list(sources), add_special=model.bundle.generation.add_special)]
    order, found = sorted(range(len(sources)), key=lambda i: lengths[i]), [("", "")] * len(sources)
    for first in range(0, len(order), ROWS):
        batch = order[first:first + ROWS]
        requests = [model.request(sources[i], temperature=0.0, max_new_tokens=2 * lengths[i] + 16) for i in batch]
        for i, [answer] in zip(batch, model.answers(requests)):
            found[i] = answer.text.strip(), answer.finish_reason
        advance(len(batch))
    return found


def same_ladder(folder: Path, now: Mapping[str, Any]) -> None:
    """ConfigError where the folder's ladder was begun with other settings than it should go on with."""
    before = read_json(folder / RESULTS).get("settings", {})
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        told = ", ".join(name if name in ("recipes", "pairs_sha256") else f"{name} {before.get(name)} -> {now[name]}" for name in changed)
        raise ConfigError(f"{folder}: this ladder was begun with other settings ({told}); go on with those, or choose another folder")
