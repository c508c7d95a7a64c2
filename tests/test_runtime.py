"""What a process may have of a machine's memory, told by a made-up /proc and /sys."""
from __future__ import annotations

import os
from pathlib import Path

import pytest

from hanok import runtime

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"


def machine(root: Path, groups: str | None, **limits: str) -> Path:
    """A root folder with these lines in /proc/self/cgroup and these limits."""
    for name, told in {**({} if groups is None else {"proc/self/cgroup": groups}), **limits}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(told)
    return root


@pytest.mark.parametrize("groups, limits, expected", [
    (None, {}, MACHINE),                                                              # not Linux
    ("0::/\n", {}, MACHINE),                                                          # no container
    ("0::/\n", {f"{V2}/memory.max": "max\n"}, MACHINE),
    ("0::/\n", {f"{V2}/memory.max": "1048576\n"}, 1 << 20),                           # a container that sees itself as the root
    ("0::/a/b\n", {f"{V2}/a/b/memory.max": "max\n", f"{V2}/a/memory.max": "2097152\n"}, 2 << 20),     # the limit of what it lies in
    ("0::/a/b\n", {f"{V2}/a/b/memory.max": "1048576\n", f"{V2}/a/memory.max": "2097152\n"}, 1 << 20),
    ("0::/../../x\n", {f"{V2}/memory.max": "1048576\n"}, 1 << 20),                    # a path that is another's
    ("5:cpu:/a\n4:memory:/a\n0::/\n", {f"{V1}/a/memory.limit_in_bytes": "1048576\n", f"{V1}/memory.limit_in_bytes": f"{1 << 62}\n"}, 1 << 20),
    ("4:cpu,memory:/docker/id\n", {f"{V1}/memory.limit_in_bytes": "1048576\n"}, 1 << 20),
    ("4:memory:/\n", {f"{V1}/memory.limit_in_bytes": f"{1 << 62}\n"}, MACHINE),       # version 1 spells "no limit" so
])
def test_the_least_limit_counts(groups, limits, expected, tmp_path):
    assert runtime.memory_bytes(machine(tmp_path, groups, **limits)) == expected


def test_a_limit_above_the_machines_memory_is_none(tmp_path):
    assert runtime.memory_bytes(machine(tmp_path, "0::/\n", **{f"{V2}/memory.max": str(2 * MACHINE)})) == MACHINE


def test_here_there_is_some():
    assert 0 < runtime.memory_bytes() <= MACHINE
