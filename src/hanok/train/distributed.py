"""One run on many devices, from outside: which rows are a rank's, and what ranks tell each other. No model and no optimizer knows of it.

ddp: a rank holds the whole model, and gradients are added up behind the last backward pass in buckets that never change, so that a run that goes on
adds in the order of before (torch's DistributedDataParallel lays its buckets out anew behind the first update). fsdp: FSDP2's `fully_shard`; a rank
holds its part of weights, gradients and optimizer, and a block is whole while it is used. What is decided together goes over gloo, as numbers.
"""
from __future__ import annotations

import json
import math
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import count, islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hanok import runtime
from hanok.contracts import IGNORE_INDEX, Batch
from hanok.errors import ConfigError, HanokError
from hanok.nn.stack import Block
from hanok.train.recipe import TrainRecipe

BUCKET = 1 << 23
"""Numbers of gradients that are added up at once."""
PATIENCE = 20.0
"""Seconds that a rank which lost another one waits before it says so: whoever started the ranks shows first what happened there, and ends it."""
FAULT = "\0"
"""What others hear where the first rank's turn ended by no refusal."""
GONE = re.compile(r"gloo|nccl|connection|broken pipe|socket|store|timed out|recvValue", re.I)
"""What a collective says where another rank is gone."""


class RankError(HanokError):
    """Another rank is not there, or not any more."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one model; by default there is no other, and nothing here does anything."""
    rank: int = 0
    n: int = 1
    device: torch.device = torch.device("cpu")
    store: Any = None                                    # torch.distributed.Store, where there are others
    turns: Iterator[int] = count()

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and speaks."""
        return self.rank == 0

    # ---- what ranks tell each other
    def sums(self, *numbers: float) -> list[float]:
        """Each number, added up over all ranks."""
        if self.n == 1:
            return list(numbers)
        told = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(told)
        return told.tolist()

    def same(self, number: float) -> float:
        """The first rank's number: what was measured, everybody decides by alike."""
        return self.sums(number if self.first else 0.0)[0] if self.n > 1 else number

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, which JSON can hold; nobody goes on before all have told theirs."""
        if self.n == 1:
            return [value]
        told = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [int(size) for size in self.sums(*(len(told) if rank == self.rank else 0 for rank in range(self.n)))]
        padded = [torch.zeros(max(sizes), dtype=torch.uint8) for _ in sizes]
        mine = torch.zeros(max(sizes), dtype=torch.uint8)
        mine[:len(told)] = told
        dist.all_gather(padded, mine)
        return [json.loads(bytes(text[:size].tolist())) for text, size in zip(padded, sizes)]

    def share(self, value: Any) -> Any:
        """The first rank's value."""
        return self.gather(value if self.first else None)[0]

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first rank alone; the others when it is through, however long that takes. What it refuses, all refuse."""
        name, refused = f"hanok/turn/{next(self.turns)}", ""
        if not self.first:
            while not self.store.check([name]):
                time.sleep(0.05)
            refused = self.store.get(name).decode()
            if refused == FAULT:
                time.sleep(PATIENCE)
                raise RankError(f"rank {self.rank} of {self.n} waited for rank 0, which ended; what ended it is told there")
            if refused:
                raise HanokError(refused)
        try:
            yield
        except HanokError as error:
            refused = str(error)
            raise
        except BaseException:
            refused = FAULT
            raise
        finally:
            if self.first and self.n > 1:
                self.store.set(name, refused)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, the loss of another rank is a RankError, told late, so that what happened there is told first."""
        try:
            yield
        except RuntimeError as error:
            if self.n == 1 or not (isinstance(error, dist.DistError) or GONE.search(str(error))):
                raise
            time.sleep(PATIENCE)
            reason = next(iter(str(error).splitlines()), "")
            raise RankError(f"rank {self.rank} of {self.n} lost another rank ({reason[:200]}); what ended that one is told there") from None

    def leave(self) -> None:
        """Behind the last word."""
        if self.n > 1:
            self.gather(None)
            dist.destroy_process_group()

    # ---- the rows
    def part_of(self, recipe: TrainRecipe, batch_tokens: int = 0) -> TrainRecipe:
        """The recipe as this rank follows it: an update's micro_batch_size x grad_accum_steps rows are dealt, at most micro_batch_size a forward.

        ConfigError where they cannot be dealt evenly.
        """
        rows, steps = recipe.micro_batch_size, recipe.grad_accum_steps
        if batch_tokens and steps % self.n:
            raise ConfigError(f"train.grad_accum_steps is {steps}, which {self.n} ranks cannot share evenly, and data.batch_tokens makes batches "
                              f"that are not split; set it to a multiple of {self.n}")
        if rows * steps % self.n:
            raise ConfigError(f"an update has {rows} x {steps} = {rows * steps} rows (train.micro_batch_size x train.grad_accum_steps), which "
                              f"{self.n} ranks cannot share evenly; make it a multiple of {self.n}")
        mine = rows * steps // self.n
        rows = rows if batch_tokens else next(size for size in range(min(rows, mine), 0, -1) if mine % size == 0)
        return replace(recipe, micro_batch_size=rows, grad_accum_steps=mine // rows)

    def deal(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Every n-th batch. All ranks get as many, since FSDP2's forwards are made together: what lacks is one that asks nothing."""
        source = iter(batches)
        while group := list(islice(source, self.n)):
            if self.rank < len(group):
                yield group[self.rank]
            else:
                assert group[0].targets is not None
                yield replace(group[0], targets=torch.full_like(group[0].targets, IGNORE_INDEX))

    def all_rows(self, carried: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The recurrent state of all ranks, in the order of the streams (`data.streams` deals them in turn)."""
        if self.n == 1:
            return dict(carried)
        whole = {}
        for name, tensor in carried.items():
            parts = [torch.empty_like(tensor) for _ in range(self.n)]
            dist.all_gather(parts, tensor.contiguous())
            whole[name] = torch.stack(parts, rows_at(name) + 1).flatten(rows_at(name), rows_at(name) + 1)
        return whole

    def own_rows(self, carried: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of it. ConfigError where the rows do not divide."""
        for name, tensor in carried.items():
            if tensor.size(rows_at(name)) % self.n:
                raise ConfigError(f"the saved recurrent state has {tensor.size(rows_at(name))} rows, which {self.n} ranks cannot share evenly")
        return {name: tensor.unflatten(rows_at(name), (-1, self.n)).select(rows_at(name) + 1, self.rank) for name, tensor in carried.items()}

    # ---- the model
    def place(self, model: nn.Module, parallel: str) -> nn.Module:
        """The model on this rank's device; fsdp: this rank's part of it, whose `hidden` gathers what it needs."""
        model = model.to(self.device)
        if self.n > 1 and parallel == "fsdp":
            shard(model, self.device, self.n)
        return model

    def add_up(self, parameters: Sequence[Tensor]) -> None:
        """ddp: every gradient becomes the sum over all ranks. FSDP2 has done so already."""
        if self.n == 1 or is_sharded(parameters):
            return
        for bucket in buckets([p.grad for p in parameters if p.grad is not None]):
            flat = torch.cat([grad.reshape(-1) for grad in bucket])
            dist.all_reduce(flat)
            for grad, total in zip(bucket, flat.split([grad.numel() for grad in bucket])):
                grad.copy_(total.view_as(grad))

    def agreed(self, loss: float, norm: float, sharded: bool) -> tuple[float, float]:
        """The loss of all rows and the norm of the whole gradient, the same numbers on every rank."""
        if self.n == 1:
            return loss, norm
        loss, norm = self.sums(loss, norm * norm if sharded else norm * self.first)
        return loss, math.sqrt(norm) if sharded else norm

    def own_chance(self, seed: int, step: int = 0) -> None:
        """Ranks behind the first draw random numbers (dropout's) of their own; the first draws what one process would."""
        if not self.first:
            runtime.seed_everything((seed * 1_000_003 + step * 8_191 + self.rank) % 2 ** 63)


ALONE = Ranks()


def join() -> Ranks:
    """The ranks that torchrun, or `--nproc`, started (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); one process, where nobody did.

    RankError where the others do not come within HANOK_RENDEZVOUS_SECONDS (300).
    """
    n = number("WORLD_SIZE", 1)
    if n == 1:
        return Ranks(device=runtime.device())
    rank = number("RANK")
    local, port, seconds = number("LOCAL_RANK", rank), number("MASTER_PORT"), number("HANOK_RENDEZVOUS_SECONDS", 300)
    address = runtime.environment("MASTER_ADDR")
    if not 0 <= rank < n or not address:
        raise ConfigError(f"RANK is {rank}, WORLD_SIZE {n}, MASTER_ADDR {address or 'missing'}; torchrun sets them, and so does --nproc")
    if not 0 < port < 65536:
        raise ConfigError(f"MASTER_PORT is {port}; expected 1 to 65535")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise ConfigError(f"rank {rank} is the {local + 1}th of this machine, which has {torch.cuda.device_count()} GPUs; start as many ranks")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    there, wait, until = f"{address}:{port}", timedelta(seconds=seconds), time.monotonic() + seconds
    advice = "start all of them within that time and check MASTER_ADDR, MASTER_PORT and the firewall (HANOK_RENDEZVOUS_SECONDS waits longer)"
    try:
        if rank > 0 or runtime.environment("TORCHELASTIC_USE_AGENT_STORE") == "True":
            wait_for(address, port, until)
        store, _, _ = next(dist.rendezvous("env://", rank, n, timeout=wait))
    except (RuntimeError, ValueError, OSError) as error:
        if rank == 0 and "listen" in str(error):
            raise RankError(f"rank 0 of {n} cannot listen at {there}: another process does, or it may not; set another MASTER_PORT") from None
        told = "waited for the others" if rank == 0 else "cannot reach rank 0"
        raise RankError(f"rank {rank} of {n} {told} at {there} for {seconds} s, in vain; {advice}") from None
    names = [f"hanok/here/{other}" for other in range(n)]
    store.set(names[rank], "here")
    try:
        store.wait(names, wait)
    except RuntimeError:
        missing = [str(other) for other, name in enumerate(names) if not store.check([name])]
        raise RankError(f"rank {rank} of {n} waited {seconds} s at {there} for rank {', '.join(missing)}, in vain; {advice}") from None
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=n)
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), "")
        raise RankError(f"rank {rank} of {n} cannot talk with the others ({reason[:200]}); check the firewall between them, and the network "
                        "interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)") from None
    return Ranks(rank, n, device, store)


def wait_for(address: str, port: int, until: float) -> None:
    """Returns when somebody listens there; OSError where nobody does until then. The store that is asked next tells its failures in pages."""
    while True:
        try:
            socket.create_connection((address, port), timeout=max(0.1, until - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() + 0.1 > until:
                raise
            time.sleep(0.1)


def number(name: str, default: int | None = None) -> int:
    """A whole number of the environment. ConfigError where it is none."""
    told = runtime.environment(name)
    if not told and default is not None:
        return default
    if not told.isdecimal():
        raise ConfigError(f"{name} is {told or 'missing'}; a whole number was expected, which torchrun sets, and so does --nproc")
    return int(told)


# ---- FSDP2 ---------------------------------------------------------------------------------------------------
def shard(model: Any, device: torch.device, n: int) -> None:
    """Cuts a model up in place: each block is a unit, and the rest (embedding, norms, head) one that stays whole from `hidden` to the backward pass,
    so that the loss reads the head's own weights."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(device.type, (n,))
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    units = [part for block in blocks for part in ([block] if block.cross is None else [block.attention, block.ffn])]     # others ask cross, too
    for unit in (*units, model):
        fully_shard(unit, mesh=mesh)
    for unit in (*units, model):                          # sums: the loss is divided by the targets of all ranks already
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)      # gloo knows no other
    register_fsdp_forward_method(model, "hidden")


def reshard(model: Any) -> None:
    """Behind a forward without a backward pass: what was gathered is let go, before a parameter changes."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def is_sharded(tensors: Iterable[Any]) -> bool:
    """Whether these are parts of larger tensors (DTensor)."""
    return any(hasattr(tensor, "to_local") for tensor in tensors)


def local(tensor: Any) -> Tensor:
    """What of it lies here, without a copy."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def own_part(whole: Tensor, like: Any) -> Tensor:
    """The part of a whole tensor that lies here of one that is cut up as `like` is."""
    if not hasattr(like, "to_local"):
        return whole
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    sizes, starts = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return whole[tuple(slice(start, start + size) for start, size in zip(starts, sizes))]


def whole_of(part: Tensor, like: Any) -> Tensor:
    """The whole of which every rank has a part, cut up as `like` is; all ranks ask for it together."""
    if not hasattr(like, "to_local"):
        return part
    from torch.distributed.tensor import DTensor
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()).full_tensor()


def rows_at(name: str) -> int:
    """The dimension of a recurrent state's rows: cells are (L,B,D), documents (B,)."""
    return 1 if name.startswith("cells/") else 0


def buckets(grads: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """In order, of one type each and of about BUCKET numbers."""
    bucket: list[Tensor] = []
    size = 0
    for grad in grads:
        if bucket and (size + grad.numel() > BUCKET or grad.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(grad)
        size += grad.numel()
    if bucket:
        yield bucket


# ---- places in the data, whatever the number of ranks --------------------------------------------------------
def for_all(saved: Mapping[str, Any], mine: TrainRecipe, recipe: TrainRecipe) -> dict[str, Any]:
    """A place in the batches as one process would tell it: batches are counted in the recipe's micro-batches. `saved` is between two updates."""
    return counted(saved, mine.grad_accum_steps, recipe.grad_accum_steps, recipe.micro_batch_size)


def for_one(saved: Mapping[str, Any], mine: TrainRecipe, recipe: TrainRecipe, loader: Mapping[str, Any]) -> dict[str, Any]:
    """The way back, for a loader that tells its own sizes."""
    if saved["loader"].get("global_batch_size") != recipe.micro_batch_size:               # another run's: the loader says so
        return counted(saved, recipe.grad_accum_steps, mine.grad_accum_steps, None)
    return counted(saved, recipe.grad_accum_steps, mine.grad_accum_steps, loader.get("global_batch_size"))


def counted(saved: Mapping[str, Any], before: int, after: int, rows: int | None) -> dict[str, Any]:
    """`saved` with updates of `after` batches in place of `before`; a loader of windows deals `rows` at a time."""
    place = dict(saved["loader"])
    if rows is not None and "window" in place:
        place["global_batch_size"] = rows
    if before == after:
        return {**saved, "loader": place}
    updates = {batch // before for batch in saved["skipped"]}
    return {**saved, "number": saved["number"] * after // before, "skipped": sorted(u * after + i for u in updates for i in range(after)),
            "loader": place}
