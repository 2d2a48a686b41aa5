"""The steps of a network, recorded while the user's own module runs: each function of torch that it calls is one.

Nothing is guessed. A function is read by a Python function of the same arguments, so an option that the reader does not name is
refused, and so is a function without a reader. What is read off is proved afterwards, by `program.trace`, on other weights and images.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from stages.common.stage import InputError, one_line
from stages.weightnet.tracing.operations import Step

# what does not change a result, and tells nothing of its values
SHAPES = {
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "element_size", "len"),
    *("get_device", "is_floating_point", "is_complex", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like"),
    *("is_tensor", "assert", "untyped_storage", "data_ptr", "storage_offset", "result_type", "get"),
}
ATTRIBUTES = {
    *("shape", "ndim", "dtype", "device", "is_cuda", "is_mps", "requires_grad", "layout", "is_sparse", "is_quantized"),
    *("itemsize", "nbytes", "is_leaf", "is_nested", "is_meta", "is_cpu", "names"),
}
SAME = {"contiguous", "clone", "detach", "detach_", "data", "cpu", "cuda", "requires_grad_", "alias"}
CASTS = {"to", "type", "float", "double", "type_as"}
LOOKS = {
    *("__bool__", "__float__", "__int__", "__index__", "__array__", "__contains__"),
    *("item", "tolist", "numpy", "nonzero", "is_nonzero", "equal", "allclose"),
}
# refused by their own names, before a function inside them is
UNSUPPORTED = (nn.EmbeddingBag,)


def plain(error: BaseException) -> str:
    """Return an error's message on one line, without colours of a terminal and addresses of objects."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", one_line(error))
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


class NotFollowed(Exception):
    """A step that is not understood; its message says why."""


@dataclass(frozen=True)
class Batch:
    """Where the images of a batch lie in a tensor: along an axis, or nowhere, if it is the same for all.

    parts: images were cut into so many along that axis (the windows of an image), which are the first axis of a step's result.
    """

    axis: int | None = 0
    parts: int = 1


ALONG_ROWS = Batch()
NOWHERE = Batch(None)


@dataclass(frozen=True)
class Operand:
    """A tensor that a step is given: a result (its place), a tensor of the network (its name), or else a constant."""

    tensor: Tensor
    shape: tuple[int, ...]  # with the batch
    place: int | None = None
    name: str | None = None
    batch: Batch = ALONG_ROWS

    @property
    def dims(self) -> int:
        """Axes of one image."""
        return len(self.shape) - (self.batch.axis is not None) + (self.batch.parts > 1)

    def axis(self, dim: int) -> int:
        """Return an axis of an image from that of a batch."""
        dim = dim + len(self.shape) if dim < 0 else dim
        if self.batch.axis is None:
            return dim
        if dim == self.batch.axis:
            raise NotFollowed("it acts across the images of a batch")
        return dim - (dim > self.batch.axis) + (self.batch.parts > 1)

    @property
    def plain(self) -> bool:
        """Whether it is a batch of images as layers of images expect them."""
        return self.batch == ALONG_ROWS


class Recorder(TorchFunctionMode):
    """While it is entered, what a module computes on `images` becomes steps.

    state: the tensors of the network by name; readers: what is kept of each function; watch: is told every step and its result.
    """

    def __init__(
        self,
        model: nn.Module,
        state: dict[str, Tensor],
        images: Tensor,
        readers: Mapping[str, Callable[..., None]],
        watch: Callable[[Step, Tensor], None],
    ) -> None:
        super().__init__()
        self.readers = readers
        self.model, self.state, self.batch, self.watch = model, state, len(images), watch
        self.steps: list[Step] = []
        self.path: list[str] = []  # the names of the modules that are running, one inside the other
        self.hooks: list[RemovableHandle] = []
        self.places = WeakTensorKeyDictionary()  # of each result: its step, its version when it was made, its batch
        self.parameters: dict[str, int] = {}  # the steps of tensors that are used by themselves
        self.whole: dict[str, list[Any]] = {}  # tensors of whole numbers that are read
        self.names = WeakTensorKeyDictionary()
        self.others = WeakTensorKeyDictionary()  # that a file may hold with other values than those of a new module
        for name, tensor in state.items():
            (self.names if tensor.is_floating_point() else self.others).setdefault(tensor, name)
        self.function = "input"
        self.add("input", [], images, batch=ALONG_ROWS)

    def __enter__(self) -> "Recorder":
        for name, module in self.model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
                self.hooks.append(module.register_forward_pre_hook(partial(self._enter, name)))
                self.hooks.append(module.register_forward_hook(self._leave))
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def _enter(self, name: str, module: nn.Module, _inputs: object) -> None:
        if isinstance(module, UNSUPPORTED):
            raise InputError(f"step {name or 'of the network'}: {type(module).__name__}, which is not supported")
        self.path.append(name)

    def _leave(self, *_: object) -> None:
        self.path.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        args = (kwargs.pop("input"), *args) if "input" in kwargs else args
        name = func.__name__
        if name == "__get__":
            name = func.__self__.__name__
            if name in ATTRIBUTES:
                return func(*args, **kwargs)
        looks = name in LOOKS
        name = name if name in SAME else name.strip("_")
        tensors = list(_tensors((args, kwargs)))
        if name in SHAPES or not any(t in self.places or t in self.names or t in self.others for t in tensors):
            return func(*args, **kwargs)
        self.function = name
        try:
            for other in (self.others[t] for t in tensors if t in self.others):
                self.whole[other] = self.state[other].tolist()
            if not any(t in self.places or t in self.names for t in tensors):
                return func(*args, **kwargs)
            if looks:
                raise NotFollowed("what forward does must not depend on the values of an image")
            return self.follow(name, func, args, kwargs)
        except NotFollowed as error:
            raise InputError(f"step {self.where}: {error}") from None

    def follow(self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a function gives for tensors that are followed, and note it; NotFollowed if that cannot be."""
        operands, named = _map(self.operand, args), _map(self.operand, kwargs)
        if name in CASTS and isinstance(args[0], Tensor):  # this run is in float64 throughout
            result = func(*args, **kwargs)
            if args[0] not in self.places and args[0] not in self.names:  # a constant, as a result is
                return result
            if result.dtype not in (torch.float32, torch.float64):
                raise NotFollowed("a change to another precision is not supported")
            return args[0]
        reader = self.readers.get(name)
        if reader is None and name not in SAME:
            raise NotFollowed(f"{name}, which is not supported")
        result = func(*args, **kwargs)
        named.pop("inplace", None)  # what it means is seen from the result
        first = operands[0]
        if name in SAME and isinstance(first, Operand):
            if first.name is not None:
                self.names[result] = first.name
            else:
                self.same(first, result)
            return result
        try:
            reader(self, result, *operands, **named)
        except TypeError as error:  # Python binds the arguments: one that the reader lacks is an option
            raise NotFollowed(f"it is called in a way that is not supported ({plain(error)})") from None
        return result

    def operand(self, tensor: Tensor) -> Operand:
        """Return what a tensor is; NotFollowed if something else has written over it."""
        shape = tuple(tensor.shape)
        if tensor in self.places:
            place, version, batch = self.places[tensor]
            if version != tensor._version:
                raise NotFollowed("it reads what was changed in place since, through another view of it")
            return Operand(tensor, shape, place=place, batch=batch)
        if tensor in self.names:
            return Operand(tensor, shape, name=self.names[tensor], batch=NOWHERE)
        given = tensor.dim() > 1 and len(tensor) == self.batch and tensor.stride(0) == 0  # expanded: to each image
        return Operand(tensor, shape, batch=ALONG_ROWS if given else NOWHERE)

    def same(self, operand: Operand, result: Tensor) -> None:
        """Note that a result is an earlier one."""
        self.places[result] = (self.source(operand), result._version, operand.batch)

    @property
    def where(self) -> str:
        """The step that is recorded, for people: its place in the network and its function."""
        return f"{self.path[-1]} ({self.function})" if self.path and self.path[-1] else self.function

    def add(
        self,
        kind: str,
        inputs: Sequence[Operand | int],
        result: Tensor,
        options: dict[str, Any] | None = None,
        tensors: dict[str, str] | None = None,
        batch: Batch | None = None,
        name: str | None = None,
    ) -> Operand:
        """Note a step and return its result.

        batch: where its images lie, if not as in the first that is read; name: the layer's, if it is not that of its tensors.
        """
        if not isinstance(result, Tensor):
            raise NotFollowed("it gives several results, which is not supported")
        if not result.is_floating_point():
            raise NotFollowed("its results are no real numbers")
        batch = batch or next(i.batch for i in inputs if isinstance(i, Operand))
        places = tuple(i if isinstance(i, int) else self.source(i) for i in inputs)
        name = name or (self.where if not tensors else _layer(next(iter(tensors.values()))))
        images = self.by_image(result, batch)
        place = self.append(Step(kind, name, places, tuple(images.shape[1:]), options or {}, tensors or {}))
        self.places[result] = (place, result._version, batch)
        self.watch(self.steps[place], images)
        return Operand(result, tuple(result.shape), place=place, batch=batch)

    def by_image(self, result: Tensor, batch: Batch) -> Tensor:
        """Return a result with the images of the batch first, and then their parts; of what all share, one."""
        if batch.axis is None:
            return result[None]
        if result.shape[batch.axis] != self.batch * batch.parts:
            raise NotFollowed("images of a batch are mixed")
        rows = result.movedim(batch.axis, 0)
        return rows.unflatten(0, (self.batch, batch.parts)) if batch.parts > 1 else rows

    def append(self, step: Step) -> int:
        """Add a step and return its place."""
        self.steps.append(step)
        return len(self.steps) - 1

    def source(self, operand: Operand) -> int:
        """Return where a result is; a tensor of the network becomes a step, and so does a constant."""
        if operand.place is not None:
            return operand.place
        if operand.name is None:
            if operand.batch.axis == 0:
                operand = Operand(operand.tensor[0], operand.shape[1:], batch=NOWHERE)
            elif operand.shape[:1] == (self.batch,) and (operand.tensor != operand.tensor[:1]).any():
                raise NotFollowed(
                    "it reads what was made outside of torch's functions, such as by TorchScript or numpy"
                )
            value = operand.tensor.double().tolist()
            return self.append(Step("constant", self.where, (), operand.shape, {"value": value}))
        key = f"{operand.name} {operand.shape}"
        if key not in self.parameters:
            tensors = {"value": operand.name}
            self.parameters[key] = self.append(Step("parameter", operand.name, (), operand.shape, {}, tensors))
        return self.parameters[key]

    def place(self, operand: "Operand | float", batch: Batch, dims: int) -> int:
        """Return where a value is that is broadcast over results of so many axes, whose images lie as `batch` says."""
        if not isinstance(operand, Operand):
            return self.append(Step("constant", self.where, (), (), {"value": float(operand)}))
        if operand.batch.axis is not None:
            if operand.batch != batch or len(operand.shape) != dims:
                raise NotFollowed("images of a batch are mixed")
            return self.source(operand)
        along = None if batch.axis is None else batch.axis - (dims - len(operand.shape))
        if along is None or along < 0 or (batch.parts > 1 and along == 0 and operand.shape[0] == 1):
            return self.source(operand)
        if operand.place is None and operand.name is None:
            return self.source(self.shared(operand, along, batch))
        if operand.shape[along] != 1:
            raise NotFollowed("it reads a tensor that has more axes than its image")
        value = operand.tensor.detach().squeeze(along)
        place = self.source(operand)
        return self.add("reshape", [place], value.unsqueeze(0) if batch.parts > 1 else value, batch=NOWHERE).place

    def shared(self, operand: Operand, along: int, batch: Batch) -> Operand:
        """Return a constant without the axis along which it has a value for each image, which must be the same."""
        value = operand.tensor.movedim(along, 0)
        if batch.parts > 1:  # parts are the first axis of what an image has
            value = value[None] if len(value) == 1 else value.unflatten(0, (self.batch, batch.parts))
        if (value != value[:1]).any():
            raise NotFollowed("it reads a tensor that no step gave which can be followed")
        value = value[0]
        return Operand(value, tuple(value.shape), batch=NOWHERE)

    def made_of(self, operand: Operand) -> str:
        """Return the name of the first tensor of the network that a result is made of."""
        places, names = [self.source(operand)], []
        while places:
            step = self.steps[places.pop()]
            names += step.tensors.values()
            places += step.inputs
        return min(names)

    def weights(self, **tensors: "Operand | None") -> dict[str, str]:
        """Return the names of a layer's tensors, which must be the network's own as they are."""
        for part, operand in tensors.items():
            if operand is not None and operand.name is None:
                raise NotFollowed(
                    f"its {part} is none of the network's tensors, but made of others: "
                    "take weight norms and the like off before you save it"
                )
        return {part: operand.name for part, operand in tensors.items() if operand is not None}


def _layer(tensor: str) -> str:
    """Return the name of the layer that a tensor belongs to."""
    layer, _, part = tensor.rpartition(".")
    return layer if layer and part in ("weight", "bias", "running_mean") else tensor


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _map(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return nested arguments with a function applied to their tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(_map(function, item) for item in value)
    if isinstance(value, dict):
        return {key: _map(function, item) for key, item in value.items()}
    return value
