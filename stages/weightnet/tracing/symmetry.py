"""Which relabellings of hidden neurons leave a network's function as it is.

A group is a set of neurons (channels, hidden units) that must be relabelled together: a residual stream is one group, however
many layers write into it. An axis of a tensor that runs over a group's neurons is permuted with it; after a flattening, in
blocks of one channel's pixels. ReLU's neurons may also be rescaled by positive factors, and tanh's may change their signs.
`print(symmetry)` shows which axis goes with which group.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.common.stage import InputError
from stages.weightnet.tracing.groups import NOBODY, Groups, find_groups, first_of_tied
from stages.weightnet.tracing.neurons import (
    INPUT,
    OUTPUT,
    Derivation,
    Ids,
    NeuronAxis,
    axes_of_tensors,
    follow,
    kernels_of,
)
from stages.weightnet.tracing.program import Program, Weights, run_stack


@dataclass(frozen=True)
class Part:
    """Indices start ... start + size * block of an axis: `block` for each of a group's `size` neurons.

    A block is a neuron's pixels, flattened. step: from one neuron to the next, where they do not lie close together.
    """

    group: str
    start: int
    size: int
    pixels: tuple[int, int]
    step: int | None = None

    @property
    def block(self) -> int:
        """Indices for each neuron."""
        return self.pixels[0] * self.pixels[1]

    @property
    def places(self) -> Int[Tensor, "size block"]:
        """The indices of each neuron."""
        step = self.block if self.step is None else self.step
        return self.start + step * torch.arange(self.size)[:, None] + torch.arange(self.block)

    @property
    def slice(self) -> slice:
        """The indices in their order."""
        if self.step in (None, 1):
            return slice(self.start, self.start + self.size * self.block)
        return slice(self.start, self.start + self.step * (self.size - 1) + 1, self.step)


@dataclass(frozen=True)
class Axis:
    """An axis of a tensor over neurons. role: the tensor writes their values, reads them, scales them, or is normalised after.

    blocks: of a convolution in so many groups, whose axis is meant as if its kernel had a column for every channel.
    """

    tensor: str
    axis: int
    parts: tuple[Part, ...]
    role: str
    blocks: int = 1


@dataclass(frozen=True)
class Edge:
    """The weights from the neurons of one group to those of another; rows, columns: where in the tensor's first two axes.

    taps: height and width of what joins two neurons, a kernel or a flattened image. blocks: of a convolution in so many groups: rows and
    columns are those of `without_groups`.
    """

    tensor: str
    target: str
    source: str
    columns: slice
    taps: tuple[int, int]
    rows: slice
    blocks: int = 1


@dataclass(frozen=True)
class Vector:
    """A tensor, or a part of it, with `block` values (or kernels) for each neuron of a group."""

    tensor: str
    group: str
    rows: slice
    block: int = 1


@dataclass(frozen=True)
class Symmetry:
    """Groups in the order of the network, with their numbers of neurons; the axes over them; how freely each may move.

    blocks: of groups whose neurons lie in blocks of equal size (attention heads, groups of a convolution), what their blocks follow:
    parents, by their names with how many there are. The neurons of a block stay together, and blocks move as their parents do.
    rigid: groups whose values pass through something that neither scaling nor signs commute with. fixed: groups that may not be permuted.
    """

    sizes: dict[str, int]
    axes: tuple[Axis, ...]
    blocks: dict[str, str]
    parents: dict[str, int]
    rigid: frozenset[str]
    kernels: dict[str, tuple[int, int]]  # of convolutions' weights
    fixed: frozenset[str] = frozenset()

    def __str__(self) -> str:
        """Return a line for each tensor: the groups that its axes run over, with the pixels or taps of each neuron."""
        notes = {
            group: f"in {self.parents[parent]} blocks that move as {parent}" for group, parent in self.blocks.items()
        }
        notes |= {group: "not permuted" for group in self.fixed if group != OUTPUT and not is_input(group)}
        lines = [f"{group}: {size} neurons {notes.get(group, '')}".rstrip() for group, size in self.sizes.items()]
        axes: dict[str, dict[int, list[str]]] = {}
        for axis in self.axes:
            where = axes.setdefault(axis.tensor, {}).setdefault(axis.axis, [])
            where += [part.group if part.block == 1 else f"{part.group} x {part.block}" for part in axis.parts]
        width = max(map(len, axes))
        for tensor, groups in axes.items():
            shown = [f"axis {axis}: {' + '.join(names)}" for axis, names in sorted(groups.items())]
            lines.append(f"{tensor:{width}}  {', '.join(shown)}")
        return "\n".join(lines)

    @property
    def hidden(self) -> list[str]:
        """The groups of hidden neurons."""
        return [group for group in self.sizes if group != OUTPUT and not is_input(group)]

    @property
    def free(self) -> list[str]:
        """The groups that may be permuted."""
        return [group for group in self.hidden if group not in self.fixed]

    @cached_property
    def rows(self) -> dict[str, list[Part]]:
        """The groups that each tensor's first axis runs over."""
        return {axis.tensor: list(axis.parts) for axis in self.axes if axis.axis == 0}

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every pair of groups that a tensor joins. Depthwise convolutions join a group to itself: they are vectors."""
        edges = []
        for axis in self.axes:
            rows = self.rows.get(axis.tensor, []) if axis.role == "reads" else []
            for column in axis.parts:
                taps = self.kernels.get(axis.tensor, column.pixels)
                for row in rows:
                    where = slice(None) if len(rows) == 1 else row.slice
                    edges.append(Edge(axis.tensor, row.group, column.group, column.slice, taps, where, axis.blocks))
        return tuple(edges)

    @cached_property
    def vectors(self) -> tuple[Vector, ...]:
        """The tensors with values for each neuron of one layer: of a concatenation they have those of several."""
        joined = {edge.tensor for edge in self.edges}
        layers = [[part.group for part in self.rows[tensor]] for tensor in joined]
        found = []
        for axis in self.axes:
            groups = [part.group for part in axis.parts]
            if axis.axis == 0 and axis.tensor not in joined and (len(groups) == 1 or groups in layers):
                for part in axis.parts:
                    found.append(
                        Vector(axis.tensor, part.group, part.slice if len(groups) > 1 else slice(None), part.block)
                    )
        return tuple(found)


def is_input(group: str) -> bool:
    """Return whether a group is the input's, or some of its channels that are read by themselves."""
    return group == INPUT or group.startswith(f"{INPUT}[")


def derive_symmetry(program: Program) -> Symmetry:
    """Return a network's symmetry; InputError names a step through which neurons cannot be followed."""
    found = follow(program)
    ties = joined(found.ties)
    axes_of_tensors(found, first_of_tied(ties, found.neurons))
    axes = list(found.axes.values())
    orders = [(ids.numpy(), False) for ids in found.orders] + [(axis.ids.numpy(), True) for axis in axes]
    arrays = np.repeat(np.arange(len(found.layers)), [size for _, size in found.layers.values()])
    pinned = flags([*found.pinned, found.results[-1].ids, torch.arange(found.layers[INPUT][1])], found.neurons)
    groups = find_groups(orders, ties, joined(found.members), arrays, pinned)
    number = np.full(found.neurons, NOBODY)
    for i, neurons in enumerate(groups.neurons):
        number[neurons] = i
    number = number[groups.roots]  # the group of each neuron
    names = name_groups(groups, found, number)
    named = tuple(name_axis(axis, groups, number, names) for axis in axes)
    used = {part.group for axis in named for part in axis.parts}
    sizes = {name: len(group) for name, group in zip(names, groups.neurons, strict=True)}
    moving = {i: parent for i, parent in groups.parents.items() if names[i] in used}
    hidden = {name: size for name, size in sizes.items() if name in used and name != OUTPUT}
    return Symmetry(
        sizes=hidden | {OUTPUT: sizes[OUTPUT]},
        axes=named,
        blocks={names[i]: names[parent] for i, parent in moving.items()},
        parents={names[parent]: sizes[names[parent]] for parent in moving.values()},
        rigid=frozenset(names[i] for i in np.unique(number[flags(found.rigid, found.neurons)])),
        kernels={
            name: (1, 1, *program.layout.shapes[name][2:])[-2:]
            for step in program.steps
            if step.kind in ("conv", "conv1d", "conv_of") and step.name in found.layers
            for name in kernels_of(program, step)
        },
        fixed=frozenset(names[i] for i, group in enumerate(groups.neurons) if groups.pinned[group].any()),
    )


def joined(pairs: Sequence[Int[Tensor, "2 _"]]) -> Int[np.ndarray, "2 m"]:
    """Return all pairs."""
    return torch.cat([torch.empty(2, 0, dtype=torch.long), *pairs], 1).numpy()


def flags(some: Sequence[Ids], neurons: int) -> Bool[np.ndarray, " neurons"]:
    """Return which neurons are among some."""
    found = np.zeros(neurons, bool)
    for ids in some:
        found[ids[ids != NOBODY].numpy()] = True
    return found


def name_groups(groups: Groups, found: Derivation, number: Int[np.ndarray, " neurons"]) -> list[str]:
    """Return the names of groups: that of their first layer, and which of its neurons they are if not all; the output's."""
    output = found.results[-1]
    ids = output.ids.numpy()
    chosen = number[ids[0]] if output.flat and (ids != NOBODY).all() else NOBODY
    if chosen == NOBODY or groups.roots[ids].tolist() != groups.neurons[chosen].tolist():
        raise InputError("the network's output is not that of one layer")
    inputs = found.layers[INPUT][1]
    if groups.neurons[chosen][0] < inputs:
        raise InputError("the network's output is not that of one layer")
    read = np.zeros(found.neurons, bool)
    for axis in found.axes.values():
        read[groups.roots[axis.ids.numpy()]] = True
    whole_input = sum(group[0] < inputs and bool(read[group[0]]) for group in groups.neurons) == 1
    layers, starts = list(found.layers.items()), [first for first, _ in found.layers.values()]
    names = []
    for i, group in enumerate(groups.neurons):
        layer, (first, size) = layers[bisect_right(starts, int(group[0])) - 1]
        start = int(group[0]) - first
        whole = len(group) == size or (layer == INPUT and whole_input and bool(read[group[0]]))
        name = layer if whole else f"{layer}[{start}:{start + len(group)}]"
        names.append(OUTPUT if i == chosen else name)
    return distinct(names)


def distinct(names: list[str]) -> list[str]:
    """Return names, those that come again with a number: of neurons that do not follow each other, several may begin alike."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return result


def name_axis(axis: NeuronAxis, groups: Groups, number: Int[np.ndarray, " neurons"], names: list[str]) -> Axis:
    """Return an axis of neurons as parts, each of a whole group; in a vector, several numbers of one neuron are a block."""
    roots = groups.roots[axis.ids.numpy()]
    own = number[axis.ids.numpy()]
    parts = []
    for group in np.unique(own).tolist():
        size = len(groups.neurons[group])
        places = np.flatnonzero(own == group)
        order = np.argsort(roots[places], kind="stable")
        by_neuron = places[order].reshape(size, -1)
        by_neuron = by_neuron[np.argsort(np.argsort(groups.neurons[group]))]  # in the order of the group
        step = int(by_neuron[1, 0] - by_neuron[0, 0]) if size > 1 else 1
        first = by_neuron[0]
        if axis.flat and (np.diff(first) == 1).all() and (size == 1 or step == len(first)):
            block = len(first)
            parts.append(Part(names[group], int(first[0]), size, axis.pixels.get(block, (1, block))))
        else:
            runs = (
                np.split(first, np.flatnonzero(np.diff(first) != 1) + 1) if axis.flat and step > 0 else first[:, None]
            )
            for run in runs:
                if len(run) > 1 and step == len(run):
                    parts.append(Part(names[group], int(run[0]), size, axis.pixels.get(len(run), (1, len(run)))))
                else:
                    parts += [Part(names[group], int(place), size, (1, 1), step) for place in run]
    return Axis(axis.tensor, axis.axis, tuple(sorted(parts, key=lambda part: part.start)), axis.role, axis.blocks)


Permutations = Mapping[str, Int[Tensor, " size"]]


def random_permutations(symmetry: Symmetry, random: torch.Generator) -> dict[str, Int[Tensor, " size"]]:
    """Draw a permutation of every hidden group's neurons."""
    result: dict[str, Int[Tensor, " size"]] = {}

    def draw(group: str) -> Int[Tensor, " size"]:
        if group not in result:
            parent = symmetry.blocks.get(group)
            order = torch.zeros(1, dtype=torch.long) if parent is None else draw(parent)
            size = (symmetry.parents | symmetry.sizes)[group] // len(order)
            inside = [block * size + torch.randperm(size, generator=random) for block in order.tolist()]
            result[group] = torch.cat(inside)
        return result[group]

    return {group: draw(group) for group in symmetry.free}


def permute(weights: Weights, symmetry: Symmetry, permutations: Permutations) -> Weights:
    """Return n networks whose hidden neurons are relabelled, the same way in all; groups not named stay as they are."""
    result = dict(weights)
    for axis in symmetry.axes:
        result[axis.tensor] = permute_axis(result[axis.tensor], axis, permutations)
    return result


def permute_axis(weight: Float[Tensor, "n ..."], axis: Axis, permutations: Permutations) -> Float[Tensor, "n ..."]:
    """Return a tensor of n networks with the neurons of one of its axes relabelled."""
    index = torch.arange(weight.shape[axis.axis + 1] * axis.blocks)
    for part in axis.parts:
        if part.group in permutations:
            index[part.places] = part.places[permutations[part.group]]
    if axis.blocks == 1:
        return weight.index_select(axis.axis + 1, index)
    size = weight.shape[2]  # of the channels that a block reads; its rows have moved to it already
    moved = [
        rows.index_select(2, order % size)
        for rows, order in zip(weight.chunk(axis.blocks, 1), index.split(size), strict=True)
    ]
    return torch.cat(moved, 1)


def without_groups(weight: Float[Tensor, "n d c ..."], blocks: int) -> Float[Tensor, "n d blocks*c ..."]:
    """Return the kernel of a convolution in groups as one that reads every channel, most by zeros."""
    if blocks == 1:
        return weight
    n, rows, columns, *taps = weight.shape
    whole = weight.new_zeros(n, blocks, rows // blocks, blocks, columns, *taps)
    each = torch.arange(blocks)
    whole[:, each, :, each] = weight.view(n, blocks, rows // blocks, columns, *taps).transpose(0, 1)
    return whole.view(n, rows, blocks * columns, *taps)


def rescale(weights: Weights, symmetry: Symmetry, factors: Mapping[str, Float[Tensor, "n size"]]) -> Weights:
    """Return n networks whose hidden neurons' values are multiplied by `factors`, which their readers divide by.

    The function stays as it is if the factors are positive (ReLU) or signs (tanh), and the group is not rigid.
    """
    result = dict(weights)
    for axis in symmetry.axes:
        if axis.role not in ("writes", "reads") or not any(part.group in factors for part in axis.parts):
            continue
        weight = result[axis.tensor]
        factor = weight.new_ones(len(weight), weight.shape[axis.axis + 1] * axis.blocks)
        for part in axis.parts:
            if part.group in factors:
                factor[:, part.places] = factors[part.group][:, :, None].to(factor)
        shape = [len(weight)] + [1] * (weight.dim() - 1)
        shape[axis.axis + 1] = -1
        if axis.blocks > 1:
            factor = factor.unflatten(1, (axis.blocks, -1)).repeat_interleave(weight.shape[1] // axis.blocks, 1)
            shape[1] = weight.shape[1]
        factor = factor.view(shape)
        result[axis.tensor] = weight * factor if axis.role == "writes" else weight / factor
    return result


@dataclass(frozen=True)
class Relabelled:
    """Weights in float64, relabelled, each tensor while it is used: all of a large network's at once are too much memory."""

    weights: Weights
    symmetry: Symmetry
    permutations: Permutations

    def __getitem__(self, name: str) -> Tensor:
        weight = self.weights[name].double()
        for axis in self.symmetry.axes:
            weight = permute_axis(weight, axis, self.permutations) if axis.tensor == name else weight
        return weight


def symmetry_error(program: Program, symmetry: Symmetry, weights: Weights, random: torch.Generator) -> float:
    """Return how far a random relabelling moves the outputs of n networks on random images, over their size, in float64."""
    images = torch.randn(4, *program.input_shape, generator=random).double()
    before = run_stack(program, Relabelled(weights, symmetry, {}), images)
    after = run_stack(program, Relabelled(weights, symmetry, random_permutations(symmetry, random)), images)
    return ((before - after).abs().amax() / before.abs().amax().clamp(min=1e-12)).item()
