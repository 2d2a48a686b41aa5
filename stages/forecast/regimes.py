"""How runs are optimised, and what of an optimiser's state a forecaster reads."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor

from stages.common.optim import warmup_cosine
from stages.common.stage import StageParams

State = dict[str, Any]  # what an optimiser keeps of a parameter, of a group of them, or of all: values by name

MOMENTUM = 0.9  # of SGD


class Regime(StageParams):
    """How a run is optimised."""

    optimizer: Literal["adam", "sgd"]  # SGD with MOMENTUM
    learning_rate: PositiveFloat
    schedule: Literal["constant", "cosine"]


def build_optimizer(
    parameters: Iterable[Tensor], regime: Regime, steps: int
) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
    """Return the regime's optimiser, and its schedule: step -> factor of the learning rate."""
    if regime.optimizer == "adam":
        optimizer = torch.optim.Adam(parameters, lr=regime.learning_rate, fused=True)
    else:
        optimizer = torch.optim.SGD(parameters, lr=regime.learning_rate, momentum=MOMENTUM, fused=True)
    return optimizer, warmup_cosine(steps, 0.0) if regime.schedule == "cosine" else lambda _: 1.0


def knows_direction(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `direction` can read this optimiser's state: torch's Adam and its kin, Muon, SGD with momentum in every group."""
    if isinstance(optimizer, torch.optim.SGD):
        return all(group["momentum"] > 0 for group in optimizer.param_groups)
    return isinstance(optimizer, (torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Muon))


def direction(parameter: Tensor, state: State, group: State) -> Tensor:
    """Return the next step of a parameter before its learning rate, from its optimiser's state and group, or zeros.

    That is m / sqrt(v) of Adam, which keeps a second moment v of each weight's gradient, and the momentum of SGD and of Muon (before
    it is made orthogonal), which keep the first, m, alone. It is zero where there is no such state, as before the first step.
    """
    if "exp_avg" in state and "exp_avg_sq" in state:
        beta1, beta2 = group["betas"]
        mean = state["exp_avg"] / (1 - beta1 ** state["step"])
        square = state["exp_avg_sq"] / (1 - beta2 ** state["step"])
        return mean / (square.sqrt() + group["eps"])
    if state.get("momentum_buffer") is not None:
        return state["momentum_buffer"]
    return torch.zeros_like(parameter)


def optimizer_direction(optimizer: torch.optim.Optimizer) -> Float[Tensor, " p"]:
    """Return the `direction` of all parameters as one vector."""
    directions = [
        direction(parameter, optimizer.state.get(parameter, {}), group).flatten()
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    return torch.cat(directions).detach()
