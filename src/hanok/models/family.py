"""What a family says of itself, and the table between its spelling and Hugging Face's, which is read in both directions.

A table is data: settings (their name -> ours, with the value that their class takes where the file is silent), settings that can only have one value
here, names that do not touch the logits, and a list of weights. An importer refuses whatever none of these explains (as penzai does).
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torch import Tensor, nn

from hanok.errors import ConfigError


@dataclass(frozen=True)
class Sizes:
    """The base of every family's config. ConfigError for a size below 1, a dropout that is no probability, an epsilon that is not above 0."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ConfigError(f"{f.name} is {value}; expected 1 or more")
            if f.name.endswith("dropout") and not 0 <= value < 1:
                raise ConfigError(f"{f.name} is {value}; expected 0 or more and less than 1")
            if f.name in ("norm_eps", "rope_theta") and not value > 0:
                raise ConfigError(f"{f.name} is {value}; expected more than 0")


REQUIRED = object()
"""A setting without a default: a file that lacks it is refused."""


@dataclass(frozen=True)
class Layout:
    """How one of their tensors holds some of ours."""
    unpack: Callable[[Tensor], Sequence[Tensor]]
    pack: Callable[[Sequence[Tensor]], Tensor]


SAME = Layout(lambda theirs: [theirs], lambda ours: ours[0])
TRANSPOSED = Layout(lambda theirs: [theirs.t()], lambda ours: ours[0].t())
ROW = Layout(lambda theirs: [theirs[0]], lambda ours: ours[0][None])


@dataclass(frozen=True)
class Weight:
    """One tensor of theirs and the tensors of ours that it holds."""
    theirs: str
    ours: tuple[str, ...]
    layout: Layout = SAME


def same(*pairs: tuple[str, str]) -> list[Weight]:
    """Weights that only differ by name."""
    return [Weight(theirs, (ours,)) for theirs, ours in pairs]


def dense(theirs: str, ours: str, layout: Layout = SAME) -> list[Weight]:
    """A weight and a bias."""
    return [Weight(f"{theirs}.weight", (f"{ours}.weight",), layout), Weight(f"{theirs}.bias", (f"{ours}.bias",))]


@dataclass(frozen=True)
class HFTable:
    """One Hugging Face class. `requires` are values that our config must have for this class to express it."""
    model_type: str
    architecture: str
    settings: Mapping[str, tuple[str, Any]]              # theirs -> (ours, their default or REQUIRED)
    weights: Callable[[Any], list[Weight]]               # config -> all weights; a tied tensor stands once
    fixed: Mapping[str, Any] = field(default_factory=dict)         # theirs -> the one value that is expressed here (also their default)
    neutral: frozenset[str] = frozenset()                # theirs: no influence on logits
    requires: Mapping[str, Any] = field(default_factory=dict)      # ours -> value
    repeats: Callable[[Any], Mapping[str, str]] = lambda config: {}      # names that may repeat a tensor: theirs -> ours; must be equal
    buffers: tuple[str, ...] = ()                        # regular expressions of tensors that follow from the config
    optional_prefix: str = ""                            # which some files leave out
    renamed: tuple[tuple[str, str], ...] = ()            # (regular expression, replacement) for older spellings of tensor names
    read: Callable[[dict[str, Any]], dict[str, Any]] = lambda data: data    # older spellings of settings -> those of `settings`
    write: Callable[[Any], dict[str, Any]] = lambda config: {}              # further settings that their class wants
    from_weights: Callable[[set[str]], dict[str, Any]] = lambda names: {}   # ours, told by which tensors are there
    refuses: Callable[[Any], str] = lambda config: ""    # what of a config this class cannot express, beyond `requires`


@dataclass(frozen=True)
class GGUFTable:
    """One GGUF architecture. Metadata keys are without the architecture's prefix; where several families share one, a `marker` tells them apart."""
    architecture: str
    settings: Mapping[str, tuple[str, Any]]
    weights: Callable[[Any], list[Weight]]
    read: Callable[[Mapping[str, Any], Mapping[str, Tensor]], dict[str, Any]] = lambda metadata, tensors: {}   # further settings of ours
    known: frozenset[str] = frozenset()                  # metadata of the architecture that `read` handles or that is neutral
    buffers: tuple[str, ...] = ()
    marker: str = ""                                     # metadata that only files of this family have
    requires: Mapping[str, Any] = field(default_factory=dict)      # ours -> value
    write: Callable[[Any], Mapping[str, Any]] = lambda config: {}  # further metadata, or other than `settings` gives
    derived: Callable[[Any], dict[str, Tensor]] = lambda config: {}      # tensors that follow from the config
    precise: frozenset[str] = frozenset()                # matrices that stay fp32
    refuses: Callable[[Any], str] = lambda config: ""    # what of a config this architecture cannot express, beyond `requires`
    told_at_export: Callable[[Any], str] = lambda config: ""       # what the format cannot keep, for people


@dataclass(frozen=True)
class Family:
    """A name, a config class, the function that builds it, and what it can be translated to."""
    name: str
    summary: str
    config: type
    build: Callable[[Any], nn.Module]
    presets: Mapping[str, Any]
    kind: Literal["decoder", "encoder", "encoder-decoder"]
    objective: Literal["causal", "masked", "seq2seq"]
    hf: tuple[HFTable, ...] = ()
    gguf: tuple[GGUFTable, ...] = ()
