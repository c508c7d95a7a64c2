"""How hanok measures: alternate A B A B in one process tree, take the median of paired ratios, print the machine's own matrix rate beside it.

A shared machine swings by a factor of three within minutes, so that absolute times mean little and ratios of neighbours much.
"""
from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

FOREIGN = 0.1
"""Cores that other processes may use during a pair: one busy neighbour costs OpenMP's barriers a factor of four."""


def sgemm_gflops(repeats: int = 5) -> float:
    """Median GFLOP/s of a 1024 x 768 x 3072 fp32 product."""
    a, b = torch.randn(1024, 768), torch.randn(768, 3072)
    a @ b
    return statistics.median(2e-9 * 1024 * 768 * 3072 / seconds(lambda: a @ b) for _ in range(repeats))


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def foreign_cpu_share(begin: tuple[float, float, float]) -> float:
    """How many cores other processes used since `begin` (from `cpu_now`)."""
    when, machine, mine = begin
    later, machine_now, mine_now = cpu_now()
    return ((machine_now - machine) - (mine_now - mine)) / max(1e-9, later - when)


def cpu_now() -> tuple[float, float, float]:
    """(wall, CPU seconds of the whole machine, CPU seconds of this process and of those that it has waited for)."""
    with open("/proc/stat") as stat:
        user, nice, system = map(int, stat.readline().split()[1:4])
    times = os.times()
    return time.perf_counter(), (user + nice + system) / os.sysconf("SC_CLK_TCK"), sum(times[:4])


@dataclass
class Pair:
    """Two measures of the same thing, taken in turn. `more_is_better`: both are rates."""
    name: str
    unit: str
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    sgemm: list[float] = field(default_factory=list)
    foreign: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return statistics.median(a / b for a, b in zip(self.ours, self.theirs))

    def line(self, goal: float | None = None) -> str:
        goal_text = "" if goal is None else f"  goal {goal:.2f}x {'reached' if self.ratio >= goal else 'MISSED'}"
        return (f"{self.name:34s} ours {statistics.median(self.ours):8.1f}  theirs {statistics.median(self.theirs):8.1f} {self.unit:9s} "
                f"ratio {self.ratio:.2f}x of {len(self.ours)} pairs{goal_text}  (sgemm {statistics.median(self.sgemm):.0f} GFLOP/s, "
                f"foreign load {statistics.median(self.foreign):.2f} cores)")


def alternate(name: str, unit: str, ours: Callable[[], float], theirs: Callable[[], float], repeats: int, patience: float = 240.0) -> Pair:
    """Rates of both, in turn. A pair during which other processes were busy is taken again, until `patience` seconds are over."""
    pair, until = Pair(name, unit), time.monotonic() + patience
    while len(pair.ours) < repeats:
        begin = cpu_now()
        sgemm, a, b = sgemm_gflops(3), ours(), theirs()
        foreign = foreign_cpu_share(begin)
        if foreign > FOREIGN and time.monotonic() < until:
            continue
        for kept, value in ((pair.sgemm, sgemm), (pair.ours, a), (pair.theirs, b), (pair.foreign, foreign)):
            kept.append(value)
    return pair
