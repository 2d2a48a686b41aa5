"""The path of a network's weights while it trains, and what of it a forecaster may read.

Everything at snapshot t is computed from snapshots up to t alone, in units of how far the weights of a layer moved
lately, so that one forecaster serves all weights of all layers, runs and phases.

Axes: t snapshots, p all weights of a network, n some of them, f features of a delta, g features of a weight, h horizons.
"""

import math
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from beartype import beartype
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor

from stages.common.vectors import Layout

typed = jaxtyped(typechecker=beartype)

WINDOW = 6  # deltas that a forecaster reads
SCALE_WINDOW = 4  # deltas whose size is the unit
AVERAGES = (4, 10, 20)  # snapshots before t whose means it reads, with that at t
HISTORY = max(AVERAGES) + 1  # snapshots up to t that it reads at all, beside the first of the run
STATIC = len(AVERAGES) + 2 + 5  # features that are no sequence: distances to means, to zero, to the start; the layer
DISTANCE = 1  # place in a token of the way from the last snapshot to an earlier one

# Gains bring all features to about the size of a delta in units of the scale, 1, since one learning rate serves them all.
DISTANCE_GAIN = 0.5  # distances add up over the window
STATE_GAIN = 0.5  # of the optimiser's direction
CONTEXT_GAIN = 3.0  # means over a neuron are smaller than single weights
ORIGIN_GAIN = 0.05  # distances from zero and from the start are many deltas long

SMALLEST_SCALE = 1e-8  # of tensors that stand still: a unit must not be 0

Forecast = Float[Tensor, "h p"]  # weights at several horizons


@dataclass(frozen=True)
class Trajectory:
    """Snapshots of one run. state: the optimiser's `regimes.direction` at each, or None where it is not known."""

    layout: Layout
    weights: Float[Tensor, "t p"]
    state: Float[Tensor, "t p"] | None

    def __len__(self) -> int:
        return len(self.weights)

    def at(self, kept: list[int] | slice) -> "Trajectory":
        """Return the run as if these snapshots of it had been taken, and no others."""
        return Trajectory(self.layout, self.weights[kept], None if self.state is None else self.state[kept])

    def until(self, t: int) -> "Trajectory":
        """Return what a forecaster may read at t: the first snapshot and the last HISTORY ones, which forecast alike."""
        return self.at([0, *range(max(1, t - HISTORY + 1), t + 1)])

    @cached_property
    def descriptors(self) -> Float[Tensor, "layers 5"]:
        """What is known of each parameter tensor in any network, each in 0 to 1 or little more.

        Whether it has one axis, whether it is a kernel, its logarithmic height and width (1 stands for 1,000 units), and
        its place in the network.
        """
        rows = [
            [
                len(shape) < 2,
                len(shape) > 2,
                math.log10(max(1, shape[0] if shape else 1)) / 3,
                math.log10(math.prod(shape[1:])) / 3,
                i / len(self.layout.shapes),
            ]
            for i, shape in enumerate(self.layout.shapes.values())
        ]
        return torch.tensor(rows, dtype=torch.float32)

    @cached_property
    def neurons_of(self) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"]]:
        """The index of each weight's row and of its column among all; 0 stands for none.

        Of a weight with two or more axes, a row is one output unit (axis 0) and a column one input (the other axes): the
        two neurons that a weight connects. Biases have neither.
        """
        rows, columns, n_rows, n_columns = [], [], 1, 1
        for shape in self.layout.shapes.values():
            if len(shape) < 2:
                rows.append(torch.zeros(math.prod(shape), dtype=torch.long))
                columns.append(rows[-1])
                continue
            height, width = shape[0], math.prod(shape[1:])
            rows.append((n_rows + torch.arange(height))[:, None].expand(height, width).flatten())
            columns.append((n_columns + torch.arange(width))[None].expand(height, width).flatten())
            n_rows, n_columns = n_rows + height, n_columns + width
        return torch.cat(rows), torch.cat(columns)

    @typed
    def neuron_means(self, x: Float[Tensor, "t p"]) -> tuple[Float[Tensor, "t rows"], Float[Tensor, "t columns"]]:
        """Return the mean of `x` over every row and every column, behind a first entry of 0 for none."""
        rows, columns = [x.new_zeros(len(x), 1)], [x.new_zeros(len(x), 1)]
        for shape, where in zip(self.layout.shapes.values(), self.layout.slices.values(), strict=True):
            if len(shape) > 1:
                matrix = x[:, where].unflatten(1, (shape[0], -1))
                rows.append(matrix.mean(2))
                columns.append(matrix.mean(1))
        return torch.cat(rows, 1), torch.cat(columns, 1)

    @cached_property
    def delta_means(self) -> tuple[Float[Tensor, "t rows"], Float[Tensor, "t columns"]]:
        """Mean movement of every neuron's weights between snapshot t - 1 and t; 0 at t = 0."""
        return tuple(
            torch.cat([torch.zeros_like(means[:1]), means.diff(dim=0)]) for means in self.neuron_means(self.weights)
        )

    @cached_property
    def state_means(self) -> tuple[Float[Tensor, "t rows"], Float[Tensor, "t columns"]]:
        """Mean step direction of every neuron's weights."""
        return self.neuron_means(self.state.float())

    @cached_property
    def state_scales(self) -> Float[Tensor, "t layers"]:
        """Root mean square of each parameter tensor's step direction over the last SCALE_WINDOW snapshots: its unit at t.

        Adam's directions are near 1, SGD's as small as its gradients: in this unit one forecaster reads both.
        """
        squares = self.state.float().square()
        by_layer = torch.stack([squares[:, where].mean(1) for where in self.layout.slices.values()], 1)
        recent = [by_layer[max(0, t - SCALE_WINDOW + 1) : t + 1].mean(0) for t in range(len(self))]
        return torch.stack(recent).sqrt() + SMALLEST_SCALE

    @cached_property
    def scales(self) -> Float[Tensor, "t layers"]:
        """Root mean square movement of each parameter tensor over the last SCALE_WINDOW snapshots, the unit at t; t >= 1."""
        # layer by layer: the movements of all weights at once would double the memory
        layers = (self.weights[:, where].diff(dim=0) for where in self.layout.slices.values())
        by_layer = torch.stack([deltas.square().mean(1) for deltas in layers], 1)
        recent = [by_layer[max(0, t - SCALE_WINDOW) : t].mean(0) for t in range(1, len(self))]
        return torch.cat([torch.full_like(by_layer[:1], torch.nan), torch.stack(recent).sqrt() + SMALLEST_SCALE])


@dataclass(frozen=True)
class Features:
    """What a forecaster reads of n weights at one snapshot."""

    tokens: Float[Tensor, "n window f"]  # a token for each delta, latest first
    static: Float[Tensor, "n g"]
    layer: Int[Tensor, " n"]
    scale: Float[Tensor, " n"]  # the unit, in which movements are predicted

    @staticmethod
    def cat(parts: "list[Features]") -> "Features":
        """Return several as one."""
        return Features(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Features)))

    @property
    def flat(self) -> Float[Tensor, "n d"]:
        """All of them in one row for each weight."""
        return torch.cat([self.tokens.flatten(1), self.static], 1)


@typed
def read_features(
    run: Trajectory, t: int, index: Int[Tensor, " n"] | slice, with_state: bool, with_context: bool
) -> Features:
    """Return the features of the weights at `index` at snapshot t >= WINDOW, from snapshots up to t alone.

    with_state: the optimiser's direction. with_context: means over the two neurons that a weight connects.
    ValueError if t is too early, or the run has no optimiser's state.
    """
    if t < WINDOW:
        raise ValueError(f"expected a snapshot of {WINDOW} or later, got {t}")
    if with_state and run.state is None:
        raise ValueError("this run has no optimiser's state: use a forecaster that reads weights only")
    layer = run.layout.layer_of[index]
    scale = run.scales[t, layer]
    row, column = (neuron[index] for neuron in run.neurons_of)
    times = torch.arange(t, t - WINDOW, -1)
    weights = run.weights[t - WINDOW : t + 1, index].flip(0)  # latest first
    latest = weights[0]
    deltas = (weights[:-1] - weights[1:]) / scale
    distances = DISTANCE_GAIN * (weights[1:] - latest) / scale
    tokens = [deltas, distances]  # DISTANCE is the place of the second
    if with_context:
        rows, columns = run.delta_means
        tokens += [CONTEXT_GAIN * rows[times][:, row] / scale, CONTEXT_GAIN * columns[times][:, column] / scale]
    if with_state:
        unit = run.state_scales[t, layer] / STATE_GAIN
        tokens.append(run.state[t - WINDOW + 1 : t + 1, index].flip(0).float() / unit)
        if with_context:
            rows, columns = run.state_means
            tokens += [CONTEXT_GAIN * rows[times][:, row] / unit, CONTEXT_GAIN * columns[times][:, column] / unit]
    static = [(latest - run.weights[max(0, t - n) : t + 1, index].mean(0)) / scale for n in AVERAGES]
    static += [ORIGIN_GAIN * latest / scale, ORIGIN_GAIN * (latest - run.weights[0, index]) / scale]
    static += run.descriptors[layer].T
    return Features(torch.stack(tokens, 2).transpose(0, 1), torch.stack(static, 1), layer, scale)


def moved_lately(run: Trajectory, t: int, index: Int[Tensor, " n"] | slice = slice(None)) -> Bool[Tensor, " n"]:
    """Return of the weights at `index` whether they moved in the window of deltas before t that a forecaster reads."""
    last = run.weights[t, index]
    moved = torch.zeros(len(last), dtype=torch.bool)
    for earlier in range(t - WINDOW, t):  # one by one: a comparison of all of them at once is as large as the run
        moved |= run.weights[earlier, index] != last
    return moved


def origins(length: int, furthest: int, every: int) -> dict[int, str]:
    """Return the origins of a run of `length` snapshots whose `furthest` horizon is known, and their phase: early or late half."""
    return {t: "early" if t < length // 2 else "late" for t in range(WINDOW + 1, length - furthest, every)}
