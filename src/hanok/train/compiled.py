"""torch.compile where it pays, and the plain model where it fails."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from hanok.contracts import Batch
from hanok.errors import HanokError
from hanok.runtime import logger
from hanok.train.distributed import is_sharded

Hidden = Callable[[Batch], Tensor]


def hidden_of(model: Any, mode: Literal["auto", "on", "off"], device: torch.device) -> Hidden:
    """model.hidden, compiled where `mode` says so; auto: on a GPU. What FSDP2 gathers as it goes is not compiled."""
    wanted = mode == "on" or mode == "auto" and device.type == "cuda"
    if wanted and is_sharded(model.parameters()):
        if mode == "on":
            logger.warning("train.compile is on and train.parallel fsdp; training goes on without torch.compile")
        return model.hidden
    return Compiled(model.hidden) if wanted else model.hidden


class Compiled:
    """A compiled function that becomes the plain one, and says so once, where compilation fails."""

    def __init__(self, plain: Hidden):
        self.plain = plain
        self.fast: Hidden | None = None                  # made at the first call: the compiler takes seconds to load

    def __call__(self, batch: Batch) -> Tensor:
        try:
            self.fast = self.fast or torch.compile(self.plain)
            return self.fast(batch)
        except HanokError:
            raise
        except Exception as error:
            hidden = self.plain(batch)                   # a mistake of the model's own is raised here
            self.gives_up(error)
            return hidden

    def gives_up(self, error: Exception) -> bool:
        """The plain function from here on, where the error may be the compiler's; it may come as late as in the backward pass."""
        if self.fast is self.plain or isinstance(error, HanokError):
            return False
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        logger.warning("torch.compile failed (%s); training goes on without it", reason)
        self.fast = self.plain
        return True
