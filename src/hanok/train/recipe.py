"""What a training run is: a recipe, written beside its results as TOML.

Every field's unit stands behind it; the command line overrides a field with --set.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from hanok.errors import ConfigError
from hanok.models import catalog


@dataclass(frozen=True)
class ModelRecipe:
    """Which model."""
    family: str = catalog.DEFAULT
    preset: str = "tiny"
    sizes: dict[str, Any] = field(default_factory=dict)  # settings of the family's config that differ from the preset's


@dataclass(frozen=True)
class TokenizerRecipe:
    """Which tokenizer: trained on the run's own text, or `path`."""
    path: str | None = None                              # tokenizer.json, or a folder that holds one; None: train one
    kind: Literal["bpe", "wordpiece", "unigram"] = "bpe"
    vocab_size: int = 4096                               # tokens
    train_bytes: int = 16_000_000                        # bytes of training text that it sees at most


@dataclass(frozen=True)
class DataRecipe:
    """Which text."""
    sources: tuple[str, ...] = ()                        # files and folders
    encoding: str = "utf-8"
    validation: float = 0.02                             # share of the text that is held out
    seq_len: int | None = None                           # tokens a row; None: the preset's context
    separate: bool = False                               # whether no token looks across documents


@dataclass(frozen=True)
class TrainRecipe:
    """How it learns."""
    steps: int = 1000                                    # optimizer updates
    seconds: float | None = None                         # wall time after which the run ends, its schedule on time; None: steps only
    micro_batch_size: int = 16                           # rows a forward
    grad_accum_steps: int = 1                            # forwards an update
    learning_rate: float = 1e-3                          # at its peak
    warmup_steps: int = 50                               # updates until the peak
    floor: float = 0.1                                   # the last learning rate, as a share of the peak
    weight_decay: float = 0.1                            # of matrices, an update, times the learning rate
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0                                    # largest gradient norm; 0: none
    eval_every: int = 200                                # updates between evaluations
    eval_tokens: int = 65_536                            # tokens of the validation text in an evaluation
    checkpoint_every: int = 1000                         # updates between checkpoints; 0: only at the end
    seed: int = 0
    threads: int = 0                                     # CPU threads; 0: torch's choice

    def __post_init__(self) -> None:
        """ConfigError for a number that no run can follow."""
        at_least_one = "steps micro_batch_size grad_accum_steps eval_every eval_tokens".split()
        not_negative = "learning_rate warmup_steps weight_decay clip checkpoint_every seed threads".split()
        for names, good, expected in (
            (at_least_one, lambda value: value >= 1, "1 or more"), (not_negative, lambda value: value >= 0, "0 or more"),
            (["seconds"], lambda value: value is None or value > 0, "more than 0, or none"), (["eps"], lambda value: value > 0, "more than 0"),
            (["beta1", "beta2"], lambda value: 0 <= value < 1, "0 or more and less than 1"), (["floor"], lambda value: 0 <= value <= 1, "0 to 1"),
        ):
            for name in names:
                if not good(getattr(self, name)):
                    raise ConfigError(f"train.{name} is {getattr(self, name)}; expected {expected}")


@dataclass(frozen=True)
class Recipe:
    """A whole run."""
    model: ModelRecipe = field(default_factory=ModelRecipe)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
