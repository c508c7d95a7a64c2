"""How the learning rate moves: a share of its peak, as a pure function of where the run stands, so that a resumed run needs no memory of it."""
from __future__ import annotations

import math


def cosine(step: int, progress: float, *, warmup_steps: int, floor: float) -> float:
    """Linear warm-up over `warmup_steps` updates, then half a cosine down to `floor` (SGDR, arXiv:1608.03983), as a share of the peak.

    `step` counts from 0; `progress` is the share of the run that is done, 0 to 1.
    """
    decayed = floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return decayed * min(1.0, (step + 1) / max(1, warmup_steps))
