"""What every forecaster has to beat: forecasts of w(t + h) that are not learned.

Axes: h horizons, p weights, t snapshots.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.forecast.trajectory import Forecast, Trajectory

DMD_WINDOW = 30  # snapshots; older ones belong to another phase of training
DMD_RANK = 8  # modes: more of them fit noise, whose powers grow with the horizon


def persistence(run: Trajectory, t: int, horizons: Sequence[int]) -> Forecast:
    """The last weights: w(t)."""
    return run.weights[t].expand(len(horizons), -1)


def linear(run: Trajectory, t: int, horizons: Sequence[int]) -> Forecast:
    """w(t) + h d(t), with the last delta d."""
    h = torch.tensor(horizons)[:, None]
    return run.weights[t] + h * (run.weights[t] - run.weights[t - 1])


@dataclass(frozen=True)
class Extrapolation:
    """Linear extrapolation of some weights, as forecasters give it: h d(t)."""

    horizons: tuple[int, ...]

    def movements(self, run: Trajectory, t: int, index: Int[Tensor, " n"]) -> Float[Tensor, "h n"]:
        """Return how far the weights at `index` move until t + h for every horizon."""
        return torch.tensor(self.horizons)[:, None] * (run.weights[t, index] - run.weights[t - 1, index])


def quadratic(run: Trajectory, t: int, horizons: Sequence[int]) -> Forecast:
    """w(t) + h d(t) + h (h + 1) / 2 (d(t) - d(t - 1)): the parabola through the last three snapshots."""
    h = torch.tensor(horizons)[:, None]
    delta, before = run.weights[t] - run.weights[t - 1], run.weights[t - 1] - run.weights[t - 2]
    return run.weights[t] + h * delta + h * (h + 1) / 2 * (delta - before)


def average(n: int) -> Callable[[Trajectory, int, Sequence[int]], Forecast]:
    """The mean of the last n snapshots (latest weight averaging, Kaddour 2022, arXiv:2209.14981)."""

    def latest_average(run: Trajectory, t: int, horizons: Sequence[int]) -> Forecast:
        return run.weights[t - n + 1 : t + 1].mean(0).expand(len(horizons), -1)

    return latest_average


def dynamic_modes(
    run: Trajectory, t: int, horizons: Sequence[int], rank: int = DMD_RANK, window: int = DMD_WINDOW
) -> Forecast:
    """Dynamic mode decomposition of the last `window` snapshots (Schmid 2010), with the part outside its modes kept as it is."""
    past = run.weights[max(0, t - window + 1) : t + 1].double()
    mean, centred = past.mean(0), past - past.mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    basis = centred.T @ vectors[:, -rank:] / values[-rank:].clamp(min=1e-12).sqrt()  # [p, rank]
    coefficients = centred @ basis
    step = torch.linalg.lstsq(coefficients[:-1], coefficients[1:]).solution
    outside = past[-1] - mean - basis @ coefficients[-1]
    ahead = [coefficients[-1] @ torch.linalg.matrix_power(step, h) for h in horizons]
    return torch.stack([mean + basis @ c + outside for c in ahead]).float()


BASELINES = {
    "persistence": persistence,
    "linear": linear,
    "quadratic": quadratic,
    "dmd": dynamic_modes,
    "average_3": average(3),
    "average_5": average(5),
    "average_7": average(7),
}
