"""Pictures of the zoo and of how well its networks' properties are predicted."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator

from stages.common.figures import image_grid, plain_ticks, save_figure, save_plot
from stages.weightnet.captions import BASELINES, predictor, property_label
from stages.weightnet.zoo.properties import PROPERTIES


def one_two_five(*axes: Axis) -> None:
    """Give logarithmic axes ticks at 1, 2, 5, and tenfolds of them, written as the numbers they are."""
    for axis in axes:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    plain_ticks(*axes)


def draw_zoo(path: Path, final: dict[str, Float[np.ndarray, " r"]]) -> None:
    """Draw how test accuracy is spread over the final networks, and every other property against it."""
    names = [name for name in final if name != "test_acc"]
    figure, axes = plt.subplots(2, 4, figsize=(10, 4.6), layout="constrained")
    axes = axes.flat
    axes[0].hist(final["test_acc"], bins=30, color="C0")
    axes[0].set(xlabel=property_label("test_acc"), ylabel="networks")
    for ax, name in zip(axes[1:], names, strict=False):
        ax.scatter(final["test_acc"], final[name], s=4, alpha=0.4, linewidths=0)
        ax.set(
            xlabel=property_label("test_acc"),
            ylabel=property_label(name),
            yscale="log" if name == "test_loss" else "linear",
        )
        if name == "test_loss":
            one_two_five(ax.yaxis)
    for ax in axes[1 + len(names) :]:
        ax.set_visible(False)
    save_plot(path, figure)


def draw_predictions(
    path: Path, predictions: dict[str, tuple[np.ndarray, np.ndarray]], names: Sequence[str] = PROPERTIES
) -> None:
    """Draw predicted against true properties on runs not seen: a row for each predictor (predicted [n, k], true [n, k])."""
    figure, axes = plt.subplots(
        len(predictions), len(names), figsize=(11, 1.9 * len(predictions)), layout="constrained", squeeze=False
    )
    for row, (name, (predicted, true)) in zip(axes, predictions.items(), strict=True):
        for k, (ax, kind) in enumerate(zip(row, names, strict=True)):
            both = np.stack([true[:, k], predicted[:, k]])
            ends = [np.nanmin(both), np.nanmax(both)]
            ax.plot(ends, ends, color="lightgrey", linewidth=1)
            ax.scatter(true[:, k], predicted[:, k], s=5, alpha=0.6, linewidths=0)
            if kind == "test_loss":
                ax.set(xscale="log", yscale="log")
                one_two_five(ax.xaxis, ax.yaxis)
            ax.set(
                title=property_label(kind) if ax in axes[0] else "",
                xlabel="measured" if ax in axes[-1] else "",
            )
        row[0].set_ylabel(f"{predictor(name).partition(':')[0]}:\npredicted")
    save_plot(path, figure)


def draw_scores(path: Path, scores: dict[str, dict[str, dict[str, float]]]) -> None:
    """Draw Kendall's tau of all predictors, best above, with its spread over splits; baselines and what sees more in grey."""
    order = sorted(scores, key=lambda name: scores[name]["tau"]["mean"])
    means = [scores[name]["tau"]["mean"] for name in order]
    spread = [scores[name]["tau"].get("std", 0.0) for name in order]
    colors = ["lightgrey" if name in BASELINES else "C0" for name in order]
    figure, ax = plt.subplots(figsize=(7, 0.24 * len(order) + 0.8), layout="constrained")
    ax.barh([predictor(name) for name in order], means, xerr=spread, color=colors, error_kw={"linewidth": 1})
    ax.set(xlabel="Kendall's tau of test accuracy, runs not seen; grey: baselines, and what sees more")
    ax.margins(y=0.01)
    save_plot(path, figure)


def draw_learning_curve(
    path: Path, curve: dict[str, dict[str, dict[str, float]]], references: dict[str, float]
) -> None:
    """Draw Kendall's tau over the number of networks learned from: predictor, number, mean and, if there is one, spread over splits.

    Dashed, by their names: references that learn from none.
    """
    figure, ax = plt.subplots(figsize=(6, 3), layout="constrained")
    for name, points in curve.items():
        spread = [point["std"] for point in points.values()] if all("std" in p for p in points.values()) else None
        means = [p["mean"] for p in points.values()]
        ax.errorbar([int(n) for n in points], means, spread, marker="o", label=predictor(name).partition(":")[0])
    for name, tau in references.items():
        ax.axhline(tau, color="grey", linestyle="--", linewidth=1, label=predictor(name))
    ticks = sorted({int(n) for points in curve.values() for n in points})
    ax.set_xscale("log")
    ax.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    ax.minorticks_off()
    ax.set(xlabel="networks learned from", ylabel="Kendall's tau of test accuracy")
    if curve or references:
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save_plot(path, figure)


def draw_attention(path: Path, networks: dict[str, list[dict[str, Float[np.ndarray, "s s"]]]]) -> None:
    """Draw how much the neurons of each layer attend to each other: a row for each network and round.

    Rows and columns of hidden neurons, whose order means nothing, are sorted by the attention that they receive.
    """
    rows = [(f"{name}:\nround {i + 1}", layers) for name, rounds in networks.items() for i, layers in enumerate(rounds)]
    groups = [group for group in rows[0][1] if len(rows[0][1][group]) > 1]
    figure, axes = image_grid(len(rows), len(groups), 1.3)
    for ax, group in zip(axes[0], groups, strict=True):
        ax.set_title("output" if group == "output" else f"hidden {groups.index(group) + 1}")
    for (label, layers), line in zip(rows, axes, strict=True):
        line[0].set_ylabel(label)
        for ax, group in zip(line, groups, strict=True):
            share = layers[group] * len(layers[group])
            order = np.argsort(-share.sum(0)) if group != "output" else np.arange(len(share))
            image = ax.imshow(share[np.ix_(order, order)], vmin=0.5, vmax=1.5, cmap="RdBu_r", interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.6, label="attention, 1 if it were even")
    save_figure(path, figure)


def draw_exam(
    path: Path, inputs: Float[np.ndarray, "b c s s"], labels: Int[np.ndarray, " b"], telling: Float[np.ndarray, " b"]
) -> None:
    """Draw the inputs of an exam that tell most of a network's accuracy, and those that tell least.

    Above each, what the better networks take it for (label), and the correlation of agreeing with them with test accuracy.
    """
    order = np.argsort(-telling)
    chosen = [*order[:32], *order[-16:]]
    figure, axes = image_grid(6, 8, 0.9)
    for ax, place in zip(axes.flat, chosen, strict=False):
        image = inputs[place].transpose(1, 2, 0)
        low, high = image.min(), image.max()
        ax.imshow((image - low) / (high - low + 1e-9), cmap="gray", interpolation="nearest")
        ax.set_title(f"{labels[place]}: {telling[place]:.2f}", fontsize=7)
    axes[0, 0].set_ylabel("tell most")
    axes[4, 0].set_ylabel("tell least")
    save_figure(path, figure)


def draw_nothing(path: Path, predictor: str) -> None:
    """Say in place of a picture that a predictor was not trained: the pipeline asks for a file."""
    figure, ax = plt.subplots(figsize=(3, 0.5))
    ax.text(0.5, 0.5, f"{predictor} was not trained", ha="center", va="center")
    ax.set_axis_off()
    save_figure(path, figure)
