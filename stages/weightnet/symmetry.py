"""Which relabellings of hidden neurons leave a network's function as it is, derived from its program.

A group is a set of neurons (channels, hidden units) that must be relabelled together: a residual stream is one group, however
many layers write into it. An axis of a tensor that runs over a group's neurons is permuted with it; after a flattening, in
blocks of one channel's pixels. ReLU's neurons may also be rescaled by positive factors, and tanh's may change their signs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.common.stage import InputError
from stages.weightnet.program import Program, Weights, run_stack

INPUT, OUTPUT = "input", "output"  # their order means something: they are never permuted
HOMOGENEOUS = {
    "input",
    "relu",
    "tanh",
    "avg_pool",
    "adaptive_pool",
    "mean",
    "flatten",
    "dropout",
    "identity",
    "add",
    "cat",
}


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
    """An axis of a tensor over neurons. role: the tensor writes their values, reads them, or is normalised after."""

    tensor: str
    axis: int
    parts: tuple[Part, ...]
    role: str


@dataclass(frozen=True)
class Edge:
    """The weights from the neurons of one group to those of another; columns: where in the tensor's second axis.

    taps: height and width of what joins two neurons, a kernel or a flattened image.
    """

    tensor: str
    target: str
    source: str
    columns: slice
    taps: tuple[int, int]


@dataclass(frozen=True)
class Symmetry:
    """Groups in the order of the network, with their numbers of neurons; the axes over them; how freely each may move.

    within: blocks that a group's permutations must respect (GroupNorm normalises each by itself). rigid: groups whose
    values pass through something that neither scaling nor signs commute with.
    """

    sizes: dict[str, int]
    axes: tuple[Axis, ...]
    within: dict[str, int]
    rigid: frozenset[str]
    kernels: dict[str, tuple[int, int]]  # of convolutions' weights

    @property
    def hidden(self) -> list[str]:
        """The groups that may be permuted."""
        return [group for group in self.sizes if group not in (INPUT, OUTPUT)]

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every pair of groups that a tensor joins. Depthwise convolutions join a group to itself: they are vectors."""
        rows = {axis.tensor: axis.parts[0] for axis in self.axes if axis.axis == 0}
        return tuple(
            Edge(
                a.tensor,
                rows[a.tensor].group,
                p.group,
                slice(p.start, p.start + p.size * p.block),
                self.kernels.get(a.tensor, p.pixels),
            )
            for a in self.axes
            if a.role == "reads"
            for p in a.parts
        )

    @cached_property
    def vectors(self) -> tuple[tuple[str, str], ...]:
        """The tensors with one value (or kernel) for each neuron, and their groups."""
        joined = {edge.tensor for edge in self.edges}
        return tuple((a.tensor, a.parts[0].group) for a in self.axes if a.tensor not in joined and len(a.parts) == 1)


Segment = tuple[str, int, tuple[int, int]]  # consecutive channels: their group, their number, pixels of each


def derive_symmetry(program: Program) -> Symmetry:
    """Return a network's symmetry; InputError names a step through which neurons cannot be followed."""
    joined: dict[str, str] = {}  # union-find: what an addition ties together

    def root(group: str) -> str:
        while group in joined:
            group = joined[group]
        return group

    sizes: dict[str, int] = {}
    within: dict[str, int] = {}
    passes: dict[str, set[str]] = {}  # the kinds of steps that a group's values go through
    kernels: dict[str, tuple[int, int]] = {}
    found: list[tuple[str, int, tuple[Part, ...], str]] = []
    segments: list[list[Segment]] = []  # of each step's result

    def parts(layout: list[Segment]) -> tuple[Part, ...]:
        result, start = [], 0
        for segment in layout:
            result.append(Part(segment[0], start, *segment[1:]))
            start += result[-1].size * result[-1].block
        return tuple(result)

    for index, step in enumerate(program.steps):
        before = segments[step.inputs[0]] if step.inputs else []
        match step.kind:
            case "input":
                sizes[INPUT] = step.shape[0]
                layout = [(INPUT, step.shape[0], (1, 1))]
            case "conv" if step.options["groups"] > 1:
                if step.options["groups"] != program.layout.shapes[f"{step.name}.weight"][0] or len(before) != 1:
                    raise InputError(f"step {step.name}: grouped convolutions are supported only if depthwise")
                layout = before
                found += [
                    (f"{step.name}.{k}", 0, parts(layout), "scales" if k == "weight" else "writes")
                    for k in ("weight", "bias")
                    if f"{step.name}.{k}" in program.layout.shapes
                ]
            case "conv" | "linear":
                group, size = step.name, step.shape[0]
                sizes[group] = size
                layout = [(group, size, (1, 1))]
                if step.kind == "conv":
                    kernels[f"{step.name}.weight"] = program.layout.shapes[f"{step.name}.weight"][2:]
                found.append((f"{step.name}.weight", 0, parts(layout), "writes"))
                found.append((f"{step.name}.weight", 1, parts(before), "reads"))
                if f"{step.name}.bias" in program.layout.shapes:
                    found.append((f"{step.name}.bias", 0, parts(layout), "writes"))
            case "group_norm" | "batch_norm":
                layout = before
                written = {root(group) for group, _, _ in layout}
                writer = program.steps[step.inputs[0]]
                if writer.kind in ("conv", "linear"):  # its rows' scale is lost behind the norm
                    found = [
                        (t, a, p, "normalised" if t.rpartition(".")[0] == writer.name and r == "writes" else r)
                        for t, a, p, r in found
                    ]
                else:
                    for group in written:
                        passes.setdefault(group, set()).add(step.kind)
                if step.kind == "group_norm":
                    if len(layout) != 1 and step.options["groups"] != 1:
                        raise InputError(f"step {step.name}: a norm in groups over concatenated channels")
                    for group in written:
                        within[group] = max(within.get(group, 1), step.options["groups"])
                found += [(f"{step.name}.{k}", 0, parts(layout), "writes") for k in ("weight", "bias")]
                if step.kind == "batch_norm":
                    found += [
                        (f"{step.name}.{k}", 0, parts(layout), "normalised") for k in ("running_mean", "running_var")
                    ]
            case "add":
                layout, other = before, segments[step.inputs[1]]
                if [s[1:] for s in layout] != [s[1:] for s in other]:
                    raise InputError(f"step {step.name} adds results whose channels do not correspond")
                for (a, _, _), (b, _, _) in zip(layout, other, strict=True):
                    if root(a) == root(b):
                        continue
                    first, second = sorted((root(a), root(b)), key=list(sizes).index)
                    if first == INPUT:
                        raise InputError(f"step {step.name} adds the network's input to hidden neurons")
                    joined[second] = first
            case "cat":
                layout = [segment for i in step.inputs for segment in segments[i]]
            case "flatten":
                shape = program.steps[step.inputs[0]].shape
                layout = [(group, size, shape[1:]) for group, size, _ in before] if len(shape) == 3 else before
            case _:
                layout = before
        for group, _, _ in layout if step.kind not in ("conv", "linear", "group_norm", "batch_norm") else []:
            passes.setdefault(group, set()).add(step.kind)
        segments.append(layout)
        if index == len(program.steps) - 1 and (len(layout) != 1 or layout[0][2] != (1, 1)):
            raise InputError("the network's output is not that of one layer")

    last = root(segments[-1][0][0])

    def name(group: str) -> str:
        return OUTPUT if root(group) == last else root(group)

    axes = tuple(
        Axis(t, a, tuple(Part(name(p.group), p.start, p.size, p.pixels) for p in ps), r) for t, a, ps, r in found
    )
    groups = {name(group): size for group, size in sizes.items()}  # in the order of their first layers
    rigid = {name(g) for g, kinds in passes.items() if kinds - HOMOGENEOUS}
    return Symmetry(groups, axes, {name(g): k for g, k in within.items() if k > 1}, frozenset(rigid), kernels)


Permutations = Mapping[str, Int[Tensor, " size"]]


def random_permutations(symmetry: Symmetry, random: torch.Generator) -> dict[str, Int[Tensor, " size"]]:
    """Draw a permutation of every hidden group's neurons."""
    result = {}
    for group in symmetry.hidden:
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


@dataclass(frozen=True)
class Networks:
    """Some networks of one architecture: what predictors read."""

    program: Program
    symmetry: Symmetry
    weights: Weights
    tanh: Bool[Tensor, " n"]  # those with tanh in place of ReLU

    def __len__(self) -> int:
        return len(self.tanh)
