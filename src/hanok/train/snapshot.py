"""A trainer as tensors and plain data, and back: weights, optimizers, averaged weights, random states, counts.

    model/NAME   ema/NAME   optimizer/I/NAME/KEY   random/torch   random/cuda (where the run is on a GPU)
"""
from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hanok.errors import ConfigError
from hanok.train.distributed import local, own_part

PLAIN = ("step", "tokens", "seconds", "losses", "optimizers", "python", "numpy")


def take(trainer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The trainer's own tensors, by name, and what JSON can hold."""
    tensors = fixed(trainer)
    kinds = []
    for i, optimizer in enumerate(trainer.optimizers):
        named = dict(parameters_of(trainer, i))
        states = {name: optimizer.state[p] for name, p in named.items() if optimizer.state.get(p)}
        tensors |= {f"optimizer/{i}/{name}/{key}": value for name, state in states.items() for key, value in sorted(state.items())
                    if isinstance(value, Tensor)}
        keys = sorted({key for state in states.values() for key, value in state.items() if isinstance(value, Tensor)})
        kinds.append({"kind": type(optimizer).__name__, "keys": keys, "untouched": [name for name in named if name not in states]})
    drawn, dice = chance(trainer.device)
    return {**tensors, **drawn}, {
        "step": trainer.n_steps, "tokens": trainer.n_tokens, "seconds": trainer.seconds, "losses": list(trainer.guard.losses), "optimizers": kinds,
        "shares": list(trainer.shares), **dice}


Chance = tuple[dict[str, Tensor], dict[str, Any]]
"""Every random state: torch's as tensors, those of Python and NumPy as plain data."""


def chance(device: torch.device) -> Chance:
    """Where the random numbers stand."""
    tensors = {"random/torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(device)
    version, words, gauss = random.getstate()
    dice: Any = np.random.get_state(legacy=False)
    return tensors, {"python": [version, list(words), gauss], "numpy": {**dice, "state": {**dice["state"], "key": dice["state"]["key"].tolist()}}}


def set_chance(drawn: tuple[Mapping[str, Tensor], Mapping[str, Any]], device: torch.device) -> None:
    """They go on where `chance` was asked."""
    tensors, plain = drawn
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state({**plain["numpy"], "state": {**plain["numpy"]["state"], "key": np.array(plain["numpy"]["state"]["key"], np.uint32)}})
    torch.set_rng_state(tensors["random/torch"].cpu().clone())
    if device.type == "cuda" and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"].cpu().clone(), device)


def put_back(trainer: Any, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Checks everything, then writes everything."""
    for name in PLAIN:
        if name not in plain:
            raise ConfigError(f"the checkpoint does not tell its {name}; it is of another version, or was changed")
    saved, ours = [part["kind"] for part in plain["optimizers"]], [type(optimizer).__name__ for optimizer in trainer.optimizers]
    if saved != ours:
        raise ConfigError(f"the checkpoint's optimizers are {' and '.join(saved)}, this run's are {' and '.join(ours)}; "
                          "resume with the train.optimizer that it was saved with")
    own = fixed(trainer)
    states = {f"optimizer/{i}/{name}/{key}": (i, p, key) for i, part in enumerate(plain["optimizers"])
              for name, p in parameters_of(trainer, i) if name not in part["untouched"] for key in part["keys"]}
    check(tensors, own, {place: p for place, (_, p, _) in states.items()})
    made = {place: room(tensors[place], p) for place, (_, p, _) in states.items()}
    drawn = {name: torch.empty_like(tensors[name], device="cpu") for name in ("random/torch", "random/cuda") if name in tensors}
    fill({**own, **made, **drawn}, tensors)
    for optimizer in trainer.optimizers:
        optimizer.state.clear()
    for place, (i, p, key) in states.items():
        trainer.optimizers[i].state[p][key] = made[place]
    trainer.n_steps, trainer.n_tokens, trainer.seconds = plain["step"], plain["tokens"], plain["seconds"]
    trainer.shares = list(plain.get("shares", []))
    trainer.guard.losses = deque(plain["losses"], trainer.guard.losses.maxlen)
    set_chance((drawn, plain), trainer.device)


def room(saved: Tensor, p: Tensor) -> Tensor:
    """Where a state of parameter `p` may be put: cut up as `p` is, unless it is a scalar."""
    return torch.empty_like(p, dtype=saved.dtype) if saved.shape == p.shape else torch.empty_like(saved, device=p.device)


@torch.no_grad()
def fill(into: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Writes the tensors, or the parts of them that lie here, into their places; what is only told of yet (`checkpoint.Sharded`) reads itself."""
    if hasattr(tensors, "fill"):
        tensors.fill(into)
        return
    for name, tensor in into.items():
        local(tensor).copy_(own_part(tensors[name], tensor))


def fixed(trainer: Any) -> dict[str, Tensor]:
    """What is there from the first moment on: parameters, buffers, averaged weights."""
    named = [*trainer.model.named_parameters(), *trainer.model.named_buffers()]
    averaged = trainer.average.weights if trainer.average else {}
    return {f"model/{name}": tensor.detach() for name, tensor in named} | {f"ema/{name}": tensor for name, tensor in averaged.items()}


def parameters_of(trainer: Any, i: int) -> Iterator[tuple[str, Tensor]]:
    """The i-th optimizer's parameters by name, in the model's order."""
    taken = {id(p) for group in trainer.optimizers[i].param_groups for p in group["params"]}
    return ((name, p) for name, p in trainer.model.named_parameters() if id(p) in taken)


def check(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> None:
    """ConfigError unless each tensor has a place and each place a tensor of its shape and type; an optimizer's count is a scalar."""
    for name, tensor in [*own.items(), *states.items(), ("random/torch", torch.get_rng_state())]:
        if name not in tensors:
            raise ConfigError(f"the checkpoint has no {name}, which this run needs; resume with the model and recipe that it was saved with")
        shapes = [tuple(tensor.shape), *([()] if name in states else [])]
        if tuple(tensors[name].shape) not in shapes:
            raise ConfigError(f"{name} is {tuple(tensors[name].shape)} in the checkpoint, {shapes[0]} in this run; "
                              "resume with the model and recipe that it was saved with")
        if name in own and tensors[name].dtype != tensor.dtype:
            raise ConfigError(f"{name} is {tensors[name].dtype} in the checkpoint, {tensor.dtype} in this run; resume in the precision of before")
    for name in tensors:
        if name not in own and name not in states and name not in ("random/torch", "random/cuda"):
            raise ConfigError(f"the checkpoint has {name}, for which this run has no place; resume with the model and recipe that it was saved with")
