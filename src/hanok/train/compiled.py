"""torch.compile where it pays, and the plain function where it fails."""
from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from hanok.contracts import Batch
from hanok.errors import HanokError
from hanok.nn.loss import Gradient, for_compilers, loss_and_gradient
from hanok.runtime import logger
from hanok.train.distributed import is_sharded

Hidden = Callable[[Batch], Tensor]
Mode = Literal["auto", "on", "off"]


def wanted(model: Any, mode: Mode, device: torch.device) -> bool:
    """auto: on a GPU. What FSDP2 gathers as it goes is not compiled."""
    return (mode == "on" or mode == "auto" and device.type == "cuda") and not is_sharded(model.parameters())


def hidden_of(model: Any, mode: Mode, device: torch.device) -> Hidden:
    """model.hidden, compiled where `mode` says so."""
    if mode == "on" and is_sharded(model.parameters()):
        logger.warning("train.compile is on and train.parallel fsdp; training goes on without torch.compile")
    return Compiled(model.hidden) if wanted(model, mode, device) else model.hidden


def gradient_of(model: Any, mode: Mode, device: torch.device) -> Gradient:
    """The loss's gradient at the logits: compiled beside a compiled model on a GPU. CPUs are as fast without."""
    return Compiled(for_compilers, loss_and_gradient) if device.type == "cuda" and wanted(model, mode, device) else loss_and_gradient


class Compiled:
    """A compiled function that becomes the plain one, and says so once, where compilation fails. `told` is what is compiled, where it is another
    function that answers the same."""

    def __init__(self, told: Callable[..., Any], plain: Callable[..., Any] | None = None):
        self.told, self.plain = told, plain or told
        self.fast: Callable[..., Any] | None = None      # made at the first call: the compiler takes seconds to load

    def __call__(self, *args: Any) -> Any:
        try:
            if self.fast is None:
                warnings.filterwarnings("ignore", module=r"torch\._(dynamo|inductor|functorch)")     # of a compiler about its own code
                self.fast = torch.compile(self.told)
            for arg in args:
                if isinstance(arg, Batch):
                    fix_sizes(arg)
            return self.fast(*args)
        except HanokError:
            raise
        except Exception as error:
            answer = self.plain(*args)                   # a mistake of the model's own is raised here
            self.gives_up(error)
            return answer

    def gives_up(self, error: Exception) -> bool:
        """The plain function from here on, where the error may be the compiler's; it may come as late as in the backward pass."""
        if self.fast is self.plain or isinstance(error, HanokError):
            return False
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        logger.warning("torch.compile failed (%s); training goes on without it", reason)
        self.fast = self.plain
        return True


def fix_sizes(batch: Batch) -> None:
    """Packed rows are of one length in all batches. Another one, of a model that was compiled before, is no reason to compile for any length: that is
    slower, and flex attention's blocks (torch 2.11) fail under it."""
    if batch.document_ids is not None:
        for tensor in (batch.token_ids, batch.document_ids, *(part for part in (batch.positions, batch.targets) if part is not None)):
            torch._dynamo.mark_static(tensor)


def forget() -> None:
    """All that was compiled: what comes then is compiled for its own sizes, and no limit of the compiler's has been reached."""
    torch.compiler.reset()
