"""What the rooms say to each other: the data that models read, and the verbs that they answer.

    model.hidden(batch) -> (B,T,D)    model.head(hidden) -> (B,T,V)    model(batch) = head(hidden(batch)), the oracle
    model.start(source, batch_size, capacity) -> state                 model.step(token_ids, state, lengths) -> (B,T,D)

The rule that carries generation is SLOT = POSITION: rows are padded on the right, and slot s of a row's memory holds that row's position s.
B batch, T query positions, S source positions, D d_model, V vocabulary.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

IGNORE_INDEX = -100
"""A target that counts for nothing."""


@dataclass(frozen=True)
class Batch:
    """What a model reads, padded on the right. `None` always means "no restriction", so that the fast path never looks at the data."""
    token_ids: Tensor                        # (B,T) integers
    keep: Tensor | None = None               # (B,T) True = real token; None: all are
    positions: Tensor | None = None          # (B,T) None: 0..T-1; packed rows restart at each document
    document_ids: Tensor | None = None       # (B,T) the number of each token's document; None: one document a row
    segment_ids: Tensor | None = None        # (B,T) BERT's sentence A or B; None: all A
    source_ids: Tensor | None = None         # (B,S) what the encoder reads
    source_keep: Tensor | None = None        # (B,S) True = real token; None: all are
    targets: Tensor | None = None            # (B,T) what each position should say; IGNORE_INDEX where nothing is asked

    @property
    def source(self) -> Batch | None:
        """What the encoder reads, as a batch of its own."""
        return None if self.source_ids is None else Batch(self.source_ids, keep=self.source_keep)

    def to(self, device: Any) -> Batch:
        """The same batch on another device."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(self, **moved)


@runtime_checkable
class State(Protocol):
    """A model's memory of B rows. Only `step`, `truncate` and `restore` change it; `select` and `join` return a new one."""
    lengths: list[int]
    """Tokens read so far, a row. Python integers, so that choosing a path never waits for a device."""

    def select(self, rows: Sequence[int]) -> State:
        """These rows, in this order, with repetitions: beams, finished rows, copies of a prefix."""

    def join(self, other: State) -> State:
        """The rows of both: a new request enters a running batch."""

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget what stands behind `lengths[b]` tokens of row b. A recurrent state refuses (RequestError) and goes back to a snapshot."""

    def snapshot(self) -> Any:
        """A mark of this moment."""

    def restore(self, mark: Any) -> None:
        """Back to the mark. RequestError if it is of another state, or was overwritten since."""


class Model(Protocol):
    """What is trained and scored."""

    def hidden(self, batch: Batch) -> Tensor: ...                                     # -> (B,T,D)

    def head(self, hidden: Tensor) -> Tensor: ...                                     # (...,D) -> (...,V)

    def __call__(self, batch: Batch) -> Tensor: ...                                   # -> (B,T,V)


@runtime_checkable
class Generator(Protocol):
    """What generates. `reads_source` is True for encoder-decoders: `start` then wants a source."""
    reads_source: bool
    max_positions: int | None
    """Positions that exist; None where a formula or a recurrence gives as many as are asked for."""

    def head(self, hidden: Tensor) -> Tensor: ...

    def start(self, source: Batch | None, batch_size: int, capacity: int) -> State:
        """An empty state for `batch_size` rows of at most `capacity` tokens."""

    def step(self, token_ids: Tensor, state: Any, lengths: Sequence[int] | None = None) -> Tensor:
        """(B,T) -> (B,T,D). Row b's first `lengths[b]` tokens are real (None: all). RequestError, and the state unmoved, past its capacity."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults are greedy."""
    temperature: float = 0.0                 # 0 = the likeliest token; 1 = the model's own distribution
    top_k: int = 0                           # keep the k likeliest tokens; 0 = all
    top_p: float = 1.0                       # keep the likeliest tokens whose probabilities reach p (nucleus); 1 = all
    min_p: float = 0.0                       # drop tokens below min_p times the likeliest one's probability; 0 = none
    repetition_penalty: float = 1.0          # divides the logits of tokens seen in prompt or answer; 1 = off
    presence_penalty: float = 0.0            # nats taken once from tokens seen in the answer; 0 = off
    frequency_penalty: float = 0.0           # nats taken for each time that a token was seen in the answer; 0 = off
    no_repeat_ngram_size: int = 0            # no n tokens in a row twice, in prompt and answer together; 0 = off
    seed: int = 0                            # of the random numbers; row i of a request draws from (seed, i)


@dataclass(frozen=True)
class Request:
    """What somebody wants written."""
    token_ids: Sequence[int]                 # the prompt; for an encoder-decoder what its decoder begins with
    source_ids: Sequence[int] | None = None  # what the encoder reads
    n: int = 1                               # answers to write, all from one prefill
    max_new_tokens: int = 128                # tokens an answer may have
    min_new_tokens: int = 0                  # tokens before which no stop id may be chosen
    stop_ids: Sequence[int] = ()             # token ids that end an answer (not part of it)
    stop: Sequence[str] = ()                 # strings that end an answer (not part of it); with beams they cut what is finished
    sampling: Sampling = field(default_factory=Sampling)
    n_beams: int = 1                         # answers that are kept side by side; above 1 the best n of them are given, and nothing is drawn
    length_penalty: float = 1.0              # a beam's score is its log-probability / length^this; above 0 favours long answers
    beyond_context: bool = False             # go on past the trained context, where positions allow it


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer, as soon as it is certain."""
    index: int                               # which of the request's n answers
    text: str                                # whole characters only
    token_ids: tuple[int, ...] = ()          # the tokens since the last chunk of this answer
    finish_reason: str | None = None         # stop, length or None while it goes on
    score: float | None = None               # of a beam: its log-probability / length^length_penalty; None without beams
