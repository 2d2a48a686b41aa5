"""Which neuron each number inside a network belongs to, followed from step to step.

Every channel or unit that a layer writes is a neuron, a number; neurons that an addition ties together count as one. Beside every
result goes an array `ids`: the neuron of which each of its numbers is a function (next to what does not depend on the order of
neurons, such as a mean over all). Steps that only move numbers move the ids along, so a slice, a padding or a concatenation
needs no rule of its own. Each kind of step is one function, which also says which axes of its tensors run over which neurons.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from stages.common.stage import InputError
from stages.weightnet.tracing.operations import ARITHMETIC, POINTWISE, POOLS, Step
from stages.weightnet.tracing.program import Program

INPUT, OUTPUT = "input", "output"  # groups whose order means something: they are never permuted
NOBODY = -1  # the id of numbers that are the same whatever the order of neurons
# what commutes with positive factors of neurons, and with signs if its ReLUs are tanh; of norms and sums, their rules say it
HOMOGENEOUS = {
    *("input", "relu", "avg_pool", "adaptive_pool", "mean", "flatten", "dropout", "cat", "neg", "reshape"),
    *("getitem", "permute", "expand", "repeat", "add", "sub", "conv", "linear", "batch_norm", "group_norm"),
}

Ids = Int[Tensor, "..."]


@dataclass(frozen=True)
class Numbers:
    """The neurons of a step's result. ids: of one image, of size one along axes on which they do not depend.

    pixels: height and width of the images that were flattened, by their numbers of pixels. source: the step of a tensor or
    constant, whose numbers are no neurons'.
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
    in which one neuron may have several numbers. rows: the part of the first axis that this holds for, if not all.
    """

    tensor: str
    axis: int
    ids: Int[Tensor, " size"]
    role: str
    flat: bool = False
    pixels: dict[int, tuple[int, int]] = field(default_factory=dict)
    rows: tuple[int, int] | None = None


class Derivation:
    """What is found while the steps of a program are followed.

    layers: the first neuron and the number of neurons of each layer; orders: results in whose order neurons lie;
    rigid: neurons whose values pass through what scaling does not commute with; fixed: those that are told apart by constants.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.layers: dict[str, tuple[int, int]] = {}
        self.parents: list[int] = []
        self.axes: list[NeuronAxis] = []
        self.orders: list[Numbers] = []
        self.blocks: list[tuple[Int[Tensor, " size"], Step]] = []  # what norms in several groups normalise
        self.rigid: set[int] = set()
        self.fixed: set[int] = set()
        self.results: list[Numbers] = []

    def written(self, step: Step, axis: int) -> Int[Tensor, " size"]:
        """Return the ids of the neurons that a step writes along an axis of its result."""
        return self.new_neurons(f"{step.name} (layer)" if step.name in (INPUT, OUTPUT) else step.name, step.shape[axis])

    def new_neurons(self, layer: str, size: int) -> Int[Tensor, " size"]:
        """Return the ids of a layer's neurons: new ones, unless it has been used before."""
        if layer not in self.layers:
            self.layers[layer] = (len(self.parents), size)
            self.parents += range(len(self.parents), len(self.parents) + size)
        first, _ = self.layers[layer]
        return torch.arange(first, first + size)

    def root(self, neuron: int) -> int:
        """Return the first of the neurons that count as one with this."""
        while self.parents[neuron] != neuron:
            self.parents[neuron] = self.parents[self.parents[neuron]]
            neuron = self.parents[neuron]
        return neuron

    def tie(self, first: Ids, second: Ids) -> Ids:
        """Make neurons count as one, each with that at its place, and return their ids; those of nobody are free."""
        both = torch.stack(torch.broadcast_tensors(first, second))
        for a, b in both.flatten(1).unique(dim=1).T.tolist():
            if a != NOBODY and b != NOBODY:
                a, b = sorted((self.root(a), self.root(b)))
                self.parents[b] = a
        return torch.where(both[0] == NOBODY, both[1], both[0])

    def add_axis(
        self,
        tensor: str,
        axis: int,
        ids: Int[Tensor, " size"],
        role: str,
        numbers: Numbers | None = None,
        rows: tuple[int, int] | None = None,
    ) -> None:
        """Note that a tensor's axis runs over neurons, those of `numbers`; if it is noted already, tie them to the others."""
        size = self.program.layout.shapes[tensor][axis]
        ids = ids.expand(size) if len(ids) == 1 else ids
        for other in self.axes:
            if (other.tensor, other.axis, other.role, other.rows) == (tensor, axis, role, rows):
                self.tie(other.ids, ids)
                return
        if (nobody := ids == NOBODY).any():  # numbers that are read, but that no layer wrote
            ids = ids.clone()
            ids[nobody] = self.new_neurons(f"{tensor} (constants)", int(nobody.sum()))
            for told_apart in (self.fixed, self.rigid):
                told_apart.update(ids[nobody].tolist())
        flat, pixels = (numbers.flat, numbers.pixels) if numbers else (False, {})
        self.axes.append(NeuronAxis(tensor, axis, ids, role, flat, pixels, rows))

    def add_vectors(self, step: Step, parts: tuple[str, ...], role: str, ids: Int[Tensor, " size"], x: Numbers) -> None:
        """Note that those of a step's tensors that it has have one value for each neuron."""
        for part in parts:
            if part in step.tensors:
                self.add_axis(step.tensors[part], 0, ids, role, x)

    def mark(self, marked: set[int], numbers: Numbers) -> None:
        """Put the neurons of a result into a set."""
        marked.update(numbers.ids[numbers.ids != NOBODY].unique().tolist())


def follow(program: Program) -> Derivation:
    """Return what is found along a program; InputError names a step through which neurons cannot be followed."""
    derivation = Derivation(program)
    for step in program.steps:
        inputs = [derivation.results[place] for place in step.inputs]
        if step.kind not in RULES:
            raise InputError(f"step {step.name}: neurons cannot be followed through {step.kind}")
        result = RULES[step.kind](derivation, step, *inputs)
        if step.kind not in HOMOGENEOUS:
            derivation.mark(derivation.rigid, result)
        if result.source is None and all(result.ids is not earlier.ids for earlier in inputs):
            derivation.orders.append(result)
        derivation.results.append(result)
    return derivation


def shortened(ids: Ids) -> Ids:
    """Return ids of size one along axes on which they do not depend."""
    for axis, size in enumerate(ids.shape):
        first = ids.narrow(axis, 0, 1)
        if size > 1 and bool((ids == first).all()):
            ids = first
    return ids


def along(step: Step, x: Numbers, axis: int) -> Int[Tensor, " size"]:
    """Return the ids along an axis; InputError if there are neurons along others."""
    if any(other != axis % x.ids.dim() for other in x.axes):
        raise InputError(
            f"step {step.name}: {step.kind} acts along another axis than that of neurons, which is not supported"
        )
    return x.ids.flatten()


def input_shape(d: Derivation, step: Step) -> tuple[int, ...]:
    """Return the shape of what a step reads."""
    return d.program.steps[step.inputs[0]].shape


def follow_input(d: Derivation, step: Step) -> Numbers:
    """The channels of an image are neurons that no layer writes."""
    return Numbers(d.new_neurons(INPUT, step.shape[0]).view(-1, *[1] * (len(step.shape) - 1)))


def follow_tensor(_d: Derivation, step: Step) -> Numbers:
    """The numbers of tensors and constants are no neurons'."""
    return Numbers(torch.full([1] * len(step.shape), NOBODY), source=step)


def follow_conv(d: Derivation, step: Step, x: Numbers) -> Numbers:
    """A kernel's rows write channels and its columns read them, within their group; a depthwise one scales them."""
    ids, groups = along(step, x, 0), step.options["groups"]
    weight, channels = step.tensors["weight"], step.shape[0]
    if 1 < groups == channels == input_shape(d, step)[0]:
        d.add_vectors(step, ("weight",), "scales", ids, x)
        d.add_vectors(step, ("bias",), "writes", ids, x)
        return x
    neurons = d.written(step, 0)
    d.add_axis(weight, 0, neurons, "writes")
    rows, columns = channels // groups, d.program.layout.shapes[weight][1]
    for group in range(groups):
        read = ids if len(ids) == 1 or groups == 1 else ids[group * columns : (group + 1) * columns]
        own = (group * rows, (group + 1) * rows)
        d.add_axis(weight, 1, read, "reads", x, own if groups > 1 else None)
        if groups > 1:  # neurons of one group do not move to another
            d.orders += [Numbers(read), Numbers(neurons[slice(*own)])]
    d.add_vectors(step, ("bias",), "writes", neurons, Numbers(neurons))
    return Numbers(neurons.view(-1, *[1] * (len(step.shape) - 1)))


def follow_linear(d: Derivation, step: Step, x: Numbers) -> Numbers:
    """A matrix's rows write neurons, its columns read them."""
    columns = along(step, x, -1)
    neurons = d.written(step, -1)
    d.add_axis(step.tensors["weight"], 0, neurons, "writes")
    d.add_axis(step.tensors["weight"], 1, columns, "reads", x)
    d.add_vectors(step, ("bias",), "writes", neurons, Numbers(neurons))
    return Numbers(neurons.view(*[1] * (len(step.shape) - 1), -1))


def follow_norm(d: Derivation, step: Step, x: Numbers) -> Numbers:
    """A norm of channels. Behind it, the scale of what the layer before it wrote is lost; the norm's weights write instead."""
    ids, place = along(step, x, 0), step.inputs[0]
    writer = d.program.steps[place]
    if writer.kind in ("conv", "linear"):
        rows = writer.tensors.values()
        d.axes = [replace(a, role="normalised") if a.tensor in rows and a.role == "writes" else a for a in d.axes]
    if writer.kind not in ("conv", "linear") or d.program.readers[place] > 1 or "weight" not in step.tensors:
        d.mark(d.rigid, x)
    if step.options.get("groups", 1) > 1:
        d.blocks.append((ids, step))
    d.add_vectors(step, ("weight", "bias"), "writes", ids, x)
    d.add_vectors(step, ("running_mean", "running_var"), "normalised", ids, x)
    return x


def follow_layer_norm(d: Derivation, step: Step, x: Numbers) -> Numbers:
    """A norm over the last axes, and its weights, which have the same axes."""
    if len(x.axes) > 1:
        raise InputError(f"step {step.name}: {step.kind} over neurons along several axes is not supported")
    before = len(step.shape) - len(step.options["normalized_shape"])
    for part in ("weight", "bias"):
        for axis in x.axes:
            if part in step.tensors and axis >= before:
                d.add_axis(step.tensors[part], axis - before, x.ids.flatten(), "writes", x)
    return x


def follow_prelu(d: Derivation, step: Step, x: Numbers) -> Numbers:
    """A slope for each channel, or one for all."""
    if d.program.layout.shapes[step.tensors["weight"]] != (1,):
        d.add_vectors(step, ("weight",), "scales", along(step, x, 0), x)
    return x


def follow_pool(_d: Derivation, step: Step, x: Numbers) -> Numbers:
    """What treats every channel by itself."""
    along(step, x, 0)
    return x


def follow_same(_d: Derivation, _step: Step, x: Numbers) -> Numbers:
    """What treats every number by itself, or all along an axis alike."""
    return x


def follow_reduction(d: Derivation, step: Step, x: Numbers) -> Numbers:
    """A mean or sum over all neurons is nobody's; over pixels, it is their neuron's."""
    dims = step.options.get("dims", (1, 2))
    if inside := [axis for axis in x.axes if axis in dims]:
        if inside != x.axes:
            raise InputError(f"step {step.name}: {step.options['of']} over a part of the neurons is not supported")
        d.mark(d.rigid, x)
        return Numbers(torch.full([1] * len(step.shape), NOBODY))
    ids = x.ids
    for dim in sorted(dims, reverse=True) if not step.options.get("keepdim") else ():
        ids = ids.select(dim, 0)
    return Numbers(ids)


def follow_reshape(d: Derivation, step: Step, x: Numbers) -> Numbers:
    """Numbers in another shape."""
    before, pixels = input_shape(d, step), x.pixels
    if len(before) == 3 and len(step.shape) == 1 and x.axes in ([], [0]):
        pixels = {before[1] * before[2]: before[1:]}
    return Numbers(shortened(x.ids.expand(before).reshape(step.shape)), pixels)


def follow_getitem(d: Derivation, step: Step, x: Numbers) -> Numbers:
    """A part of the numbers."""
    return Numbers(shortened(x.ids.expand(input_shape(d, step))[step.options["index"]]), x.pixels)


def follow_permute(_d: Derivation, step: Step, x: Numbers) -> Numbers:
    """Axes in another order."""
    return Numbers(x.ids.permute(step.options["dims"]), x.pixels)


def follow_expand(_d: Derivation, step: Step, x: Numbers) -> Numbers:
    """Numbers repeated along an axis."""
    return Numbers(x.with_dims(len(step.shape)), x.pixels)


def follow_repeat(d: Derivation, step: Step, x: Numbers) -> Numbers:
    """Numbers several times along their axes."""
    return Numbers(shortened(x.ids.expand(input_shape(d, step)).repeat(step.options["sizes"])), x.pixels)


def follow_pad(d: Derivation, step: Step, x: Numbers) -> Numbers:
    """A border of pixels is their neurons'; channels that are added are nobody's."""
    ends = [step.options["pad"][i : i + 2] for i in range(0, len(step.options["pad"]), 2)]
    borders = dict(zip(range(len(step.shape) - 1, -1, -1), ends, strict=False))  # from the last axis on
    along(step, x, 0)
    if not any(borders.get(0, (0,))):
        return x
    if step.options["mode"] != "constant":
        raise InputError(f"step {step.name}: padding of channels by {step.options['mode']} is not supported")
    ids = x.ids if x.axes else x.ids.expand(input_shape(d, step)[0], *x.ids.shape[1:])  # channels that are all the same
    wide = [end if axis == 0 else 0 for axis, ends in borders.items() for end in ends]
    return Numbers(pad(ids, wide, value=NOBODY), x.pixels)


def follow_cat(d: Derivation, step: Step, *parts: Numbers) -> Numbers:
    """Numbers one after the other."""
    dim = step.options["dim"]
    if any(part.source is not None and part.source.kind == "parameter" for part in parts):
        raise InputError(f"step {step.name}: a tensor of the network beside results is not supported")
    sizes = [d.program.steps[place].shape[dim] for place in step.inputs]
    others = torch.broadcast_shapes(*[part.ids.narrow(dim, 0, 1).shape for part in parts])
    shapes = [[*others[:dim], size, *others[dim + 1 :]] for size in sizes]
    ids = torch.cat([part.ids.expand(shape) for part, shape in zip(parts, shapes, strict=True)], dim)
    pixels = {count: shape for part in parts for count, shape in part.pixels.items()}
    return Numbers(shortened(ids), pixels)


def follow_arithmetic(d: Derivation, step: Step, x: Numbers, y: Numbers) -> Numbers:
    """Results that are joined number by number tie their neurons; one number for all neurons ties none."""
    if x.source is not None and y.source is not None:
        raise InputError(f"step {step.name}: only tensors and constants are joined, which is not supported")
    if x.source is not None or y.source is not None:
        return join_tensor(d, step, *((x, y.source) if y.source is not None else (y, x.source)))
    first, second = x.with_dims(len(step.shape)), y.with_dims(len(step.shape))
    pixels = x.pixels | y.pixels
    if first.shape != second.shape or step.kind not in HOMOGENEOUS:
        for numbers in (x, y):
            d.mark(d.rigid, numbers)
    if first.shape == second.shape:
        return Numbers(d.tie(first, second), pixels)
    if 1 not in (first.numel(), second.numel()):
        raise InputError(f"step {step.name} joins results whose neurons do not correspond")
    return Numbers(first if second.numel() == 1 else second, pixels)


def join_tensor(d: Derivation, step: Step, x: Numbers, source: Step) -> Numbers:
    """Return a result joined with a tensor of the network or a constant, which may have one value for each neuron."""
    result = Numbers(x.with_dims(len(step.shape)), x.pixels)
    d.mark(d.rigid, result)
    before = len(step.shape) - len(source.shape)
    own = [axis for axis in result.axes if axis >= before and source.shape[axis - before] > 1]
    if source.kind == "constant":
        value = torch.tensor(source.options["value"])
        if any((value != value.narrow(axis - before, 0, 1)).any() for axis in own):
            d.mark(d.fixed, result)
    elif own:
        ids, name = along(step, result, own[0]), source.tensors["value"]
        wide = [axis for axis, size in enumerate(d.program.layout.shapes[name]) if size > 1]  # ones may stand between
        place = [axis for axis, size in enumerate(source.shape) if size > 1].index(own[0] - before)
        d.add_axis(name, wide[place], ids, "writes" if step.kind in ("add", "sub") else "scales", result)
    return result


RULES: dict[str, Callable[..., Numbers]] = {
    "input": follow_input,
    "constant": follow_tensor,
    "parameter": follow_tensor,
    "conv": follow_conv,
    "linear": follow_linear,
    **dict.fromkeys(("batch_norm", "group_norm", "instance_norm"), follow_norm),
    "layer_norm": follow_layer_norm,
    "prelu": follow_prelu,
    "mean": follow_reduction,
    "reduction": follow_reduction,
    **dict.fromkeys(("flatten", "reshape"), follow_reshape),
    "getitem": follow_getitem,
    "permute": follow_permute,
    "expand": follow_expand,
    "repeat": follow_repeat,
    "pad": follow_pad,
    "cat": follow_cat,
    **dict.fromkeys(("dropout", "softmax", "log_softmax", *POINTWISE), follow_same),
    **dict.fromkeys(POOLS, follow_pool),
    **dict.fromkeys(ARITHMETIC, follow_arithmetic),
}
