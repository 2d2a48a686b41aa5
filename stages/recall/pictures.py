"""Pictures of fleets and of what is recalled from them.

Axes: n images or networks, h rows and v columns of pixels, w weights of a network.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes

from stages.common.figures import image_grid, legible, plain_ticks, save_figure, save_plot, show_image, show_signed
from stages.recall.captions import caption

SHOWN = 10


def draw_fleet(
    path: Path, mean_images: Float[np.ndarray, "n 3 h v"], truth: Mapping[str, np.ndarray], classes: list[str]
) -> None:
    """Draw some data sets of a fleet: their mean images, and their proportions or truth tables."""
    figure, axes = image_grid(2, SHOWN, 1.1)
    has_rules = "table" in truth
    values = truth["table" if has_rules else "proportions"]
    for image, value, (above, below) in zip(mean_images, values, axes.T, strict=False):
        show_image(above, image)
        below.bar(range(len(value)), value, color="C0")
        below.set(ylim=(0, 1), xticks=range(len(value)))
        below.tick_params(labelsize=7, length=0)
    axes[0, 0].set_ylabel("mean image", fontsize=7)
    axes[1, 0].set_ylabel("rule" if has_rules else "proportions", fontsize=7)
    legend = "cells: " + ", ".join(f"{i} {name}" for i, name in enumerate(legible(classes)))
    figure.supxlabel(legend if has_rules else "class", fontsize=8)
    save_figure(path, figure)


def draw_masked_accuracy(path: Path, acc: dict[str, dict[str, dict[str, float]]], majority: float) -> None:
    """Draw each method's accuracy over the mask ratio, with its standard deviation over seeds."""
    figure, ax = plt.subplots(figsize=(4.5, 3))
    for method, by_ratio in acc.items():
        ratios = [float(ratio) for ratio in by_ratio]
        means = [measured["mean"] for measured in by_ratio.values()]
        stds = [measured.get("std", 0.0) for measured in by_ratio.values()]
        ax.errorbar(ratios, means, stds, marker="o", markersize=3, capsize=2, label=caption(method))
    ax.axhline(majority, color="0.6", linestyle=":", label="most frequent class")
    ax.set(xlabel="share of patches hidden", ylabel="test accuracy", ylim=(0, 1))
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save_plot(path, figure)


def draw_explained_variance(path: Path, ratios: dict[str, dict[str, dict[str, float]]]) -> None:
    """Draw how much of the changes principal components hold, of training and of unseen networks."""
    figure, ax = plt.subplots(figsize=(4.5, 3))
    for color, (name, by_count) in enumerate(ratios.items()):
        counts = [int(count) for count in by_count]
        for kind, style in (("training", ":"), ("unseen", "-")):
            values = [by_kind[kind] for by_kind in by_count.values()]
            ax.plot(counts, values, style, color=f"C{color}", label=name if kind == "unseen" else None)
    ax.set(xscale="log", xlabel="principal components", ylabel="share of the change (dotted: training)", ylim=(0, 1))
    plain_ticks(ax.xaxis)
    ax.legend(fontsize=7)
    save_plot(path, figure)


def draw_rows(
    path: Path, rows: Mapping[str, Float[np.ndarray, "n 3 h v"]], signed: bool = False, fontsize: int | None = 8
) -> None:
    """Draw images that belong together below each other, a row of each kind; signed: differences, red above and blue below 0."""
    figure, axes = image_grid(len(rows), SHOWN)
    for (name, images), row in zip(rows.items(), axes, strict=True):
        row[0].set_ylabel(caption(name), rotation=0, ha="right", va="center", fontsize=fontsize)
        for image, ax in zip(images, row, strict=False):
            show_signed(ax, image.mean(0, keepdims=True)) if signed else show_image(ax, image)
    save_figure(path, figure)


def draw_representations(path: Path, decoded: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Draw how well every characteristic is decoded from every representation, with 95 % intervals; dotted: what ignores it."""
    panels = [
        (fleet, key, measure)
        for fleet, by_key in decoded.items()
        for key, by in by_key.items()
        for measure in by["baseline"]
    ]
    columns = 3
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(12, 2.4 * rows), squeeze=False)
    for ax, (fleet, key, measure) in zip(axes.flat, panels, strict=False):
        by = decoded[fleet][key]
        names = [name for name in by if name != "baseline"]
        values = np.array([[by[name][measure][k] for k in ("mean", "low", "high")] for name in names])
        places = np.arange(len(names))[::-1]
        spread = [values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]]
        ax.barh(places, values[:, 0], xerr=spread, color="C0", error_kw={"elinewidth": 0.7})
        ax.axvline(by["baseline"][measure], color="k", linestyle=":", linewidth=0.8)
        ax.set_yticks(places, [caption(name) for name in names], fontsize=8)
        ax.set_xlim(min(0, values[:, 0].min()), 1)
        ax.set_title(f"{fleet}: {caption(key)}, {caption(measure)}")
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    figure.tight_layout()
    save_plot(path, figure)


class Growth(TypedDict):
    """How well one characteristic of a fleet is decoded from so many fine-tunes."""

    fleet: str
    characteristic: str
    reads: str
    fine_tunes: int
    repeat: int
    score: float


def draw_growth(path: Path, rows: list[Growth]) -> None:
    """Draw scores over the number of fine-tunes learned from, one panel for each fleet."""
    fleets = list(dict.fromkeys(row["fleet"] for row in rows))
    figure, axes = plt.subplots(1, len(fleets), figsize=(2.8 * len(fleets), 2.4), squeeze=False)
    for ax, fleet in zip(axes[0], fleets, strict=True):
        of_fleet = [row for row in rows if row["fleet"] == fleet]
        counts = sorted({row["fine_tunes"] for row in of_fleet})
        scores: dict[tuple[str, int], list[float]] = {}
        for row in of_fleet:
            scores.setdefault((row["reads"], row["fine_tunes"]), []).append(row["score"])
        for reads in dict.fromkeys(row["reads"] for row in of_fleet):
            means = [np.mean(scores[reads, count]) for count in counts]
            ax.plot(counts, means, marker="o", markersize=3, label=caption(reads))
        characteristic = of_fleet[0]["characteristic"]
        measure = "R²" if characteristic == "proportions" else "bits right"
        ax.set(xscale="log", xlabel="fine-tunes", title=f"{fleet}: {caption(characteristic)}, {measure}")
        ax.set_xticks(counts, map(str, counts), minor=False)
        ax.minorticks_off()
    axes[0, 0].set_ylabel("score on unseen fine-tunes")
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    save_plot(path, figure)


def draw_bars(path: Path, panels: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Draw means with their 95 % intervals: below each other the quantities, by their labels, each on an axis of its own."""
    heights = [0.35 * len(measured) + 0.8 for measured in panels.values()]
    figure, axes = plt.subplots(
        len(panels), figsize=(5, sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for ax, (label, measured) in zip(axes[:, 0], panels.items(), strict=True):
        bars(ax, measured, label)
    save_plot(path, figure)


def bars(ax: Axes, measured: Mapping[str, Mapping[str, float]], label: str) -> None:
    """Draw means with their 95 % intervals."""
    places = np.arange(len(measured))[::-1]
    means = np.array([interval["mean"] for interval in measured.values()])
    half = [interval.get("high", interval["mean"]) - interval["mean"] for interval in measured.values()]
    ax.barh(places, means, xerr=half, color="C0", error_kw={"elinewidth": 0.7})
    ax.set_yticks(places, [caption(name) for name in measured])
    ax.set(xlabel=label, xlim=(0, 1))


def draw_space(
    path: Path,
    change: Float[np.ndarray, "n w"],
    test: Bool[np.ndarray, " n"],
    pairs: Mapping[str, np.ndarray],
    effects: Mapping[str, np.ndarray],
) -> None:
    """Draw changes along their two leading axes, coloured by the effect that each attribute has in the rule; and cosines."""
    train = ~test
    centred = change - change[train].mean(0)
    _, _, components = np.linalg.svd(centred[train], full_matrices=False)
    x, y = (centred @ components[:2].T).T
    figure, axes = plt.subplots(1, len(effects) + 1, figsize=(2.7 * (len(effects) + 1), 2.6))
    for ax, (name, effect) in zip(axes, effects.items(), strict=False):
        for which, marker in ((train, "o"), (test, "^")):
            ax.scatter(x[which], y[which], c=effect[which], cmap="coolwarm", s=10, marker=marker, vmin=-1, vmax=1)
        ax.set(xlabel="axis 1", ylabel="axis 2", xticks=[], yticks=[])
        ax.set_title(f"red: yes if {name};\ntriangles: rules never trained", fontsize=8)
    levels = np.unique(pairs["agreement"])
    cosines = [pairs["cosine"][pairs["agreement"] == level] for level in levels]
    axes[-1].violinplot(cosines, levels, widths=0.2, showmeans=True)
    axes[-1].set(xlabel="agreement of two rules", ylabel="cosine of their changes")
    figure.tight_layout()
    save_plot(path, figure)
