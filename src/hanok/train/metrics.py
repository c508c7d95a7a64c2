"""Where a run's numbers and samples go besides metrics.csv: TensorBoard, Weights & Biases, MLflow, each only if asked for (train.log) and installed.

All three hear the same few verbs, so that a fourth is one class more.
"""
from __future__ import annotations

import hashlib
import html
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hanok.errors import ConfigError

NOT_LOGGED = ("step", "tokens", "seconds")
INSTALL = {"tensorboard": "pip install 'hanok[track]'", "wandb": "pip install wandb", "mlflow": "pip install mlflow"}


class Tracker(Protocol):
    """A place that shows how a run goes."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None: ...

    def text(self, step: int, text: str) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard; what an interrupted run wrote behind `step` is hidden."""

    def __init__(self, out: Path, recipe: Mapping[str, Any], step: int):
        from torch.utils.tensorboard import SummaryWriter
        self.writer: Any = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def text(self, step: int, text: str) -> None:
        self.writer.add_text("sample", text, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Weights & Biases; a resumed run goes on under its name."""

    def __init__(self, out: Path, recipe: Mapping[str, Any], step: int):
        import wandb
        self.wandb: Any = wandb
        self.run = wandb.init(project="hanok", name=out.name, id=hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16], resume="allow",
                              config=dict(recipe))

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def text(self, step: int, text: str) -> None:
        self.run.log({"sample": self.wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """MLflow; a resumed run is one more run of the same name."""

    def __init__(self, out: Path, recipe: Mapping[str, Any], step: int):
        import mlflow
        self.mlflow: Any = mlflow
        mlflow.set_experiment("hanok")
        mlflow.start_run(run_name=out.name)
        mlflow.log_dict(dict(recipe), "recipe.json")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.mlflow.log_metrics(dict(values), step=step)

    def text(self, step: int, text: str) -> None:
        self.mlflow.log_text(text, f"samples/step-{step}.md")

    def close(self) -> None:
        self.mlflow.end_run()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def check(names: Sequence[str]) -> None:
    """ConfigError for a tracker that is not installed."""
    for name in names:
        try:
            importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
        except ImportError:
            raise ConfigError(f"train.log names {name}, which is not installed; {INSTALL[name]}, or leave it out") from None


def begun(name: str, out: Path, recipe: Mapping[str, Any], step: int) -> Tracker:
    """The tracker of that name. ConfigError where it refuses to begin: it wants a login, a server, another setting."""
    try:
        return TRACKERS[name](out, recipe, step)
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"train.log names {name}, which did not begin: {reason}; settle that and go on with `hanok pretrain --resume {out}`, "
                          "or take another train.log") from error


class Trackers:
    """All that a run asked for, as one."""

    def __init__(self, names: Sequence[str], out: Path, recipe: Mapping[str, Any], step: int):
        self.all = [begun(name, out, recipe, step) for name in dict.fromkeys(names)]

    def numbers(self, values: Mapping[str, float]) -> None:
        """A row of metrics.csv."""
        told = {name: value for name, value in values.items() if name not in NOT_LOGGED}
        for tracker in self.all:
            tracker.numbers(int(values["step"]), told)

    def text(self, step: int, text: str) -> None:
        for tracker in self.all:
            tracker.text(step, text)

    def close(self) -> None:
        for tracker in self.all:
            tracker.close()
