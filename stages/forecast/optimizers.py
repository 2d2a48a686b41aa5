"""How runs are optimised, and what of an optimiser's state a forecaster reads."""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor

from stages.common.optim import warmup_cosine
from stages.common.stage import StageParams


class Regime(StageParams):
    """How a run is optimised."""

    optimizer: Literal["adam", "sgd"]  # SGD with momentum 0.9
    learning_rate: PositiveFloat
    schedule: Literal["constant", "cosine"]


def build_optimizer(
    parameters: Iterable[Tensor], regime: Regime, steps: int
) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
    """Return the regime's optimiser, and its schedule: step -> factor of the learning rate."""
    if regime.optimizer == "adam":
        optimizer = torch.optim.Adam(parameters, lr=regime.learning_rate, fused=True)
    else:
        optimizer = torch.optim.SGD(parameters, lr=regime.learning_rate, momentum=0.9, fused=True)
    return optimizer, warmup_cosine(steps, 0.0) if regime.schedule == "cosine" else lambda _: 1.0


def optimizer_direction(optimizer: torch.optim.Optimizer) -> Float[Tensor, " p"]:
    """Return the direction of the next step before its learning rate: m / sqrt(v) of Adam, the momentum of SGD.

    Zero where there is no such state, as before the first step.
    """
    directions = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            direction = torch.zeros_like(parameter)
            if "exp_avg" in state and "exp_avg_sq" in state:
                beta1, beta2 = group["betas"]
                mean = state["exp_avg"] / (1 - beta1 ** state["step"])
                square = state["exp_avg_sq"] / (1 - beta2 ** state["step"])
                direction = mean / (square.sqrt() + group["eps"])
            elif state.get("momentum_buffer") is not None:
                direction = state["momentum_buffer"]
            directions.append(direction.flatten())
    return torch.cat(directions).detach()
