"""Forecasts as functions: how far the outputs of a forecast network are from those of the network to come, and what it gains in loss.

Weights that lie near each other need not be networks that answer alike: outputs on reference images tell. A forecast's gain is how much
lower its loss is than that of the network that is kept, over the latter; learned beforehand from runs that it has not seen, its mean tells
whether a forecast is worth trying at all.

Axes: t snapshots, o origins, h horizons, n images, k classes, p weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from stages.forecast.layerwise import LayerForecaster
from stages.forecast.trajectory import Trajectory

LARGEST_GAIN = 1.0  # of a loss: a network that a forecast ruins must not count for more than one that it perfects


@dataclass(frozen=True)
class Reference:
    """A network, and the images on which weights are compared. Batch norm goes by the statistics of these images."""

    network: nn.Module
    images: Float[Tensor, "n c s s"]
    labels: Int[Tensor, " n"]

    @torch.no_grad()
    def logits(self, run: Trajectory, weights: Float[Tensor, " p"]) -> Float[Tensor, "n k"]:
        """Return the network's outputs with weights laid out as a run's."""
        return functional_call(self.network.train(), run.layout.unflatten(weights), (self.images,))

    def loss(self, logits: Float[Tensor, "n k"]) -> float:
        """Return the mean cross-entropy of outputs."""
        return cross_entropy(logits, self.labels).item()


@dataclass(frozen=True)
class AsFunctions:
    """Forecasts from some origins, judged by outputs; nan where the run does not go on so far.

    error: squared error of the forecast network's logits; kept: of the last network's. gain: in loss, over that of the last network.
    """

    error: Float[Tensor, "o h"]
    kept: Float[Tensor, "o h"]
    gain: Float[Tensor, "o h"]

    @property
    def ratios(self) -> Float[Tensor, " h"]:
        """The squared error of logits over that of keeping the last weights, summed over origins as that of weights is."""
        return self.error.nansum(0) / self.kept.nansum(0)


def judge_as_functions(
    model: LayerForecaster, path: Trajectory, run: Trajectory, reference: Reference, origins: Sequence[int]
) -> AsFunctions:
    """Return what forecasts of a path from its snapshots at `origins` are as functions, beside the run's own networks.

    path: the run itself, or an average of it.
    """
    sums = torch.full((3, len(origins), len(model.horizons)), torch.nan, dtype=torch.float64)
    for o, t in enumerate(origins):
        last = reference.logits(run, run.weights[t])
        loss = reference.loss(last)
        for i, (h, weights) in enumerate(zip(model.horizons, model.predict(path, t), strict=True)):
            ahead = reference.logits(run, weights)
            sums[2, o, i] = max(-LARGEST_GAIN, (loss - reference.loss(ahead)) / max(loss, 1e-12))
            if t + h < len(run):
                true = reference.logits(run, run.weights[t + h])
                sums[0, o, i], sums[1, o, i] = ((x - true).square().mean() for x in (ahead, last))
    return AsFunctions(*sums)


def averaged(run: Trajectory, decay: float) -> Trajectory:
    """Return the exponential average of a run over its snapshots; the optimiser's state is the run's."""
    rows = [run.weights[0]]
    for weights in run.weights[1:]:
        rows.append(rows[-1].lerp(weights, 1 - decay))
    return Trajectory(run.layout, torch.stack(rows), run.state)
