"""The machine: device, precision, threads, seeds, folders, logging. The only room that reads the environment.

HANOK_HOME (default ~/.cache/hanok) holds what was pulled and what was computed once.
"""
from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("hanok")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")                           # before the first product: see `deterministic`


def environment(name: str, default: str = "") -> str:
    """An environment variable, trimmed."""
    return os.environ.get(name, default).strip()


def environment_with_prefix(prefix: str) -> dict[str, str]:
    """All environment variables that begin with `prefix`, by their full name."""
    return {name: value for name, value in os.environ.items() if name.startswith(prefix)}


def home() -> Path:
    """hanok's own folder: HANOK_HOME, else hanok in the user's cache folder."""
    named = environment("HANOK_HOME")
    if named:
        return Path(named).expanduser()
    return Path(environment("XDG_CACHE_HOME") or Path.home() / ".cache") / "hanok"


def cache_dir(*parts: str) -> Path:
    """A folder below `home`, made if it is not there."""
    path = home().joinpath("cache", *parts)
    path.mkdir(parents=True, exist_ok=True)
    return path


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's global generators."""
    import numpy as np
    import torch
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Inside, a GPU answers the same to the bit each time: gradients of embeddings and of attention are added up in one order, and kernels are chosen
    without a stopwatch. A CPU does so by itself."""
    import torch
    if device.type != "cuda" or not products_are_deterministic(device):
        yield
        return
    strict, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic                                           # a module with a property
    filled, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warned)
        memory.fill_uninitialized_memory = filled


@cache
def products_are_deterministic(device: torch.device) -> bool:
    """Whether this process may ask so much of its GPU: cuBLAS was told before its first product, above. Says so where it was not."""
    import torch
    strict, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        torch.ones(16, 16, device=device) @ torch.ones(16, 16, device=device)
    except RuntimeError as error:
        if "CUBLAS_WORKSPACE_CONFIG" not in str(error):
            raise
        logger.warning("CUBLAS_WORKSPACE_CONFIG is %s, or was not set when the GPU was first used; a resumed run may differ in its last bits: "
                       "set it to :4096:8, or import hanok first", environment("CUBLAS_WORKSPACE_CONFIG"))
        return False
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warned)
    return True


def device(name: str = "auto") -> torch.device:
    """The named device; `auto` is a CUDA device where there is one, else the CPU."""
    import torch
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def interactive(stream=None) -> bool:
    """Whether a person reads this stream (a terminal)."""
    stream = stream or sys.stderr
    return bool(getattr(stream, "isatty", lambda: False)())


def peak_memory_bytes() -> int:
    """The largest resident memory of this process so far, in bytes."""
    import resource
    kilo = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilo if sys.platform == "darwin" else kilo * 1024


def memory_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may have: the machine's, or what a container (Linux control groups, version 1 or 2) leaves it of them."""
    allowed = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:                                                                   # not Linux
        groups = []
    for _, kinds, path in groups:
        if not kinds:
            top, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in kinds.split(","):
            top, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        folder = top.joinpath(*(part for part in path.split("/") if part not in ("", "..")))      # as the host sees it: it need not be here
        for place in (folder, *folder.parents):
            if not place.is_relative_to(top):
                break
            try:
                allowed.append(int((place / name).read_text()))
            except (OSError, ValueError):                                             # no limit here: there is no file, or it says "max"
                continue
    return min(allowed)
