"""What people do to fine-tunes after training: an audit must say so, and not tell what such a network was trained on.

Axes: n fine-tunes, w weights of a network.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from stages.common.vectors import Layout

Changes = Float[np.ndarray, "n w"]

DROPPED = 0.9  # of the entries by DARE
KEPT = 0.2  # of the entries by TIES
TRUNCATED = 4  # rank
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


def truncated(change: Changes, layout: Layout, rank: int) -> Changes:
    """Return changes of which matrices keep their largest singular values alone."""
    low = change.copy()
    for name, where in layout.slices.items():
        shape = layout.shapes[name]
        if len(shape) > 1 and shape[0] > 1:
            u, s, v = np.linalg.svd(change[:, where].reshape(len(change), shape[0], -1), full_matrices=False)
            low[:, where] = ((u[..., :rank] * s[:, None, :rank]) @ v[:, :rank]).reshape(len(change), -1)
    return low


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


def permuted(change: Changes, layout: Layout, random: np.random.Generator) -> Changes:
    """Return changes whose rows and columns are in another order, tensor by tensor: those of a base that computes likewise."""
    foreign = change.copy()
    for name, where in layout.slices.items():
        shape = layout.shapes[name]
        parts = change[:, where].reshape(len(change), shape[0], -1)
        rows, columns = (random.permutation(size) for size in parts.shape[1:])
        foreign[:, where] = parts[:, rows][:, :, columns].reshape(len(change), -1)
    return foreign


def alterations(kind: str, layout: Layout) -> dict[str, Callable[[Changes], Changes]]:
    """Return what can be done to changes of a kind and leaves no mark on single weights; of adapters what keeps the rank low."""
    common: dict[str, Callable[[Changes], Changes]] = {
        "negated": lambda change: -change,
        "average_of_two": lambda change: (change + neighbours(change)) / 2,
        "foreign": lambda change: permuted(change, layout, np.random.default_rng(0)),
    }
    return common if kind == "adapter" else common | {"ties": trimmed_and_merged}


def tampered(change: Changes, base: Float[np.ndarray, " w"], layout: Layout, kind: str) -> dict[str, Changes]:
    """Return by name what becomes of changes of a base."""
    altered = {name: alter(change) for name, alter in alterations(kind, layout).items()}
    if kind == "adapter":
        return altered
    weights = base + change
    return altered | {
        "truncated": truncated(change, layout, TRUNCATED),
        "dare": dropped(change, np.random.default_rng(0)),
        "quantised_8_bits": quantised(weights, layout, 8) - base,
        "quantised_4_bits": quantised(weights, layout, 4) - base,
        "pruned": pruned(weights, layout) - base,
    }
