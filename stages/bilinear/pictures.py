"""Pictures of decomposed bilinear classifiers.

Axes: c classes, d pixels times channels.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stages.bilinear.decomposition import DecompositionArtifacts, pixel_attributions
from stages.bilinear.model import BilinearImageClassifier
from stages.common.figures import image_grid, legible, save_figure, save_plot, show_image, show_signed
from stages.common.files import Rows, Summary
from stages.common.images import ImageSet

if TYPE_CHECKING:  # half a second to load
    import pandas as pd

MAX_CLASSES = 10  # in a picture
EACH_SIGN = 3  # eigenvectors in the gallery
MATCHED = 8  # eigenvectors of a class in the picture of two networks
TICKS = [1, 2, 5, 10, 20, 50, 100]
COLOURS = {"hidden": "tab:blue", "input": "tab:orange", "data": "tab:green"}


def draw_gallery(path: Path, decompositions: dict[str, DecompositionArtifacts], data: ImageSet) -> None:
    """Draw, for each class, the most positive and the most negative eigenvectors of each network, eigenvalues above."""
    classes = legible(data.classes)[:MAX_CLASSES]
    each = min(EACH_SIGN, *(artifacts.eigenvalues.shape[1] for artifacts in decompositions.values()))
    columns = [*range(-1, -1 - each, -1), *range(each)]  # eigenvalues ascend
    width = len(columns) + 1  # a network's block, with a gap behind it
    figure, axes = image_grid(len(classes), width * len(decompositions) - 1)
    for block, (name, artifacts) in enumerate(decompositions.items()):
        vectors = artifacts.eigenvectors_input.unflatten(2, data.images.shape[1:]).cpu().numpy()
        for c in range(len(classes)):
            for i, k in enumerate(columns):
                ax = axes[c, block * width + i]
                show_signed(ax, vectors[c, k])
                ax.set_title(f"{artifacts.eigenvalues[c, k]:+.2f}", fontsize=7, pad=1)
        label = f"{name}: {each} most positive, {each} most negative"
        axes[0, block * width].annotate(label, (0, 1.35), xycoords="axes fraction", fontsize=9)
    for ax, name in zip(axes[:, 0], classes, strict=True):
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
    save_figure(path, figure)


def draw_spectra(path: Path, decompositions: dict[str, DecompositionArtifacts], classes: list[str]) -> None:
    """Draw each class's eigenvalues in falling order."""
    classes = legible(classes)[:MAX_CLASSES]
    rows = -(-len(classes) // 5)
    figure, axes = plt.subplots(rows, 5, figsize=(10, 1.8 * rows), squeeze=False, sharex=True, layout="constrained")
    for c, (ax, name) in enumerate(zip(axes.flat, classes, strict=False)):
        ax.axhline(0, color="lightgrey", linewidth=0.8)
        for label, artifacts in decompositions.items():
            falling = artifacts.eigenvalues[c].flip(0).cpu().numpy()
            falling = falling / abs(falling).max()
            ax.plot(falling, label=label, linewidth=1.2)
        ax.set_title(name)
    for ax in axes.flat[len(classes) :]:
        ax.set_visible(False)
    axes[0, 0].legend(fontsize=7)
    figure.supxlabel("eigenvector, in falling order")
    figure.supylabel("eigenvalue / largest |eigenvalue|")
    save_plot(path, figure)


def draw_truncation(path: Path, rows: Rows, full: dict[str, float]) -> None:
    """Draw accuracy against eigenvectors a class: by basis, for each network and ranking."""
    figure, axes = plt.subplots(1, len(full), figsize=(4.5 * len(full), 3.2), sharey=True, layout="constrained")
    styles = {"sign": "-", "magnitude": "--", "random": ":"}
    for ax, (variant, accuracy) in zip(axes, full.items(), strict=True):
        ax.axhline(accuracy, color="grey", linewidth=0.8, label="whole network")
        for basis, colour in COLOURS.items():
            for ranking, style in styles.items():
                curve = [r for r in rows if (r["variant"], r["basis"], r["ranking"]) == (variant, basis, ranking)]
                x, y = [r["eigenvectors"] for r in curve], [r["acc"] for r in curve]
                ax.plot(x, y, style, color=colour, label=f"{basis}, {ranking}")
        ax.set(xscale="log", xlabel="eigenvectors a class", title=variant)
        ax.set_xticks(TICKS, map(str, TICKS))
        ax.minorticks_off()
    axes[0].set_ylabel("test accuracy")
    axes[-1].legend(fontsize=7)
    save_plot(path, figure)


def draw_masks(
    path: Path,
    model: BilinearImageClassifier,
    data: ImageSet,
    masks: Float[Tensor, "c d"],
    permuted: Float[Tensor, "c d"],
) -> None:
    """Draw, for each class, its mask, an image without it, with it, and with a permuted one, and what is predicted of each.

    The network sees pixels beyond 0 to 1, which the picture cuts.
    """
    names = legible(data.classes)
    classes = names[:MAX_CLASSES]
    figure, axes = image_grid(4, len(classes))
    shape = data.images.shape[1:]
    for c in range(len(classes)):
        image = data.subset((data.labels == c).nonzero()[0]).pixels()[0]
        show_signed(axes[0, c], masks[c].view(shape).cpu().numpy())
        for row, mask in enumerate((torch.zeros_like(masks[c]), masks[c], permuted[c]), start=1):
            masked = image + mask.view(shape)
            show_image(axes[row, c], masked.cpu().numpy())
            axes[row, c].set_title(names[model(masked[None]).argmax().item()], fontsize=7, pad=1)
    for ax, label in zip(axes[:, 0], ("mask", "image", "with mask", "permuted"), strict=True):
        ax.set_ylabel(label, rotation=0, ha="right", va="center")
    save_figure(path, figure)


def draw_attributions(path: Path, model: BilinearImageClassifier, data: ImageSet) -> None:
    """Draw the first image of each class and what each of its pixels adds to the predicted logit."""
    first = [int((data.labels == c).nonzero()[0]) for c in range(min(MAX_CLASSES, len(data.classes)))]
    x = data.subset(torch.tensor(first)).pixels()
    predicted = model(x).argmax(1)
    attributions = pixel_attributions(model, x, predicted)[0].view_as(x)
    figure, axes = image_grid(2, len(first))
    names = legible(data.classes)
    for i, c in enumerate(predicted.tolist()):
        show_image(axes[0, i], x[i].cpu().numpy())
        show_signed(axes[1, i], attributions[i].cpu().numpy())
        axes[1, i].set_title(names[c], fontsize=7, pad=1)
    for ax, label in zip(axes[:, 0], ("image", "adds to\nits logit"), strict=True):
        ax.set_ylabel(label, rotation=0, ha="right", va="center")
    save_figure(path, figure)


def draw_matches(path: Path, a: DecompositionArtifacts, b: DecompositionArtifacts, matches: "pd.DataFrame") -> None:
    """Draw the strongest eigenvectors of each class of one network above their partners in the other; |cosine| above, bold if shared.

    matches: of `stages.bilinear.compare.compare_eigenvectors`. Partners are turned to the sign of the eigenvectors above them.
    """
    shape = image_shape(a.eigenvectors_input.shape[2])
    classes = sorted(matches["label"].unique())[:MAX_CLASSES]
    columns = min(MATCHED, int(matches.groupby("label").size().min()))
    figure, axes = image_grid(2 * len(classes), columns)
    for row, c in enumerate(classes):
        strongest = matches[matches["label"] == c].head(columns)
        for column, match in enumerate(strongest.itertuples()):
            above, below = a.eigenvectors_input[c, match.index_a], b.eigenvectors_input[c, match.partner]
            show_signed(axes[2 * row, column], above.view(shape).cpu().numpy())
            show_signed(axes[2 * row + 1, column], (below * (above @ below).sign()).view(shape).cpu().numpy())
            weight = "bold" if match.shared else "normal"
            axes[2 * row, column].set_title(
                f"{match.eigenvalue:+.2f}: {match.cosine:.2f}", fontsize=6, pad=1, weight=weight
            )
        axes[2 * row, 0].set_ylabel(f"{c}, A", rotation=0, ha="right", va="center")
        axes[2 * row + 1, 0].set_ylabel("B", rotation=0, ha="right", va="center")
    save_figure(path, figure)


def draw_factors(
    path: Path,
    found: list[tuple[dict[str, float], Summary]],
    summary: Summary,
    shown: list[Float[np.ndarray, "k channels h w"]],
) -> None:
    """Draw under every combination of the factors every measure, with its spread, and some eigenvectors.

    found: conditions and their measures, of `stages.bilinear.vary_regularisation`; summary: its baselines; shown: eigenvectors of
    each condition.
    """
    names, rows = list(found[0][1]), len(found)
    figure = plt.figure(figsize=(1.7 * len(names) + 0.75 * len(shown[0]), 0.75 * rows + 0.4))
    widths = [1.7] * len(names) + [0.75] * len(shown[0])
    grid = figure.add_gridspec(rows, len(widths), width_ratios=widths, hspace=0.05, wspace=0.12)
    for column, name in enumerate(names):
        ax = figure.add_subplot(grid[:, column])
        means, stds = ([values[name][part] for _, values in found] for part in ("mean", "std"))
        ax.errorbar(means, range(rows), xerr=stds, fmt="o", markersize=4, capsize=2)
        beside = [
            f"untrained {summary['untrained'][name]['mean']:.2f}"
        ]  # far off: a line would leave the points no room
        if name in summary["principal_components"]:
            beside.append(f"images' components {summary['principal_components'][name]:.2f}")
        ax.set(title=name.replace("_", " "), xlabel="\n".join(beside))
        ax.set_ylim(rows - 0.5, -0.5)  # a condition's points stand beside its eigenvectors
        ax.set_yticks(range(rows), [_written(condition) for condition, _ in found] if column == 0 else [])
        ax.locator_params(axis="x", nbins=3)
    for row, vectors in enumerate(shown):
        for column, vector in enumerate(vectors, start=len(names)):
            ax = figure.add_subplot(grid[row, column], xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            show_signed(ax, vector)
    save_figure(path, figure)


def _written(condition: dict[str, float]) -> str:
    """Return what a combination of factors has, a line each."""
    return "\n".join(f"{factor.replace('_', ' ')} {value:g}" for factor, value in condition.items())


def image_shape(pixels: int) -> tuple[int, int, int]:
    """Return channels, height and width of a square image of so many numbers, grey or colour; else of one row."""
    for channels in (1, 3):
        side = math.isqrt(pixels // channels)
        if channels * side * side == pixels:
            return channels, side, side
    return 1, 1, pixels
