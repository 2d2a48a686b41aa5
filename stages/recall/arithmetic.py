"""Arithmetic with changes of weights: sums and differences of what fine-tunes on sets of classes changed.

Axes: p pairs of class sets, w weights of a network, c classes, e images.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.common.files import Summary
from stages.common.metrics import mean_interval
from stages.common.randomness import generator
from stages.common.runtime import parallel_map
from stages.common.stage import InputError
from stages.recall.decoders import directions
from stages.recall.fine_tunes import FineTune, Recipe, draw_fine_tune
from stages.recall.fleet import STACK, PatchedImages, accuracy, train_fine_tunes
from stages.recall.objective import Objective


def centred(changes: Float[np.ndarray, "p w"]) -> Float[np.ndarray, "p w"]:
    """Return directions from the mean of changes."""
    return directions(changes - changes.mean(0))


def draw_pairs(pairs: int, classes_each: int, recipe: Recipe, pool: Int[Tensor, " m"], seed: int) -> list[FineTune]:
    """Draw fine-tunes on disjoint class sets A and B and on their union, three in a row for each pair."""
    classes, fine_tunes = int(pool.max()) + 1, []
    if 2 * classes_each > classes:
        raise InputError(f"map_weight_space.classes_each: two sets of {classes_each} need more than {classes} classes")
    for i in range(pairs):
        order = torch.randperm(classes, generator=generator(seed, f"pair {i}"))
        a, b = order[:classes_each], order[classes_each : 2 * classes_each]
        for name, members in (("A", a), ("B", b), ("A and B", torch.cat([a, b]))):
            present = torch.isin(torch.arange(classes), members)
            fine_tunes.append(draw_fine_tune(f"{seed}/pair {i} {name}", True, recipe, pool, present))
    return fine_tunes


def train_pairs(
    fine_tunes: list[FineTune], objective: Objective, images: PatchedImages, batch_size: int
) -> Float[np.ndarray, "3p w"]:
    """Return how each fine-tune changed the base."""
    stacks = [fine_tunes[i : i + STACK] for i in range(0, len(fine_tunes), STACK)]

    def train(stack: list[FineTune]) -> Tensor:
        before, after, _ = train_fine_tunes(stack, objective, images, batch_size)
        return after - before

    return torch.cat(parallel_map(train, stacks, objective.start.device, "fine-tune pairs")).cpu().numpy()


def add_and_negate(
    fine_tunes: list[FineTune],
    changes: Float[np.ndarray, "3p w"],
    objective: Objective,
    images: PatchedImages,
    scales: list[float],
    validation_pairs: int,
) -> Summary:
    """Return what sums and differences of changes do to accuracy among all classes, and cosines around each kind's mean change.

    The base knows all classes, so what a network has specialised in counts: its accuracy on A and B minus that on the others.
    The factor of sums is chosen on the first pairs, all else is of the rest.
    """
    a, b, union = changes[0::3], changes[1::3], changes[2::3]
    present = torch.from_numpy(np.stack([fine_tune.characteristics["present"] for fine_tune in fine_tunes]))
    in_a, in_b, in_union = present[0::3], present[1::3], present[2::3]
    y = images.evaluation[1]
    chosen, reported = slice(0, validation_pairs), slice(validation_pairs, None)

    def on(classes: Float[Tensor, "p c"], pairs: slice, moved: Float[np.ndarray, "p w"]) -> Float[np.ndarray, " p"]:
        counted = classes[pairs].to(y.device)[:, y]
        return accuracy(objective, moved[pairs], images.evaluation, y.expand(len(counted), -1), counted)

    def specialised(pairs: slice, moved: Float[np.ndarray, "p w"]) -> Float[np.ndarray, " p"]:
        return on(in_union, pairs, moved) - on(1 - in_union, pairs, moved)

    scale = max(scales, key=lambda scale: specialised(chosen, scale * (a + b)).mean())
    moves = {"base": np.zeros_like(a), "a": a, "b": b, "sum": scale * (a + b), "trained_on_union": union}
    negated = {
        f"{name}_on_{where}": on(which, reported, moved)
        for name, moved in (("union", union), ("union_without_a", union - a))
        for where, which in (("a", in_a), ("b", in_b))
    }
    measured = {
        "on_union": {name: on(in_union, reported, moved) for name, moved in moves.items()},
        "negation": negated,
        "on_union_minus_on_others": {name: specialised(reported, moved) for name, moved in moves.items()},
        "cosine": pair_cosines(a, b, union, reported),
    }
    intervals = {key: {k: mean_interval(v.tolist()) for k, v in by.items()} for key, by in measured.items()}
    return {"scale": scale, **intervals}


def pair_cosines(
    a: Float[np.ndarray, "p w"], b: Float[np.ndarray, "p w"], union: Float[np.ndarray, "p w"], pairs: slice
) -> dict[str, Float[np.ndarray, " p"]]:
    """Return cosines of changes of some pairs, each around the mean change of its kind over all pairs."""
    total, whole = centred(a + b)[pairs], centred(union)[pairs]
    others = np.roll(whole, 1, axis=0)
    return {
        "sum_and_union": (total * whole).sum(1),
        "sum_and_another_union": (total * others).sum(1),
        "a_and_b": (centred(a) * centred(b))[pairs].sum(1),
    }
