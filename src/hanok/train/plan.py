"""The time dial: which model, batch, rates and updates give the best loss in so many seconds, and what a run will cost before it starts.

An update's time is a `measure.Cost` on a probed `Machine`; its loss is `expected`. What will not fit is refused with what would.
"""
from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from hanok import report
from hanok.bundle.bundle import empty_model
from hanok.config import from_dict, override, to_dict
from hanok.errors import ConfigError
from hanok.models import catalog
from hanok.models.family import Family
from hanok.nn.loss import chunk_tokens
from hanok.train.expected import LAW, Law, Text, expected_bits, is_recurrent
from hanok.train.measure import Cost, Machine, Shape, count, count_one, state_bytes
from hanok.train.optim import optimizers, outside
from hanok.train.recipe import Recipe, TrainRecipe
from hanok.train.trainer import precision

WIDTHS = (64, 96, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 8192)
ASPECTS = (24, 32, 48, 64)
"""Width for each layer of a Transformer."""


# ---- one run -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Plan:
    """What a run will be."""
    recipe: Recipe
    parameters: int
    tokens: float                            # targets in all updates
    steps: int                               # that its steps or its seconds allow
    step_seconds: float
    memory: float                            # bytes, of the process at its largest
    disk: float                              # bytes, of the run's folder and of the text as tokens
    epochs: float                            # times that the text is read
    bits: float                              # a byte of validation text
    spread: float                            # of these, one standard deviation
    begin: float = 0.0                       # seconds of the first update's compiling

    @property
    def seconds(self) -> float:
        return self.begin + self.steps * self.step_seconds

    def rows(self, machine: Machine, free_disk: float) -> list[tuple[str, str]]:
        """What there is to know, in words."""
        told, data, config = self.recipe.train, self.recipe.data, config_of(self.recipe)
        per_update = f"{told.micro_batch_size} x {data.seq_len or config.max_seq_len} tokens" + (
            f" x {told.grad_accum_steps}" if told.grad_accum_steps > 1 else "")
        compiling = f" (the first {report.seconds(self.begin)} for torch.compile)" if self.begin else ""
        time = [("time", f"{report.seconds(self.seconds)} of updates{compiling}, {report.seconds(1000 * self.step_seconds)} a thousand; about "
                         f"{report.seconds(self.around)} of evaluations besides")] if self.step_seconds else []
        return [
            ("model", f"{self.recipe.model.family}, {config.n_layers if hasattr(config, 'n_layers') else '?'} layers of {config.d_model}, "
                      f"{config.vocab_size:,} tokens of vocabulary"),
            ("parameters", report.count(self.parameters)),
            ("tokens", f"{report.count(self.tokens)}: the text {self.epochs:.2g} times"),
            ("steps", f"{self.steps:,} of {per_update}; {told.optimizer} at {told.learning_rate:.2g}"),
            ("memory", f"{report.size(self.memory)} of {report.size(machine.memory)}"),
            ("disk", f"{report.size(self.disk)} of {report.size(free_disk)} that are free"), *time,
            ("expected loss", f"{self.bits:.2f} ± {2 * self.spread:.2f} bits a byte")]

    def to_dict(self) -> dict[str, Any]:
        """The same for machines: seconds, bytes, bits a byte and their standard deviation."""
        return {"parameters": self.parameters, "tokens": self.tokens, "steps": self.steps, "step_seconds": self.step_seconds, "seconds": self.seconds,
                "compile_seconds": self.begin, "memory_bytes": round(self.memory), "disk_bytes": round(self.disk), "epochs": self.epochs,
                "bits_per_byte": self.bits, "bits_per_byte_deviation": self.spread, "recipe": to_dict(self.recipe)}

    @property
    def around(self) -> float:
        """Seconds for evaluations; reading the text comes before."""
        told = self.recipe.train
        tokens = told.micro_batch_size * told.grad_accum_steps * (self.recipe.data.seq_len or 1)
        return (self.steps // told.eval_every + 1) * self.step_seconds * told.eval_tokens / tokens / 3


def config_of(recipe: Recipe, vocab_size: int | None = None) -> Any:
    """The model's sizes, as a run will work them out."""
    family = catalog.family(recipe.model.family)
    preset = catalog.preset(family.name, recipe.model.preset)
    sizes = {**to_dict(preset), "vocab_size": vocab_size or recipe.tokenizer.vocab_size, "max_seq_len": recipe.data.seq_len or preset.max_seq_len}
    return from_dict(family.config, {**sizes, **recipe.model.sizes}, "model.sizes")


def shape_of(recipe: Recipe, config: Any, text: Text) -> Shape:
    """What a forward is given."""
    tokens = text.n_bytes / max(1, text.n_documents) / text.bytes_per_token(config.vocab_size)
    return Shape(recipe.train.micro_batch_size, recipe.data.seq_len or config.max_seq_len, max(1.0, tokens), recipe.data.separate)


@lru_cache(maxsize=4096)
def weights_of(name: str, config: Any) -> tuple[int, int]:
    """Parameters of a model, and those that are neither embedding nor head."""
    model: Any = empty_model(catalog.family(name), config)
    everything, embedded = {id(p): p.numel() for p in model.parameters()}, outside(model)
    return sum(everything.values()), sum(n for key, n in everything.items() if key not in embedded)


LEAST_BYTES = 12
"""A weight, its gradient, and a number of the optimizer's."""
STARTED, FRAGMENTS, TEXTS = 110e6, 1.18, 1.3
"""Bytes that kernels' code and buffers take at the first update; what lies idle between live tensors; beside each byte of text that is held."""

CONTEXT, GPU_FRAGMENTS = 600e6, 1.06
"""The same two of an H100."""


def memory(machine: Machine, cost: Cost, n_weights: int, text: Text, loss: float = 0.0, in_bf16: bool = False) -> float:
    """The largest resident memory of the run's process. On a GPU, of the device: a chunk of the `loss` has so many bytes there, and what is alive
    beside weights, gradients and optimizer takes half as many in bf16, as it did on the H100."""
    if machine.device == "cuda":
        return CONTEXT + GPU_FRAGMENTS * (cost.standing + max(0.0, cost.peak - cost.standing) / (2 if in_bf16 else 1) + loss)
    tensors = FRAGMENTS * cost.peak + 4 * n_weights                                   # gradients come and go between others
    return STARTED + tensors + machine.resident + TEXTS * text.held


def loss_bytes(shape: Shape, vocab_size: int, compiled: bool, in_bf16: bool) -> float:
    """Of a chunk on a GPU: logits and their gradient, and without a compiler the log-probabilities in fp32 with what they are made of."""
    logits = min(shape.n_rows * shape.seq_len, chunk_tokens(vocab_size, on_gpu=True)) * vocab_size
    return logits * (2 * (2 if in_bf16 else 4) + (0 if compiled else 8))


def disk(recipe: Recipe, config: Any, text: Text, steps: int) -> float:
    """The bundle, all checkpoints with one that is being written, and the text as tokens."""
    model: Any = empty_model(catalog.family(recipe.model.family), config)
    n, told = sum(p.numel() for p in model.parameters()), recipe.train
    one = state_bytes(optimizers(model, told)) + 4 * n * (1 + bool(told.ema_decay))
    n_checkpoints = 1 + (steps // told.checkpoint_every if told.checkpoint_every else 0)
    tokens = text.n_bytes / text.bytes_per_token(config.vocab_size)
    return 4 * n + one * min(n_checkpoints, told.keep_checkpoints + 2) + tokens * (2 if config.vocab_size <= 1 << 16 else 4)


COUNTED = ("grad_accum_steps", "optimizer", "ema_decay", "label_smoothing", "z_loss")
"""What of a recipe's training changes an update's cost."""


def counted(told: TrainRecipe) -> TrainRecipe:
    """With defaults in all other places."""
    return replace(TrainRecipe(), **{name: getattr(told, name) for name in COUNTED})


@lru_cache(maxsize=1024)
def cost_of(name: str, config: Any, told: TrainRecipe, shape: Shape, plain: bool = False) -> Cost:
    """A remembered count; plain: of batches in which no row holds two documents."""
    family = catalog.family(name)
    return count_one(family, config, told, shape, False) if plain else count(family, config, told, shape)


def plan_of(recipe: Recipe, machine: Machine, text: Text, law: Law = LAW, steps: int | None = None) -> Plan:
    """What the recipe will be on this machine. Without a probe (sgemm 0) its time is not told, and its steps are the recipe's."""
    family, config, told = catalog.family(recipe.model.family), config_of(recipe, text.vocab_size), recipe.train
    shape = shape_of(recipe, config, text)
    cost = cost_of(family.name, config, counted(told), shape)
    step_seconds = machine.seconds(cost) if machine.sgemm else 0.0
    if steps is None:
        by_time = (told.seconds - machine.begin) / step_seconds if told.seconds and step_seconds else math.inf
        steps = max(1, int(min(told.steps, by_time)))
    per_update = shape.n_rows * shape.seq_len * told.grad_accum_steps
    n, inner = weights_of(family.name, config)
    length, tokens = text.bytes_per_token(config.vocab_size), steps * per_update
    bits = expected_bits(law, inner, tokens * length, text.n_bytes, per_update, config.vocab_size, text.zlib)
    in_bf16 = machine.device == "cuda" and precision(told.precision, empty_model(family, config), torch.device("cuda")) == "bf16"
    held = memory(machine, cost, n, text, loss_bytes(shape, config.vocab_size, told.compile != "off" and told.parallel != "fsdp", in_bf16), in_bf16)
    return Plan(recipe, n, tokens, steps, step_seconds, held, disk(recipe, config, text, steps),
                tokens * length / text.n_bytes, bits, bits * law.spread, machine.begin if step_seconds else 0.0)


class DoesNotFit(ConfigError):
    """A run that is larger than the machine. `settings` (--set a.b=c) would make it fit; none where nothing was found."""

    def __init__(self, message: str, settings: tuple[str, ...] = ()):
        super().__init__(message)
        self.settings = settings


def fits(plan: Plan, machine: Machine, free_disk: float) -> bool:
    return plan.memory <= machine.memory and plan.disk <= free_disk


def needs(recipe: Recipe, machine: Machine, text: Text) -> tuple[float, float]:
    """Bytes of memory and of disk; of memory only what its weights alone need, where that is too much already."""
    config = config_of(recipe, text.vocab_size)
    n = weights_of(recipe.model.family, config)[0]
    if LEAST_BYTES * n > machine.memory:
        return machine.resident + LEAST_BYTES * n, disk(recipe, config, text, recipe.train.steps)
    plan = plan_of(recipe, machine, text)
    return plan.memory, plan.disk


def check(recipe: Recipe, machine: Machine, text: Text, free_disk: float) -> None:
    """DoesNotFit where memory or disk will not hold the run. It names what would fit, the nearest first: fewer rows at once, fewer checkpoints, a
    smaller model."""
    need, on_disk = needs(recipe, machine, text)
    if need <= machine.memory and on_disk <= free_disk:
        return
    short = need > machine.memory
    n = weights_of(recipe.model.family, config_of(recipe, text.vocab_size))[0]
    about = "at least" if LEAST_BYTES * n > machine.memory else "about"               # `needs` has looked no further then
    told = (f"this run needs {about} {report.size(need)} of memory, and there are {report.size(machine.memory)}" if short else
            f"this run needs about {report.size(on_disk)} of disk, and {report.size(free_disk)} are free")

    def holds(settings: Sequence[str]) -> tuple[float, float] | None:
        """The needs of the recipe under these settings, where they are met."""
        try:
            told = needs(from_dict(Recipe, override(to_dict(recipe), settings), "recipe"), machine, text)
        except ConfigError:                                                           # sizes that were given do not go with these
            return None
        return told if told[0] <= machine.memory and told[1] <= free_disk else None

    fewer = list(less_at_once(recipe)) if short else [KEEP_ONE, [*KEEP_ONE, "train.checkpoint_every=0"]]
    least = fewer[-1] if fewer else []
    settings = next((one for one in fewer if holds(one)), None) or last_that([[*one, *least] for one in shrunk(recipe, text)], holds)
    if settings is None:
        raise DoesNotFit(f"{told}; nothing smaller fits either: free some, or choose another machine")
    met = holds(settings)
    assert met is not None
    raise DoesNotFit(f"{told}; {report.size(met[0 if short else 1])} are enough with {' '.join(f'--set {one}' for one in settings)}", tuple(settings))


KEEP_ONE = ["train.keep_checkpoints=1"]
T = TypeVar("T")


def last_that(ascending: Sequence[T], holds: Callable[[T], object]) -> T | None:
    """The last for which it holds, where what comes later asks for more; by halving."""
    low, high = 0, len(ascending)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if holds(ascending[middle]) else (low, middle)
    return ascending[low - 1] if low else None


def less_at_once(recipe: Recipe) -> Iterator[list[str]]:
    """The same update in smaller forwards."""
    rows, parts = recipe.train.micro_batch_size, recipe.train.grad_accum_steps
    for fewer in (n for n in range(rows - 1, 0, -1) if rows % n == 0):
        yield [f"train.micro_batch_size={fewer}", f"train.grad_accum_steps={parts * rows // fewer}"]


def shrunk(recipe: Recipe, text: Text) -> list[list[str]]:
    """Sizes of fewer parameters, the fewest first."""
    family, config = catalog.family(recipe.model.family), config_of(recipe, text.vocab_size)
    if not sizes_chosen(family):
        most = weights_of(family.name, config)[0]
        presets = sorted((weights_of(family.name, preset)[0], name) for name, preset in family.presets.items())
        return [[f"model.preset={name}"] for n, name in presets if n < most]
    shapes = sorted((d * d * n, d, n) for d in WIDTHS for n in depths(family, d) if d < config.d_model)
    return [[f"model.sizes.{name}={value}" for name, value in sizes_of(family, d, n).items()] for _, d, n in shapes]


def roughly_fits(recipe: Recipe, machine: Machine, text: Text, free_disk: float) -> bool:
    """Whether it surely fits, told in no time: by three times what enters and leaves each layer, and everything else counted generously."""
    family, config = catalog.family(recipe.model.family), config_of(recipe, text.vocab_size)
    model: Any = empty_model(family, config)
    shape = shape_of(recipe, config, text)
    n, tokens = sum(p.numel() for p in model.parameters()), shape.n_rows * shape.seq_len
    numbers = sum(part.in_features + part.out_features for part in model.modules() if isinstance(part, nn.Linear))
    numbers += sum(part.num_layers * 20 * part.hidden_size for part in model.modules() if isinstance(part, nn.RNNBase))
    alive = Cost(peak=4.0 * (6 * n + 3 * tokens * numbers + 4 * min(tokens, chunk_tokens(config.vocab_size)) * config.vocab_size))
    held = memory(machine, alive, n, text, loss_bytes(shape, config.vocab_size, compiled=False, in_bf16=False))
    return held <= machine.memory and disk(recipe, config, text, recipe.train.steps) <= free_disk


def free_at(path: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    path = path.absolute()
    while not os.path.exists(path):                                                   # or not to be looked at
        path = path.parent
    return shutil.disk_usage(path).free


# ---- sizes ---------------------------------------------------------------------------------------------------
def sizes_of(family: Family, d_model: int, n_layers: int) -> dict[str, Any]:
    """A family's sizes at a width and depth, in its own proportions."""
    names, head = {f.name for f in fields(family.config)}, 32 if d_model < 256 else 64
    preset = family.presets["tiny"]
    told: dict[str, Any] = {"d_model": d_model, "n_layers": n_layers, "n_heads": d_model // head}
    if "n_kv_heads" in names:
        groups = d_model // head
        told |= {"n_kv_heads": max(1, groups // 2) if groups % 2 == 0 and preset.n_kv_heads < preset.n_heads else groups}
    if "d_ff" in names:
        told["d_ff"] = round(d_model * preset.d_ff / preset.d_model / 32) * 32
    return {name: value for name, value in told.items() if name in names}


def sizes_chosen(family: Family) -> bool:
    """Whether a plan can choose its sizes."""
    return family.kind != "encoder-decoder" and "tiny" in family.presets and {"d_model", "n_layers"} <= {f.name for f in fields(family.config)}


def check_family(family: Family) -> None:
    """ConfigError for one whose sizes the dial does not know."""
    if not sizes_chosen(family):
        able = [other.name for other in catalog.FAMILIES.values() if sizes_chosen(other)]
        raise ConfigError(f"no plan chooses the sizes of a {family.name}; it knows those of {', '.join(able)}: choose --preset and --steps yourself")


def depths(family: Family, d_model: int) -> list[int]:
    """Layers that go with a width."""
    if is_recurrent(family.name):
        return [1, 2]
    return sorted({max(2, round(d_model / aspect)) for aspect in ASPECTS})
