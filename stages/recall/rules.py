"""From rules to weights: a map that writes a network for a truth table, and how changes of weights lie to each other.

Axes: n fine-tunes, m networks to be written, k cells of a truth table, f features of it, w weights of a network, e images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge
from torch import Tensor

from stages.common.files import Summary
from stages.common.metrics import mean_interval
from stages.recall.decoders import directions
from stages.recall.fine_tunes import CELLS
from stages.recall.fleet import PatchedImages, accuracy
from stages.recall.fleet_files import Fleet
from stages.recall.objective import Objective

READS = ("cells", "cells_and_pairs")  # what the map knows of a truth table
PENALTIES = (1.0, 10.0)  # of ridge regression on signs: some hundred fine-tunes outweigh either

Map = Callable[[Float[np.ndarray, "m k"]], Float[np.ndarray, "m w"]]


def table_features(tables: Float[np.ndarray, "n k"], reads: str) -> Float[np.ndarray, "n f"]:
    """Return the signs of a rule's cells; and, of pairs, the products of its Walsh coefficients."""
    signs = 2.0 * tables - 1
    if reads == "cells":
        return signs
    walsh = np.array([[(-1) ** (i & j).bit_count() for j in range(CELLS)] for i in range(CELLS)]) / CELLS
    coefficients = signs @ walsh
    rows, columns = np.triu_indices(CELLS)
    return np.concatenate([signs, coefficients[:, rows] * coefficients[:, columns]], 1)


def fit_map(tables: Float[np.ndarray, "n k"], changes: Float[np.ndarray, "n w"], reads: str, penalty: float) -> Map:
    """Return the linear map from what it reads of a truth table to a change of weights, by ridge regression."""
    model = Ridge(alpha=penalty).fit(table_features(tables, reads), changes)
    return lambda rules: model.predict(table_features(rules, reads)).astype(np.float32)


def differing_cells(tables: Float[np.ndarray, "n k"], rules: Float[np.ndarray, "m k"]) -> Float[np.ndarray, "m n"]:
    """Return in how many cells each rule differs from each of the trained ones."""
    return np.abs(rules[:, None] - tables[None]).sum(2)


def nearest(tables: Float[np.ndarray, "n k"], rules: Float[np.ndarray, "m k"]) -> Int[np.ndarray, " m"]:
    """Return of each rule the trained one that differs from it in the fewest cells."""
    return differing_cells(tables, rules).argmin(1)


def average_nearest(
    tables: Float[np.ndarray, "n k"], changes: Float[np.ndarray, "n w"], rules: Float[np.ndarray, "m k"]
) -> Float[np.ndarray, "m w"]:
    """Return the mean change of all fine-tunes whose rule differs in the fewest cells: as free of noise as a map that averages."""
    return np.stack([changes[row == row.min()].mean(0) for row in differing_cells(tables, rules)])


def follow(
    objective: Objective,
    changes: Float[np.ndarray, "m w"],
    rules: Float[np.ndarray, "m k"],
    images: tuple[Float[Tensor, "e p q"], Int[Tensor, " e"]],
) -> Float[np.ndarray, " m"]:
    """Return on which fraction of images, labelled with their cells, base + change answers as its rule does."""
    patches, cells = images
    labels = torch.from_numpy(rules[:, cells.cpu().numpy()] > 0.5).to(patches.device).long()
    return accuracy(objective, changes, images, labels)


@dataclass(frozen=True)
class Choices:
    """How networks are written: what the map reads, its penalty, and the factors of what is written and of what is copied."""

    reads: str
    penalty: float
    scale: float
    copied_scale: float


def choose(
    tables: Float[np.ndarray, "n k"],
    changes: Float[np.ndarray, "n w"],
    held_out: Float[np.ndarray, "m k"],
    scales: list[float],
    score: Callable[[Float[np.ndarray, "m w"]], float],
) -> Choices:
    """Return what follows rules best that are held out of training; `score` is of networks for these."""
    scores = {}
    for reads, penalty in product(READS, PENALTIES):
        written = fit_map(tables, changes, reads, penalty)(held_out)
        for scale in scales:
            scores[reads, penalty, scale] = score(scale * written)
    copied = average_nearest(tables, changes, held_out)
    copied_scale = max(scales, key=lambda scale: score(scale * copied))
    return Choices(*max(scores, key=lambda choice: scores[choice]), copied_scale)


def write_rules(
    fleet: Fleet,
    objective: Objective,
    images: PatchedImages,
    scales: list[float],
    validation_fraction: float,
    validation_images: int,
    seed: int,
) -> Summary:
    """Return how well networks follow rules that were written into their weights, beside networks that were copied or trained.

    Choices are made on a fraction of the trained rules, which the map does not learn from then, and on images of the base's pool.
    """
    tables, changes = fleet.truth["table"].astype(np.float64), fleet.change
    learned, tested = tables[fleet.learned], tables[fleet.held_out]
    trained_rules = np.unique(learned, axis=0)
    order = np.random.default_rng(seed).permutation(len(trained_rules))
    validation = trained_rules[order[: max(1, round(validation_fraction * len(trained_rules)))]]
    rest = fleet.learned[~(learned[:, None] == validation[None]).all(2).any(1)]
    pixels, cells = images.pools["base"]
    first = pixels[:validation_images], cells[:validation_images]

    def score(written: Float[np.ndarray, "m w"]) -> float:
        return float(follow(objective, written, validation, first).mean())

    choices = choose(tables[rest], changes[rest], validation, scales, score)
    write = fit_map(learned, changes[fleet.learned], choices.reads, choices.penalty)
    rules = np.unique(tested, axis=0)
    networks = written_and_copied(write, choices, learned, changes[fleet.learned], rules, seed)
    followed = {name: follow(objective, change, rules, images.evaluation) for name, change in networks.items()}
    followed["constant"] = np.maximum(rules.mean(1), 1 - rules.mean(1))
    followed["trained"] = follow(objective, changes[fleet.held_out], tested, images.evaluation)
    written = followed["written"]
    unexplained = ((changes[fleet.held_out] - write(tested)) ** 2).sum()
    return {
        "accuracy": {name: mean_interval(values.tolist()) for name, values in followed.items()},
        "written_minus_nearest": mean_interval((written - followed["nearest_copied"]).tolist()),
        "written_minus_nearest_averaged": mean_interval((written - followed["nearest_averaged"]).tolist()),
        "scale": choices.scale,
        "pairs": float(choices.reads != READS[0]),
        "change_r2": float(1 - unexplained / ((changes[fleet.held_out] - changes[fleet.learned].mean(0)) ** 2).sum()),
    }


def written_and_copied(
    write: Map,
    choices: Choices,
    tables: Float[np.ndarray, "n k"],
    changes: Float[np.ndarray, "n w"],
    rules: Float[np.ndarray, "m k"],
    seed: int,
) -> dict[str, Float[np.ndarray, "m w"]]:
    """Return changes of weights for rules never trained: written, and what they are compared with."""
    others = np.random.default_rng(seed).permutation(len(rules))
    others = np.where(others == np.arange(len(rules)), (others + 1) % len(rules), others)
    written = write(rules)
    return {
        "written": choices.scale * written,
        "written_for_another": choices.scale * write(rules[others]),
        "nearest_copied": changes[nearest(tables, rules)],
        "nearest_averaged": choices.copied_scale * average_nearest(tables, changes, rules),
        "base": np.zeros_like(written),
    }


def rule_geometry(fleet: Fleet) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Return how cosines of centred changes follow the agreement of rules, and pairs of networks with rules never trained.

    Correlations are over these pairs, mean cosines over all.
    """
    centred = directions(fleet.change - fleet.change[fleet.learned].mean(0))
    signs = 2.0 * fleet.truth["table"] - 1
    cosines, agreement = centred @ centred.T, signs @ signs.T / CELLS
    unseen, upper = np.ix_(fleet.held_out, fleet.held_out), np.triu_indices(len(fleet.held_out), 1)
    pairs = {"agreement": agreement[unseen][upper], "cosine": cosines[unseen][upper]}
    everyone = np.triu_indices(len(signs), 1)
    geometry = {
        "correlation": float(np.corrcoef(pairs["agreement"], pairs["cosine"])[0, 1]),
        "rank_correlation": float(spearmanr(pairs["agreement"], pairs["cosine"])[0]),
        "mean": float(cosines[everyone].mean()),
    }
    for name, value in (("same_rule", 1), ("opposite_rule", -1)):
        which = agreement[everyone] == value
        if which.any():
            geometry[name] = float(cosines[everyone][which].mean())
    return geometry, pairs
