"""What surrounds a long run: batches that can be gone past and found again, and signals that wait for the end of an update.

A signal in the middle of an update would leave half of the weights moved; so the first one only asks. What sends one often sends it twice (a shell to
its group, a supervisor), so an echo is let go by, and only a third, or one that comes after seconds, insists.
"""
from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, Protocol

from hanok.contracts import Batch

PLACES = ("epoch", "window", "step", "batch")
"""What loaders call a place in their order."""


class Loader(Protocol):
    """An endless line of batches that knows its place."""

    def __next__(self) -> Batch: ...

    def state(self) -> Mapping[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


class Batches:
    """A loader whose batches are numbered from 0; those that made a loss diverge are drawn and given to nobody."""

    def __init__(self, loader: Loader, at_a_time: int = 1):
        self.loader, self.n_drawn = loader, 0
        self.skipped: set[int] = set()
        self.latest: deque[int] = deque(maxlen=at_a_time)    # numbers of the batches of the latest update
        self.places: deque[dict[str, Any]] = deque(maxlen=at_a_time)     # and where they were drawn

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.places.append(self.saved())
        while self.n_drawn in self.skipped:
            next(self.loader)
            self.n_drawn += 1
        batch = next(self.loader)
        self.latest.append(self.n_drawn)
        self.n_drawn += 1
        return batch

    def skip_latest(self) -> None:
        """The batches of the latest update will not be given again."""
        self.skipped.update(self.latest)

    def give_back(self) -> None:
        """The batches of the latest update will be drawn once more (and given, unless they are skipped)."""
        if self.places:
            self.restore(self.places[0])

    def state(self) -> dict[str, int]:
        """The next batch's place, in few words for people."""
        told = self.loader.state()
        return {"number": self.n_drawn, **{name: told[name] for name in PLACES if name in told}}

    def saved(self) -> dict[str, Any]:
        """The next batch's place as a checkpoint keeps it."""
        return {"number": self.n_drawn, "skipped": sorted(self.skipped), "loader": dict(self.loader.state())}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Back to where `saved` was taken; what was skipped since stays skipped. ConfigError where the loader is another."""
        self.loader.restore(saved["loader"])
        self.n_drawn, self.skipped = saved["number"], self.skipped | set(saved["skipped"])


class Terminated(KeyboardInterrupt):
    """SIGTERM: the same as Ctrl-C, said by another program."""


class Signals:
    """Inside, Ctrl-C and SIGTERM ask to leave: `leave_if_asked` raises between two updates, and there is time for a checkpoint.

    A third one, or another after `patience` seconds, raises wherever it comes (`insisted`).
    """
    NAMES = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, patience: float = 5.0) -> None:
        self.patience = patience
        self.asked: type[KeyboardInterrupt] | None = None
        self.heard: list[float] = []                                 # when each came, in seconds
        self.insisted = False
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():    # nobody else may
            self.before = {name: signal.signal(name, self.hear) for name in self.NAMES if signal.getsignal(name) is not signal.SIG_IGN}
        return self

    def __exit__(self, *exit: object) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def hear(self, number: int, frame: FrameType | None) -> None:
        kind = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        self.heard.append(time.monotonic())
        if self.asked and (len(self.heard) > 2 or self.heard[-1] - self.heard[0] >= self.patience):
            self.insisted = True
            raise kind("left at once, in the middle of an update or of a checkpoint; what the last whole checkpoint holds is what stays")
        self.asked = self.asked or kind

    def leave_if_asked(self, step: object = None) -> None:
        """KeyboardInterrupt, or Terminated, where a signal came."""
        if self.asked is not None:
            raise self.asked
