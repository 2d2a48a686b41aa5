"""One network's neurons in another's order: the relabelling that brings their weights closest together.

Weight matching (Ainsworth et al. 2023, "Git Re-Basin", algorithm 1): one group after the other gets its best order, a linear assignment,
while the others keep theirs, until nothing changes. Blocks (attention heads) are assigned first, by how well their neurons can be.
"""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import cross_entropy

from stages.weightnet.tracing.program import Program, Weights, run_stack
from stages.weightnet.tracing.symmetry import Axis, Symmetry, permute_axis, without_groups

SWEEPS = 50  # at most, over all groups
POINTS = 11  # along the straight line between two networks

Orders = dict[str, Int[Tensor, " size"]]


def align(target: Weights, other: Weights, symmetry: Symmetry, random: torch.Generator) -> Orders:
    """Return the orders of the hidden groups by which `permute` brings `other` close to `target`; weights are [1, ...] each.

    random: the order in which groups are gone through.
    """
    grouped = {axis.tensor: axis.blocks for axis in symmetry.axes if axis.blocks > 1}
    own, given = [
        {name: without_groups(value, grouped.get(name, 1))[0].double() for name, value in weights.items()}
        for weights in (target, other)
    ]
    axes = [replace(axis, blocks=1) for axis in symmetry.axes]
    orders = {group: torch.arange(symmetry.sizes[group]) for group in symmetry.free}
    families: dict[str, list[str]] = {}  # groups that move together, by the parent of their blocks
    for group in symmetry.free:
        families.setdefault(symmetry.blocks.get(group, group), []).append(group)
    names = list(families)
    for _ in range(SWEEPS):
        before = {group: order.clone() for group, order in orders.items()}
        for i in torch.randperm(len(names), generator=random).tolist():
            parent = names[i]
            likeness = {group: similarity(own, given, axes, orders, group) for group in families[parent]}
            blocks = symmetry.parents.get(parent)
            orders |= assign_blocks(likeness, blocks) if blocks else assign_all(likeness)
        if all(torch.equal(orders[group], order) for group, order in before.items()):
            break
    return orders


def similarity(
    target: Weights, other: Weights, axes: list[Axis], orders: Orders, group: str
) -> Float[np.ndarray, "size size"]:
    """Return the inner product of all weights of each neuron of a group with those of each of the other network's."""
    total = np.zeros(())
    for axis in axes:
        for part in (part for part in axis.parts if part.group == group):
            moved = other[axis.tensor][None]
            for along in (one for one in axes if one.tensor == axis.tensor):
                fixed = (
                    orders
                    if along.axis != axis.axis
                    else {name: order for name, order in orders.items() if name != group}
                )
                moved = permute_axis(moved, along, fixed)
            first, second = (
                x.movedim(axis.axis, 0)[part.places].flatten(1).numpy() for x in (target[axis.tensor], moved[0])
            )
            total = total + first @ second.T
    return total


def assign_all(likeness: dict[str, Float[np.ndarray, "size size"]]) -> Orders:
    """Return the order of each group by itself in which neurons are most like those at their places."""
    return {group: torch.from_numpy(linear_sum_assignment(-matrix)[1]) for group, matrix in likeness.items()}


def assign_blocks(likeness: dict[str, Float[np.ndarray, "size size"]], blocks: int) -> Orders:
    """Return the orders of groups in blocks: which block comes to which place, the same in all groups, and the orders inside."""
    whole = np.zeros((blocks, blocks))
    inside: dict[str, list[list[Int[np.ndarray, " d"]]]] = {}
    for group, matrix in likeness.items():
        parts = [np.split(rows, blocks, 1) for rows in np.split(matrix, blocks)]
        inside[group] = [[linear_sum_assignment(-part)[1] for part in row] for row in parts]
        for i, row in enumerate(parts):
            for j, part in enumerate(row):
                whole[i, j] += part[np.arange(len(part)), inside[group][i][j]].sum()
    chosen = linear_sum_assignment(-whole)[1]
    return {
        group: torch.from_numpy(np.concatenate([j * len(orders[i][j]) + orders[i][j] for i, j in enumerate(chosen)]))
        for group, orders in inside.items()
    }


def distance(target: Weights, other: Weights) -> float:
    """Return how far two networks' weights are apart, over the length of the first's."""
    squares = [(float(((x - other[name]) ** 2).sum()), float((x**2).sum())) for name, x in target.items()]
    apart, length = map(sum, zip(*squares, strict=True))
    return (apart / length) ** 0.5


def loss_barrier(
    program: Program, target: Weights, other: Weights, images: Float[Tensor, "b c h w"], labels: Int[Tensor, " b"]
) -> float:
    """Return how far the loss on the straight line between two networks rises at most above the line between their own losses, in nats.

    (Frankle et al. 2020.) Running statistics of norms are averaged, too.
    """
    places = torch.linspace(0, 1, POINTS).to(images)
    line = {
        name: torch.cat([torch.lerp(x, other[name], place.to(x)) for place in places]) for name, x in target.items()
    }
    with torch.no_grad():
        logits = run_stack(program, line, images)
    losses = torch.stack([cross_entropy(one, labels) for one in logits])
    return (losses - torch.lerp(losses[0], losses[-1], places)).amax().item()
