"""Forecasts used while training: an optimiser that now and then jumps to better weights, if a validation batch agrees."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stages.forecast.jump import JumpForecaster
from stages.forecast.regimes import optimizer_direction
from stages.forecast.trajectory import HISTORY, WINDOW, Layout, Trajectory

PROPOSALS = ("stay", "average", "jump")


class NowcastOptimizer:
    """A drop-in around any torch.optim optimiser, for any model: `step()` steps, and proposes other weights now and then.

    Every `every` steps it takes a snapshot. After every WINDOW + 1 of them it proposes to stay, to move to their mean (latest
    weight averaging), or to jump where the forecaster says, and takes what `validation_loss` likes best. A move starts the
    snapshots anew. A proposal is not worth its cost if the loss falls by less than training would have made it fall for as many steps,
    going by the loss since the proposal before; after `patience` such proposals in a row it switches itself off, and is then the bare
    optimiser. Learning-rate schedulers belong to the bare one, `self.optimizer`.

    forecaster: of tune_jump; None proposes the mean alone. validation_loss: returns the model's loss, as it is now, on
    images that it is not trained on, the same at every call of a proposal. evaluation_cost, forecast_cost: in optimiser steps;
    `charged_steps` counts what was spent on them.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        forecaster: JumpForecaster | None,
        validation_loss: Callable[[], float],
        every: int,
        patience: int = 3,
        evaluation_cost: float = 0.0,
        forecast_cost: float = 0.0,
    ) -> None:
        if every < 1 or patience < 1:
            raise ValueError(f"expected positive every and patience, got {every} and {patience}")
        self.optimizer, self.forecaster, self.validation_loss = optimizer, forecaster, validation_loss
        self.every, self.patience = every, patience
        self.evaluation_cost, self.forecast_cost = evaluation_cost, forecast_cost
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.layout = Layout({str(i): tuple(p.shape) for i, p in enumerate(self.parameters)})
        self.start: tuple[Tensor, Tensor] | None = None
        self.recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=HISTORY)  # weights and the optimiser's direction
        self.steps, self.strikes, self.charged_steps = 0, 0, 0.0
        self.last: tuple[int, float] | None = None  # step and loss after the proposal before
        self.chosen: list[str] = []  # of PROPOSALS, one for each time that it proposed

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The bare optimiser's."""
        return self.optimizer.param_groups

    @property
    def on(self) -> bool:
        """Whether it still proposes."""
        return self.strikes < self.patience

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a step of the bare optimiser, then perhaps a snapshot, then perhaps a move."""
        if self.start is None:
            self.start = self._snapshot()
        loss = self.optimizer.step(closure)
        self.steps += 1
        if self.on and self.steps % self.every == 0:
            self.recent.append(self._snapshot())
            if self.steps // self.every % (WINDOW + 1) == 0:
                self._propose()
        return loss

    @torch.no_grad()
    def _propose(self) -> None:
        now, _ = self.recent[-1]
        weights, states = (torch.stack(part) for part in zip(self.start, *self.recent, strict=True))
        candidates = {"stay": now, "average": weights[-WINDOW - 1 :].mean(0)}
        if self.forecaster is not None:
            candidates["jump"] = self.forecaster.propose(Trajectory(self.layout, weights, states), len(weights) - 1)
        losses = {}
        for name, candidate in candidates.items():
            self._move(candidate)
            losses[name] = self.validation_loss()
        best = min(losses, key=losses.__getitem__)
        self._move(candidates[best])
        self.chosen.append(best)
        spent = self.evaluation_cost * len(candidates) + self.forecast_cost * ("jump" in candidates)
        worth = losses["stay"] - losses[best] > spent * self._progress(losses["stay"])
        self.strikes = 0 if worth else self.strikes + 1
        self.charged_steps += spent
        self.last = (self.steps, losses[best])
        if best != "stay":
            self.recent.clear()  # the path before the move says nothing of the one after it

    def _progress(self, loss: float) -> float:
        """Return by how much training lowered the loss in a step since the proposal before; 0 if it did not."""
        if self.last is None:
            return 0.0
        step, before = self.last
        return max(0.0, (before - loss) / (self.steps - step))

    def _snapshot(self) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
        weights = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        return weights, optimizer_direction(self.optimizer)

    def _move(self, weights: Float[Tensor, " p"]) -> None:
        for parameter, part in zip(self.parameters, self.layout.unflatten(weights).values(), strict=True):
            parameter.copy_(part)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that is needed to go on: the bare optimiser's state, the snapshots, what was chosen."""
        own = {name: getattr(self, name) for name in ("start", "steps", "strikes", "charged_steps", "last", "chosen")}
        return {"optimizer": self.optimizer.state_dict(), "nowcast": own | {"recent": list(self.recent)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; the model's weights are the model's own. KeyError if it is another optimiser's."""
        own = dict(state["nowcast"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.recent = deque(own.pop("recent"), maxlen=HISTORY)
        for name, value in own.items():
            setattr(self, name, list(value) if name == "chosen" else value)
