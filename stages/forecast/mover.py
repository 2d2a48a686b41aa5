"""Training that moves to forecasts of its own weights and asks no validation images, beside the average whose weights to take in the end.

As Knyazev et al. 2024, arXiv:2409.04434, have it for NiNo: states of the weights every so many steps, and once there are enough of
them the weights become those forecast some states ahead, early in training far, late near.

Axes: t states, p weights that are trained.
"""

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from stages.common.released import PROJECT
from stages.common.vectors import Layout
from stages.forecast.layerwise import LayerForecaster
from stages.forecast.released import RELEASED, load_released
from stages.forecast.trajectory import WINDOW, Forecast, Trajectory

EVERY = 140  # steps: one forecast in some 1,000, as NiNo's
HORIZONS = (20, 20, 20, 10, 10, 10, 5, 5, 1, 1)  # states
DECAY = 0.995
PROGRESS = ("steps", "moves", "first", "recent")  # in a state_dict, beside the average


class Forecaster(Protocol):
    """What forecasts a run's weights at t + h from its snapshots up to t."""

    @property
    def horizons(self) -> Sequence[int]: ...

    def predict(self, run: Trajectory, t: int) -> Forecast: ...


class Mover:
    """Moves a model's weights ahead while any optimiser trains it: `step()` after each step of that.

    It keeps the weights after the first step, and then every `every` steps. Once there are `states` of these, the parameters that
    require a gradient and moved meanwhile become what is forecast of them, and states are kept anew. The optimiser, its state and
    schedules are not touched; parameters that are frozen or stand still keep every bit. Nothing is asked whether a move helps: at
    first the loss may rise, and on schedules of two and four times a constant rate one or two of five networks never made up for it.

    `average` is a copy of the model, whose weights to take in the end: the exponential average over steps of weights and of buffers
    that are no integers, moves included (None if decay is 0). Running statistics of batch norm are no weights: a move leaves them
    behind until training renews them, and in the average they are averaged, too; torch.optim.swa_utils.update_bn makes them exact.

    model: the network itself, not what distributes it over processes, of which each makes a mover of its own; all move alike.
    forecaster: on the processor, with weights alone; None is the published one. states: WINDOW + 1 or more for a LayerForecaster.
    horizons: in states, of one forecast after the other, the last one for all that follow.
    """

    def __init__(
        self,
        model: nn.Module,
        forecaster: Forecaster | None = None,
        every: int = EVERY,
        states: int = WINDOW + 1,
        horizons: Sequence[int] = HORIZONS,
        decay: float = DECAY,
    ) -> None:
        """ValueError if it cannot work with one of these."""
        self.forecaster: Forecaster = forecaster or load_released(PROJECT / RELEASED)[0]
        self.model, self.every, self.states, self.horizons, self.decay = model, every, states, tuple(horizons), decay
        self._check()
        self.average = copied(model).eval().requires_grad_(False) if decay else None
        self.steps, self.moves = 0, 0
        self._begin()

    def _check(self) -> None:
        if isinstance(self.forecaster, LayerForecaster):
            if self.forecaster.reads["with_state"]:
                raise ValueError(
                    "expected a forecaster that reads weights alone, got one that reads the optimiser's state"
                )
            if self.states <= WINDOW:
                raise ValueError(f"expected states > {WINDOW}, as many as the forecaster reads, got {self.states}")
        if self.every < 1 or not 0 <= self.decay < 1:
            raise ValueError(f"expected every >= 1 and 0 <= decay < 1, got {self.every} and {self.decay}")
        if not self.horizons or not set(self.horizons) <= set(self.forecaster.horizons):
            raise ValueError(f"expected horizons of {[*self.forecaster.horizons]}, got {[*self.horizons]}")
        if any(hasattr(p, "to_local") for p in self.model.parameters()):
            raise ValueError("parameters are sharded over machines (DTensor), and only whole ones can be moved")
        if any(map(is_lazy, self.model.parameters())):
            raise ValueError("parameters of lazy layers have no shape yet: run the model once before")

    def _begin(self) -> None:
        """Forget all states; what is moved is what is trained now."""
        self.trained = self._trained()
        self.layout = Layout.of(self.trained)
        self.first: Float[Tensor, " p"] | None = None
        self.recent: list[Float[Tensor, " p"]] = []

    def _trained(self) -> dict[str, Tensor]:
        named = self.model.named_parameters()
        return {name: p for name, p in named if p.requires_grad and p.is_floating_point() and p.numel()}

    @torch.no_grad()
    def step(self) -> bool:
        """Take note of a step that the optimiser has made; return whether the weights were moved after it."""
        self.steps += 1
        due = self.steps % self.every == 0
        if due and list(map(id, self._trained().values())) != list(map(id, self.trained.values())):
            self._begin()  # layers were frozen, unfrozen or exchanged
        if self.first is None:
            self.first = self._weights()
        if due and self.trained:
            self.recent.append(self._weights())
        if moved := len(self.recent) == self.states:
            self._move(self.first)
        if self.average is not None:
            self._take_in(self.average)
        return moved

    def _weights(self) -> Float[Tensor, " p"]:
        """Return weights on the processor in float32, or in float64 if some are: no bit of a parameter is lost."""
        double = any(p.dtype == torch.float64 for p in self.trained.values())
        dtype = torch.float64 if double else torch.float32
        return torch.cat(
            [torch.empty(0, dtype=dtype), *(p.reshape(-1).to("cpu", dtype) for p in self.trained.values())]
        )

    def _move(self, first: Float[Tensor, " p"]) -> None:
        states = torch.stack(self.recent)
        run = Trajectory(self.layout, torch.stack([first, *self.recent]).float(), None)
        horizon = self.horizons[min(self.moves, len(self.horizons) - 1)]
        ahead = self.forecaster.predict(run, len(run) - 1)[self.forecaster.horizons.index(horizon)]
        if states.dtype == torch.float64:
            ahead = states[-1] + (ahead - run.weights[-1])
        for p, where in zip(self.trained.values(), self.layout.slices.values(), strict=True):
            if (states[:, where] != states[-1, where]).any():
                p.copy_(ahead[where].view(p.shape))
        self.recent = []
        self.moves += 1

    def _take_in(self, average: nn.Module) -> None:
        """Take weights and buffers as they are now into their average: the first ones as they are, and integers always."""
        share = 1 - self.decay if self.steps > 1 else 1.0
        tensors = ([*model.parameters(), *model.buffers()] for model in (average, self.model))
        for mean, now in zip(*tensors, strict=True):
            if mean.is_floating_point() or mean.is_complex():
                mean.lerp_(now, share)
            else:
                mean.copy_(now)

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on beside the model's and the optimiser's own states: tensors and numbers."""
        average = None if self.average is None else self.average.state_dict()
        shapes = [list(shape) for shape in self.layout.shapes.values()]
        return {name: getattr(self, name) for name in PROGRESS} | {"shapes": shapes, "average": average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; its weights are left out if they are not of the parameters that are trained now.

        ValueError if it has an average and this has none, or the other way round.
        """
        if (state["average"] is None) != (self.average is None):
            raise ValueError("expected a state of a mover with the same decay: one of the two keeps no average")
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self._begin()
        same = state["shapes"] == [list(shape) for shape in self.layout.shapes.values()]
        for name in PROGRESS if same else ("steps", "moves"):
            value = state[name]
            setattr(self, name, list(value) if name == "recent" else value)


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a model; ValueError if it holds tensors that cannot be copied, as torch.nn.utils.weight_norm leaves them."""
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        why = str(error).partition(".")[0]
        raise ValueError(f"the model cannot be copied for its average ({why}): decay=0 keeps none") from None
