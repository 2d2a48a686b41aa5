"""Training's bookkeeping: schedules of learning rates, and whether it converges."""

import math
from collections.abc import Callable

import torch

from stages.common.stage import InputError

DIVERGED = 2.0  # times the loss that training began with


def warmup_cosine(steps: int, warmup_fraction: float) -> Callable[[int], float]:
    """Return step -> factor of the learning rate: linear up to 1, then half a cosine down to 0 at `steps`."""
    warmup = math.ceil(warmup_fraction * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)  # not 0: the first step should move, too
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def warmup_times_cosine(learning_rate: float, steps: int, warmup_fraction: float) -> Callable[[int], float]:
    """Return step -> learning rate: half a cosine over all `steps`, times a linear warm-up.

    Unlike that of `warmup_cosine` the cosine begins at the first step, so the peak is below `learning_rate`.
    """

    def rate(step: int) -> float:
        warmup = min(1.0, (step + 1) / (warmup_fraction * steps))
        return learning_rate * warmup * (0.5 * (1 + math.cos(math.pi * step / steps)))

    return rate


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def require_convergence(loss: float, where: str, remedy: str, start: float = math.inf) -> None:
    """InputError if training has diverged: a loss that is not finite, or above twice that of the untrained network (`start`, if known).

    Such a network is no result, whatever becomes of it later. `loss` is a mean over many batches or over held-out data: that of one
    batch may jump. where: of which training, and when; remedy: what the user may do, both for the message.
    """
    if not math.isfinite(loss):
        raise InputError(f"{where}: training diverged, its loss is not finite: {remedy}")
    if loss > DIVERGED * start:
        raise InputError(f"{where}: training diverged, its loss is {loss:.3g} and was {start:.3g} untrained: {remedy}")
