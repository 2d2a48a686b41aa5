"""Pictures of the zoo and of how well its networks' properties are predicted."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float

from stages.common.figures import save_figure
from stages.weightnet.properties import PROPERTIES, REFERENCES

LABELS = {
    "train_acc": "training accuracy",
    "test_acc": "test accuracy",
    "gap": "generalisation gap",
    "noise_acc": "accuracy under noise",
    "fgsm_acc": "accuracy under FGSM",
    "test_loss": "test loss",
    "calibration_error": "calibration error",
}


def draw_zoo(path: Path, final: dict[str, Float[np.ndarray, " r"]]) -> None:
    """Draw how test accuracy is spread over the final networks, and every other property against it."""
    names = [name for name in final if name != "test_acc"]
    figure, axes = plt.subplots(2, 4, figsize=(10, 4.6), layout="constrained")
    axes = axes.flat
    axes[0].hist(final["test_acc"], bins=30, color="C0")
    axes[0].set(xlabel=LABELS["test_acc"], ylabel="networks")
    for ax, name in zip(axes[1:], names, strict=False):
        ax.scatter(final["test_acc"], final[name], s=4, alpha=0.4, linewidths=0)
        ax.set(xlabel=LABELS["test_acc"], ylabel=LABELS[name], yscale="log" if name == "test_loss" else "linear")
    for ax in axes[1 + len(names) :]:
        ax.set_visible(False)
    save_figure(path, figure)


def draw_predictions(path: Path, predictions: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Draw predicted against true properties on runs not seen: a row for each predictor (predicted [n, k], true [n, k])."""
    figure, axes = plt.subplots(
        len(predictions), len(PROPERTIES), figsize=(11, 1.9 * len(predictions)), layout="constrained", squeeze=False
    )
    for row, (name, (predicted, true)) in zip(axes, predictions.items(), strict=True):
        for k, (ax, kind) in enumerate(zip(row, PROPERTIES, strict=True)):
            ends = [min(true[:, k].min(), predicted[:, k].min()), max(true[:, k].max(), predicted[:, k].max())]
            ax.plot(ends, ends, color="lightgrey", linewidth=1)
            ax.scatter(true[:, k], predicted[:, k], s=5, alpha=0.6, linewidths=0)
            if kind == "test_loss":
                ax.set(xscale="log", yscale="log")
                ax.minorticks_off()
            ax.set(title=LABELS[kind] if ax in axes[0] else "", xlabel="measured" if ax in axes[-1] else "")
        row[0].set_ylabel(f"{name}:\npredicted")
    save_figure(path, figure)


def draw_scores(path: Path, scores: dict[str, dict[str, dict[str, float]]]) -> None:
    """Draw Kendall's tau of all predictors, best above, with its spread over splits; references that see images in grey."""
    order = sorted(scores, key=lambda name: scores[name]["tau"]["mean"])
    means = [scores[name]["tau"]["mean"] for name in order]
    spread = [scores[name]["tau"].get("std", 0.0) for name in order]
    colors = ["lightgrey" if name in REFERENCES or name.startswith("hyper") else "C0" for name in order]
    figure, ax = plt.subplots(figsize=(5.5, 0.24 * len(order) + 0.8), layout="constrained")
    ax.barh(order, means, xerr=spread, color=colors)
    ax.set(xlabel="Kendall's tau of test accuracy, runs not seen")
    save_figure(path, figure)
