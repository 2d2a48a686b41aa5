"""Pictures of forecasts of weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from jaxtyping import Float
from torch import Tensor

from stages.common.figures import save_figure
from stages.forecast.forecasters import principal_components
from stages.forecast.trajectory import WINDOW, Trajectory

LIMITS = (0.2, 2.0)  # of ratios; what is worse lies above the picture


def draw_horizons(path: Path, table: dict[str, Any]) -> None:
    """Draw the error over persistence's against the horizon: a column for each regime, a row for each phase."""
    regimes = list(table["persistence"])
    phases = ("early", "late")
    figure, axes = plt.subplots(
        2, len(regimes), figsize=(3.2 * len(regimes), 5), squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    for row, phase in zip(axes, phases, strict=True):
        for ax, regime in zip(row, regimes, strict=True):
            for i, (forecaster, by_regime) in enumerate(table.items()):
                points = by_regime[regime][phase]
                horizons, means = [int(h) for h in points], [value["mean"] for value in points.values()]
                learned = forecaster in ("transformer", "weights_only", "mlp", "ridge")
                ax.plot(horizons, means, "o-" if learned else "--", color=f"C{i % 10}", label=forecaster, markersize=3)
            ax.set(ylim=LIMITS, title=f"{regime}, {phase} half")
    axes[0, -1].legend(fontsize=6)
    figure.supxlabel("horizon, snapshots")
    figure.supylabel("squared error / that of keeping the last weights")
    save_figure(path, figure)


def draw_path(
    path: Path, run: Trajectory, forecast: Callable[[Trajectory, int], Float[Tensor, "h p"]], horizons: list[int]
) -> None:
    """Draw a run's path in the plane of its two main directions, and the forecasts from some points of it."""
    mean, basis, _ = principal_components(run.weights, 2)
    points = (run.weights - mean) @ basis.T
    figure, ax = plt.subplots(figsize=(5, 4), layout="constrained")
    ax.plot(points[:, 0], points[:, 1], ".-", color="lightgrey", label="the run's weights")
    for t in range(WINDOW + 1, len(run) - max(horizons), 8):
        ahead = (forecast(run, t) - mean) @ basis.T
        ax.plot(
            [points[t, 0], *ahead[:, 0]], [points[t, 1], *ahead[:, 1]], "o-", color="tab:red", markersize=2, linewidth=1
        )
    ax.plot(
        [], [], "o-", color="tab:red", markersize=2, label=f"forecasts, {', '.join(map(str, horizons))} snapshots ahead"
    )
    ax.set(xlabel="first principal direction", ylabel="second principal direction")
    ax.legend()
    save_figure(path, figure)
