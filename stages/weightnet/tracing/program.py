"""A network as a list of steps, and many networks of one kind run at once.

Everything that treats networks as data reads this list: the trainer runs stacks of networks along it, the symmetry is derived
from it, and probes are sent through it. A step that is not understood is refused by name, never guessed; and before a program is
handed out, each of its steps has given what the user's own module gives, in float64, on weights and images drawn at random.
"""

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from stages.common.stage import InputError
from stages.common.vectors import Layout
from stages.weightnet.tracing.attention import write_out_attention
from stages.weightnet.tracing.operations import POINTWISE, Step, batch_statistics, own_order, run_step, torch_order
from stages.weightnet.tracing.readers import READERS
from stages.weightnet.tracing.recording import ALONG_ROWS, Recorder, plain
from stages.weightnet.tracing.recurrence import write_out_recurrence

Weights = dict[str, Tensor]  # of n networks, every tensor [n, *shape]

ROUNDING = 1e-9  # relative, in float64: more than this is not the same function
FEW = 10007  # random numbers; a prime, so that rows and columns differ
NOISE = 0.3  # of what keeps the size of results: sums over many layers must not overflow
CANCELLED = 1e-5  # of the size of what a step reads: of what is smaller, cancellation leaves rounding alone
SOFTMAX = ("softmax", "log_softmax")


@dataclass(frozen=True)
class Program:
    """The steps of a network in order, the last of which is its output, and the shapes of its tensors by name.

    unused: tensors of the module that its outputs do not depend on; notes: what people should know about the program. whole: tensors
    of whole numbers (places in tables) that it was read with: a file of weights that has them must have the same.
    """

    steps: tuple[Step, ...]
    layout: Layout
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    whole: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image."""
        return self.steps[0].shape

    @property
    def activations(self) -> list[str]:
        """The kinds of activations, by name."""
        return sorted({step.kind for step in self.steps if step.kind in POINTWISE or step.kind == "prelu"})

    def may_overwrite(self, place: int) -> bool:
        """Return whether the reader of a step's result may write over it: a convolution's, if nothing else reads it."""
        return self.steps[place].kind == "conv" and self.readers[place] == 1

    @cached_property
    def readers(self) -> Counter[int]:
        """How many times each step's result is read."""
        return Counter(place for step in self.steps for place in step.inputs)

    @cached_property
    def last_reader(self) -> dict[int, int]:
        """The last step that reads each step's result."""
        return {place: number for number, step in enumerate(self.steps) for place in step.inputs}

    def numbers_of(self, kind: str) -> list[int]:
        """Return how many numbers each step of a kind gives for one image."""
        return [math.prod(step.shape) for step in self.steps if step.kind == kind]


def trace(model: nn.Module, input_shape: tuple[int, ...]) -> Program:
    """Return the program of a network of images [c, h, w]; InputError names what cannot be followed.

    The module is run twice, on weights, images and batches of another size: the first run is recorded, the second compared.
    """
    name = type(model).__name__
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about the user's code
            steps, whole, output = record(copied(model), input_shape, 2, lambda *_: None)
            own = copied(model)  # another, when the first is gone: some keep results for the next time
            weights = {key: value[None] for key, value in float_state(own).items()}
            layout = Layout({key: tuple(value.shape[1:]) for key, value in weights.items()})
            program = Program(steps, layout, whole=whole)
            check(own, program, output, weights)
    except InputError as error:
        raise InputError(f"{name} cannot be traced: {error}") from None
    except Exception as error:  # this runs the user's code, which may raise anything
        given = f"it cannot run on images {list(input_shape)} ({plain(error)}): is that their shape (--input-shape)?"
        raise InputError(f"{name} cannot be traced: {given}") from None
    program = logits_of(without_unused(program, output))
    if len(program.steps[-1].shape) != 1:
        raise InputError(
            f"{name} gives {list(program.steps[-1].shape)} for an image: expected one number for each class"
        )
    if not program.layout.shapes:
        raise InputError(f"{name} has no layers: its outputs depend on none of its weights")
    return program


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a module in float64 to use, not train; InputError if it has tensors that are made of others."""
    try:
        own = copy.deepcopy(model).double().eval()
    except RuntimeError as error:
        raise InputError(f"it cannot be copied ({plain(error)}): take weight norms and the like off first") from None
    write_out_attention(own)
    write_out_recurrence(own)
    return own


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that are saved with a module, themselves, by name."""
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def float_state(model: nn.Module) -> dict[str, Tensor]:
    """Return those of a module's tensors that are no counters."""
    return {name: tensor for name, tensor in state_tensors(model).items() if tensor.is_floating_point()}


def randomise(state: dict[str, Tensor], random: torch.Generator) -> None:
    """Move every number of a network at random, so that no zero or one hides what is left out; positive tensors stay so.

    The random numbers are the same few again and again: millions take seconds.
    """
    factors = torch.rand(FEW, generator=random, dtype=torch.float64) + 0.5
    changes = torch.randn(FEW, generator=random, dtype=torch.float64)
    for tensor in state.values():
        value = tensor.detach()
        times = -(-value.numel() // FEW)
        positive = bool((value > 0).all())
        value.mul_(factors.repeat(times)[: value.numel()].view(value.shape))
        if not positive:
            fan_in = value[0].numel() if value.dim() > 1 else 100
            value.add_(changes.repeat(times)[: value.numel()].view(value.shape), alpha=NOISE * max(1, fan_in) ** -0.5)
        factors, changes = factors.roll(1), changes.roll(1)


def record(
    model: nn.Module, input_shape: tuple[int, ...], batch: int, watch: Callable[[Step, Tensor], None]
) -> tuple[tuple[Step, ...], dict[str, list[Any]], int]:
    """Return the steps of a module that runs on random weights and images, the tables that it read, and the place of its output.

    watch: is told each step and its result [b, *shape].
    """
    random = torch.Generator().manual_seed(batch)
    randomise(float_state(model), random)
    images = torch.randn(batch, *input_shape, generator=random, dtype=torch.float64)
    recorder = Recorder(model, state_tensors(model), images, READERS, watch)
    same = images.clone()
    with recorder:
        result = model(images)
    again = model(same) if isinstance(result, Tensor) else result
    if not isinstance(result, Tensor):
        raise InputError(f"it returns a {type(result).__name__}: expected a tensor of one number for each class")
    if result not in recorder.places:
        raise InputError("what it returns was not made by steps that can be followed")
    if not torch.allclose(again, result, rtol=ROUNDING, atol=ROUNDING * result.abs().amax().item(), equal_nan=True):
        raise InputError("it gives other results for the same images when it is called again")
    place, version, batch = recorder.places[result]
    if version != result._version:
        raise InputError("what it returns was changed in place, through another view of it")
    if batch != ALONG_ROWS:
        raise InputError("what it returns mixes the images of a batch")
    return tuple(recorder.steps), recorder.whole, place


def check(model: nn.Module, program: Program, output: int, weights: Weights) -> None:
    """Compare every step with the module's own, on other weights and images; InputError names the first that differs.

    weights: those of the module, which are drawn anew for it.
    """
    sizes: list[float] = []  # of every step's result
    results: dict[int, Tensor] = {}  # the module's own: errors do not add up
    places = iter(range(len(program.steps)))

    def watch(step: Step, expected: Tensor) -> None:
        for place in places:
            known = program.steps[place]
            inputs = [results[i] for i in known.inputs]
            own = own_order(expected[None]) if place == 0 else run_step(known, inputs, tensors_of(known, weights))
            if known.kind not in ("constant", "parameter"):
                break
            results[place] = own.to(expected)
            sizes.append(largest(own))
        if len(sizes) == len(program.steps) or step != program.steps[len(sizes)]:
            raise InputError(f"step {step.name}: forward takes another way for other images or weights")
        read = max((sizes[i] for i in step.inputs), default=0.0)
        sizes.append(max(largest(expected), CANCELLED * read))
        found = torch_order(own)[0]
        found = found.expand_as(expected) if found.shape[1:] == expected.shape[1:] else found  # what all images share
        error = difference(found, expected) / max(sizes[-1], 1e-300)
        if not error < ROUNDING:
            raise InputError(f"step {step.name}: what is run differs from the module's own by {error:.1e} of its size")
        results[place] = own_order(expected[None].clone())  # it may be written over
        for i in {i for i in step.inputs if program.last_reader[i] == place}:
            del results[i]

    again, _, other = record(model, program.input_shape, 3, watch)
    if again != program.steps or other != output:
        raise InputError("forward takes another way for other images or weights")


def difference(x: Tensor, expected: Tensor) -> float:
    """Return the largest difference between numbers; infinity if they are not as many, or not finite (of a border, for a maximum)."""
    if x.shape != expected.shape:
        return math.inf
    apart = torch.where(x == expected, 0.0, x - expected).abs().amax().item()
    return apart if math.isfinite(apart) else math.inf


def largest(x: Tensor) -> float:
    """Return the size of the largest number that is finite."""
    return x.abs().nan_to_num(0.0, posinf=0.0).amax().item()


def without_unused(program: Program, output: int) -> Program:
    """Return a program that ends with the step `output`, without the steps and tensors that it does not depend on."""
    needed = {output}
    for place in range(output, -1, -1):
        if place in needed:
            needed.update(program.steps[place].inputs)
    order = sorted(needed | {0})
    new = {place: number for number, place in enumerate(order)}
    steps = tuple(replace(s, inputs=tuple(new[i] for i in s.inputs)) for s in (program.steps[i] for i in order))
    read = {name for step in steps for name in step.tensors.values()}
    unused = tuple(name for name in program.layout.shapes if name not in read)
    layers = list(dict.fromkeys(name.rpartition(".")[0] or name for name in unused))
    more = f" and {len(layers) - 5} more" if len(layers) > 5 else ""
    notes = (f"not used by forward, left out: {', '.join(layers[:5])}{more}",) if layers else ()
    layout = Layout({name: shape for name, shape in program.layout.shapes.items() if name in read})
    return Program(steps, layout, unused, program.notes + notes, program.whole)


def logits_of(program: Program) -> Program:
    """Return a program without a softmax, or sigmoids, at its end; of a softmax's logarithm without an exponential, too."""
    last = program.steps[-1]
    if last.kind in SOFTMAX:
        ends = last.options["dim"] == len(last.shape) - 1
    else:
        ends = last.kind == "sigmoid" or (last.kind == "exp" and program.steps[last.inputs[0]].kind == "log_softmax")
    if not ends:
        return program
    note = f"{last.kind} at the end left out: the properties are those of the logits"
    return logits_of(
        replace(without_unused(program, last.inputs[0]), unused=program.unused, notes=(*program.notes, note))
    )


def logarithm_of(program: Program, least: float) -> Program:
    """Return a program of the logarithms of a program's outputs, none of them taken for less than `least`."""
    last, end = program.steps[-1], len(program.steps)
    more = [
        Step("clamp", "logarithm", (end - 1,), last.shape, {"min": least, "max": None}),
        Step("log", "logarithm", (end,), last.shape),
    ]
    return replace(program, steps=(*program.steps, *more))


def rescaled_input(program: Program, mean: float, std: float) -> Program:
    """Return a program that multiplies images by std and adds mean first: of images in units of pixels' deviation, around their mean.

    InputError unless std is positive and both are finite.
    """
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise InputError(
            f"pixels of mean {mean:g} and deviation {std:g}: expected finite numbers, the deviation positive"
        )
    if (mean, std) == (0.0, 1.0):
        return program
    image, *others = program.steps
    before = [
        Step("constant", "pixels", (), (), {"value": std}),
        Step("mul", "pixels", (0, 1), image.shape),
        Step("constant", "pixels", (), (), {"value": mean}),
        Step("add", "pixels", (2, 3), image.shape),
    ]
    moved = [replace(step, inputs=tuple(place + len(before) for place in step.inputs)) for step in others]
    return replace(program, steps=(image, *before, *moved))


def bordered_input(program: Program, border: int, value: float) -> Program:
    """Return a program of smaller images, around which it puts a border of so many pixels of a value first."""
    image, *others = program.steps
    channels, height, width = image.shape
    before = [
        replace(image, shape=(channels, height - 2 * border, width - 2 * border)),
        Step("pad", "border", (0,), image.shape, {"pad": [border] * 4, "mode": "constant", "value": value}),
    ]
    moved = [replace(step, inputs=tuple(place + 1 for place in step.inputs)) for step in others]
    return replace(program, steps=(*before, *moved))


def run_stack(
    program: Program,
    weights: Weights,
    images: Float[Tensor, "b c h w"] | Float[Tensor, "n b c h w"],
    tanh: Bool[Tensor, " n"] | None = None,
    dropout: Sequence[Float[Tensor, "n b f"]] = (),
    running: Weights | None = None,
) -> Float[Tensor, "n b k"]:
    """Return the outputs of n networks: on the same images, or on images of each one's own.

    tanh: the networks whose ReLUs are replaced by tanh. In training: dropout, what the inputs of each dropout step are multiplied
    by; running, a dictionary for the running statistics that batch norms have after these images, by which they then normalise.
    """
    for result in run_steps(program, weights, images, tanh, dropout, running):
        output = result
    return output


def run_steps(
    program: Program,
    weights: Weights,
    images: Float[Tensor, "b c h w"] | Float[Tensor, "n b c h w"],
    tanh: Bool[Tensor, " n"] | None = None,
    dropout: Sequence[Float[Tensor, "n b f"]] = (),
    running: Weights | None = None,
) -> Iterator[Tensor]:
    """Give the result of every step, as `run_stack` says, in the order of `operations`; each is kept while it is needed."""
    results: dict[int, Tensor] = {}
    masks = iter(dropout)
    for place, step in enumerate(program.steps):
        inputs = [results[i] for i in step.inputs]
        tensors = tensors_of(step, weights)
        match step.kind:
            case "input":
                y = own_order(images if images.dim() == 5 else images[None])
            case "constant":
                y = run_step(step, inputs, tensors).to(images)
            case "relu" if tanh is not None:
                y = _relu_or_tanh(inputs[0], tanh, program.may_overwrite(step.inputs[0]))
            case "dropout" if dropout:
                y = inputs[0] * next(masks).view(inputs[0].shape)
            case "batch_norm" if running is not None:
                old = tensors["running_mean"], tensors["running_var"]
                now, after = batch_statistics(inputs[0], *old, step.options["momentum"])
                running.update({step.tensors[part]: value for part, value in after.items()})
                y = run_step(step, inputs, tensors | now)
            case _:
                y = run_step(step, inputs, tensors)
        results[place] = y
        for i in {i for i in step.inputs if program.last_reader[i] == place}:
            del results[i]
        del inputs
        yield y


def tensors_of(step: Step, weights: Weights) -> dict[str, Tensor]:
    """Return the tensors that a step uses, by their parts in it."""
    return {part: weights[name] for part, name in step.tensors.items()}


def _relu_or_tanh(x: Tensor, tanh: Bool[Tensor, " n"], overwrite: bool) -> Tensor:
    """Return tanh of the networks that are flagged and ReLU of the others, in the memory of x if it may be overwritten."""
    if tanh.all():
        return x.tanh_() if overwrite else x.tanh()
    if not tanh.any():
        return x.relu_() if overwrite else x.relu()
    kinds, counts = torch.unique_consecutive(
        tanh, return_counts=True
    )  # each of those that lie together once, not both of all
    in_place = overwrite and len(x) == len(tanh) and not x.requires_grad
    parts = x.expand(len(tanh), *x.shape[1:]).split(counts.tolist())
    results = [_relu_or_tanh(part, is_tanh[None], in_place) for part, is_tanh in zip(parts, kinds, strict=True)]
    return x if in_place else torch.cat(results)
