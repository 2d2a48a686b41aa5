"""Forecast any network's weights: linearly in each weight's past, by coefficients that a small network reads from its layer.

What a step of stochastic training makes of a weight is mostly noise, and how much of it persists, or is taken back, differs by
optimiser, learning rate, phase, and by the stride of the snapshots; but it is alike for all weights of a layer. The second
moments of a layer's past tell: how deltas correlate with those before them, how far the weights lie from their recent means.
So the coefficients c are a function of these moments, learned over many runs, and a weight's movement is c . x: as cheap as a
linear model, on any network. Examples for it are moments, too: |y - X c|^2 needs X^T X, X^T y and y^T y alone.
Where the optimiser is at hand, its next step is one more feature: what `regimes.direction` makes of its moments.

Axes: t snapshots, n weights of a layer, f features of a weight, h horizons, l layers, s what the network reads of a layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stages.common.randomness import seeded_init
from stages.forecast.trajectory import (
    ORIGIN_GAIN,
    SCALE_WINDOW,
    SMALLEST_SCALE,
    WINDOW,
    Forecast,
    Trajectory,
)

MEANS = (10, 20, 40)  # snapshots before t, with whose mean that at t is compared
FEATURES = WINDOW + len(MEANS) + 2
OTHERS = 8  # what is read of a layer beside correlations and sizes of its features
SAMPLE = 1 << 16  # weights of a layer, of which its moments are taken
EDGE = 3.0  # standard deviations
SMALLEST_SPREAD = 1e-2
CHUNK = 1 << 18  # weights forecast at a time

Index = Int[Tensor, " n"] | slice


@dataclass(frozen=True)
class Units:
    """Sizes of a layer at an origin. movement: root mean square of its last SCALE_WINDOW deltas; direction: that of the optimiser's
    direction at the origin, None if it is not read."""

    movement: Tensor
    direction: Tensor | None


def feature_count(with_state: bool) -> int:
    """Return f: how many features a weight has."""
    return FEATURES + with_state


def read_count(with_state: bool) -> int:
    """Return s: how many numbers are read of a layer, correlations and sizes of its features and others."""
    f = feature_count(with_state)
    return f * (f - 1) // 2 + f + OTHERS


def past_features(run: Trajectory, t: int, index: Index, units: Units) -> Float[Tensor, "f n"]:
    """Return of the weights at `index` their last deltas before t, and their ways from recent means, from zero and from the first
    snapshot, in units of movement; then the optimiser's direction in its own unit, if it is read."""
    past = run.weights[max(0, t - MEANS[-1]) : t + 1, index]
    latest = past[-1]
    deltas = past[-WINDOW - 1 :].diff(dim=0).flip(0)
    rows = [*deltas, *(latest - past[-n - 1 :].mean(0) for n in MEANS)]
    rows += [ORIGIN_GAIN * latest, ORIGIN_GAIN * (latest - run.weights[0, index])]
    features = torch.stack(rows) / units.movement
    if units.direction is None or run.state is None:
        return features
    return torch.cat([features, run.state[t : t + 1, index].float() / units.direction])


def units_of(run: Trajectory, t: int, index: Index, with_state: bool) -> Units:
    """Return the units of a layer with weights at `index`; ValueError if the state is to be read, and the run has none."""
    movement = run.weights[t - SCALE_WINDOW : t + 1, index].diff(dim=0).square().mean().sqrt() + SMALLEST_SCALE
    if not with_state:
        return Units(movement, None)
    if run.state is None:
        raise ValueError("this run has no optimiser's state: use a forecaster that reads weights only")
    return Units(movement, run.state[t, index].float().square().mean().sqrt() + SMALLEST_SCALE)


def reading(moments: Float[Tensor, "f f"], snapshots: int, descriptors: Float[Tensor, " 5"]) -> Tensor:
    """Return what the network reads of a layer, each about 1 or less: correlations of features, their sizes, shape and place.

    descriptors: of Trajectory. snapshots: how many are known up to t.
    """
    size = moments.diagonal().sqrt() + 1e-6
    correlations = (moments / size / size[:, None])[tuple(torch.triu_indices(len(size), len(size), 1))]
    known = [min(snapshots, n + 1) / (n + 1) for n in MEANS[1:]]
    relative = (
        math.log10(float(ORIGIN_GAIN / size[FEATURES - 2]) + 1e-6) / 3
    )  # how far the layer moves, beside its weights
    return torch.cat([correlations, size.log(), descriptors, torch.tensor([*known, relative])])


@dataclass(frozen=True)
class Layer:
    """What is known of a layer at an origin. moments: X X^T / n of its weights' features X."""

    read: Float[Tensor, " s"]
    moments: Float[Tensor, "f f"]
    units: Units


def read_layer(run: Trajectory, t: int, layer: int, with_state: bool) -> Layer:
    """Return what is read of a layer from snapshots up to t >= WINDOW; of a large one, from evenly spread weights."""
    where = list(run.layout.slices.values())[layer]
    spread = max(1, (where.stop - where.start) // SAMPLE)
    some = slice(where.start, where.stop, spread)
    units = units_of(run, t, some, with_state)
    x = past_features(run, t, some, units)
    moments = x @ x.T / x.shape[1]
    return Layer(reading(moments, t + 1, run.descriptors[layer]), moments, units)


class LayerForecaster(nn.Module):
    """Coefficients [f, h] of a layer from what is read of it; weights at t + h from them. It starts as "no change"."""

    def __init__(self, horizons: Sequence[int], d_model: int, seed: int, with_state: bool = False) -> None:
        super().__init__()
        self.horizons = tuple(horizons)
        self.reads = {"with_state": with_state, "with_context": False}
        reads, self.features = read_count(with_state), feature_count(with_state)
        # mean gains in loss by horizon on unseen runs, of "weights" and of their "average", by steps between snapshots
        self.gains: dict[str, dict[int, list[float]]] = {}
        with seeded_init(seed):
            self.body = nn.Sequential(nn.Linear(reads, d_model), nn.GELU(), nn.Linear(d_model, d_model), nn.GELU())
            self.head = nn.Linear(d_model, self.features * len(self.horizons))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("centre", torch.zeros(reads))
        self.register_buffer("spread", torch.ones(reads))

    def standardise(self, read: Float[Tensor, "k s"]) -> None:
        """Take the mean and spread of what is read from layers learned from."""
        self.centre.copy_(read.mean(0))
        self.spread.copy_(read.std(0) + SMALLEST_SPREAD)

    def forward(self, read: Float[Tensor, "*k s"]) -> Float[Tensor, "*k f h"]:
        # layers far from all that were learned from are read as if they lay at the edge: nothing is extrapolated
        inside = ((read - self.centre) / self.spread).clamp(-EDGE, EDGE)
        return self.head(self.body(inside)).unflatten(-1, (self.features, -1))

    def coefficients(self, run: Trajectory, t: int) -> list[tuple[Float[Tensor, "h f"], Units]]:
        """Return of each layer the coefficients of its weights' features, and its units."""
        layers = [read_layer(run, t, layer, self.reads["with_state"]) for layer in range(len(run.layout.shapes))]
        return [
            (c.T, layer.units) for c, layer in zip(self(torch.stack([x.read for x in layers])), layers, strict=True)
        ]

    @torch.no_grad()
    def movements(self, run: Trajectory, t: int, index: Int[Tensor, " n"]) -> Float[Tensor, "h n"]:
        """Return how far the weights at the increasing `index` move until t + h for every horizon, from the snapshots up to t."""
        ends = torch.tensor([where.stop for where in run.layout.slices.values()])
        parts = index.tensor_split(torch.searchsorted(index, ends)[:-1])
        return torch.cat(
            [
                units.movement * (c @ past_features(run, t, part, units))
                for (c, units), part in zip(self.coefficients(run, t), parts, strict=True)
            ],
            1,
        )

    @torch.no_grad()
    def predict(self, run: Trajectory, t: int) -> Forecast:
        """Return the weights of a run at t + h for every horizon, from its snapshots up to t."""
        ahead = run.weights[t].repeat(len(self.horizons), 1)
        for (c, units), where in zip(self.coefficients(run, t), run.layout.slices.values(), strict=True):
            for start in range(where.start, where.stop, CHUNK):
                part = slice(start, min(start + CHUNK, where.stop))
                ahead[:, part] += units.movement * (c @ past_features(run, t, part, units))
        return ahead
