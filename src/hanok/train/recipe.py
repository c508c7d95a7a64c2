"""What a training run is: a recipe, written beside its results as TOML.

Every field's unit stands behind it; the command line overrides a field with --set.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hanok.config import converted, from_dict, read_toml
from hanok.errors import ConfigError
from hanok.models import catalog


@dataclass(frozen=True)
class ModelRecipe:
    """Which model."""
    family: str = catalog.DEFAULT
    preset: str = "tiny"
    sizes: dict[str, Any] = field(default_factory=dict)  # settings of the family's config that differ from the preset's

    def __post_init__(self) -> None:
        """Sizes get the types of the family's config: the command line tells them as text. ConfigError: one that is no such number."""
        if self.family in catalog.FAMILIES:
            object.__setattr__(self, "sizes", converted(catalog.family(self.family).config, self.sizes, f"{self.family}'s model.sizes"))


@dataclass(frozen=True)
class TokenizerRecipe:
    """Which tokenizer: trained on the run's own text, or `path`."""
    path: str | None = None                              # tokenizer.json, or a folder that holds one; None: train one
    kind: Literal["bpe", "wordpiece", "unigram", "characters"] = "bpe"
    vocab_size: int = 4096                               # tokens
    train_bytes: int = 16_000_000                        # bytes of training text that it sees at most; characters: of all text
    n_sentinels: int = 100                               # tokens <extra_id_0>, ... that one gets which is trained for span corruption


@dataclass(frozen=True)
class DataRecipe:
    """Which text, and what is asked of it."""
    sources: tuple[str, ...] = ()                        # files and folders; for seq2seq .tsv, .csv or .jsonl
    encoding: str = "utf-8"
    validation: float = 0.02                             # share of the text that is held out
    seq_len: int | None = None                           # tokens a row; None: the preset's context
    separate: bool = True                                # whether no token looks across documents (recurrent models never do)
    objective: Literal["causal", "masked", "span_corruption", "prefix", "seq2seq"] | None = None      # None: what the family and the files are for
    rate: float = 0.15                                   # masked, span_corruption: share of the tokens that are hidden
    mean_span_length: float = 3.0                        # span_corruption: tokens
    whole_words: bool = False                            # masked: whether words are hidden whole
    columns: tuple[str, ...] = ()                        # seq2seq: names of the columns of a .tsv or .csv whose first line does not tell them
    source_column: str = "source"                        # seq2seq: what is read
    target_column: str = "target"                        # seq2seq: what is written
    group_column: str | None = None                      # seq2seq: what is held out as a whole, for example a file; None: equal sources
    batch_tokens: int = 0                                # seq2seq: padded tokens of both sides a forward; 0: train.micro_batch_size rows

    def __post_init__(self) -> None:
        """ConfigError for a number that no objective can follow."""
        for name, good, expected in (("rate", 0 < self.rate < 1, "a number between 0 and 1"), ("batch_tokens", self.batch_tokens >= 0, "0 or more"),
                                     ("mean_span_length", self.mean_span_length >= 1, "1 or more"),
                                     ("seq_len", self.seq_len is None or self.seq_len >= 1, "1 or more")):
            if not good:
                raise ConfigError(f"data.{name} is {getattr(self, name)}; expected {expected}")


@dataclass(frozen=True)
class TrainRecipe:
    """How it learns."""
    steps: int = 1000                                    # optimizer updates
    seconds: float | None = None                         # wall time after which the run ends, its schedule on time; None: steps only
    micro_batch_size: int = 16                           # rows a forward
    grad_accum_steps: int = 1                            # forwards an update; several devices share an update's rows
    optimizer: Literal["adamw", "muon"] = "muon"         # muon: hidden matrices by Muon, everything else by AdamW
    learning_rate: float = 2.5e-3                        # of AdamW, at its peak
    muon_learning_rate: float | None = None              # of Muon, at its peak; its updates are as long as AdamW's; None: learning_rate
    embedding_learning_rate: float | None = None         # of embeddings and heads, at its peak; None: learning_rate, beside Muon twelve times that
    schedule: Literal["cosine", "wsd", "noam"] = "wsd"   # behind the warm-up: half a cosine; constant, then a line; 1/sqrt(update)
    warmup_steps: int = 50                               # updates until the peak
    decay: float = 0.6                                   # share of the run that falls (wsd)
    floor: float = 0.0                                   # the last learning rate, as a share of the peak (cosine, wsd)
    weight_decay: float = 0.01                           # of matrices, an update, times the learning rate
    beta1: float = 0.8                                   # share of the old in AdamW's mean gradient
    beta2: float = 0.99                                  # share of the old in its mean squared gradient
    eps: float = 1e-8
    muon_momentum: float = 0.95                          # share of the old that stays in Muon's running mean, an update
    clip: float = 1.0                                    # largest gradient norm; 0: none
    label_smoothing: float = 0.0                         # share of a target's probability that is spread over the vocabulary
    z_loss: float = 0.0                                  # times the square of log Z, added to a target's loss (PaLM: 1e-4)
    ema_decay: float = 0.0                               # share of the old that stays in the averaged weights, an update; 0: none are kept
    spike_factor: float = 0.0                            # spreads above the last losses' median that are a spike; 0: only NaN and infinity count
    on_spike: Literal["stop", "rollback"] = "stop"       # what a NaN or a spike does; rollback: on from the last checkpoint, past the batch
    compile: Literal["auto", "on", "off"] = "auto"       # torch.compile; auto: on a GPU, for rows of one length; fsdp: off
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of forward and backward (weights stay fp32); auto: bf16 on a GPU that has it, else fp32
    parallel: Literal["ddp", "fsdp"] = "ddp"             # on several devices: whole weights on each, or (FSDP2) a part of them
    eval_every: int = 200                                # updates between evaluations
    eval_tokens: int = 65_536                            # tokens of the validation text in an evaluation
    checkpoint_every: int = 1000                         # updates between checkpoints; 0: only at the end
    keep_checkpoints: int = 2                            # newest that stay; so does the best of those at an evaluation
    sample_every: int = 0                                # updates between samples; 0: none
    sample_prompt: str = ""                              # text that a sample goes on from or answers; an encoder fills its [MASK]
    sample_tokens: int = 40                              # tokens a sample may have
    log: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()  # where the numbers go besides metrics.csv
    seed: int = 0
    threads: int = 0                                     # CPU threads; 0: torch's choice

    def __post_init__(self) -> None:
        """ConfigError for a number that no run can follow."""
        at_least_one = "steps micro_batch_size grad_accum_steps eval_every eval_tokens keep_checkpoints sample_tokens".split()
        not_negative = "learning_rate warmup_steps weight_decay clip checkpoint_every sample_every seed threads z_loss spike_factor".split()
        rates, below_one = ["muon_learning_rate", "embedding_learning_rate"], "beta1 beta2 muon_momentum ema_decay label_smoothing".split()
        for names, good, expected in (
            (at_least_one, lambda value: value >= 1, "1 or more"), (not_negative, lambda value: value >= 0, "0 or more"),
            (["seconds"], lambda value: value is None or value > 0, "more than 0, or none"), (["eps"], lambda value: value > 0, "more than 0"),
            (rates, lambda value: value is None or value >= 0, "0 or more, or none"),
            (below_one, lambda value: 0 <= value < 1, "0 or more and less than 1"),
            (["floor", "decay"], lambda value: 0 <= value <= 1, "0 to 1"),
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


def read_recipe(path: Path | str) -> Recipe:
    """A recipe's TOML file; a run's own recipe.toml is one too. ConfigError names the line, or the setting nearest to one that is unknown."""
    data = read_toml(path)
    for about_the_run in ("begun", "sources"):
        data.pop(about_the_run, None)
    return from_dict(Recipe, data, str(path))
