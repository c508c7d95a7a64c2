"""hanok pretrain TEXT... --out DIR"""
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from hanok.cli.output import Json, Quiet, emit, next_commands, say, shown, typed


def pretrain(
    text: Annotated[list[Path], Parameter(negative="", help="Files and folders.")],
    *,
    out: Annotated[Path, Parameter(help="The run's new folder; the bundle's files stand at its top when it is done.")],
    family: Annotated[str, Parameter(help="qwen3, llama, gpt2 or gpt.")] = "qwen3",
    preset: Annotated[str, Parameter(help="Sizes: tiny, small, ... (an unknown name lists them).")] = "tiny",
    steps: Annotated[int | None, Parameter(help="Optimizer updates.")] = None,
    seed: Annotated[int | None, Parameter(help="Of weights and of the order of the text.")] = None,
    encoding: Annotated[str, Parameter(help="Of the text files.")] = "utf-8",
    set: Annotated[list[str] | None, Parameter(name="--set", negative="", help="Any field of the recipe: --set train.learning_rate=3e-3; may be "
                                                                               "repeated.")] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Train a model from raw text."""
    from hanok import report
    from hanok.disk import refuse_occupied
    from hanok.train.pretrain import Pretraining, prepare
    refuse_occupied(out)
    recipe = make_recipe(text, family, preset, steps, seed, encoding, set or [])
    prepared = prepare(recipe, (lambda line: None) if quiet else say)
    run = Pretraining(prepared, out)
    with report.Progress("training", total=100, unit="percent", quiet=quiet) as bar:
        bundle = run.run(lambda step: bar.update(100 * step.progress, **live(step, run)))
    picture_of(run)
    metrics = bundle.manifest["metrics"]
    if json:
        emit({"bundle": str(out), "family": family, **metrics})
        return
    say(f"{family} in {shown(out)}: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in metrics.items()))
    next_commands(f'hanok generate {typed(out)} --prompt "..."', f"hanok show {typed(out)}", f"hanok export {typed(out)} OUT --to hf")


def make_recipe(text: list[Path], family: str, preset: str, steps: int | None, seed: int | None, encoding: str, settings: list[str]):
    """The command line as a recipe; --set comes last."""
    from hanok.config import from_dict, override, to_dict
    from hanok.train.recipe import Recipe
    told: dict[str, Any] = to_dict(Recipe())
    told["model"] |= {"family": family, "preset": preset}
    told["data"] |= {"sources": [str(path) for path in text], "encoding": encoding}
    told["train"] |= {name: value for name, value in (("steps", steps), ("seed", seed)) if value is not None}
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
