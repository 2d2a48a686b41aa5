"""Schedules of learning rates."""

import math
from collections.abc import Callable


def warmup_cosine(steps: int, warmup_fraction: float) -> Callable[[int], float]:
    """Return step -> factor of the learning rate: linear up to 1, then half a cosine down to 0 at `steps`."""
    warmup = math.ceil(warmup_fraction * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)  # not 0: the first step should move, too
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor
