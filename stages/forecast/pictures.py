"""Pictures of forecasts of weights."""

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from stages.common.figures import plain_ticks, save_plot
from stages.common.files import Rows, Summary
from stages.common.vectors import principal_components
from stages.forecast.captions import FORECASTERS, METHODS, REGIMES
from stages.forecast.trajectory import WINDOW, Trajectory

LIMITS = (0.0, 2.0)  # of ratios; what is worse lies above the picture
LEARNT = ("transformer", "weights_only", "mlp", "ridge", "diffusion", "jump")
COLOURS = {
    "transformer": "tab:red",
    "weights_only": "tab:orange",
    "mlp": "tab:purple",
    "ridge": "tab:pink",
    "diffusion": "tab:brown",
    "jump": "tab:green",
    "persistence": "black",
    "linear": "tab:blue",
    "quadratic": "tab:cyan",
    "dmd": "tab:olive",
    "average_3": "lightgrey",
    "average_5": "darkgrey",
    "average_7": "grey",
}


def draw_curve(ax: Axes, name: str, curve: pd.DataFrame, value: str, low: str, high: str) -> None:
    """Draw one forecaster's values against the horizon; of learned ones with their intervals, where three runs or more give one."""
    bars = [curve[value] - curve[low], curve[high] - curve[value]] if curve["n"].min() >= 3 and name in LEARNT else None
    shift = 0.08 * (list(COLOURS).index(name) - len(COLOURS) / 2)  # so that intervals do not hide each other
    ax.errorbar(
        curve["h"] + shift,
        curve[value],
        bars,
        fmt="o-" if name in LEARNT else "--",
        color=COLOURS[name],
        label=FORECASTERS[name],
        markersize=3,
        linewidth=1,
        elinewidth=0.5,
    )


def draw_horizons(path: Path, ratios: pd.DataFrame, value: str = "mean", ylabel: str = "squared error") -> None:
    """Draw a ratio to persistence's against the horizon, with its interval: a column for each regime, a row for each phase."""
    table = ratios.reset_index()
    regimes, phases = list(table["regime"].unique()), ("early", "late")
    figure, axes = plt.subplots(
        2,
        len(regimes),
        figsize=(2.6 * len(regimes) + 1.2, 5),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    low, high = ("low", "high") if value == "mean" else (f"{value}_low", f"{value}_high")
    for row, phase in zip(axes, phases, strict=True):
        for ax, regime in zip(row, regimes, strict=True):
            for name, curve in table[(table.regime == regime) & (table.phase == phase)].groupby(
                "forecaster", sort=False
            ):
                if name not in COLOURS:  # the plain design lies far above the picture
                    continue
                draw_curve(ax, name, curve, value, low, high)
            n = table[table.regime == regime]["n"].iloc[0]
            of = f"{n:.0f} unseen runs" if n > 1 else "a single unseen run"
            ax.set(ylim=LIMITS, title=f"{REGIMES.get(regime, regime)}\n{phase} half, {of}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    figure.supxlabel("horizon, snapshots")
    figure.supylabel(f"{ylabel} / that of keeping the last weights")
    save_plot(path, figure)


def draw_times(path: Path, errors: pd.DataFrame, regime: str, horizons: tuple[int, ...]) -> None:
    """Draw the error over persistence's against the origin, summed over the runs of a regime: an axis for each horizon."""
    sums = (
        errors[errors.regime == regime]
        .groupby(["forecaster", "h", "t"], sort=False)["error"]
        .sum()
        .unstack("forecaster")
    )
    ratios = sums.div(sums["persistence"], axis=0)
    n = errors[errors.regime == regime]["run"].nunique()
    figure, axes = plt.subplots(
        1, len(horizons), figsize=(2.6 * len(horizons) + 1.2, 2.6), squeeze=False, sharey=True, layout="constrained"
    )
    for ax, h in zip(axes[0], horizons, strict=True):
        for name, colour in COLOURS.items():
            if name in ratios:
                ax.plot(
                    ratios.loc[h].index,
                    ratios.loc[h, name],
                    "o-" if name in LEARNT else "--",
                    color=colour,
                    label=FORECASTERS[name],
                    markersize=3,
                )
        ax.set(ylim=LIMITS, title=f"{REGIMES.get(regime, regime)}, {h} ahead, n = {n}", xlabel="forecast from snapshot")
    axes[0, 0].set_ylabel("squared error / that of\nkeeping the last weights")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    save_plot(path, figure)


def draw_accumulation(path: Path, accumulation: pd.DataFrame) -> None:
    """Draw how the error of forecasts grows when each is made from the one before, beside direct ones, by regime, in the late half."""
    table = accumulation.reset_index()
    figure, ax = plt.subplots(figsize=(5, 2.8), layout="constrained")
    for i, regime in enumerate(table["regime"].unique()):
        for name, style in (("rolled_out", "-"), ("direct", "o")):
            curve = table[(table.regime == regime) & (table.forecaster == name)]
            label = f"{REGIMES.get(regime, regime)}, {name.replace('_', ' ')}, n = {curve['n'].iloc[0]:.0f}"
            ax.plot(curve["h"], curve["mean"], style, color=f"C{i}", markersize=4, label=label)
    ax.axhline(1, color="black", linestyle="--", linewidth=0.8, label="the last weights kept")
    ax.set(
        ylim=LIMITS, xlabel="steps rolled out, snapshots", ylabel="squared error / that of\nkeeping the last weights"
    )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(fontsize=7)
    save_plot(path, figure)


def draw_accuracies(path: Path, losses: pd.DataFrame, regime: str) -> None:
    """Draw the accuracy that forecast networks gain over the last one, with its interval: an axis for each phase."""
    table = losses.reset_index()
    table = table[(table.regime == regime) & table.forecaster.isin(COLOURS)]
    phases = ("early", "late")
    figure, axes = plt.subplots(1, len(phases), figsize=(8, 2.8), layout="constrained")
    for ax, phase in zip(axes, phases, strict=True):
        for name, curve in table[table.phase == phase].groupby("forecaster", sort=False):
            draw_curve(ax, name, curve, "acc_points", "acc_points_low", "acc_points_high")
        shown = table[(table.phase == phase) & table.forecaster.isin((*LEARNT, "average_3"))]
        lowest, highest = (  # a single run has no interval
            shown[end].fillna(shown["acc_points"]) for end in ("acc_points_low", "acc_points_high")
        )
        ax.set(
            ylim=(lowest.min() - 1, max(highest.max(), 0) + 1),
            title=f"{REGIMES.get(regime, regime)}, {phase} half (n = {table['n'].iloc[0]:.0f})",
            xlabel="horizon, snapshots",
        )
    axes[0].set_ylabel("test accuracy minus that of\nthe last weights, points")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    save_plot(path, figure)


def draw_path(
    path: Path, run: Trajectory, forecast: Callable[[Trajectory, int], Float[Tensor, "h p"]], horizons: tuple[int, ...]
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
    save_plot(path, figure)


def draw_components(path: Path, curves: Rows, spans: Summary, random: dict[str, float]) -> None:
    """Draw what k components hold: variance between and within runs, and the next movement, beside a random subspace."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 2.8), sharey=True, layout="constrained")
    table = pd.DataFrame(curves)
    for which, style in (("training", "-"), ("unseen", "--")):
        rows = table[table.runs == which]
        left.plot(
            rows["k"], rows["between"], "o" + style, color="tab:blue", markersize=3, label=f"between {which} runs"
        )
        left.plot(
            rows["k"], rows["within"], "o" + style, color="tab:orange", markersize=3, label=f"within {which} runs"
        )
    left.set(xscale="log", title="variance explained", xlabel="components of the training runs", ylabel="share")
    left.legend(fontsize=7, loc="center right")
    for span, colour in (("runs", "tab:blue"), ("past", "tab:red")):
        for h, style in zip(spans[span], ("-", "--", "-.", ":"), strict=False):
            cells = spans[span][h]
            label = f"of {'training runs' if span == 'runs' else 'its own past'}, {h} ahead"
            right.plot([int(k) for k in cells], [c["mean"] for c in cells.values()], style, color=colour, label=label)
    right.plot([int(k) for k in random], list(random.values()), color="grey", label="random subspace")
    right.set(xscale="log", title="share of an unseen run's movement in the span", xlabel="components")
    right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    plain_ticks(left.xaxis, right.xaxis)
    save_plot(path, figure)


def draw_nowcasts(path: Path, history: pd.DataFrame) -> None:
    """Draw test loss against cost, in steps and with what nowcasting spends: the mean over seeds of every method."""
    figure, ax = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
    seeds = history["seed"].nunique()
    for name, rows in history.groupby("method", sort=False):
        mean = rows.groupby("step")[["cost", "loss"]].mean()
        base, _, proposals = name.partition("_")
        colour = {"adam": "tab:blue", "tuned": "tab:orange", "cosine": "tab:green"}[base]
        style = {"": "-", "average": ":", "nowcast": "--"}[proposals]
        ax.plot(mean["cost"], mean["loss"], style, color=colour, linewidth=1, label=METHODS.get(name, name))
    ax.set(
        yscale="log",
        xlabel="steps, with the cost of forecasts and their choice",
        ylabel=f"test loss, mean over {seeds} seeds",
    )
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:.1g}")
    ax.legend(fontsize=7)
    save_plot(path, figure)
