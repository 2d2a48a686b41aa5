"""Pictures of pretraining, of few shots, of continual learning, and of associative memory.

Axes: n images, m stored images or slots, t tasks, c h w channels and pixels.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from torch import Tensor

from stages.common.figures import image_grid, legible, plain_ticks, save_figure, save_plot, show_image
from stages.common.files import Rows, Summary
from stages.vit_memory.captions import caption

RECONSTRUCTIONS = 10  # images in a row
RETRIEVED = 4  # stored images shown beside each image
COMMON_BETA = 0.125  # 1 / sqrt(64): that of attention between tokens, often taken for memories as well
CLASSICAL_CAPACITY = 0.138  # patterns for each bit (Amit, Gutfreund & Sompolinsky 1985)
KINDS = {"class": "among all classes so far", "task": "among the task's own"}


def _mean_matrix(rows: Rows, method: str, kind: str) -> Float[np.ndarray, "t t"]:
    """Return R[after, on], mean over seeds."""
    cells = [row for row in rows if (row["method"], row["kind"]) == (method, kind)]
    tasks = 1 + max(row["after"] for row in cells)
    matrix = np.zeros((tasks, tasks))
    for row in cells:
        matrix[row["after"], row["on"]] += row["acc"]
    return matrix * tasks**2 / len(cells)


def draw_accuracy(path: Path, rows: Rows, table: Summary) -> None:
    """Draw the accuracy over the tasks so far, after each task, of every method; the best at the end comes first in the legend."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 3.4), layout="constrained")
    colours = {method: f"C{i}" for i, method in enumerate(table)}
    for ax, (kind, title) in zip(axes, KINDS.items(), strict=True):
        for i, method in enumerate(sorted(table, key=lambda m, kind=kind: -table[m][kind]["final"]["mean"])):
            matrix = _mean_matrix(rows, method, kind)
            so_far = [matrix[t, : t + 1].mean() for t in range(len(matrix))]
            label = f"{caption(method)} {table[method][kind]['final']['mean']:.1%}"
            style = {"linestyle": "-" if i < 5 else "--", "color": colours[method], "label": label}
            ax.plot(range(1, len(matrix) + 1), so_far, marker="o", markersize=3, **style)
        ax.set(title=title, xlabel="tasks learned", ylim=(0, 1.02), xticks=range(1, len(matrix) + 1))
        ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes[0].set_ylabel("test accuracy over those tasks")
    save_plot(path, figure)


def draw_matrices(path: Path, rows: Rows) -> None:
    """Draw R of every method: rows are tasks learned, columns the task that is tested, blank before it is learned.

    Above class-, below task-incremental.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = image_grid(2, len(methods), size=1.1)
    for i, kind in enumerate(KINDS):
        for ax, method in zip(axes[i], methods, strict=True):
            matrix = _mean_matrix(rows, method, kind)
            learned = np.tril(np.ones_like(matrix, dtype=bool))
            image = ax.imshow(np.where(learned, matrix, np.nan), vmin=0, vmax=1, cmap="viridis")
            ax.set_title(caption(method).partition(":")[0] if i == 0 else "", fontsize=8, pad=2)
        axes[i, 0].set_ylabel(f"{kind}-incremental\nafter task", fontsize=7)
        axes[i, 0].set_xlabel("on task", fontsize=7)
    figure.colorbar(image, ax=axes, shrink=0.7, label="test accuracy")
    save_figure(path, figure)


def draw_methods(path: Path, table: Summary, reference: str, title: str) -> None:
    """Draw each method's difference to the reference, with its interval; accuracy beside the name."""
    methods = [m for m in sorted(table, key=lambda m: table[m]["acc"]["mean"]) if "difference" in table[m]]
    figure, ax = plt.subplots(figsize=(6, 0.3 * len(methods) + 1), layout="constrained")
    for i, method in enumerate(methods):
        d = table[method]["difference"]
        ax.plot([100 * d["low"], 100 * d["high"]], [i, i], color="C0")
        ax.plot(100 * d["mean"], i, "o", color="C0", markersize=4)
    ax.axvline(0, color="grey", linewidth=0.8)
    names = [f"{caption(m)}, {table[m]['acc']['mean']:.1%}" for m in methods]
    ax.set(yticks=range(len(methods)), yticklabels=names, title=title)
    of_reference = f"{caption(reference)}, {table[reference]['acc']['mean']:.1%}"
    ax.set_xlabel(f"accuracy minus that of the {of_reference}, points")
    save_plot(path, figure)


def draw_retrieval(path: Path, errors: list[dict[str, float]], capacity: list[dict[str, float]]) -> None:
    """Draw the error of retrieval against beta for each number of patterns, and the fraction retrieved by either kind of network."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for patterns in dict.fromkeys(row["patterns"] for row in errors):
        curve = [row for row in errors if row["patterns"] == patterns]
        x, y = [row["beta"] for row in curve], [row["error"] for row in curve]
        axes[0].plot(x, y, "o-", markersize=3, label=f"{patterns} patterns")
    axes[0].axvline(COMMON_BETA, color="grey", linewidth=0.8, label=f"{COMMON_BETA}: attention between tokens")
    axes[0].set(
        xscale="log",
        xlabel="beta",
        ylabel="distance to the stored pattern (length 1)",
        title="retrieval from a noisy key",
    )
    axes[0].legend(fontsize=7)
    for kind, style in (("modern", "o-"), ("classical", "s--")):
        axes[1].plot([r["patterns"] for r in capacity], [r[kind] for r in capacity], style, markersize=3, label=kind)
    axes[1].axvline(CLASSICAL_CAPACITY * capacity[0]["dim"], color="grey", linewidth=0.8)
    axes[1].set(
        xscale="log", xlabel=f"bipolar patterns of {capacity[0]['dim']} bits", ylabel="share retrieved without error"
    )
    axes[1].set_title("capacity; line: the theory of the classical network")
    plain_ticks(axes[0].xaxis, axes[1].xaxis)
    axes[1].legend(fontsize=7)
    save_plot(path, figure)


def draw_energy(path: Path, rows: list[dict[str, float]]) -> None:
    """Draw the energy after each update, and how far the state still moves, for each beta."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for beta in dict.fromkeys(row["beta"] for row in rows):
        curve = [row for row in rows if row["beta"] == beta]
        for ax, key in zip(axes, ("energy", "movement"), strict=True):
            x, y = [row["step"] for row in curve], [row[key] for row in curve]
            ax.plot(x, y, "o-", markersize=3, label=f"beta {beta:g}")
    axes[0].set(xlabel="updates", ylabel="energy")
    axes[1].set(xlabel="updates", ylabel="distance to the state before", yscale="symlog")
    axes[1].set_yscale("symlog", linthresh=1e-4)
    axes[0].legend(fontsize=7)
    save_plot(path, figure)


def draw_attention(
    path: Path,
    images: Float[Tensor, "n c h w"],
    stored: Float[Tensor, "m c h w"],
    attention: dict[str, Float[Tensor, "n m"]],
    names: list[str],
) -> None:
    """Draw each image and the stored images that it attends to most, for each memory; attention above."""
    width, names = RETRIEVED + 1, legible(names)  # of a memory's block
    figure, axes = image_grid(len(images), len(attention) * width)
    for i, image in enumerate(images):
        for block, (name, weights) in enumerate(attention.items()):
            first, *others = axes[i, block * width : (block + 1) * width]
            show_image(first, image.cpu().numpy())
            first.set_title(names[i], fontsize=7, pad=1)
            values, slots = weights[i].topk(RETRIEVED)
            for ax, value, slot in zip(others, values.tolist(), slots.tolist(), strict=True):
                show_image(ax, stored[slot].cpu().numpy())
                ax.set_title(f"{value:.0%}", fontsize=7, pad=1)
            if i == 0:
                first.annotate(f"{name}: image, and what it retrieves", (0, 1.35), xycoords="axes fraction", fontsize=8)
    save_figure(path, figure)


def draw_slots(path: Path, attention: dict[str, Float[Tensor, "n m"]], labels: list[int]) -> None:
    """Draw the attention of images (rows, by class) over slots (columns, by class): a block for each class if memory is right."""
    size = (4.2 * len(attention), 3.6)
    figure, axes = plt.subplots(1, len(attention), figsize=size, squeeze=False, layout="constrained")
    for ax, (name, weights) in zip(axes[0], attention.items(), strict=True):
        ax.imshow(weights.cpu().numpy() ** 0.5, cmap="magma", aspect="auto", interpolation="nearest")
        ends = np.flatnonzero(np.diff(labels)) + 0.5
        title = f"{name}: {weights.min():.1%} (black) to {weights.max():.1%}"
        ax.set(title=title, xlabel="slots, by class", ylabel="test images, by class", yticks=[])
        ax.vlines(ends, -0.5, len(weights) - 0.5, color="white", linewidth=0.3)
    save_figure(path, figure)


def draw_reconstructions(
    path: Path, rows: dict[str, Float[Tensor, "n 3 h w"]], mean: Sequence[float], std: Sequence[float]
) -> None:
    """Draw the first images of each row, by its name: as they are, seen, filled in. They are normalised by `mean` and `std`."""
    figure, axes = image_grid(len(rows), RECONSTRUCTIONS)
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        scale, shift = (images.new_tensor(values).view(3, 1, 1) for values in (std, mean))
        for ax, image in zip(row, images, strict=False):
            show_image(ax, (image * scale + shift).cpu().numpy())
    save_figure(path, figure)
