"""hanok pretrain TEXT... --out DIR, and hanok pretrain --resume DIR"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from hanok.cli.output import Json, Quiet, emit, next_commands, say, shown, typed


def pretrain(
    text: Annotated[list[Path] | None, Parameter(negative="", help="Files and folders; those that the recipe names, where none are given.")] = None,
    *,
    out: Annotated[Path | None, Parameter(help="The run's new folder; the bundle's files stand at its top when it is done.")] = None,
    recipe: Annotated[Path | None, Parameter(help="A TOML file of settings, such as those in recipes/; the options below override it.")] = None,
    family: Annotated[str | None, Parameter(help="One of those that `hanok families` lists; qwen3 where nothing names another.")] = None,
    preset: Annotated[str | None, Parameter(help="Sizes, one of those that `hanok families NAME` lists; tiny where nothing names others.")] = None,
    steps: Annotated[int | None, Parameter(help="Optimizer updates.")] = None,
    minutes: Annotated[float | None, Parameter(show_default=False, help="The best run in so many minutes of training on this machine: what is not "
                                                                        "given otherwise is chosen, and printed first. Its rates follow the clock; "
                                                                        "equal to the bit, repeated or resumed, are runs by --steps only.")] = None,
    seed: Annotated[int | None, Parameter(help="Of weights and of the order of the text.")] = None,
    encoding: Annotated[str | None, Parameter(help="Of the text files; utf-8 where nothing names another.")] = None,
    set: Annotated[list[str] | None, Parameter(name="--set", negative="", help="Any field of the recipe: --set train.learning_rate=3e-3; may be "
                                                                               "repeated.")] = None,
    resume: Annotated[Path | None, Parameter(help="A run that was interrupted goes on from its newest checkpoint; it needs nothing else.")] = None,
    force: Annotated[bool, Parameter(negative="", show_default=False, help="With --resume: take a recipe that was edited since.")] = False,
    nproc: Annotated[int, Parameter(help="Processes that share the work on this machine, for example one a GPU.")] = 1,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Train a model from raw text, or go on with a run."""
    given = dict(locals())
    if nproc != 1:
        from hanok.cli.launch import as_typed, launch
        launch(nproc, ["pretrain", *as_typed({**given, "nproc": None})])
        return
    from hanok.train.distributed import join
    ranks = join()
    with ranks.together():
        train(ranks, given)
        ranks.leave()


def train(ranks: Any, given: dict[str, Any]) -> None:
    """The run, on this rank: the first of them speaks."""
    from hanok import report
    from hanok.cli.main import leave
    from hanok.train.runs import Terminated
    text, out, resume, force, settings = given["text"], given["out"], given["resume"], given["force"], given["set"] or []
    quiet, json = given["quiet"] or not ranks.first, given["json"]
    told = (lambda line: None) if quiet else say
    if resume is not None:
        others = {"TEXT": text, **{f"--{name}": given[name] for name in ("out", "recipe", "family", "preset", "minutes", "seed", "encoding")}}
        run = resumed(resume, others, given["steps"], settings, force, told, ranks)
        if run is None:
            if ranks.first:
                finished_already(resume, json)
            return
        out = resume
    else:
        asked = {name: given[name] for name in ("family", "preset", "steps", "seed", "encoding")}
        made = make_recipe(text, given["recipe"], **asked, settings=settings)
        if given["minutes"] is not None:
            made = timed(given, made, asked, told, ranks)
        run = begun(text, out, made, force, told, ranks)
    try:
        with report.Progress("training", total=100, unit="percent", quiet=quiet) as bar:
            run.say = bar.print
            bundle = run.run(lambda step: bar.update(100 * step.progress, **live(step, run)))
    except Terminated as signal:
        leave(143, f"terminated; {signal}")
    if not ranks.first:
        return
    picture_of(run)
    metrics = bundle.manifest["metrics"]
    if json:
        emit({"bundle": str(out), "family": bundle.family.name, **metrics})
        return
    say(f"{bundle.family.name} in {shown(run.run_folder.out)}: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in metrics.items()))
    next_commands(*what_next(bundle, typed(run.run_folder.out)))


def timed(given: dict[str, Any], recipe: Any, asked: dict[str, Any], told: Callable[[str], None], ranks: Any) -> Any:
    """The recipe that --minutes chooses, under what was given."""
    from hanok.cli.plan import dialled, settings_given
    from hanok.errors import ConfigError
    if ranks.n > 1:
        raise ConfigError("--minutes plans for one process; ask `hanok plan` for a recipe, and give it to all of them with --steps")
    settings = settings_given(given["text"], given["recipe"], asked, given["set"] or [])
    return dialled(settings, given["minutes"], given["out"] or Path.cwd(), told) if recipe.data.sources and given["out"] else recipe


def begun(text: list[Path] | None, out: Path | None, recipe: Any, force: bool, told: Callable[[str], None], ranks: Any) -> Any:
    """A new run."""
    from hanok.cli.plan import refuse_too_large
    from hanok.disk import refuse_occupied
    from hanok.errors import ConfigError
    from hanok.train.pretrain import begin
    if force:
        raise ConfigError("--force belongs to --resume; a new run takes its recipe as it is")
    if not recipe.data.sources:
        raise ConfigError("TEXT is missing; name files or folders to learn from (`hanok pretrain --help` says more)")
    if out is None:
        raise ConfigError("--out is missing; name the run's new folder (`hanok pretrain --help` says more)")
    if ranks.first:
        refuse_occupied(out)
        refuse_too_large(recipe, out)
    return begin(recipe, out, told, ranks)


def resumed(folder: Path, given: dict[str, Any], steps: int | None, settings: list[str], force: bool, told: Callable[[str], None],
            ranks: Any) -> Any:
    """A run that goes on; None where it is finished."""
    from hanok.errors import ConfigError
    from hanok.train.resume import resume
    for name, value in given.items():
        if value is not None and value != []:
            raise ConfigError(f"{name} and --resume were both given; a run that goes on knows what it learns from: leave {name} out")
    return resume(folder, [*([] if steps is None else [f"train.steps={steps}"]), *settings], force=force, say=told, ranks=ranks)


def finished_already(folder: Path, json: bool) -> None:
    from hanok.config import read_json
    metrics = read_json(folder / "manifest.json").get("metrics", {})
    if json:
        emit({"bundle": str(folder), "family": read_json(folder / "config.json")["family"], **metrics})
        return
    say(f"{shown(folder)} is finished: {metrics.get('steps')} steps; nothing is left to do "
        "(--set train.steps=N --force goes on, at the rates of the longer schedule)")
    next_commands(f"hanok show {typed(folder)}")


def what_next(bundle: Any, folder: str) -> list[str]:
    """What can be done with such a model."""
    from hanok.bundle.tables import expressible
    asked = [f'hanok generate {folder} --prompt "..."'] if bundle.family.kind != "encoder" else []
    return [*asked, f"hanok show {folder}", *([f"hanok export {folder} OUT --to hf"] if expressible(bundle.family.hf, bundle.config) else [])]


def make_recipe(text: list[Path] | None, file: Path | None, family: str | None, preset: str | None, steps: int | None, seed: int | None,
                encoding: str | None, settings: list[str]) -> Any:
    """The recipe file with the command line over it; --set comes last."""
    from hanok.config import from_dict, override, to_dict
    from hanok.train.recipe import Recipe, read_recipe
    told: dict[str, Any] = to_dict(Recipe() if file is None else read_recipe(file))
    options: dict[str, dict[str, Any]] = {"model": {"family": family, "preset": preset}, "train": {"steps": steps, "seed": seed},
               "data": {"sources": [str(path) for path in text] if text else None, "encoding": encoding}}
    for table, values in options.items():
        told[table] |= {name: value for name, value in values.items() if value is not None}
    return from_dict(Recipe, override(told, settings), "recipe")


def live(step: Any, run: Any) -> dict[str, Any]:
    """What the bar shows of a step."""
    from hanok.report import count
    told = {"step": f"{step.step}", "loss": f"{step.loss:.3f}"}
    if run.validation is not None:
        told["bits/byte"] = f"{run.validation.bits_per_byte:.3f}"
    return {**told, "tokens/s": count(step.tokens_per_second)}


def picture_of(run: Any) -> list[Path]:
    """The run's loss.png; says so where it could not be drawn."""
    picture = run.run_folder.out / "loss.png"
    if picture.exists():
        return [picture]
    say("no loss.png: matplotlib is missing; pip install 'hanok[plot]' brings it")
    return []
