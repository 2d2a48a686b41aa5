"""Pictures: saved whole, with the same bytes for the same numbers."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import NullFormatter

from stages.common.files import atomic_path, vector_path

SHARPNESS = 2  # pixels of a file for each that a page shows it with
plt.rcParams.update(
    {
        "figure.dpi": 110,
        "savefig.dpi": 110 * SHARPNESS,
        "font.size": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "legend.handlelength": 3,  # dashes are told from lines
        "svg.hashsalt": "weightlens",  # names of an SVG's parts are drawn from it, else by chance
    }
)


def save_figure(path: Path, figure: Figure) -> None:
    """Write `figure` as PNG without the metadata that would change its bytes, and close it."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def save_plot(path: Path, figure: Figure) -> None:
    """Write `figure`, of lines and points, as PNG and also as SVG, which stays sharp at any size; and close it."""
    with atomic_path(vector_path(path)) as temporary:
        figure.savefig(temporary, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    save_figure(path, figure)


def plain_ticks(*axes: Axis) -> None:
    """Write the ticks of logarithmic axes as the numbers they are, 100 and no power of ten, and those between not at all."""
    for axis in axes:
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def legible(names: list[str]) -> list[str]:
    """Return names of classes as they can be drawn: one with a character that the font lacks becomes its number."""
    font = get_font(findfont("DejaVu Sans"))
    return [name if all(map(font.get_char_index, map(ord, name))) else f"class {i}" for i, name in enumerate(names)]


def image_grid(rows: int, columns: int, size: float = 0.9) -> tuple[Figure, np.ndarray]:
    """Return a figure of `rows` x `columns` axes without ticks, each `size` inches, and the axes as an array."""
    figure, axes = plt.subplots(rows, columns, figsize=(columns * size, rows * (size + 0.15)), squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return figure, axes


def show_signed(ax: Axes, weights: Float[np.ndarray, "c h w"]) -> None:
    """Draw signed weights: red positive, blue negative, white zero; with three channels, colours around grey."""
    limit = np.abs(weights).max() or 1.0
    if len(weights) == 3:
        ax.imshow(0.5 + weights.transpose(1, 2, 0) / (2 * limit), interpolation="nearest")
    else:
        ax.imshow(weights.mean(0), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")


def show_image(ax: Axes, pixels: Float[np.ndarray, "c h w"]) -> None:
    """Draw an image of pixels in 0 to 1; what lies outside is clipped."""
    pixels = pixels.clip(0, 1)
    if len(pixels) == 3:
        ax.imshow(pixels.transpose(1, 2, 0), interpolation="nearest")
    else:
        ax.imshow(pixels.mean(0), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
