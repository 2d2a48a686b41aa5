"""Pictures of fleets and of what is recalled from them."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from stages.common.figures import image_grid, save_figure, show_image

SHOWN = 10


def draw_fleet(path: Path, fleet: Mapping[str, np.ndarray], classes: list[str]) -> None:
    """Draw some data sets of a fleet: their mean images, and their proportions or truth tables."""
    figure, axes = image_grid(2, SHOWN, 1.1)
    values = fleet["true.table" if "true.table" in fleet else "true.proportions"]
    for image, value, (above, below) in zip(fleet["mean_image"], values, axes.T, strict=False):
        show_image(above, image)
        below.bar(range(len(value)), value, color="C0")
        below.set(ylim=(0, 1), xticks=range(len(value)))
        below.tick_params(labelsize=5, length=0)
    axes[0, 0].set_ylabel("mean image", fontsize=7)
    axes[1, 0].set_ylabel("rule" if "true.table" in fleet else "proportions", fontsize=7)
    figure.supxlabel(
        "cells: " + ", ".join(f"{i} {name}" for i, name in enumerate(classes)) if "true.table" in fleet else "class",
        fontsize=6,
    )
    save_figure(path, figure)


def draw_masked_accuracy(path: Path, acc: dict[str, dict[str, dict[str, float]]], majority: float) -> None:
    """Draw each method's accuracy over the mask ratio, with its standard deviation over seeds."""
    figure, ax = plt.subplots(figsize=(4.5, 3))
    for method, by_ratio in acc.items():
        means, stds = ([found.get(key, 0.0) for found in by_ratio.values()] for key in ("mean", "std"))
        ax.errorbar(
            [float(ratio) for ratio in by_ratio], means, stds, marker="o", markersize=3, capsize=2, label=method
        )
    ax.axhline(majority, color="0.6", linestyle=":", label="most frequent class")
    ax.set(xlabel="share of patches hidden", ylabel="test accuracy", ylim=(0, 1))
    ax.legend(fontsize=6)
    save_figure(path, figure)
