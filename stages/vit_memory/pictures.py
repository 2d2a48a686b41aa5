"""Pictures of continual learning and of associative memory."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from torch import Tensor

from stages.common.figures import image_grid, save_figure, show_image

Rows = list[dict[str, Any]]
KINDS = {"class": "among all classes so far", "task": "among the task's own"}


def _mean_matrix(rows: Rows, method: str, kind: str) -> Float[np.ndarray, "t t"]:
    """Return R[after, on], mean over seeds."""
    own = [row for row in rows if (row["method"], row["kind"]) == (method, kind)]
    tasks = 1 + max(row["after"] for row in own)
    matrix = np.zeros((tasks, tasks))
    for row in own:
        matrix[row["after"], row["on"]] += row["acc"]
    return matrix * tasks**2 / len(own)


def draw_accuracy(path: Path, rows: Rows, table: dict[str, Any]) -> None:
    """Draw the accuracy over the tasks so far, after each task, of every method; the best at the end comes first in the legend."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    colours = {method: f"C{i}" for i, method in enumerate(table)}
    for ax, (kind, title) in zip(axes, KINDS.items(), strict=True):
        for i, method in enumerate(sorted(table, key=lambda m, kind=kind: -table[m][kind]["final"]["mean"])):
            matrix = _mean_matrix(rows, method, kind)
            so_far = [matrix[t, : t + 1].mean() for t in range(len(matrix))]
            label = f"{method.replace('_', ' ')} {table[method][kind]['final']['mean']:.1%}"
            style = {"linestyle": "-" if i < 5 else "--", "color": colours[method], "label": label}
            ax.plot(range(1, len(matrix) + 1), so_far, marker="o", markersize=3, **style)
        ax.set(title=title, xlabel="tasks learnt", ylim=(0, 1.02), xticks=range(1, len(matrix) + 1))
        ax.legend(fontsize=6)
    axes[0].set_ylabel("test accuracy over those tasks")
    save_figure(path, figure)


def draw_matrices(path: Path, rows: Rows) -> None:
    """Draw R of every method: rows are tasks learnt, columns the task that is tested; above class-, below task-incremental."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = image_grid(2, len(methods), size=1.1)
    for i, kind in enumerate(KINDS):
        for ax, method in zip(axes[i], methods, strict=True):
            ax.imshow(_mean_matrix(rows, method, kind), vmin=0, vmax=1, cmap="viridis")
            ax.set_title(method.replace("_", " ") if i == 0 else "", fontsize=7, pad=2)
        axes[i, 0].set_ylabel(f"{kind}-incremental\nafter task", fontsize=7)
        axes[i, 0].set_xlabel("on task", fontsize=7)
    save_figure(path, figure)


def draw_retrieval(path: Path, errors: Rows, capacity: Rows) -> None:
    """Draw the error of retrieval against beta for each number of patterns, and the share retrieved by either kind of network."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for patterns in dict.fromkeys(row["patterns"] for row in errors):
        own = [row for row in errors if row["patterns"] == patterns]
        axes[0].plot(
            [r["beta"] for r in own], [r["error"] for r in own], "o-", markersize=3, label=f"{patterns} patterns"
        )
    axes[0].axvline(0.125, color="grey", linewidth=0.8)
    axes[0].set(
        xscale="log",
        xlabel="beta",
        ylabel="distance to the stored pattern (length 1)",
        title="retrieval from a noisy key",
    )
    axes[0].legend(fontsize=6)
    for kind, style in (("modern", "o-"), ("classical", "s--")):
        axes[1].plot([r["patterns"] for r in capacity], [r[kind] for r in capacity], style, markersize=3, label=kind)
    axes[1].axvline(0.138 * capacity[0]["dim"], color="grey", linewidth=0.8)
    axes[1].set(
        xscale="log", xlabel=f"bipolar patterns of {capacity[0]['dim']} bits", ylabel="share retrieved without error"
    )
    axes[1].set_title("capacity; line: the theory of the classical network")
    axes[1].legend(fontsize=6)
    save_figure(path, figure)


def draw_energy(path: Path, rows: Rows) -> None:
    """Draw the energy after each update, and how far the state still moves, for each beta."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for beta in dict.fromkeys(row["beta"] for row in rows):
        own = [row for row in rows if row["beta"] == beta]
        for ax, key in zip(axes, ("energy", "movement"), strict=True):
            ax.plot([r["step"] for r in own], [r[key] for r in own], "o-", markersize=3, label=f"beta {beta:g}")
    axes[0].set(xlabel="updates", ylabel="energy")
    axes[1].set(xlabel="updates", ylabel="distance to the state before", yscale="symlog")
    axes[1].set_yscale("symlog", linthresh=1e-4)
    axes[0].legend(fontsize=6)
    save_figure(path, figure)


def draw_attention(
    path: Path,
    images: Float[Tensor, "n c h w"],
    stored: Float[Tensor, "m c h w"],
    shares: dict[str, Float[Tensor, "n m"]],
    names: list[str],
) -> None:
    """Draw each image and the stored images that it retrieves most of, share above; then its whole attention over all slots."""
    top = 4
    figure, axes = image_grid(len(images), len(shares) * (top + 1))
    for i, image in enumerate(images):
        for block, (name, share) in enumerate(shares.items()):
            at = block * (top + 1)
            show_image(axes[i, at], image.cpu().numpy())
            axes[i, at].set_title(names[i], fontsize=6, pad=1)
            values, slots = share[i].topk(top)
            for ax, value, slot in zip(axes[i, at + 1 : at + 1 + top], values.tolist(), slots.tolist(), strict=True):
                show_image(ax, stored[slot].cpu().numpy())
                ax.set_title(f"{value:.0%}", fontsize=6, pad=1)
            if i == 0:
                axes[0, at].annotate(
                    f"{name}: image, and what it retrieves", (0, 1.3), xycoords="axes fraction", fontsize=8
                )
    save_figure(path, figure)


def draw_slots(path: Path, shares: dict[str, Float[Tensor, "n m"]], labels: list[int]) -> None:
    """Draw the attention of images (rows, by class) over slots (columns, by class): a block for each class if memory is right."""
    figure, axes = plt.subplots(1, len(shares), figsize=(4.2 * len(shares), 3.6), squeeze=False, layout="constrained")
    for ax, (name, share) in zip(axes[0], shares.items(), strict=True):
        ax.imshow(share.cpu().numpy() ** 0.5, cmap="magma", aspect="auto", interpolation="nearest")
        ends = np.flatnonzero(np.diff(labels)) + 0.5
        title = f"{name}: {share.min():.1%} (black) to {share.max():.1%}"
        ax.set(title=title, xlabel="slots, by class", ylabel="test images, by class", yticks=[])
        ax.vlines(ends, -0.5, len(share) - 0.5, color="white", linewidth=0.3)
    save_figure(path, figure)
