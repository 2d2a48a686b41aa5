"""Which relabellings of hidden neurons leave a network's function as it is.

A group is a set of neurons (channels, hidden units) that must be relabelled together: a residual stream is one group, however
many layers write into it. An axis of a tensor that runs over a group's neurons is permuted with it; after a flattening, in
blocks of one channel's pixels. ReLU's neurons may also be rescaled by positive factors, and tanh's may change their signs.
`print(symmetry)` shows which axis goes with which group.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.common.stage import InputError
from stages.weightnet.tracing.neurons import INPUT, NOBODY, OUTPUT, Derivation, NeuronAxis, follow
from stages.weightnet.tracing.program import Program, Weights, run_stack

MOST_PIECES = 64  # groups that one layer's neurons may fall into


@dataclass(frozen=True)
class Part:
    """Indices start ... start + size * block of an axis: `block` for each of a group's `size` neurons.

    A block is a neuron's pixels, flattened.
    """

    group: str
    start: int
    size: int
    pixels: tuple[int, int]

    @property
    def block(self) -> int:
        """Indices for each neuron."""
        return self.pixels[0] * self.pixels[1]


@dataclass(frozen=True)
class Axis:
    """An axis of a tensor over neurons. role: the tensor writes their values, reads them, scales them, or is normalised after.

    rows: the part of the tensor's first axis that it holds for, if not all: a group of a convolution in groups.
    """

    tensor: str
    axis: int
    parts: tuple[Part, ...]
    role: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Edge:
    """The weights from the neurons of one group to those of another; rows, columns: where in the tensor's first two axes.

    taps: height and width of what joins two neurons, a kernel or a flattened image.
    """

    tensor: str
    target: str
    source: str
    columns: slice
    taps: tuple[int, int]
    rows: slice


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

    within: blocks that a group's permutations must respect (GroupNorm normalises each by itself). rigid: groups whose
    values pass through something that neither scaling nor signs commute with. fixed: groups that may not be permuted.
    """

    sizes: dict[str, int]
    axes: tuple[Axis, ...]
    within: dict[str, int]
    rigid: frozenset[str]
    kernels: dict[str, tuple[int, int]]  # of convolutions' weights
    fixed: frozenset[str] = frozenset()

    def __str__(self) -> str:
        """Return a line for each tensor: the groups that its axes run over, with the pixels or taps of each neuron."""
        notes = {**{g: f"in {b} blocks" for g, b in self.within.items()}, **dict.fromkeys(self.fixed, "not permuted")}
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
                columns = slice(column.start, column.start + column.size * column.block)
                taps = self.kernels.get(axis.tensor, column.pixels)
                for row in rows:
                    if axis.rows is None or axis.rows[0] <= row.start < axis.rows[1]:
                        where = slice(None) if len(rows) == 1 else slice(row.start, row.start + row.size)
                        edges.append(Edge(axis.tensor, row.group, column.group, columns, taps, where))
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
                    where = slice(part.start, part.start + part.size * part.block)
                    found.append(Vector(axis.tensor, part.group, where if len(groups) > 1 else slice(None), part.block))
        return tuple(found)


def is_input(group: str) -> bool:
    """Return whether a group is the input's, or some of its channels that are read by themselves."""
    return group == INPUT or group.startswith(f"{INPUT}[")


Order = tuple[
    Int[Tensor, " runs"], Int[Tensor, " runs"]
]  # neurons as they lie along an axis, and how many numbers of each


def derive_symmetry(program: Program) -> Symmetry:
    """Return a network's symmetry; InputError names a step through which neurons cannot be followed."""
    found = follow(program)
    roots = torch.tensor([found.root(neuron) for neuron in range(len(found.parents))])
    orders = [in_runs(numbers.ids.flatten(), roots, numbers.flat) for numbers in found.orders]
    orders += [in_runs(axis.ids, roots, axis.flat) for axis in found.axes]
    chains, within = find_chains_in_blocks(orders, found, roots)
    names = name_chains(chains, found, roots)
    axes = tuple(name_axis(axis, roots, chains, names) for axis in found.axes)
    used = {part.group for axis in axes for part in axis.parts}
    sizes = {name: len(chain) for name, chain in zip(names, chains, strict=True) if name in used}
    sizes[OUTPUT] = sizes.pop(OUTPUT)  # at the end
    group_of = {neuron: name for name, chain in zip(names, chains, strict=True) for neuron in chain}

    def groups(neurons: set[int]) -> frozenset[str]:
        return frozenset(group_of[int(roots[neuron])] for neuron in neurons)

    return Symmetry(
        sizes=sizes,
        axes=axes,
        within={names[chain]: blocks for chain, blocks in within.items()},
        rigid=groups(found.rigid),
        kernels={
            step.tensors["weight"]: program.layout.shapes[step.tensors["weight"]][2:]
            for step in program.steps
            if step.kind == "conv" and step.name in found.layers
        },
        fixed=groups(found.fixed),
    )


def in_runs(ids: Int[Tensor, " m"], roots: Int[Tensor, " neurons"], flat: bool) -> Order:
    """Return neurons in the order in which they lie; in a vector, several numbers of one neuron are one run."""
    ids = torch.where(ids == NOBODY, NOBODY, roots[ids])
    return torch.unique_consecutive(ids, return_counts=True) if flat else (ids, torch.ones_like(ids))


def find_chains_in_blocks(
    orders: list[Order], found: Derivation, roots: Int[Tensor, " neurons"]
) -> tuple[list[list[int]], dict[int, int]]:
    """Return the groups, and in how many blocks norms normalise some of them, by their numbers.

    Where the channels of a norm are not just one group, its blocks are groups of their own, or parts of them.
    """
    whole = list(found.blocks)
    while True:
        chains = find_chains(orders, len(roots))
        numbers = {tuple(chain): number for number, chain in enumerate(chains)}
        cut = [(ids, step) for ids, step in whole if tuple(roots[ids].tolist()) not in numbers]
        if not cut:
            break
        whole = [(ids, step) for ids, step in whole if tuple(roots[ids].tolist()) in numbers]
        for ids, step in cut:
            orders += [in_runs(block, roots, False) for block in ids.chunk(step.options["groups"])]
    within: dict[int, int] = {}
    for ids, step in whole:
        number = numbers[tuple(roots[ids].tolist())]
        within[number] = math.lcm(within.get(number, 1), step.options["groups"])
    return chains, within


def find_chains(orders: Sequence[Order], neurons: int) -> list[list[int]]:
    """Return the groups: neurons that lie one after the other, in the same order, wherever any of them lies.

    Whatever reads or writes them treats those of a group alike, so they may be relabelled. Neurons count by their roots.
    """
    different = {(ids.numpy().tobytes(), counts.numpy().tobytes()): (ids, counts) for ids, counts in orders}
    pairs = []
    for ids, counts in different.values():
        nothing = ids.new_tensor([NOBODY])
        before, after = torch.cat([nothing, ids]), torch.cat([ids, nothing])
        alike = torch.cat([counts[:1], counts]) == torch.cat([counts, counts[-1:]])
        pairs += [
            torch.stack([before, torch.where(alike, after, NOBODY)]),
            torch.stack([torch.where(alike, before, NOBODY), after]),
        ]
    every = torch.cat(pairs, 1).unique(dim=1)
    following, preceding = only_partner(every, neurons), only_partner(every.flip(0), neurons)
    chains = []
    for start in every.unique()[1:].tolist():  # the first is nobody
        previous = preceding[start]
        if previous != NOBODY and following[previous] == start:
            continue
        chain = [start]
        while (neuron := following[chain[-1]]) != NOBODY and preceding[neuron] == chain[-1]:
            chain.append(neuron)
        chains.append(chain)
    return chains


def only_partner(pairs: Int[Tensor, "2 m"], neurons: int) -> list[int]:
    """Return for each neuron the second of its pairs if all of them have the same one, else nobody."""
    first, second = pairs
    first, second = first[first != NOBODY], second[first != NOBODY]
    single = torch.bincount(first, minlength=neurons)[first] == 1
    partner = torch.full((neurons,), NOBODY)
    partner[first[single]] = second[single]
    return partner.tolist()


def name_chains(chains: list[list[int]], found: Derivation, roots: Int[Tensor, " neurons"]) -> list[str]:
    """Return the names of groups: that of their first layer, and which of its neurons they are if not all; the output's."""
    output = found.results[-1]
    outputs = roots[output.ids].tolist() if output.flat and bool((output.ids != NOBODY).all()) else None
    if outputs not in chains or outputs[0] < found.layers[INPUT][1]:
        raise InputError("the network's output is not that of one layer")
    read = set(roots[torch.cat([axis.ids for axis in found.axes])].tolist())
    inputs = sum(chain[0] < found.layers[INPUT][1] and chain[0] in read for chain in chains)
    names, pieces = [], dict.fromkeys(found.layers, 0)
    for chain in chains:
        layer, (first, size) = next(item for item in found.layers.items() if item[1][0] <= chain[0] < sum(item[1]))
        pieces[layer] += 1
        start = chain[0] - first
        whole = len(chain) == size or (layer == INPUT and inputs == 1 and chain[0] in read)
        name = layer if whole else f"{layer}[{start}:{start + len(chain)}]"
        names.append(OUTPUT if chain == outputs else name)
    if mixed := [layer for layer, count in pieces.items() if count > MOST_PIECES]:
        raise InputError(f"the neurons of {mixed[0]} are mixed in a way that cannot be followed")
    return names


def name_axis(axis: NeuronAxis, roots: Int[Tensor, " neurons"], chains: list[list[int]], names: list[str]) -> Axis:
    """Return an axis of neurons as parts that are whole groups."""
    starts = {chain[0]: (name, len(chain)) for name, chain in zip(names, chains, strict=True)}
    parts, place, start = [], 0, 0
    ids, counts = (values.tolist() for values in in_runs(axis.ids, roots, axis.flat))
    while place < len(ids):
        name, size = starts[ids[place]]
        parts.append(Part(name, start, size, axis.pixels.get(counts[place], (1, counts[place]))))
        start += size * counts[place]
        place += size
    return Axis(axis.tensor, axis.axis, tuple(parts), axis.role, axis.rows)


Permutations = Mapping[str, Int[Tensor, " size"]]


def random_permutations(symmetry: Symmetry, random: torch.Generator) -> dict[str, Int[Tensor, " size"]]:
    """Draw a permutation of every hidden group's neurons."""
    result = {}
    for group in symmetry.free:
        blocks = symmetry.within.get(group, 1)
        size = symmetry.sizes[group] // blocks
        inside = [block * size + torch.randperm(size, generator=random) for block in range(blocks)]
        result[group] = torch.cat(inside)
    return result


def permute(weights: Weights, symmetry: Symmetry, permutations: Permutations) -> Weights:
    """Return n networks whose hidden neurons are relabelled, the same way in all; groups not named stay as they are."""
    result = dict(weights)
    for axis in symmetry.axes:
        result[axis.tensor] = permute_axis(result[axis.tensor], axis, permutations)
    return result


def permute_axis(weight: Float[Tensor, "n ..."], axis: Axis, permutations: Permutations) -> Float[Tensor, "n ..."]:
    """Return a tensor of n networks with the neurons of one of its axes relabelled."""
    if axis.rows is not None:
        start, end = axis.rows
        moved = permute_axis(weight[:, start:end], replace(axis, rows=None), permutations)
        return torch.cat([weight[:, :start], moved, weight[:, end:]], 1)
    index = []
    for part in axis.parts:
        neurons = permutations.get(part.group, torch.arange(part.size))
        index.append(part.start + (neurons[:, None] * part.block + torch.arange(part.block)).flatten())
    return weight.index_select(axis.axis + 1, torch.cat(index))


def rescale(weights: Weights, symmetry: Symmetry, factors: Mapping[str, Float[Tensor, "n size"]]) -> Weights:
    """Return n networks whose hidden neurons' values are multiplied by `factors`, which their readers divide by.

    The function stays as it is if the factors are positive (ReLU) or signs (tanh), and the group is not rigid.
    """
    result = dict(weights)
    for axis in symmetry.axes:
        if axis.role not in ("writes", "reads") or not any(part.group in factors for part in axis.parts):
            continue
        weight = result[axis.tensor]
        columns = []
        for part in axis.parts:
            factor = factors.get(part.group, weight.new_ones(len(weight), part.size))
            columns.append(factor.repeat_interleave(part.block, 1))
        factor = torch.cat(columns, 1)
        shape = [len(weight)] + [1] * (weight.dim() - 1)
        shape[axis.axis + 1] = -1
        factor = factor.view(shape)
        if axis.rows is not None:
            outside = torch.ones_like(weight)
            outside[:, slice(*axis.rows)] = factor.expand_as(outside[:, slice(*axis.rows)])
            factor = outside
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
