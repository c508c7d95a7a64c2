"""The run's folder: its recipe, metrics.csv, checkpoints (safetensors and JSON, no pickle), and in the end the bundle's files at its top.

    RUN/recipe.toml  metrics.csv  checkpoints/step-00001000/{model,optimizer}.safetensors, state.json
"""
from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hanok.bundle.weights import parameters, write_safetensors
from hanok.config import to_dict, toml, write_json
from hanok.disk import disk_error, new_dir, refuse_occupied, write_text
from hanok.train.recipe import Recipe

COLUMNS = ("step", "tokens", "seconds", "loss", "validation_loss", "bits_per_byte", "learning_rate", "grad_norm", "tokens_per_second")


class Run:
    """A new run in an empty or new folder. DataError where something is there already."""

    def __init__(self, out: Path | str, recipe: Recipe, sources: list[dict[str, Any]]):
        self.out, self.rows = Path(out), []  # type: tuple[Path, list[dict[str, float]]]
        refuse_occupied(self.out)
        try:
            (self.out / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(self.out, error) from None
        write_text(self.out / "metrics.csv", ",".join(COLUMNS) + "\n")
        write_text(self.out / "recipe.toml", toml({**to_dict(recipe), "sources": {source["path"]: source["sha256"] for source in sources}}) + "\n")

    def record(self, values: dict[str, float]) -> None:
        """One more row of metrics.csv."""
        self.rows.append(values)
        row = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in values.items()}
        try:
            with open(self.out / "metrics.csv", "a", newline="") as file:
                csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n").writerow(row)
        except OSError as error:
            raise disk_error(self.out / "metrics.csv", error) from None

    def checkpoint(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int = 2) -> Path:
        """Writes what a run needs to go on, atomically, and forgets all but the newest `keep`."""
        path = self.out / "checkpoints" / f"step-{state['step']:08d}"
        if not path.exists():
            with new_dir(path) as folder:
                write_safetensors(folder / "model.safetensors", parameters(model))
                write_safetensors(folder / "optimizer.safetensors", optimizer_tensors(model, optimizer))
                write_json(folder / "state.json", state)
        for old in sorted((self.out / "checkpoints").glob("step-*"))[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
        return path


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: `embed.token.weight/exp_avg`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {f"{names[id(parameter)]}/{key}": value for parameter, state in optimizer.state.items() for key, value in state.items()
            if isinstance(value, Tensor)}
