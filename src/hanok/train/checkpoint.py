"""The run's folder, and the only room of training that touches the disk: its recipe, numbers, samples and checkpoints (no pickle).

    RUN/recipe.toml  tokenizer.json  metrics.csv  samples.md  checkpoints/step-00001000/{model,optimizer}.safetensors, state.json

Beside the weights, optimizer.safetensors holds every other tensor of a run that goes on: optimizer, averaged weights, random and carried states. Many
ranks write a file each instead (torch.distributed.checkpoint's safetensors: shard-00001-model-00001-of-00001.safetensors, ...), from which any
number of ranks can go on.
"""
from __future__ import annotations

import fcntl
import os
import re
import shutil
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hanok.bundle.weights import read_safetensors, write_safetensors
from hanok.config import read_json, read_toml, to_dict, toml, write_json
from hanok.disk import disk_error, new_dir, read_text, write_text
from hanok.errors import DataError, HanokError, WeightsError
from hanok.text.tokenizer import Tokenizer
from hanok.train.distributed import ALONE, Ranks
from hanok.train.recipe import Recipe

COLUMNS = ("step", "tokens", "seconds", "loss", "validation_loss", "perplexity", "bits_per_byte", "learning_rate", "grad_norm", "tokens_per_second")
MODEL = "model/"
SHARDS = "shard-*.safetensors"
UNFINISHED = re.compile(r"\.(step-\d+|bundle\.new|metrics\.csv|samples\.md|recipe\.toml|loss\.png)\.[0-9a-f]{16}|bundle\.new")


class Run:
    """A run's folder that is there already. DataError where it is none."""

    def __init__(self, out: Path | str):
        self.out, self.rows = Path(out), []  # type: tuple[Path, list[dict[str, Any]]]
        self.unlock: Callable[[], object] = lambda: None
        if not (self.out / "recipe.toml").is_file():
            told = "it has no recipe.toml" if self.out.exists() else "there is nothing of that name"
            raise DataError(f"{self.out} is no run: {told}; begin one with `hanok pretrain TEXT --out {self.out}`")

    @classmethod
    def new(cls, out: Path | str, recipe: Recipe, sources: list[dict[str, Any]], tokenizer: Tokenizer) -> Run:
        """A run in an empty or new folder, with the tokenizer that it keeps. DataError where something is there already."""
        out = Path(out)
        with new_dir(out) as folder:
            (folder / "checkpoints").mkdir()
            write_text(folder / "metrics.csv", ",".join(COLUMNS) + "\n")
            tokenizer.save(folder)
            write_recipe(folder, recipe, {source["path"]: source["sha256"] for source in sources}, str(Path.cwd()))
        return cls(out)

    def lock(self) -> None:
        """Nobody else may train here until `unlock`, or until this process ends, however it does. DataError where somebody does."""
        (self.out / "checkpoints").mkdir(exist_ok=True)
        handle = os.open(self.out / "checkpoints", os.O_RDONLY)
        self.unlock = weakref.finalize(self, os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{self.out}: another process is training here; wait for it, or end it first") from None

    # ---- the recipe
    def told(self) -> tuple[dict[str, Any], dict[str, str], str]:
        """The recipe as plain data, the hash of each source's file, and the folder in which the run was begun."""
        data = read_toml(self.out / "recipe.toml")
        return data, data.pop("sources", {}), data.pop("begun", {}).get("folder", ".")

    def accept(self, recipe: Recipe, checkpoint: Path | None) -> None:
        """The run goes on with this recipe."""
        _, sources, begun = self.told()
        write_recipe(self.out, recipe, sources, begun)
        if checkpoint is not None:
            self.amend(checkpoint, recipe=to_dict(recipe))

    # ---- numbers and samples
    def record(self, values: Mapping[str, Any]) -> None:
        """One more row of metrics.csv."""
        self.rows.append(dict(values))
        row = {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in values.items()}
        self.append("metrics.csv", ",".join(row.get(name, "") for name in COLUMNS) + "\n")

    def sample(self, step: int, text: str) -> None:
        """One more part of samples.md, indented, so that nothing in it reads as Markdown."""
        self.append("samples.md", f"## step {step}\n\n" + "".join(f"    {line}\n" for line in text.splitlines()) + "\n")

    def append(self, name: str, text: str) -> None:
        try:
            with open(self.out / name, "a", encoding="utf-8", newline="") as file:
                file.write(text)
        except OSError as error:
            raise disk_error(self.out / name, error) from None

    def rewind(self, step: int) -> None:
        """Forgets what was told and kept behind `step`, and what was left unfinished, so that the run goes on without a gap or a repetition."""
        for path in (self.out / "checkpoints").glob("step-*"):
            if path.name[5:].isdecimal() and (int(path.name[5:]) > step or not (path / "state.json").is_file()):
                shutil.rmtree(path)                                                   # damaged, or it would have been gone on from
        for path in (*self.out.iterdir(), *(self.out / "checkpoints").iterdir()):
            if UNFINISHED.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        metrics, samples = self.out / "metrics.csv", self.out / "samples.md"
        head, *lines = read_text(metrics).splitlines() or [""]
        whole = [line for line in lines if re.match(r"\d+,", line) and line.count(",") == head.count(",") and int(line.partition(",")[0]) <= step]
        write_text(metrics, "\n".join([",".join(COLUMNS), *whole]) + "\n")
        self.rows = [{name: value for name, value in zip(head.split(","), line.split(",")) if value} for line in whole]
        if samples.exists():
            parts = re.split(r"^(?=## step \d+$)", read_text(samples), flags=re.M)
            write_text(samples, "".join(part for part in parts if part and int(part.split(maxsplit=3)[2]) <= step))

    # ---- checkpoints
    def checkpoint(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int = 2, ranks: Ranks = ALONE) -> Path:
        """Writes what a run needs to go on, whole or not at all; then forgets all but the newest `keep` and the best by validation. All ranks ask."""
        path = self.out / "checkpoints" / f"step-{state['step']:08d}"
        if ranks.n > 1:
            if not ranks.share(path.exists()):
                write_shards(path, tensors, state, ranks)
            if not ranks.first:
                return path
        elif not path.exists():
            with new_dir(path) as folder:
                write_safetensors(folder / "model.safetensors", {n.removeprefix(MODEL): t for n, t in tensors.items() if n.startswith(MODEL)})
                write_safetensors(folder / "optimizer.safetensors", {n: t for n, t in tensors.items() if not n.startswith(MODEL)})
                write_json(folder / "state.json", state)
        everything = self.checkpoints()
        losses = {old: loss for old in everything if (loss := self.state(old).get("validation_loss")) is not None}
        best = min(losses, key=lambda old: losses[old], default=None)
        for old in everything[:-keep]:
            if old != best:
                going = old.rename(old.with_name(f".{old.name}.{0:016}"))             # a kill in the middle leaves nothing that looks whole
                shutil.rmtree(going, ignore_errors=True)
        return path

    def checkpoints(self) -> list[Path]:
        """All that are whole, the oldest first."""
        return sorted((path.parent for path in (self.out / "checkpoints").glob("step-*/state.json")), key=lambda path: int(path.name[5:]))

    @staticmethod
    def state(path: Path) -> dict[str, Any]:
        """What stands in a checkpoint beside its tensors."""
        return read_json(path / "state.json")

    @staticmethod
    def read(path: Path, ranks: Ranks = ALONE) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A checkpoint's tensors and state. HanokError names the file that is damaged."""
        if list(path.glob(SHARDS)):
            return Sharded(path, ranks), read_json(path / "state.json")
        tensors = {MODEL + name: tensor for name, tensor in read_safetensors(path / "model.safetensors").items()}
        return {**tensors, **read_safetensors(path / "optimizer.safetensors")}, read_json(path / "state.json")

    def amend(self, path: Path, **changes: Any) -> None:
        """Writes some of a checkpoint's state anew."""
        write_json(path / "state.json", {**self.state(path), **changes})

    def newest_whole(self) -> tuple[Path | None, str]:
        """The newest checkpoint that can be read, and in words what is wrong with newer ones. DataError where there are some, and none can be."""
        lost: list[str] = []
        for path in reversed(self.checkpoints()):
            try:
                self.read(path)
                return path, ", ".join(lost)
            except HanokError as error:
                lost.append(str(error).partition("; ")[0])                            # what follows is advice for a file that was fetched
        if lost:
            raise DataError(f"{', '.join(lost)}; no checkpoint of {self.out} is whole: bring one back, or remove them all to begin at step 0")
        return None, ""

    def reopen(self) -> None:
        """A finished run that goes on is no bundle until it is finished again."""
        (self.out / "config.json").unlink(missing_ok=True)


class Sharded(dict[str, Tensor]):
    """The tensors of a checkpoint that many ranks wrote, told (without memory) and read where `fill` wants them; all ranks do that together."""

    def __init__(self, path: Path, ranks: Ranks = ALONE):
        from torch.distributed.checkpoint import HuggingFaceStorageReader
        files, n = sorted(path.glob(SHARDS)), read_json(path / "state.json").get("n_ranks", 1)
        if len(files) != n:
            raise WeightsError(f"{path} has {len(files)} shards of {n}; bring the others back")
        for file in files:
            read_safetensors(file)                                                    # none of them is cut short
        self.path, self.ranks = path, ranks
        self.stored: dict[str, str] = {}
        mine = f"random/{ranks.rank if ranks.rank < n else 0}/"
        for name, told in HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata.items():
            if not name.startswith("random/") or name.startswith(mine):
                ours = name.replace(mine, "random/")
                self.stored[ours] = name
                self[ours] = torch.empty(told.size, dtype=told.properties.dtype, device="meta")   # type: ignore[union-attr]

    def fill(self, into: Mapping[str, Tensor]) -> None:
        """Reads each tensor, or the part of it that lies here, into its place."""
        import torch.distributed.checkpoint as dcp
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")          # as it was asked to be
            dcp.load({self.stored[name]: tensor for name, tensor in into.items()}, no_dist=self.ranks.n == 1,
                     storage_reader=dcp.HuggingFaceStorageReader(str(self.path)))


def write_shards(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], ranks: Ranks) -> None:
    """A new checkpoint, of which each rank writes a part; whole or not at all."""
    import torch.distributed.checkpoint as dcp
    with new_dir(path) if ranks.first else nullcontext(path) as made:
        folder = Path(ranks.share(str(made)))
        named = {name.replace("random/", f"random/{ranks.rank}/") if name.startswith("random/") else name: t for name, t in tensors.items()}
        try:
            dcp.save(named, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
        except dcp.api.CheckpointException as error:
            for reason, _ in error.failures.values():
                if isinstance(reason, OSError):
                    raise disk_error(path, reason) from None
            raise
        if ranks.first:
            write_json(folder / "state.json", state)
    ranks.share(None)                                                                 # nobody goes on before it has its name


def write_recipe(folder: Path, recipe: Recipe, sources: Mapping[str, str], begun: str) -> None:
    """recipe.toml: the recipe, where it was begun, and what it learns from."""
    write_text(folder / "recipe.toml", toml({**to_dict(recipe), "begun": {"folder": begun}, "sources": dict(sources)}) + "\n")
