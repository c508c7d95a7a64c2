"""hanok ladder PAIRS.tsv --minutes 10 --out DIR"""
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from hanok.cli.output import Json, Quiet, emit, next_commands, say, shown, typed

COLUMNS = ("file", "source", "target")


def ladder(
    pairs: Annotated[Path, Parameter(help="Pairs of a source and a target: .tsv, .csv or .jsonl.")],
    *,
    out: Annotated[Path, Parameter(help="The new folder, or one that was interrupted: a bundle a rung, ladder.json, ladder.md, ladder.png.")],
    minutes: Annotated[float, Parameter(help="Training time of each rung, in updates; recall gets 0.3 of it once more.")] = 10.0,
    steps: Annotated[int | None, Parameter(help="Updates of each rung, in place of minutes.")] = None,
    columns: Annotated[list[str] | None, Parameter(negative="", consume_multiple=True, help="Names of a table's columns whose first line does not "
                       "tell them; file, source, target where none are given. The test set is split off by file, where there is one.")] = None,
    recipes: Annotated[Path | None, Parameter(help="A folder with rnn.toml, lstm.toml, bahdanau.toml, transformer.toml; recipes/ladder.")] = None,
    seed: Annotated[int, Parameter(help="Of weights, split and order.")] = 0,
    threads: Annotated[int, Parameter(help="CPU threads; 0: torch's choice.")] = 0,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Climb from RNN to Transformer: on the same pairs and minutes, how well four models translate, how fast they learn, how far they remember."""
    from hanok import report
    from hanok.cli.main import leave
    from hanok.errors import ConfigError
    from hanok.lab.ladder import Budget, Ladder, check, parameters
    from hanok.lab.ladder_report import ALIGN, claims, overview
    from hanok.train.runs import Terminated
    for name, value, least in (("--minutes", minutes, 1e-3), ("--steps", 1 if steps is None else steps, 1), ("--threads", threads, 0)):
        if not value >= least:
            raise ConfigError(f"{name} is {value}; expected {least} or more")
    told = (lambda line: None) if quiet else say
    rungs = rungs_of(recipes)
    check(rungs)
    budget = Budget(60 * minutes) if steps is None else Budget(None, steps)
    test = begun(out, pairs, columns or [], rungs, budget, seed, threads)
    told("parameters: " + ", ".join(f"{name} {report.count(n)}" for name, n in parameters(rungs).items()))
    try:
        results = Ladder(out, rungs, budget, seed, threads, test, told, quiet).climb()
    except Terminated as signal:
        leave(143, f"terminated; {signal}")
    except KeyboardInterrupt as interrupt:
        raise type(interrupt)(f"the same command goes on with what is missing in {shown(out)}") from None
    written(out, results)
    if json:
        emit(results)
        return
    print(report.table(*overview(results), align=ALIGN) + "\n")
    print("\n".join(f"{claim.statement} [{claim.verdict}]\n  {claim.numbers}" for claim in claims(results)))
    next_commands(f'hanok attend {typed(out / "bahdanau")} --text "..."', f'hanok generate {typed(out / "transformer")} --prompt "..."')


def rungs_of(folder: Path | None) -> dict[str, Any]:
    """The recipes of the four rungs, in their order. ConfigError names the one that is missing."""
    import hanok
    from hanok.errors import ConfigError
    from hanok.lab.ladder import RUNGS
    from hanok.train.recipe import read_recipe
    places = [folder] if folder else [Path("recipes") / "ladder", Path(hanok.__file__).parents[2] / "recipes" / "ladder"]
    place = next((place for place in places if place.is_dir()), None)
    if place is None:
        raise ConfigError(f"{places[0]}: there is no such folder; name one with {', '.join(f'{name}.toml' for name in RUNGS)} by --recipes")
    for name in RUNGS:
        if not (place / f"{name}.toml").is_file():
            raise ConfigError(f"{place} has no {name}.toml, the recipe of a rung; the others are {', '.join(rung for rung in RUNGS if rung != name)}")
    return {name: read_recipe(place / f"{name}.toml") for name in RUNGS}


def begun(out: Path, source: Path, columns: list[str], rungs: dict[str, Any], budget: Any, seed: int, threads: int) -> list[Any]:
    """The test pairs of a ladder that is begun here, or that was begun here with the same settings and goes on."""
    from dataclasses import asdict
    from json import dumps

    from hanok.config import write_json
    from hanok.data.pairs import Columns, read_pairs
    from hanok.disk import new_dir, refuse_occupied, sha256, write_text
    from hanok.lab.ladder import RESULTS, cut, same_ladder, told_by
    settings = told_by(rungs, budget, seed, threads, sha256(source))
    if (out / RESULTS).is_file():
        same_ladder(out, settings)
    else:
        refuse_occupied(out)
        train, test = cut(list(read_pairs([source], columns_of(source, columns))), seed)
        with new_dir(out) as folder:
            (folder / "data").mkdir()
            for name, some in (("train", train), ("test", test)):
                write_text(folder / "data" / f"{name}.jsonl", "".join(dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in some))
            write_json(folder / RESULTS, {"settings": settings, "data": {"pairs": str(source), "train": len(train), "test": len(test)}})
    return list(read_pairs([out / "data" / "test.jsonl"], Columns(group="group")))


def columns_of(source: Path, told: list[str]) -> Any:
    """Which column is which: as the first line says, else as it was told. ConfigError where no column is the source, or the target."""
    from hanok.data.pairs import Columns, find_pairs
    from hanok.disk import read_text
    from hanok.errors import ConfigError
    [file] = find_pairs([source])
    first = read_text(file).partition("\n")[0]
    if file.suffix.lower() == ".jsonl":
        return Columns(group="file" if '"file"' in first else None)
    cells = [cell.strip().strip('"') for cell in first.split("," if file.suffix.lower() == ".csv" else "\t")]
    itself = {"source", "target"} <= set(cells)
    names = cells if itself else told or list(COLUMNS)
    if not {"source", "target"} <= set(names):
        raise ConfigError(f"--columns names {', '.join(names)}; a column named source and one named target were expected")
    return Columns(group="file" if "file" in names else None, names=() if itself else tuple(names))


def written(out: Path, results: dict[str, Any]) -> None:
    """ladder.md and, where it can be drawn, ladder.png."""
    from hanok.disk import write_text
    from hanok.errors import ConfigError
    from hanok.lab.ladder_pictures import plot_ladder
    from hanok.lab.ladder_report import markdown
    picture = out / "ladder.png"
    try:
        plot_ladder(results, picture, title="From RNN to Transformer", unit="the same pairs, the same tokenizer, the same time")
    except ConfigError as error:
        say(str(error))
    write_text(out / "ladder.md", markdown({**results, "picture": picture.exists()}))
