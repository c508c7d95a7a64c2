"""How the learning rate moves: a share of its peak, as a pure function of where the run stands, so that a resumed run needs no memory of it.

`step` counts updates from 0; `progress` is the share of the run that is done, 0 to 1, by updates or by time.
"""
from __future__ import annotations

import math

from hanok.train.recipe import TrainRecipe


def share(recipe: TrainRecipe, step: int, progress: float) -> float:
    """The recipe's schedule, as a share of each peak."""
    if recipe.schedule == "noam":
        return noam(step, warmup_steps=recipe.warmup_steps)
    if recipe.schedule == "wsd":
        return wsd(step, progress, warmup_steps=recipe.warmup_steps, decay=recipe.decay, floor=recipe.floor)
    return cosine(step, progress, warmup_steps=recipe.warmup_steps, floor=recipe.floor)


def warmed(step: int, warmup_steps: int) -> float:
    """A line from 1/warmup_steps to 1, which it reaches at the last update of the warm-up."""
    return min(1.0, (step + 1) / max(1, warmup_steps))


def until_peak(step: int, progress: float, warmup_steps: int) -> float:
    """The share of the run that its warm-up takes: by updates exactly, by time at the mean pace so far; until its end all of `progress`."""
    return progress * min(1.0, warmup_steps / step if step else 1.0)


def cosine(step: int, progress: float, *, warmup_steps: int, floor: float) -> float:
    """Linear warm-up over `warmup_steps` updates, then, from the peak on, half a cosine down to `floor` (SGDR, arXiv:1608.03983)."""
    progress = min(1.0, progress)
    begin = until_peak(step, progress, warmup_steps)
    behind = (progress - begin) / (1 - begin) if begin < progress else 0.0
    return warmed(step, warmup_steps) * (floor + (1 - floor) * (1 + math.cos(math.pi * behind)) / 2)


def wsd(step: int, progress: float, *, warmup_steps: int, decay: float, floor: float) -> float:
    """Warm-up, stable, decay: a trapezoid whose last `decay` of the run, or all behind the peak, is a line down to `floor` (arXiv:2404.06395,
    2405.18392)."""
    progress = min(1.0, progress)
    falls = min(decay, 1 - until_peak(step, progress, warmup_steps))
    return warmed(step, warmup_steps) * (floor + (1 - floor) * min(1.0, (1 - progress) / falls if falls else 1.0))


def noam(step: int, *, warmup_steps: int) -> float:
    """Linear warm-up, then 1/sqrt(update) ("Attention Is All You Need", arXiv:1706.03762, eq. 3), over its peak, which stands where both meet."""
    update, warmup = step + 1, max(1, warmup_steps)
    return min(update / warmup, math.sqrt(warmup / update))
