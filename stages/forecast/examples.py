"""What LayerForecaster learns from, as moments: of each layer at each origin of each run, at every stride.

With a layer's features X [n, f] and its true movements y [n, h] in its unit, the mean squared error of coefficients c is
y^T y / n - 2 c . X^T y / n + c^T (X^T X / n) c: no single weight need be kept. Where a forecaster is learned for a network's outputs,
products x . y are those of `curvature`, x . (G y A): how far a movement of weights moves the outputs.

Axes: e origins, l layers (those that a network lacks have share 0), s what is read of a layer, f features, h horizons.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stages.forecast.curvature import Factors
from stages.forecast.layerwise import feature_count, past_features, read_count, read_layer
from stages.forecast.trajectory import WINDOW, Trajectory

RATIO_CEILING = 3.0  # of an origin's error over that of keeping the weights: a few would drown the rest


@dataclass(frozen=True)
class Examples:
    """Origins of runs. share: of a layer in its network's squares; known: whether the run goes on so far."""

    read: Float[Tensor, "e l s"]
    moments: Float[Tensor, "e l f f"]
    cross: Float[Tensor, "e l f h"]  # X^T y / n
    energy: Float[Tensor, "e l h"]  # y^T y / n
    share: Float[Tensor, "e l"]
    known: Bool[Tensor, "e h"]

    def __len__(self) -> int:
        return len(self.read)

    def take(self, index: Tensor) -> "Examples":
        """Return those at `index`."""
        return Examples(*(getattr(self, field.name)[index] for field in fields(self)))

    @staticmethod
    def cat(parts: "Sequence[Examples]") -> "Examples":
        """Return several as one."""
        return Examples(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Examples)))


def thin(run: Trajectory, start: int, stride: int) -> Trajectory:
    """Return a run as if it had been recorded from snapshot `start` on and more rarely: every `stride`th snapshot."""
    return run.at(slice(start, None, stride))


def example(
    run: Trajectory, t: int, horizons: Sequence[int], layers: int, factors: Sequence[Factors] | None = None
) -> Examples:
    """Return the example of a run at t, padded to `layers`; horizons that the run does not reach are not known.

    The optimiser's direction is read if the run has it. factors: of each tensor, where errors are those of outputs.
    """
    known = torch.tensor([t + h < len(run) for h in horizons])
    with_state = run.state is not None
    f = feature_count(with_state)
    read, moments = torch.zeros(layers, read_count(with_state)), torch.zeros(layers, f, f)
    cross, energy = torch.zeros(layers, f, len(horizons)), torch.zeros(layers, len(horizons))
    share = torch.zeros(layers)
    for i, where in enumerate(run.layout.slices.values()):
        layer = read_layer(run, t, i, with_state)
        x = past_features(run, t, where, layer.units)
        ahead = run.weights[[min(t + h, len(run) - 1) for h in horizons], where]
        y = (ahead - run.weights[t, where]) / layer.units.movement
        read[i], moments[i], n = layer.read, layer.moments, x.shape[1]
        if factors is None:
            cross[i], energy[i] = x @ y.T / n, y.square().mean(1)
        else:
            both = torch.cat([x, y])
            form = factors[i].times(both) @ both.T / n
            moments[i], cross[i], energy[i] = form[:f, :f], form[:f, f:], form[f:, f:].diagonal()
        share[i] = n * layer.units.movement.square()
    parts = (read, moments, cross, energy, share / share.sum(), known)
    return Examples(*(part[None] for part in parts))


def draw_origins(
    run: Trajectory,
    stride: int,
    horizons: Sequence[int],
    n: int,
    layers: int,
    random: torch.Generator,
    factors_of: Callable[[Tensor], Sequence[Factors]] | None = None,
) -> list[Examples]:
    """Return `n` examples at a stride, or none if the run is too short; of half of them only a short past is known.

    factors_of: of the network with the weights at an origin, where errors are those of outputs.
    """
    length = -(-len(run) // stride)
    if length < WINDOW + 2:
        return []
    drawn = []
    for i in range(n):
        start = int(torch.randint(min(stride, len(run) - stride * (WINDOW + 1)), (), generator=random))
        t = int(torch.randint(WINDOW, -(-(len(run) - start) // stride) - 1, (), generator=random))
        if i % 2:  # the run is known from a later snapshot on
            later = int(torch.randint(t - WINDOW + 1, (), generator=random))
            start, t = start + later * stride, t - later
        thinned = thin(run, start, stride)
        factors = None if factors_of is None else factors_of(thinned.weights[t])
        drawn.append(example(thinned, t, horizons, layers, factors))
    return drawn


def squared_errors(coefficients: Float[Tensor, "e l f h"], examples: Examples) -> Float[Tensor, "e l h"]:
    """Return the mean squared error of each layer, in its unit."""
    squares = (coefficients * (examples.moments @ coefficients)).sum(2)
    return examples.energy - 2 * (coefficients * examples.cross).sum(2) + squares


def network_errors(
    coefficients: Float[Tensor, "e l f h"], examples: Examples
) -> tuple[Float[Tensor, "e h"], Float[Tensor, "e h"]]:
    """Return the squared errors of whole networks, and those of keeping the last weights; 0 where they are not known."""
    share = examples.share[:, :, None]
    errors = (share * squared_errors(coefficients, examples)).sum(1)
    return errors * examples.known, (share * examples.energy).sum(1) * examples.known


def relative_loss(coefficients: Float[Tensor, "e l f h"], examples: Examples) -> Tensor:
    """Return the mean over origins and horizons of a network's error over that of keeping the last weights."""
    errors, kept = network_errors(coefficients, examples)
    ratios = (errors / kept.clamp(min=1e-12)).clamp(max=RATIO_CEILING)
    return ratios[examples.known].mean()
