"""`hanok pretrain --resume RUN`: the folder says all that is needed, and what does not fit any more is named before anything is touched.

N updates are the same to the bit as some, a kill, and the rest (same machine, threads and ranks). A run without a checkpoint begins again at step 0.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hanok.bundle.bundle import is_bundle
from hanok.config import from_dict, override, to_dict
from hanok.data.pairs import find_pairs
from hanok.data.sources import hash_sources
from hanok.errors import ConfigError, DataError
from hanok.models import catalog
from hanok.train.checkpoint import Run
from hanok.train.data_of_run import RunData, chosen_objective
from hanok.train.distributed import ALONE, Ranks
from hanok.train.pretrain import Pretraining, Say, prepare, sha256_of
from hanok.train.recipe import Recipe

MOST_TOLD = 5
"""Differences that a message names."""
FREE = ("train.parallel ",)
"""What may change without --force: it moves no number but by rounding."""


def resume(out: Path | str, settings: Sequence[str] = (), *, force: bool = False, say: Say = lambda line: None,
           ranks: Ranks | None = None) -> Pretraining | None:
    """The run in `out`, ready to go on from its newest checkpoint; None where it is finished.

    `settings` (a.b=c) and an edited recipe.toml are taken only by `force`: the schedule then is that of the new recipe from here on, and the batches
    stay those of the data. How many `ranks` there are, and train.parallel, may differ from before. ConfigError names each difference; DataError a
    source that is gone or changed.
    """
    run, ranks = Run(out), ALONE if ranks is None else ranks
    if ranks.first:
        run.lock()
    try:
        return opened(run, settings, force, say if ranks.first else lambda line: None, ranks)
    except BaseException:
        run.unlock()
        raise


def opened(run: Run, settings: Sequence[str], force: bool, say: Say, ranks: Ranks) -> Pretraining | None:
    """The locked run as it should go on."""
    with ranks.in_turn():
        told = checked(run, settings, force, say)
    if told is None:
        return None
    prepared, newest, changed = told
    pretraining = Pretraining(prepared, run, newest, say, None if ranks is ALONE else ranks)
    if ranks.first:
        if changed:
            say(f"taken as edited: {listed(changed)}")
            run.accept(prepared.recipe, newest)
        run.reopen()
    say(f"going on from step {pretraining.trainer.n_steps:,} of {run.out}")
    return pretraining


def checked(run: Run, settings: Sequence[str], force: bool, say: Say) -> tuple[RunData, Path | None, list[str]] | None:
    """What the run reads, the checkpoint that it goes on from, and what of the recipe was edited; None where it is finished."""
    written, sources, begun = run.told()
    plain = to_dict(from_dict(Recipe, written, str(run.out / "recipe.toml")))
    recipe = from_dict(Recipe, override(plain, settings), "recipe")
    newest, lost = run.newest_whole()
    state = {"recipe": plain} if newest is None else run.state(newest)
    changed = differences(to_dict(from_dict(Recipe, state["recipe"], str(newest))), to_dict(recipe))
    if not force and any(not change.startswith(FREE) for change in changed):
        made = "run" if newest is None else "checkpoint"
        raise ConfigError(f"{run.out}: the recipe is not the one that the {made} was made with: {listed(changed)}; put it back, or take it as it is "
                          "now with --force")
    if is_bundle(run.out) and not changed:
        run.unlock()
        return None
    found = located(recipe, begun)
    same_sources(found, recipe, sources)
    others = [change for change in changed if change.startswith("tokenizer.")]
    if others:
        raise ConfigError(f"{run.out}: the tokenizer of the recipe is not the one that the {'run' if newest is None else 'checkpoint'} was made with "
                          f"({listed(others)}), and its model knows no other tokens; put it back, or begin a new run")
    own = run.out / "tokenizer.json"
    if own.is_file():
        found = replace(found, tokenizer=replace(found.tokenizer, path=str(own)))
    prepared = replace(prepare(found, say), recipe=recipe)
    if newest is not None and state["tokenizer_sha256"] != sha256_of(prepared.tokenizer):
        what = f"{own} was changed: it" if own.is_file() else f"{own} is gone, and {recipe.tokenizer.path or 'what this machine trains in its place'}"
        raise ConfigError(f"{what} is not the tokenizer that {newest} was made with; bring tokenizer.json back")
    if lost:
        say(f"{lost}; going back to {'the beginning' if newest is None else newest.name}")
    return prepared, newest, changed


def differences(before: Mapping[str, Any], after: Mapping[str, Any], where: str = "") -> list[str]:
    """What changed between two recipes as plain data: `train.steps 40 -> 80`."""
    told = []
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            told += differences(old, new, f"{where}{name}.")
        elif old != new:
            told.append(f"{where}{name} {shown(old)} -> {shown(new)}")
    return told


def shown(value: Any) -> str:
    return "nothing" if value is None else str(value)


def listed(things: Sequence[str]) -> str:
    return ", ".join(things[:MOST_TOLD]) + (f" and {len(things) - MOST_TOLD} more" if len(things) > MOST_TOLD else "")


def located(recipe: Recipe, begun: str) -> Recipe:
    """The recipe with its files where they are now: relative ones below the folder in which the run was begun, else below the current one."""
    def place(path: str) -> str:
        here, there = Path(path), Path(begun) / path
        return path if not there.exists() or here.exists() and here.samefile(there) else str(there)

    path = recipe.tokenizer.path
    return replace(recipe, data=replace(recipe.data, sources=tuple(map(place, recipe.data.sources))),
                   tokenizer=replace(recipe.tokenizer, path=None if path is None else place(path)))


def same_sources(found: Recipe, recipe: Recipe, recorded: Mapping[str, str]) -> None:
    """DataError where a source's file is gone, new or changed since the run was begun."""
    paired = chosen_objective(found, catalog.family(found.model.family)) == "seq2seq"
    now: dict[str, str] = {}
    for told, place in zip(recipe.data.sources, found.data.sources):
        if not Path(place).exists():
            raise DataError(f"{told} is gone, and the run learns from it; bring it back to where it was")
        for source in hash_sources(find_pairs([place]) if paired else [place]):
            path = Path(str(source["path"]))
            name = told if path == Path(place) else str(Path(told) / path.relative_to(place))
            now[name.encode("utf-8", "replace").decode()] = str(source["sha256"])
    changed = [f"{name} {'is gone' if name not in now else 'is new' if name not in recorded else 'has changed'}"
               for name in dict.fromkeys([*recorded, *now]) if now.get(name) != recorded.get(name)]
    if changed:
        raise DataError(f"the text is not what the run learned from: {listed(changed)}; bring it back, or begin a new run")
