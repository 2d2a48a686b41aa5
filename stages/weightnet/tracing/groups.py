"""Which neurons may change places: groups, found from where neurons lie.

Neurons are numbers; those that are tied count as one, the first of them. Two neurons are of one group if they lie in the same places: in
the same results and axes of tensors, as often, with the same distances between the numbers of each. Blocks (the channels of a group of a
convolution, the units of an attention head) are told of by their parents: a neuron whose parent moves moves with it. This is colour
refinement (Weisfeiler and Leman 1968) of the graph of neurons, orders and parents, after which a group's neurons look all alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, UInt64

NOBODY = -1  # the id of numbers that are the same whatever the order of neurons

Array = Int[np.ndarray, "..."]
Hash = UInt64[np.ndarray, " m"]


@dataclass(frozen=True)
class Order:
    """The neurons of a result or of an axis of a tensor: where the first number of each lies, and a hash of where the others do."""

    neurons: Int[np.ndarray, " m"]
    first: Int[np.ndarray, " m"]
    pattern: Hash
    of_axis: bool


@dataclass(frozen=True)
class Groups:
    """Groups of neurons in their order; of a group that moves in blocks, the number of the group whose neurons the blocks follow."""

    neurons: list[Int[np.ndarray, " size"]]
    parents: dict[int, int]
    roots: Int[np.ndarray, " neurons"]
    pinned: Bool[np.ndarray, " neurons"]


def mixed(*values: Array | int) -> Hash:
    """Return a hash of numbers (splitmix64, Steele et al. 2014)."""
    result = np.zeros(1, np.uint64)
    for value in values:
        result = result ^ np.asarray(value).astype(np.int64).view(np.uint64)
        result = result + np.uint64(0x9E3779B97F4A7C15)
        result = (result ^ (result >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        result = (result ^ (result >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        result = result ^ (result >> np.uint64(31))
    return result


def first_of_tied(pairs: Int[np.ndarray, "2 m"], neurons: int) -> Int[np.ndarray, " neurons"]:
    """Return for each neuron the first of those that are tied to it, directly or by others."""
    roots = np.arange(neurons)
    while True:
        before = roots.copy()
        least = np.minimum(roots[pairs[0]], roots[pairs[1]])
        for side in pairs:
            np.minimum.at(roots, before[side], least)
            np.minimum.at(roots, side, least)
        roots = roots[roots]
        if (roots == before).all():
            return roots


def order_of(ids: Int[np.ndarray, " m"], of_axis: bool) -> Order:
    """Return where neurons lie."""
    places = np.flatnonzero(ids != NOBODY)
    sorted_ = places[np.argsort(ids[places], kind="stable")]
    neurons, starts, counts = np.unique(ids[sorted_], return_index=True, return_counts=True)
    first = sorted_[starts]
    distances = mixed(sorted_ - np.repeat(first, counts), np.arange(len(sorted_)) - np.repeat(starts, counts))
    pattern = np.add.reduceat(distances, starts) if len(starts) else np.zeros(0, np.uint64)
    return Order(neurons, first, pattern, of_axis)


def settle_parents(
    ties: Int[np.ndarray, "2 m"],
    members: Int[np.ndarray, "2 k"],
    arrays: Int[np.ndarray, " neurons"],
    pinned: Bool[np.ndarray, " neurons"],
) -> tuple[Int[np.ndarray, " neurons"], Int[np.ndarray, "2 k"], Bool[np.ndarray, " neurons"]]:
    """Return roots, parents with their children, and the neurons that stay, such that no neuron has two parents that move.

    arrays: a number for each neuron, the same for those of one layer. Parents of the same blocks are tied; those of others stay.
    """
    while True:
        roots = first_of_tied(ties, len(arrays))
        stays = np.zeros_like(pinned)
        stays[roots[pinned]] = True
        pairs = np.unique(roots[members], axis=1) if members.size else members
        pairs = pairs[:, pairs[0] != pairs[1]]
        while (stays[pairs[1]] & ~stays[pairs[0]]).any():
            stays[pairs[0][stays[pairs[1]]]] = True
        moving = pairs[:, ~stays[pairs[0]]]
        moving = moving[:, np.argsort(moving[1], kind="stable")]
        _, starts, counts = np.unique(moving[1], return_index=True, return_counts=True)
        if (counts <= 1).all():
            return roots, pairs, stays
        both = np.stack([moving[0], np.repeat(moving[0][starts], counts)])
        both = np.unique(both[:, both[0] != both[1]], axis=1)
        kinds = arrays[both]
        one_to_one = np.zeros(both.shape[1], bool)
        for kind in np.unique(kinds, axis=1).T:
            here = (kinds == kind[:, None]).all(0)
            distinct = {len(np.unique(side)) for side in both[:, here]}
            one_to_one[here] = kind[0] != kind[1] and distinct == {int(here.sum())}
        ties = np.concatenate([ties, both[:, one_to_one]], 1)
        pinned = stays.copy()
        pinned[both[:, ~one_to_one].flatten()] = True


def refined(colours: Array, pairs: Int[np.ndarray, "2 k"], stays: Bool[np.ndarray, " neurons"]) -> Array:
    """Return colours that differ where the parents or the children of neurons do, and everywhere that colours did."""
    colours = np.unique(colours, return_inverse=True)[1]
    while True:
        parents, children = pairs
        hashes = mixed(colours, 1)
        below = mixed(np.where(stays[parents], parents, colours[parents]), np.where(stays[parents], 2, 3))
        np.add.at(hashes, children, below)
        moving = ~stays[parents]  # of those that stay, each is itself
        np.add.at(hashes, parents[moving], mixed(colours[children[moving]], 4))
        finer = np.unique(hashes, return_inverse=True)[1]
        if finer.max(initial=0) == colours.max(initial=0):
            return finer
        colours = finer


def find_groups(
    orders: Sequence[tuple[Array, bool]],
    ties: Array,
    members: Array,
    arrays: Array,
    pinned: Bool[np.ndarray, " neurons"],
) -> Groups:
    """Return the groups; orders: ids of results and of axes of tensors (True), along which a group's neurons lie at one distance."""
    roots, pairs, stays = settle_parents(ties, members, arrays, pinned)
    found: dict[tuple[bytes, bool], Order] = {}
    for ids, of_axis in orders:
        ids = np.where(ids == NOBODY, NOBODY, roots[ids])
        found.setdefault((ids.tobytes(), of_axis), order_of(ids, of_axis))
    hashes = np.zeros(len(roots), np.uint64)
    for number, order in enumerate(found.values()):
        hashes[order.neurons] += mixed(order.pattern, number)
    roots_only = np.unique(roots)
    axes = [order for order in found.values() if order.of_axis]
    colours = np.unique(mixed(hashes, stays), return_inverse=True)[1]
    while True:
        colours = refined(colours, pairs, stays)
        moving = pairs[:, ~stays[pairs[0]]]
        parent = np.full(len(roots), NOBODY)
        parent[moving[1]] = moving[0]
        sequence = in_sequence(colours, parent, roots_only)
        run = runs_of(sequence, colours, distances(sequence, colours, axes, len(roots)))
        many = colours[
            sequence[np.flatnonzero((run[1:] != run[:-1]) & (colours[sequence][1:] == colours[sequence][:-1]))]
        ]
        if not len(many):
            break
        broken = np.isin(colours, many)
        if len(blocked := np.unique(parent[broken & (parent != NOBODY)])):
            stays[np.isin(colours, colours[blocked]) & np.isin(np.arange(len(roots)), roots_only)] = True
        else:
            colours[sequence] = run
    groups = sorted(np.split(sequence, np.flatnonzero(np.diff(run)) + 1), key=lambda group: group[0])
    above = {i: parent[group[0]] for i, group in enumerate(groups) if parent[group[0]] != NOBODY}
    whole = np.zeros(len(roots), int)
    for i, group in enumerate(groups):
        whole[group] = i
    return Groups(groups, {i: int(whole[neuron]) for i, neuron in above.items()}, roots, stays)


def in_sequence(colours: Array, parent: Array, roots: Array) -> Array:
    """Return neurons sorted by their colours; children lie as their parents do."""
    place = np.arange(len(colours))
    for _ in range(3):  # parents of parents at most
        key = np.where(parent == NOBODY, 0, place[parent])
        order = roots[np.lexsort((roots, key[roots], colours[roots]))]
        place[order] = np.arange(len(order))
    return order


def distances(sequence: Array, colours: Array, axes: Sequence[Order], neurons: int) -> Hash:
    """Return a hash, for each neuron in a sequence, of how far the next of its colour lies from it along each axis."""
    following = np.full(neurons, NOBODY)
    alike = colours[sequence[1:]] == colours[sequence[:-1]]
    following[sequence[:-1][alike]] = sequence[1:][alike]
    result, first = np.zeros(neurons, np.uint64), np.zeros(neurons, int)
    for number, order in enumerate(axes):
        first[order.neurons] = order.first
        after = following[order.neurons]
        step = np.where(after == NOBODY, 0, first[after] - order.first)
        result[order.neurons] += mixed(step, number)
    return result[sequence]


def runs_of(sequence: Array, colours: Array, steps: Hash) -> Array:
    """Return a number for each neuron of a sequence, the same for those of one colour that follow each other at one distance.

    The longest runs are taken first.
    """
    colour = colours[sequence]
    joined = np.concatenate([colour[1:] == colour[:-1], [False]])  # to the next
    same = np.concatenate([[False], joined[1:] & joined[:-1] & (steps[1:] == steps[:-1])])
    starts = np.flatnonzero(joined & ~same)
    lengths = np.add.reduceat(joined & True, starts, dtype=int) if len(starts) else np.zeros(0, int)
    taken, whole = np.zeros(len(sequence), bool), np.zeros(len(sequence), bool)  # whole: joined to the next for good
    for i in np.argsort(-lengths, kind="stable").tolist():
        first, last = starts[i], starts[i] + lengths[i]  # neurons
        first, last = first + taken[first], last - taken[last]
        if first < last:
            taken[first : last + 1] = True
            whole[first:last] = True
    return np.cumsum(np.concatenate([[True], ~whole[:-1]])) - 1
