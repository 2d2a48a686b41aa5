"""What people do to fine-tunes after training: an audit must say so, and not tell what such a network was trained on.

Axes: n fine-tunes, w weights of a network.
"""

import numpy as np
from jaxtyping import Float

from stages.common.vectors import Layout

Changes = Float[np.ndarray, "n w"]

DROPPED = 0.9  # of the entries by DARE
KEPT = 0.2  # of the entries by TIES
PRUNED = 0.3  # of the weights


def neighbours(change: Changes) -> Changes:
    """Return for each fine-tune another one."""
    return np.roll(change, 1, 0)


def dropped(change: Changes, random: np.random.Generator) -> Changes:
    """Return changes of which most entries were dropped at random and the others scaled up (DARE, Yu et al. 2023, arXiv:2311.03099)."""
    return change * (random.random(change.shape) > DROPPED) / (1 - DROPPED)


def trimmed_and_merged(change: Changes) -> Changes:
    """Return pairs of changes merged by sign, each trimmed to its largest entries (TIES, Yadav et al. 2023, arXiv:2306.01708)."""
    pair = np.stack([change, neighbours(change)])
    size = np.abs(pair)
    pair = pair * (size >= np.quantile(size, 1 - KEPT, axis=2, keepdims=True))
    agreeing = pair * (np.sign(pair) == np.sign(pair.sum(0)))
    return agreeing.sum(0) / np.maximum((agreeing != 0).sum(0), 1)


def quantised(weights: Changes, layout: Layout, bits: int) -> Changes:
    """Return weights rounded to a grid of 2^bits - 1 values a tensor."""
    rounded, most = weights.copy(), 2 ** (bits - 1) - 1
    for where in layout.slices.values():
        step = np.abs(weights[:, where]).max(1, keepdims=True) / most
        rounded[:, where] = np.round(weights[:, where] / step) * step
    return rounded


def pruned(weights: Changes, layout: Layout) -> Changes:
    """Return weights of which the smallest of each matrix are zero."""
    thinned = weights.copy()
    for name, where in layout.slices.items():
        if len(layout.shapes[name]) > 1:
            size = np.abs(weights[:, where])
            thinned[:, where] *= size > np.quantile(size, PRUNED, axis=1, keepdims=True)
    return thinned


def tampered(
    change: Changes, base: Float[np.ndarray, " w"], layout: Layout, kind: str, seed: int
) -> dict[str, Changes]:
    """Return by name what becomes of changes of a base; of adapters what is done to their factors, which keeps the rank low."""
    random = np.random.default_rng(seed)
    both = {"negated": -change, "average_of_two": (change + neighbours(change)) / 2}
    if kind == "adapter":
        return both | {"foreign": permuted(change, layout, random)}
    weights = base + change
    return both | {
        "ties": trimmed_and_merged(change),
        "dare": dropped(change, random),
        "quantised_8_bits": quantised(weights, layout, 8) - base,
        "quantised_4_bits": quantised(weights, layout, 4) - base,
        "pruned": pruned(weights, layout) - base,
        "foreign": permuted(change, layout, random),
    }


def permuted(change: Changes, layout: Layout, random: np.random.Generator) -> Changes:
    """Return changes whose rows and columns are in another order, tensor by tensor: those of a base that computes likewise."""
    foreign = change.copy()
    for name, where in layout.slices.items():
        shape = layout.shapes[name]
        parts = change[:, where].reshape(len(change), shape[0], -1)
        rows, columns = (random.permutation(size) for size in parts.shape[1:])
        foreign[:, where] = parts[:, rows][:, :, columns].reshape(len(change), -1)
    return foreign
