"""What a forecast has to beat while training: averages of weights, a line through them, and NiNo's published forecaster.

Axes: t states, n weights of a tensor, h horizons, p all weights.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear, silu

from stages.common.checkpoints import load_torch
from stages.common.stage import InputError
from stages.common.vectors import Layout
from stages.forecast.layerwise import MEANS, LayerForecaster
from stages.forecast.trajectory import WINDOW, Trajectory

Weights = Float[Tensor, " p"]

NINO_STATES = 5
NINO_KINDS = {"matrix": 1, "bias": 2, "convolution": 3, "norm weight": 4}  # rows of its embedding of layers


class Reader(Protocol):
    """Weights made from those that training goes through; training itself takes no notice of them."""

    def observe(self, step: int, weights: Weights) -> None: ...

    def weights(self) -> Weights | None: ...


class Last:
    """The last weights."""

    def __init__(self) -> None:
        self.last: Weights | None = None

    def observe(self, step: int, weights: Weights) -> None:  # noqa: ARG002 (the protocol's)
        self.last = weights

    def weights(self) -> Weights | None:
        return self.last


class ExponentialAverage:
    """An exponential average over steps (Polyak's; Morales-Brotons et al. 2024, arXiv:2411.18704)."""

    def __init__(self, decay: float) -> None:
        self.decay, self.average = decay, torch.empty(0)

    def observe(self, step: int, weights: Weights) -> None:
        if step == 1:
            self.average = weights.clone()
        self.average.lerp_(weights, 1 - self.decay)

    def weights(self) -> Weights | None:
        return self.average


class LatestAverage:
    """The mean of the latest snapshots (Kaddour 2022, arXiv:2209.14981)."""

    def __init__(self, every: int, snapshots: int) -> None:
        self.every, self.recent = every, deque[Weights](maxlen=snapshots)

    def observe(self, step: int, weights: Weights) -> None:
        if step % self.every == 0:
            self.recent.append(weights.clone())

    def weights(self) -> Weights | None:
        return torch.stack(list(self.recent)).mean(0) if self.recent else None


class Forecast:
    """A forecast of the weights `ahead` snapshots later, from snapshots of the weights, or of their exponential average."""

    def __init__(self, model: LayerForecaster, layout: Layout, every: int, ahead: int, decay: float = 0.0) -> None:
        self.model, self.layout, self.every = model, layout, every
        self.horizon = model.horizons.index(ahead)
        self.average = ExponentialAverage(decay)
        self.first: Weights | None = None
        self.recent = deque[Weights](maxlen=MEANS[-1] + 1)

    def observe(self, step: int, weights: Weights) -> None:
        self.average.observe(step, weights)
        if self.first is None:
            self.first = weights.clone()
        if step % self.every == 0:
            self.recent.append(self.average.average.clone())

    def weights(self) -> Weights | None:
        if len(self.recent) <= WINDOW:
            return None
        run = Trajectory(self.layout, torch.stack([self.first, *self.recent]), None)
        return self.model.predict(run, len(run) - 1)[self.horizon]


@dataclass(frozen=True)
class Line:
    """Each weight's least-squares line through its latest states: the forecast that takes no learning."""

    states: int
    horizons: tuple[int, ...]

    def predict(self, run: Trajectory, t: int) -> Float[Tensor, "h p"]:
        """Return the weights of a run at t + h for every horizon, from its latest snapshots up to t."""
        states = run.weights[t + 1 - self.states : t + 1]
        times = torch.arange(self.states) - (self.states - 1) / 2
        slope = times @ states / times.square().sum()
        return states.mean(0) + (times[-1] + torch.tensor(self.horizons))[:, None] * slope


class Nino:
    """NiNo's published multilayer perceptron (Knyazev et al. 2024, arXiv:2409.04434), which sees each weight's last five states alone."""

    horizons = range(1, 41)

    def __init__(self, path: Path) -> None:
        """InputError if the file is not that checkpoint."""
        state = load_torch(path, {"state_dict"})["state_dict"]
        try:
            self.inlet = state["edge_proj.fc.0.weight"], state["edge_proj.fc.0.bias"]
            self.kinds = state["layer_embed.weight"]
            self.layers = [tuple(state[f"edge_mlp.fc.{2 * i}.{part}"] for part in ("weight", "bias")) for i in range(4)]
        except KeyError as error:
            raise InputError(f"{path}: expected NiNo's nino_mlp.pt, which has {error}") from None

    @staticmethod
    def kind(shape: Sequence[int], is_weight: bool) -> int:
        """Return the row of the embedding for a tensor of this shape."""
        return NINO_KINDS[{1: "norm weight" if is_weight else "bias", 2: "matrix", 4: "convolution"}[len(shape)]]

    @torch.no_grad()
    def ahead(self, states: Float[Tensor, "5 n"], kind: int) -> Float[Tensor, "h n"]:
        """Return a tensor's weights 1 to 40 states later."""
        mean, std = states.mean(), states.std()
        z = ((states - mean) / (std + 1e-6)).T
        x = linear(z, *self.inlet) + self.kinds[kind]
        for i, layer in enumerate(self.layers):
            x = linear(x, *layer)
            x = silu(x) if i < len(self.layers) - 1 else x
        return ((z[:, -1:] + x) * std + mean).T

    def predict(self, run: Trajectory, t: int) -> Float[Tensor, "h p"]:
        """Return the weights of a run at t + h for every horizon, from its latest NINO_STATES snapshots up to t."""
        states = run.weights[t + 1 - NINO_STATES : t + 1]
        places = zip(run.layout.shapes.items(), run.layout.slices.values(), strict=True)
        return torch.cat(
            [
                self.ahead(states[:, where], self.kind(shape, name.endswith("weight")))
                for (name, shape), where in places
            ],
            1,
        )
