"""torch.compile where it pays, and the plain function where it fails."""
from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import fields
from functools import cache
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
    """The loss's gradient at the logits: compiled beside a compiled model on a GPU; on CPUs the plain one, which works in place."""
    return Compiled(for_compilers, loss_and_gradient) if device.type == "cuda" and wanted(model, mode, device) else loss_and_gradient


class Compiled:
    """A compiled function that becomes the plain one, and says so once, where compilation fails. `told` is what is compiled, where it is another
    function that answers the same. The compiler's warnings about its own code are silenced in this process."""

    def __init__(self, told: Callable[..., Any], plain: Callable[..., Any] | None = None):
        self.told, self.plain = told, plain or told
        self.fast: Callable[..., Any] | None = None      # made at the first call: the compiler takes seconds to load

    def __call__(self, *args: Any) -> Any:
        try:
            if self.fast is None:
                self.fast = compiled(self.told)
            for arg in args:
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


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By torch's own compiler, to kernels that are chosen without a stopwatch and add in a fixed order, where this torch can be asked for that."""
    import torch._inductor.config as inductor
    warnings.filterwarnings("ignore", module=r"torch\._(dynamo|inductor|functorch)")
    keep_embeddings_whole()
    return torch.compile(function, options={"deterministic": True} if hasattr(inductor, "deterministic") else None)


@cache
def keep_embeddings_whole() -> None:
    """The compiler leaves an embedding's gradient to torch's own kernel, as it does on Intel's GPUs. Its own adds by atomics, in any order; asked for
    a fixed one, it adds all places of a token one after the other, which for T5's few relative positions are a hundred thousand."""
    gradient = torch.ops.aten.embedding_dense_backward
    try:
        from torch._inductor import decomposition, lowering
        for op in (gradient, gradient.default):
            decomposition.decompositions.pop(op, None)
        decomposition.fast_random_decomps.cache_clear()  # made of them
        if gradient.default not in lowering.fallbacks:
            lowering.make_fallback(gradient, warn=False)
    except (ImportError, AttributeError, AssertionError):                             # another torch: as it chooses
        return


def fix_sizes(told: Any) -> None:
    """Packed rows are of one length in all batches, and a chunk of the loss has one of few sizes. That another one came before is no reason to
    compile for any: that is slower, flex attention's blocks (torch 2.11) fail under it, and a run that goes on would add in another order."""
    if isinstance(told, Batch):
        parts = [getattr(told, field.name) for field in fields(told)] if told.document_ids is not None else []
    else:
        parts = [told]
    for tensor in parts:
        if isinstance(tensor, Tensor):
            torch._dynamo.mark_static(tensor)


def forget() -> None:
    """All that was compiled in this process: what comes is compiled for its own sizes, and no limit of the compiler's, beyond which it silently does
    nothing, has been reached."""
    torch.compiler.reset()
