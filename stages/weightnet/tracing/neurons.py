"""Which neuron each number inside a network belongs to, followed from step to step.

Every channel or unit that a layer writes is a neuron, a number; neurons that an addition ties together count as one. Beside every
result goes an array `ids`: the neuron of which each of its numbers is a function (next to what does not depend on the order of
neurons, such as a mean over all). Steps that only move numbers move the ids along, so a slice, a padding or a concatenation
needs no rule of its own. Each kind of step is one function, which also says which axes of its tensors run over which neurons.

Where a number depends on several neurons of a block (a product of queries and keys), a new neuron stands for the block, and is the
parent of those in it. What no rule can tell is never guessed: the neurons that are concerned stay where they are (`pin`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from stages.common.stage import InputError
from stages.weightnet.tracing.groups import NOBODY, first_of_tied
from stages.weightnet.tracing.operations import ARITHMETIC, POINTWISE, POOLS, Step
from stages.weightnet.tracing.program import Program

KERNELS = ("conv_of", "linear_of")  # layers whose kernels are made of tensors
INPUT, OUTPUT = "input", "output"  # groups whose order means something: they are never permuted
# what commutes with positive factors of neurons, and with signs if its ReLUs are tanh; of norms and sums, their rules say it
HOMOGENEOUS = {
    *("input", "relu", "avg_pool", "adaptive_pool", "mean", "flatten", "dropout", "cat", "neg", "reshape"),
    *("getitem", "permute", "expand", "repeat", "add", "sub", "conv", "linear", "batch_norm", "group_norm"),
    *("roll", "index"),
}

Ids = Int[Tensor, "..."]


@dataclass(frozen=True)
class Numbers:
    """The neurons of a step's result. ids: of one image, of size one along axes on which they do not depend.

    pixels: height and width of the images that were flattened, by their numbers of pixels. source: the step of a tensor or
    constant from which alone it was made: the numbers of a tensor are neurons of their own until a result ties them.
    """

    ids: Ids
    pixels: dict[int, tuple[int, int]] = field(default_factory=dict)
    source: Step | None = None

    @property
    def axes(self) -> list[int]:
        """The axes along which neurons lie."""
        return [axis for axis, size in enumerate(self.ids.shape) if size > 1]

    @property
    def flat(self) -> bool:
        """Whether it is a vector."""
        return self.ids.dim() == 1

    def with_dims(self, dims: int) -> Ids:
        """Return the ids as they are broadcast to results of so many axes."""
        return self.ids.view(*[1] * (dims - self.ids.dim()), *self.ids.shape)


@dataclass(frozen=True)
class NeuronAxis:
    """An axis of a tensor over neurons.

    role: the tensor writes their values, reads them, scales them, or is normalised after. flat: whether it is that of a vector,
    in which one neuron may have several numbers. blocks: of a kernel in so many groups, whose axis is meant as if it were in one.
    """

    tensor: str
    axis: int
    ids: Int[Tensor, " size"]
    role: str
    flat: bool = False
    pixels: dict[int, tuple[int, int]] = field(default_factory=dict)
    blocks: int = 1


class Derivation:
    """What is found while the steps of a program are followed.

    layers: the first neuron and the number of neurons of each layer; orders: results in which neurons lie; members: parents and
    their children; rigid: neurons whose values pass through what scaling does not commute with; pinned: those that stay.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.layers: dict[str, tuple[int, int]] = {}
        self.neurons = 0
        self.axes: dict[tuple[str, int, int], NeuronAxis] = {}
        self.orders: list[Ids] = []
        self.ties: list[Int[Tensor, "2 m"]] = []
        self.roots, self.counted = np.arange(0), 0  # what neurons are tied to by the first so many ties
        self.members: list[Int[Tensor, "2 m"]] = []
        self.parents: dict[bytes, Ids] = {}
        self.normalised: set[str] = set()
        self.tensors: dict[str, Ids] = {}  # of those that are no layer's, the neurons of their numbers
        self.rigid: list[Ids] = []
        self.pinned: list[Ids] = []
        self.results: list[Numbers] = []

    def written(self, step: Step, axis: int) -> Int[Tensor, " size"]:
        """Return the ids of the neurons that a step writes along an axis of its result."""
        return self.new_neurons(f"{step.name} (layer)" if step.name in (INPUT, OUTPUT) else step.name, step.shape[axis])

    def new_neurons(self, layer: str, size: int) -> Int[Tensor, " size"]:
        """Return the ids of a layer's neurons: new ones, unless it has been used before."""
        if layer not in self.layers:
            self.layers[layer] = (self.neurons, size)
            self.neurons += size
        first, _ = self.layers[layer]
        return torch.arange(first, first + size)

    def tie(self, first: Ids, second: Ids) -> Ids:
        """Make neurons count as one, each with that at its place, and return their ids; those of nobody are free."""
        both = torch.stack(torch.broadcast_tensors(first, second))
        pairs = both.flatten(1)
        self.ties.append(pairs[:, (pairs != NOBODY).all(0) & (pairs[0] != pairs[1])])
        return torch.where(both[0] == NOBODY, both[1], both[0])

    def settled(self, ids: Ids) -> Ids:
        """Return ids of which those that are tied so far are the same."""
        roots = np.concatenate([self.roots, np.arange(len(self.roots), self.neurons)])
        if len(self.ties) > self.counted:
            new = torch.cat(self.ties[self.counted :], 1).numpy()
            roots = first_of_tied(roots[new], self.neurons)[roots]
        self.roots, self.counted = roots, len(self.ties)
        return shortened(torch.where(ids == NOBODY, NOBODY, torch.from_numpy(roots)[ids]))

    def along(self, x: Numbers, axis: int) -> Int[Tensor, " size"]:
        """Return the ids along an axis: what treats the places along others alike ties the neurons there."""
        rows = x.ids.movedim(axis, -1).flatten(0, -2) if x.ids.dim() > 1 else x.ids[None]
        found = rows.amax(0)  # nobody's numbers are the least
        if len(rows) > 1:
            self.tie(found[None], rows)
        return found

    def blocks(self, ids: Ids, inside: list[int]) -> Ids:
        """Return a parent for each block of neurons that lie along the axes `inside`, which have size one then.

        Where there is but one block, no parent is needed: the ids are nobody's. Blocks whose neurons do not lie together (those of
        the branches that a sum joins) are tied, like the terms of a sum.
        """
        inside, wide = sorted(inside), axes_of(ids)
        if wide - set(inside) and min(wide & set(inside), default=ids.dim()) < max(wide - set(inside)):
            first = ids.amax(inside, keepdim=True)
            return self.tie(first, ids).amax(inside, keepdim=True)
        outside = [axis for axis in range(ids.dim()) if axis not in inside]
        shape = [1 if axis in inside else size for axis, size in enumerate(ids.shape)]
        rows = ids.permute(*outside, *inside).reshape(int(np.prod(shape)), -1)
        if len(rows) == 1:
            return torch.full(shape, NOBODY)
        if rows.shape[1] == 1:
            return rows.view(shape)
        key = rows.numpy().tobytes() + str(rows.shape).encode()
        if key not in self.parents:
            self.parents[key] = self.new_neurons(f"blocks {len(self.parents)}", len(rows))
            self.add_members(self.parents[key][:, None], rows)
        return self.parents[key].view(shape)

    def add_members(self, parents: Ids, children: Ids) -> None:
        """Note that neurons move with their parents."""
        pairs = torch.stack(torch.broadcast_tensors(parents, children)).flatten(1)
        self.members.append(pairs[:, (pairs != NOBODY).all(0)])

    def join(self, x: Ids, y: Ids) -> Ids:
        """Return the ids of what is made of two results' numbers, place by place; they have equally many axes.

        Where neurons lie along the same axes, they are tied; where those of one lie along more, they are children of the other's;
        and of an outer product, the neurons of one are pinned.
        """
        own, other = axes_of(x), axes_of(y)
        if own != other:  # along some, neurons may have been tied since
            x, y = self.settled(x), self.settled(y)
            own, other = axes_of(x), axes_of(y)
        if own == other:
            return self.tie(x, y)
        if not own or not other:
            return y if not own else x
        if other < own:
            x, y, own, other = y, x, other, own
        if not own < other:
            self.pinned.append(x)
            x = self.blocks(x, sorted(own - other))
        self.add_members(x, y)
        return y

    def pin(self, *some: Numbers) -> None:
        """Let neurons stay where they are."""
        self.pinned += [x.ids for x in some]
        self.rigid += [x.ids for x in some]

    def add_axis(
        self,
        tensor: str,
        axis: int,
        ids: Int[Tensor, " size"],
        role: str,
        numbers: Numbers | None = None,
        blocks: int = 1,
    ) -> None:
        """Note that a tensor's axis runs over neurons, those of `numbers`; if it is noted already, tie them to the others."""
        size = self.program.layout.shapes[tensor][axis] * blocks
        ids = ids.expand(size) if len(ids) == 1 else ids
        key = (tensor, axis, blocks)
        if key in self.axes:
            self.tie(self.axes[key].ids, ids)
            if self.axes[key].role != role:
                self.rigid.append(ids)
            return
        if (nobody := ids == NOBODY).any():  # numbers that are read, but that no layer wrote
            ids = ids.clone()
            ids[nobody] = self.new_neurons(f"{tensor} (constants)", int(nobody.sum()))
            self.pin(Numbers(ids[nobody]))
        flat, pixels = (numbers.flat, numbers.pixels) if numbers else (False, {})
        self.axes[key] = NeuronAxis(tensor, axis, ids, role, flat, pixels, blocks)

    def add_vectors(self, step: Step, parts: tuple[str, ...], role: str, ids: Int[Tensor, " size"], x: Numbers) -> None:
        """Note that those of a step's tensors that it has have one value for each neuron."""
        for part in parts:
            if part in step.tensors:
                self.add_axis(step.tensors[part], 0, ids, role, x)


def follow(program: Program) -> Derivation:
    """Return what is found along a program; InputError names a step through which neurons cannot be followed."""
    derivation = Derivation(program)
    making = makes_kernels(program)
    for place, step in enumerate(program.steps):
        inputs = [derivation.results[i] for i in step.inputs]
        if place in making:
            derivation.results.append(Numbers(torch.full([1] * len(step.shape), NOBODY), source=step))
            continue
        if step.kind not in RULES:
            raise InputError(f"step {step.name}: neurons cannot be followed through {step.kind}")
        result = RULES[step.kind](derivation, step, *inputs)
        if step.kind not in HOMOGENEOUS and result.source is None:
            derivation.rigid.append(result.ids)
        if result.source is None and all(result.ids is not earlier.ids for earlier in inputs):
            derivation.orders.append(result.ids.flatten())
        derivation.results.append(result)
    derivation.axes = {
        key: replace(axis, role="normalised")
        if axis.role == "writes" and axis.tensor in derivation.normalised
        else axis
        for key, axis in derivation.axes.items()
    }
    return derivation


def makes_kernels(program: Program) -> set[int]:
    """Return the steps that lead to kernels and to nothing else: tensors, and what is made of them and constants alone."""
    for_kernels, for_others = set[int](), {0}  # places, by what reads their results; images are no kernel
    for number, step in reversed(list(enumerate(program.steps))):  # what reads a step comes behind it
        makes_one = number in for_kernels and number not in for_others
        for slot, place in enumerate(step.inputs):
            is_kernel = step.kind in KERNELS and slot == 1
            (for_kernels if is_kernel or makes_one else for_others).add(place)
    return for_kernels - for_others


def tensors_behind(program: Program, place: int) -> set[str]:
    """Return the names of the tensors that a step's result is made of."""
    step = program.steps[place]
    return set(step.tensors.values()).union(*(tensors_behind(program, i) for i in step.inputs))


def kernels_of(program: Program, step: Step) -> list[str]:
    """Return the names of a convolution's kernel, or of the tensors of its shape that it is made of."""
    if step.kind != "conv_of":
        return [step.tensors["weight"]]
    shape = program.steps[step.inputs[1]].shape
    return [name for name in tensors_behind(program, step.inputs[1]) if program.layout.shapes[name] == shape]


def axes_of_tensors(d: Derivation, roots: Int[np.ndarray, " neurons"]) -> None:
    """Note, of tensors that are no layer's, the axis along which their numbers were tied to neurons; pin what lies otherwise."""
    tied = np.bincount(roots)
    for name, ids in d.tensors.items():
        if name in {
            axis.tensor for axis in d.axes.values()
        }:  # a layer's, too: that its numbers are used by themselves pins them
            d.pin(Numbers(ids), *[Numbers(axis.ids) for axis in d.axes.values() if axis.tensor == name])
            continue
        found = torch.from_numpy(roots[ids.numpy()])
        if bool((tied[found.numpy()] == 1).all()):  # nothing ties them: they are places
            d.pinned.append(ids)
            continue
        short = shortened(found)
        wide = [axis for axis, size in enumerate(short.shape) if size > 1]
        if len(wide) == 1:
            d.add_axis(name, wide[0], short.flatten(), "scales")
        else:
            d.pinned.append(ids)


def axes_of(ids: Ids) -> set[int]:
    """Return the axes along which neurons lie."""
    return {axis for axis, size in enumerate(ids.shape) if size > 1}


def shortened(ids: Ids) -> Ids:
    """Return ids of size one along axes on which they do not depend."""
    for axis, size in enumerate(ids.shape):
        first = ids.narrow(axis, 0, 1)
        if size > 1 and bool((ids == first).all()):
            ids = first
    return ids


def input_shape(d: Derivation, step: Step) -> tuple[int, ...]:
    """Return the shape of what a step reads."""
    return d.program.steps[step.inputs[0]].shape


def follow_input(d: Derivation, step: Step) -> Numbers:
    """The channels of an image are neurons that no layer writes."""
    return Numbers(d.new_neurons(INPUT, step.shape[0]).view(-1, *[1] * (len(step.shape) - 1)))


def follow_constant(_d: Derivation, step: Step) -> Numbers:
    """The numbers of constants are no neurons'."""
    return Numbers(torch.full([1] * len(step.shape), NOBODY), source=step)


def follow_parameter(d: Derivation, step: Step) -> Numbers:
    """Every number of a tensor is a neuron of its own, until a result ties it."""
    name = step.tensors["value"]
    if name not in d.tensors:
        shape = d.program.layout.shapes[name]
        d.tensors[name] = d.new_neurons(f"{name} (numbers)", int(np.prod(shape))).view(shape)
    return Numbers(d.tensors[name].view(step.shape), source=step)


def follow_conv(d: Derivation, step: Step, x: Numbers) -> Numbers:
    """A kernel's rows write channels and its columns read them, within their group; a depthwise one scales them."""
    ids, groups = d.along(x, 0), step.options["groups"]
    weight, channels, before = step.tensors["weight"], step.shape[0], input_shape(d, step)[0]
    if 1 < groups == channels == before:
        d.add_vectors(step, ("weight",), "scales", ids, x)
        d.add_vectors(step, ("bias",), "writes", ids, x)
        return Numbers(ids.view(-1, *[1] * (len(step.shape) - 1)), x.pixels)
    neurons = d.written(step, 0)
    d.add_axis(weight, 0, neurons, "writes")
    d.add_axis(weight, 1, ids, "reads", x, groups)
    if groups > 1:
        parents = d.blocks(d.axes[weight, 1, groups].ids.view(groups, -1), [1])
        d.add_members(parents, neurons.view(groups, -1))
    d.add_vectors(step, ("bias",), "writes", neurons, Numbers(neurons))
    return Numbers(neurons.view(-1, *[1] * (len(step.shape) - 1)))


def follow_kernel(d: Derivation, step: Step, x: Numbers, _kernel: Numbers) -> Numbers:
    """A layer whose kernel is made of tensors, in a way that treats rows alike and columns alike: it is tried out by relabelling.

    Those of the kernel's shape are read as it is; what has a number for each row, or for each column and pixel of it, goes along.
    """
    conv, shapes = step.kind == "conv_of", d.program.layout.shapes
    kernel = d.program.steps[step.inputs[1]].shape
    ids, groups = d.along(x, 0 if conv else -1), step.options.get("groups", 1)
    neurons = d.written(step, 0 if conv else -1)
    d.rigid += [ids, neurons]
    alone = conv and 1 < groups == kernel[0] == input_shape(d, step)[0]
    if alone:
        d.tie(ids.expand(kernel[0]), neurons)
    columns, pixels = ids.expand(kernel[1] * groups) if len(ids) == 1 else ids, int(np.prod(kernel[2:]))
    for name in sorted(tensors_behind(d.program, step.inputs[1])):
        shape = shapes[name]
        if shape == kernel:
            d.add_axis(name, 0, neurons, "writes")
            if not alone:
                d.add_axis(name, 1, columns, "reads", x, groups)
            if groups > 1 and not alone:
                d.add_members(d.blocks(d.axes[name, 1, groups].ids.view(groups, -1), [1]), neurons.view(groups, -1))
        elif shape and int(np.prod(shape)) == kernel[0] == max(shape):
            d.add_axis(name, shape.index(kernel[0]), neurons, "scales")
        elif shape == (kernel[1] * pixels,) and groups == 1:
            d.add_axis(name, 0, columns.repeat_interleave(pixels), "scales")
        elif int(np.prod(shape)) > 1:
            d.pin(x, Numbers(neurons))
    d.add_vectors(step, ("bias",), "writes", neurons, Numbers(neurons))
    return Numbers(
        neurons.view(-1, *[1] * (len(step.shape) - 1)) if conv else neurons.view(*[1] * (len(step.shape) - 1), -1)
    )


def follow_conv1d(d: Derivation, step: Step, x: Numbers) -> Numbers:
    """Like a convolution of images; neurons along the axis over which the kernel moves stay where they are."""
    if x.axes in ([], [0]):
        return follow_conv(d, step, x)
    d.pin(x)
    return follow_conv(d, step, Numbers(torch.full([1] * x.ids.dim(), NOBODY)))


def follow_linear(d: Derivation, step: Step, x: Numbers) -> Numbers:
    """A matrix's rows write neurons, its columns read them. Along an axis without neurons it mixes places, for each neuron alike."""
    if x.axes and x.ids.shape[-1] == 1 and input_shape(d, step)[-1] > 1:
        return Numbers(x.ids, x.pixels)
    columns = d.along(x, -1)
    neurons = d.written(step, -1)
    d.add_axis(step.tensors["weight"], 0, neurons, "writes")
    d.add_axis(step.tensors["weight"], 1, columns, "reads", x)
    d.add_vectors(step, ("bias",), "writes", neurons, Numbers(neurons))
    return Numbers(neurons.view(*[1] * (len(step.shape) - 1), -1))


def follow_norm(d: Derivation, step: Step, x: Numbers) -> Numbers:
    """A norm of channels. Behind it, the scale of what the layer before it wrote is lost; the norm's weights write instead."""
    ids, place = d.along(x, step.options.get("axis", 0)), step.inputs[0]
    writer = d.program.steps[place]
    if writer.kind in ("conv", "linear"):
        d.normalised.update(writer.tensors.values())
    if writer.kind not in ("conv", "linear") or d.program.readers[place] > 1 or "weight" not in step.tensors:
        d.rigid.append(x.ids)
    if (groups := step.options.get("groups", 1)) > 1 and len(ids) > 1:
        d.blocks(ids.view(groups, -1), [1])
    d.add_vectors(step, ("weight", "bias"), "writes", ids, x)
    d.add_vectors(step, ("running_mean", "running_var"), "normalised", ids, x)
    return x


def follow_layer_norm(d: Derivation, step: Step, x: Numbers) -> Numbers:
    """A norm over the last axes, and its weights, which have the same axes."""
    before = len(step.shape) - len(step.options["normalized_shape"])
    inside = [axis for axis in x.axes if axis >= before]
    if len(inside) > 1:
        d.pin(x)
        return x
    if not inside:
        return x
    d.blocks(x.ids, inside)
    for part in ("weight", "bias"):
        if part in step.tensors:
            d.add_axis(step.tensors[part], inside[0] - before, d.along(x, inside[0]), "writes", x)
    return x


def follow_prelu(d: Derivation, step: Step, x: Numbers) -> Numbers:
    """A slope for each channel, or one for all."""
    if d.program.layout.shapes[step.tensors["weight"]] != (1,):
        d.add_vectors(step, ("weight",), "scales", d.along(x, 0), x)
    return x


def follow_pool(d: Derivation, _step: Step, x: Numbers) -> Numbers:
    """What treats every channel by itself."""
    if x.axes in ([], [0]):
        return x
    return Numbers(d.along(x, 0).view(-1, *[1] * (x.ids.dim() - 1)), x.pixels)


def follow_filter(d: Derivation, step: Step, x: Numbers) -> Numbers:
    """A constant kernel for every channel: where they differ, the channels stay."""
    kernel = np.array(step.options["kernel"])
    if (kernel != kernel[:1]).any():
        d.pin(x)
    return follow_pool(d, step, x)


def follow_same(_d: Derivation, _step: Step, x: Numbers) -> Numbers:
    """What treats every number by itself."""
    return x


def follow_softmax(d: Derivation, step: Step, x: Numbers) -> Numbers:
    """Numbers along an axis, all alike: those of a block stay together."""
    if step.options["dim"] in x.axes:
        d.blocks(x.ids, [step.options["dim"]])
    return x


def follow_reduction(d: Derivation, step: Step, x: Numbers) -> Numbers:
    """A mean or sum over all neurons is nobody's, over those of blocks it is that of the block; over pixels, their neuron's."""
    dims = step.options.get("dims", (1, 2))
    ids = x.ids
    if inside := [axis for axis in x.axes if axis in dims]:
        d.rigid.append(ids)
        ids = d.blocks(ids, inside)
    for dim in sorted(dims, reverse=True) if not step.options.get("keepdim") else ():
        ids = ids.select(dim, 0)
    return Numbers(ids, source=x.source)


def follow_reshape(d: Derivation, step: Step, x: Numbers) -> Numbers:
    """Numbers in another shape."""
    before, pixels = input_shape(d, step), x.pixels
    if len(before) == 3 and len(step.shape) == 1 and x.axes in ([], [0]):
        pixels = {before[1] * before[2]: before[1:]}
    return replace(x, ids=shortened(x.ids.expand(before).reshape(step.shape)), pixels=pixels)


def follow_getitem(d: Derivation, step: Step, x: Numbers) -> Numbers:
    """A part of the numbers."""
    return replace(x, ids=shortened(x.ids.expand(input_shape(d, step))[step.options["index"]]))


def follow_index(_d: Derivation, step: Step, x: Numbers) -> Numbers:
    """Numbers taken by their places along an axis."""
    axis, places = step.options["axis"], torch.tensor(step.options["places"])
    if x.ids.shape[axis] == 1:
        return x
    return replace(x, ids=shortened(x.ids.index_select(axis, places)))


def follow_roll(_d: Derivation, step: Step, x: Numbers) -> Numbers:
    """Numbers shifted around axes."""
    moved = [
        (shift, dim) for shift, dim in zip(step.options["shifts"], step.options["dims"], strict=True) if dim in x.axes
    ]
    return replace(x, ids=x.ids.roll(*map(tuple, zip(*moved, strict=True)))) if moved else x


def follow_permute(_d: Derivation, step: Step, x: Numbers) -> Numbers:
    """Axes in another order."""
    return replace(x, ids=x.ids.permute(step.options["dims"]))


def follow_expand(_d: Derivation, step: Step, x: Numbers) -> Numbers:
    """Numbers repeated along an axis."""
    return replace(x, ids=x.with_dims(len(step.shape)))


def follow_repeat(d: Derivation, step: Step, x: Numbers) -> Numbers:
    """Numbers several times along their axes."""
    return replace(x, ids=shortened(x.ids.expand(input_shape(d, step)).repeat(step.options["sizes"])))


def follow_pad(d: Derivation, step: Step, x: Numbers) -> Numbers:
    """A border is nobody's, where it lies along neurons; else it is as the other numbers of its neuron."""
    ends = [step.options["pad"][i : i + 2] for i in range(0, len(step.options["pad"]), 2)]
    borders = dict(zip(range(len(step.shape) - 1, -1, -1), ends, strict=False))  # from the last axis on
    before = input_shape(d, step)
    alike = [0] if not x.axes and bool((x.ids != NOBODY).all()) else []  # channels that are all the same
    wide = {axis: ends for axis, ends in borders.items() if any(ends) and axis in (*x.axes, *alike)}
    if not wide:
        return x
    if step.options["mode"] != "constant":
        d.pin(x)
        return Numbers(torch.full([1] * len(step.shape), NOBODY))
    ids = x.ids.expand(before[0], *x.ids.shape[1:]) if alike else x.ids
    sizes = [end for axis in range(len(step.shape) - 1, -1, -1) for end in wide.get(axis, (0, 0))]
    return Numbers(pad(ids, sizes, value=NOBODY), x.pixels)


def follow_cat(d: Derivation, step: Step, *parts: Numbers) -> Numbers:
    """Numbers one after the other."""
    dim = step.options["dim"]
    sizes = [d.program.steps[place].shape[dim] for place in step.inputs]
    others = torch.broadcast_shapes(*[part.ids.narrow(dim, 0, 1).shape for part in parts])
    shapes = [[*others[:dim], size, *others[dim + 1 :]] for size in sizes]
    ids = torch.cat([part.ids.expand(shape) for part, shape in zip(parts, shapes, strict=True)], dim)
    pixels = {count: shape for part in parts for count, shape in part.pixels.items()}
    sources = sorted(
        (part.source for part in parts if part.source is not None), key=lambda step: step.kind == "constant"
    )
    return Numbers(shortened(ids), pixels, sources[0] if len(sources) == len(parts) else None)


def follow_arithmetic(d: Derivation, step: Step, x: Numbers, y: Numbers) -> Numbers:
    """Results that are joined number by number tie their neurons; one number for all neurons ties none."""
    first, second = x.with_dims(len(step.shape)), y.with_dims(len(step.shape))
    pixels = x.pixels | y.pixels
    for source, numbers, other in ((x.source, second, y.source), (y.source, first, x.source)):
        if source is not None and source.kind == "constant":
            tell_apart(d, step, numbers, source)
            return Numbers(numbers, pixels, other)
    for source, own, numbers in ((x.source, first, second), (y.source, second, first)):
        if source is not None:
            return Numbers(join_tensor(d, own, numbers), pixels, x.source and y.source)
    if first.shape != second.shape or step.kind not in HOMOGENEOUS:
        d.rigid += [first, second]
    return Numbers(d.join(first, second), pixels)


def tell_apart(d: Derivation, step: Step, ids: Ids, source: Step) -> None:
    """Pin neurons for which a constant has different values."""
    value = np.array(source.options["value"])
    before = len(step.shape) - value.ndim
    d.rigid.append(ids)
    own = [axis for axis in range(before, ids.dim()) if ids.shape[axis] > 1]
    if any((value != value.take([0], axis - before)).any() for axis in own):
        d.pinned.append(ids)


def join_tensor(d: Derivation, numbers: Ids, ids: Ids) -> Ids:
    """Tie the numbers of a tensor to the neurons of a result, where both lie along an axis; else they are places, and stay."""
    d.rigid.append(ids)
    if not any(a > 1 and b > 1 for a, b in zip(numbers.shape, ids.shape, strict=True)):
        d.pinned.append(numbers)
        return ids
    alone = [axis for axis, size in enumerate(ids.shape) if size > 1 and numbers.shape[axis] == 1]
    d.tie(numbers, d.blocks(ids, alone) if alone else ids)
    return ids


def follow_contract(d: Derivation, step: Step, x: Numbers, y: Numbers) -> Numbers:
    """A sum of products (torch.einsum). Neurons along an axis that is summed are tied; blocks of them leave their parents."""
    (first, second), result = step.options["of"], step.options["to"]
    every = result + "".join(dict.fromkeys(c for c in first + second if c not in result))

    def spread(ids: Ids, letters: str) -> Ids:
        order = [letters.index(c) for c in every if c in letters]
        return ids.permute(order).view([ids.shape[letters.index(c)] if c in letters else 1 for c in every])

    own, other = spread(x.ids, first), spread(y.ids, second)
    d.rigid += [own, other]
    summed = list(range(len(result), len(every)))
    inside = [[axis for axis in summed if ids.shape[axis] > 1] for ids in (own, other)]
    if inside[0] == inside[1]:
        if inside[0]:
            shared = [axis for axis in range(len(every)) if (own.shape[axis] > 1) == (other.shape[axis] > 1)]
            if len(shared) == len(every):
                d.tie(own, other)
            else:
                d.pinned += [own, other]
    else:
        d.pinned += [ids for ids, some in ((own, inside[0]), (other, inside[1])) if some]
    own, other = (d.blocks(ids, some) if some else ids for ids, some in zip((own, other), inside, strict=True))
    ids = d.join(own, other)
    return Numbers(ids.view(ids.shape[: len(result)]))


RULES: dict[str, Callable[..., Numbers]] = {
    "input": follow_input,
    "constant": follow_constant,
    "parameter": follow_parameter,
    "conv": follow_conv,
    "conv1d": follow_conv1d,
    **dict.fromkeys(KERNELS, follow_kernel),
    "filter": follow_filter,
    "linear": follow_linear,
    **dict.fromkeys(("batch_norm", "group_norm", "instance_norm"), follow_norm),
    **dict.fromkeys(("layer_norm", "rms_norm"), follow_layer_norm),
    "prelu": follow_prelu,
    "mean": follow_reduction,
    "reduction": follow_reduction,
    **dict.fromkeys(("flatten", "reshape"), follow_reshape),
    "getitem": follow_getitem,
    "index": follow_index,
    "roll": follow_roll,
    "permute": follow_permute,
    "expand": follow_expand,
    "repeat": follow_repeat,
    "pad": follow_pad,
    "cat": follow_cat,
    "contract": follow_contract,
    **dict.fromkeys(("softmax", "log_softmax"), follow_softmax),
    **dict.fromkeys(("dropout", *POINTWISE), follow_same),
    **dict.fromkeys(POOLS, follow_pool),
    **dict.fromkeys(ARITHMETIC, follow_arithmetic),
}
