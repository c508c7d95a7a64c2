"""hanok plan [TEXT...] [--minutes M | --params N | --tokens N] [--device-memory 8GB]; and what `hanok pretrain` asks of a plan."""
from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from hanok.cli.output import Json, emit, next_commands, typed

MINUTES = 10.0
"""Where nothing else is asked for."""
UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12, "ki": 2 ** 10, "mi": 2 ** 20, "gi": 2 ** 30, "ti": 2 ** 40}


def plan(
    text: Annotated[list[Path] | None, Parameter(negative="", help="Files and folders to learn from; without any, a text like the Python standard "
                                                                   "library is assumed.")] = None,
    *,
    minutes: Annotated[float | None, Parameter(show_default=False, help="The best loss in so many minutes of training; 10 where nothing else is "
                                                                        "asked for.")] = None,
    params: Annotated[str | None, Parameter(help="A model of about so many parameters, for example 30M.")] = None,
    tokens: Annotated[str | None, Parameter(help="Training on so many tokens, for example 2B; 20 a parameter where only --params is given.")] = None,
    device_memory: Annotated[str | None, Parameter(help="Memory that there is, for example 8GB; else this machine's. Alone: the largest model that "
                                                        "it holds.")] = None,
    family: Annotated[str | None, Parameter(help="One of those that `hanok families` lists; qwen3 where nothing names another.")] = None,
    set: Annotated[list[str] | None, Parameter(name="--set", negative="", help="Any field of the recipe, which the plan then keeps; may be "
                                                                               "repeated.")] = None,
    json: Json = False,
) -> None:
    """Say what a run would be, without training: model, batch, steps, memory, disk, time and expected loss.

    This machine is probed for some seconds, and all times are its own.
    """
    from hanok.errors import ConfigError
    from hanok.train.dial import Choice
    from hanok.train.expected import LIBRARY, survey
    from hanok.train.measure import here
    from hanok.train.plan import free_at
    if minutes is not None and (params or tokens):
        raise ConfigError("--minutes chooses the size and the tokens itself; give either --minutes, or --params and --tokens")
    memory = None if device_memory is None else round(quantity(device_memory, "--device-memory", "8GB"))
    n_params, n_tokens = (None if told is None else quantity(told, name, "30M") for told, name in ((params, "--params"), (tokens, "--tokens")))
    given = settings_given(text, None, {"family": family}, set or [])
    seen = survey(given) if given.get("data", {}).get("sources") else LIBRARY
    choice = Choice(given, seen, here(memory)).probed(memory)
    by_size = n_params or n_tokens or (memory and minutes is None)
    free = free_at(Path.cwd())
    seconds = 60 * (MINUTES if minutes is None else checked(minutes))
    found = choice.of_size(n_params, n_tokens, free) if by_size else choice.best(seconds, free)
    if json:
        emit({**found.to_dict(), "sgemm_gflops": choice.machine.sgemm / 1e9, "device": choice.machine.device})
        return
    print(shown(found, choice.machine, free))
    what = " ".join(map(typed, text)) if text else "TEXT"
    next_commands(f"hanok pretrain {what} --out DIR" + (f" --minutes {seconds / 60:g}" if not by_size else
                                                        "".join(f" --set {setting}" for setting in differing(found.recipe))))


def shown(found: Any, machine: Any, free_disk: float) -> str:
    """A plan on a screen."""
    rows = found.rows(machine, free_disk)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {told}" for name, told in rows)


def differing(recipe: Any) -> list[str]:
    """Settings (a.b=c) that make this recipe of the default one, but for its text."""
    from hanok.config import to_dict
    from hanok.train.recipe import Recipe
    plain, told = to_dict(Recipe()), to_dict(recipe)
    changed = [(f"{table}.{name}", value) for table, values in told.items() for name, value in values.items()
               if name not in ("sources", "sizes") and plain[table].get(name) != value]
    return [f"{name}={value}" for name, value in [*((f"model.sizes.{name}", value) for name, value in recipe.model.sizes.items()), *changed]]


def quantity(told: str, name: str, example: str) -> float:
    """30M, 1.5B, 8GB, 8GiB. ConfigError for what is none."""
    from hanok.errors import ConfigError
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgbt]?i?)b?\s*", told.lower().replace(",", "").replace("_", ""))
    if match is None or match[2] not in UNITS or float(match[1]) <= 0:
        raise ConfigError(f"{name} {told}: expected a quantity, for example {example}")
    return float(match[1]) * UNITS[match[2]]


def checked(minutes: float) -> float:
    from hanok.errors import ConfigError
    if not 0 < minutes < 1e6:
        raise ConfigError(f"--minutes {minutes:g}: expected more than 0 and less than a million")
    return minutes


def settings_given(text: list[Path] | None, file: Path | None, asked: dict[str, Any], settings: list[str]) -> dict[str, dict[str, Any]]:
    """What a person has settled, and nothing else: the recipe file, the options over it, --set last."""
    from hanok.config import from_dict, override, read_toml
    from hanok.train.recipe import Recipe
    told: dict[str, Any] = {} if file is None else {name: table for name, table in read_toml(file).items() if name not in ("begun", "sources")}
    places = {"family": "model", "preset": "model", "steps": "train", "seed": "train", "encoding": "data"}
    for name, value in [*asked.items(), ("sources", [str(path) for path in text] if text else None)]:
        if value is not None:
            told.setdefault(places.get(name, "data"), {})[name] = value
    told = override(told, settings)
    recipe = from_dict(Recipe, told, "recipe")                                        # refuses what cannot be, and gives values their types
    return {table: {name: getattr(getattr(recipe, table), name) for name in values} for table, values in told.items()}


def dialled(given: dict[str, dict[str, Any]], minutes: float, out: Path, told: Callable[[str], None]) -> Any:
    """The recipe of the best run in so many minutes, printed before it starts."""
    from hanok.disk import refuse_occupied
    from hanok.train.dial import Choice
    from hanok.train.expected import survey
    from hanok.train.measure import here
    from hanok.train.plan import free_at
    refuse_occupied(out)                                                              # before seconds are spent on a probe
    choice = Choice(given, survey(given), here()).probed()
    found = choice.best(60 * checked(minutes), free_at(out))
    told(shown(found, choice.machine, free_at(out)))
    return found.recipe


def refuse_too_large(recipe: Any, out: Path) -> None:
    """DoesNotFit for a run that memory or disk will not hold, with what would fit."""
    from hanok.models import catalog
    from hanok.train.data_of_run import chosen_objective
    from hanok.train.expected import unread
    from hanok.train.measure import here
    from hanok.train.plan import check, free_at, roughly_fits
    paired = chosen_objective(recipe, catalog.family(recipe.model.family)) == "seq2seq"
    machine, text, free = here(), unread(recipe.data.sources, paired), free_at(out)
    if not roughly_fits(recipe, machine, text, free):
        check(recipe, machine, text, free)
