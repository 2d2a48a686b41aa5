"""The steps of a network, recorded while the user's own module runs: each function of torch that it calls is one.

Nothing is guessed. A function is read by a Python function of the same arguments, so an option that the reader does not name is
refused, and so is a function without a reader. What is read off is proved afterwards, by `program.trace`, on other weights and images.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from stages.common.command import InputError, one_line
from stages.weightnet.operations import Step

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
UNSUPPORTED = (
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.Transformer,
    nn.Embedding,
)  # before their inside is read
VIEWS = {
    "view",
    "reshape",
    "unsqueeze",
    "squeeze",
    "getitem",
    "flatten",
}  # of a tensor of the network: its numbers in their order


def plain(error: BaseException) -> str:
    """Return an error's message on one line, without colours of a terminal and addresses of objects."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", one_line(error))
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


class NotFollowed(Exception):
    """A step that is not understood; its message says why."""


@dataclass(frozen=True)
class Operand:
    """A tensor that a step is given: a result (its place), a tensor of the network (its name), or else a constant."""

    tensor: Tensor
    shape: tuple[int, ...]  # with the batch
    place: int | None = None
    name: str | None = None

    @property
    def dims(self) -> int:
        """Axes of one image."""
        return len(self.shape) - 1


class Recorder(TorchFunctionMode):
    """While it is entered, what a module computes on `images` becomes steps.

    state: the tensors of the network by name; watch: is told the recorder and every result.
    """

    def __init__(
        self, model: nn.Module, state: dict[str, Tensor], images: Tensor, watch: Callable[[Step, Tensor], None]
    ) -> None:
        super().__init__()
        self.model, self.state, self.batch, self.watch = model, state, len(images), watch
        self.steps: list[Step] = []
        self.path: list[str] = []  # the names of the modules that are running, one inside the other
        self.hooks: list[RemovableHandle] = []
        self.places = WeakTensorKeyDictionary()  # of each result: its step, and its version when it was made
        self.names = WeakTensorKeyDictionary()
        for name, tensor in state.items():
            self.names.setdefault(tensor, name)
        self.function = "input"
        self.add("input", [], images)

    def __enter__(self) -> "Recorder":
        for name, module in self.model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
                self.hooks.append(module.register_forward_pre_hook(partial(self._enter, name)))
                self.hooks.append(module.register_forward_hook(self._leave))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def _enter(self, name: str, module: nn.Module, _inputs: Any) -> None:
        if isinstance(module, UNSUPPORTED):
            raise InputError(f"step {name or 'of the network'}: {type(module).__name__}, which is not supported")
        self.path.append(name)

    def _leave(self, *_: Any) -> None:
        self.path.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
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
        known = [t for t in _tensors((args, kwargs)) if t in self.places or t in self.names]
        if not known or name in SHAPES:
            return func(*args, **kwargs)
        self.function = name
        try:
            if looks:
                raise NotFollowed("what forward does must not depend on the values of an image")
            return self.follow(name, func, args, kwargs)
        except NotFollowed as error:
            raise InputError(f"step {self.where}: {error}") from None

    def follow(self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a function gives for tensors that are followed, and note it; NotFollowed if that cannot be."""
        operands, named = _map(self.operand, args), _map(self.operand, kwargs)
        if name in CASTS and isinstance(args[0], Tensor):  # this run is in float64 throughout
            if func(*args, **kwargs).dtype not in (torch.float32, torch.float64):
                raise NotFollowed("a change to another precision is not supported")
            return args[0]
        reader = READERS.get(name)
        if reader is None and name not in SAME:
            raise NotFollowed(f"{name}, which is not supported")
        result = func(*args, **kwargs)
        named.pop("inplace", None)  # what it means is seen from the result
        first = operands[0]
        if isinstance(first, Operand) and first.name is not None and (name in VIEWS or name in SAME):
            return self.view_tensor(first, result)
        if all(tensor not in self.places for tensor in _tensors((args, kwargs))):
            if any(tensor not in self.names for tensor in _tensors((args, kwargs))):
                raise NotFollowed(
                    "it reads what was made outside of torch's functions, such as by TorchScript or numpy"
                )
            raise NotFollowed("tensors of the network are used in a way that cannot be followed")
        if name in SAME:
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
            place, version = self.places[tensor]
            if version != tensor._version:
                raise NotFollowed("it reads what was changed in place since, through another view of it")
            return Operand(tensor, shape, place=place)
        return Operand(tensor, shape, name=self.names.get(tensor))

    def view_tensor(self, operand: Operand, result: Tensor) -> Tensor:
        """Note that a tensor is one of the network's, in another shape."""
        if result.numel() != operand.tensor.numel():
            raise NotFollowed(f"a part of {operand.name} is used in a way that cannot be followed")
        self.names[result] = operand.name
        return result

    def same(self, operand: Operand, result: Tensor) -> None:
        """Note that a result is an earlier one."""
        self.places[result] = (operand.place, result._version)

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
    ) -> int:
        """Note a step whose result is that of a batch, and return its place."""
        if not isinstance(result, Tensor):
            raise NotFollowed("it gives several results, which is not supported")
        if result.shape[:1] != (self.batch,):
            raise NotFollowed("images of a batch are mixed")
        if not result.is_floating_point():
            raise NotFollowed("its results are no real numbers")
        places = tuple(i if isinstance(i, int) else self.place(i, i.dims) for i in inputs)
        name = self.where if not tensors else _layer(next(iter(tensors.values())))
        step = Step(kind, name, places, tuple(result.shape[1:]), options or {}, tensors or {})
        place = self.append(step)
        self.places[result] = (place, result._version)
        self.watch(step, result)
        return place

    def append(self, step: Step) -> int:
        """Add a step and return its place."""
        self.steps.append(step)
        return len(self.steps) - 1

    def place(self, operand: "Operand | float", dims: int) -> int:
        """Return where a value is that is broadcast over images of so many axes; constants and tensors become steps."""
        if not isinstance(operand, Operand):
            return self.append(Step("constant", self.where, (), (), {"value": float(operand)}))
        if operand.place is not None:
            return operand.place
        value = operand.tensor
        if value.dim() == dims + 1:  # the axis of the batch
            if (value != value[:1]).any() or (operand.name is not None and len(value) > 1):
                raise NotFollowed("it reads a tensor that no step gave which can be followed")
            value = value[0]
        if value.dim() > dims:
            raise NotFollowed("it reads a tensor that has more axes than its image")
        if operand.name is not None:
            tensors = {"value": operand.name}
            return self.append(Step("parameter", operand.name, (), tuple(value.shape), {}, tensors))
        return self.append(Step("constant", self.where, (), tuple(value.shape), {"value": value.double().tolist()}))

    def weights(self, **tensors: "Operand | None") -> dict[str, str]:
        """Return the names of a layer's tensors, which must be the network's own as they are."""
        for part, operand in tensors.items():
            if operand is not None and operand.name is None:
                raise NotFollowed(
                    f"its {part} is none of the network's tensors, but made of others: "
                    "take weight norms and the like off before you save it"
                )
            if operand is not None and operand.shape != tuple(self.state[operand.name].shape):
                raise NotFollowed(f"its {part} is {operand.name} in another shape, which is not supported")
        return {part: operand.name for part, operand in tensors.items() if operand is not None}


REQUIRED = Parameter.empty


def _layer(tensor: str) -> str:
    """Return the name of the layer that a tensor belongs to."""
    layer, _, part = tensor.rpartition(".")
    return layer if layer and part in ("weight", "bias", "running_mean") else tensor


def _tensors(value: Any) -> Iterator[Tensor]:
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


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    both = (value, value) if isinstance(value, int) else tuple(value)
    return both if len(both) == 2 else both * 2


def _axis(dim: int, dims: int) -> int:
    """Return an axis of an image from that of a batch."""
    axis = (dim + dims + 1 if dim < 0 else dim) - 1
    if axis < 0:
        raise NotFollowed("it acts across the images of a batch")
    return axis


Size = int | Sequence[int]
Layer = Operand | None  # a tensor of a layer, which it may lack


def read_conv(
    r: Recorder,
    y: Tensor,
    x: Operand,
    weight: Operand,
    bias: Layer = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> None:
    """torch.conv2d. Padding "same" is one pixel larger behind than before if its size is odd: that pixel is a step."""
    tensors, source = r.weights(weight=weight, bias=bias), x
    stride, dilation = _pair(stride), _pair(dilation)
    if isinstance(padding, str):
        taps = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        padding = [tap // 2 for tap in taps]
        if any(tap % 2 for tap in taps):
            border = [0, taps[1] % 2, 0, taps[0] % 2]
            source = r.add("pad", [x], pad(x.tensor, border), {"pad": border, "mode": "constant", "value": 0.0})
    options = {"stride": stride, "padding": _pair(padding), "groups": groups}
    r.add("conv", [source], y, options | ({"dilation": dilation} if dilation != (1, 1) else {}), tensors)


def read_linear(r: Recorder, y: Tensor, x: Operand, weight: Operand, bias: Layer = None) -> None:
    """torch.nn.functional.linear."""
    r.add("linear", [x], y, {}, r.weights(weight=weight, bias=bias))


def read_batch_norm(
    r: Recorder,
    y: Tensor,
    x: Operand,
    running_mean: Layer,
    running_var: Layer,
    weight: Layer = None,
    bias: Layer = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> None:
    """torch.nn.functional.batch_norm."""
    if training or running_mean is None:
        raise NotFollowed("a norm without running statistics mixes the images of a batch")
    tensors = r.weights(running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    r.add("batch_norm", [x], y, {"eps": eps, "momentum": momentum}, tensors)


def read_group_norm(
    r: Recorder, y: Tensor, x: Operand, num_groups: int, weight: Layer = None, bias: Layer = None, eps: float = 1e-5
) -> None:
    """torch.nn.functional.group_norm."""
    r.add("group_norm", [x], y, {"groups": num_groups, "eps": eps}, r.weights(weight=weight, bias=bias))


def read_instance_norm(
    r: Recorder,
    y: Tensor,
    x: Operand,
    running_mean: Layer = None,
    running_var: Layer = None,
    weight: Layer = None,
    bias: Layer = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> None:
    """torch.nn.functional.instance_norm."""
    if use_input_stats:
        r.add("instance_norm", [x], y, {"eps": eps}, r.weights(weight=weight, bias=bias))
    else:
        read_batch_norm(r, y, x, running_mean, running_var, weight, bias, False, momentum, eps)


def read_layer_norm(
    r: Recorder,
    y: Tensor,
    x: Operand,
    normalized_shape: Sequence[int],
    weight: Layer = None,
    bias: Layer = None,
    eps: float = 1e-5,
) -> None:
    """torch.nn.functional.layer_norm."""
    options = {"normalized_shape": tuple(normalized_shape), "eps": eps}
    r.add("layer_norm", [x], y, options, r.weights(weight=weight, bias=bias))


def read_prelu(r: Recorder, y: Tensor, x: Operand, weight: Operand) -> None:
    """torch.prelu."""
    r.add("prelu", [x], y, {}, r.weights(weight=weight))


def read_dropout(r: Recorder, y: Tensor, x: Operand, p: float = 0.5, training: bool = True, *_: bool) -> None:
    """torch.nn.functional.dropout: nothing is dropped when a network is used."""
    if training and p > 0:
        raise NotFollowed("it drops values at random even in eval mode: pass training=self.training, or use nn.Dropout")
    if r.function == "dropout":
        r.add("dropout", [x], y)
    else:
        r.same(x, y)


def read_reshape(r: Recorder, y: Tensor, x: Operand, *_: Any, **__: Any) -> None:
    """view, reshape, flatten, squeeze, unsqueeze, unflatten: the shape of the result says all."""
    if math.prod(y.shape[1:]) != math.prod(x.shape[1:]):
        raise NotFollowed("images of a batch are mixed")
    if tuple(y.shape) == x.shape:
        r.same(x, y)
    else:
        r.add("flatten" if y.dim() == 2 else "reshape", [x], y)


def read_mean(r: Recorder, y: Tensor, x: Operand, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> None:
    """torch.mean, sum, amax and amin."""
    if dtype is not None:
        raise NotFollowed("another precision is not supported")
    if dim is None:
        raise NotFollowed("it acts across the images of a batch")
    dims = tuple(sorted(_axis(d, x.dims) for d in ([dim] if isinstance(dim, int) else dim)))
    if r.function == "mean" and dims == (1, 2) and x.dims == 3 and not keepdim:
        r.add("mean", [x], y)
    else:
        r.add("reduction", [x], y, {"of": r.function, "dims": dims, "keepdim": keepdim})


def read_max(
    r: Recorder, y: Any, x: Operand, other: Any = None, keepdim: bool = False, *, dim: int | None = None
) -> None:
    """torch.max and min: of two results, or along an axis, of which the indices are not followed."""
    if isinstance(other, Operand):
        read_arithmetic(r, y, x, other)
        return
    axis = other if dim is None else dim
    if axis is None:
        raise NotFollowed("it acts across the images of a batch")
    options = {"of": f"a{r.function}", "dims": (_axis(axis, x.dims),), "keepdim": keepdim}
    r.add("reduction", [x], y[0], options)


def read_repeat(r: Recorder, y: Tensor, x: Operand, *sizes: Any) -> None:
    """torch.Tensor.repeat."""
    sizes = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    if sizes[0] != 1 or len(sizes) != len(x.shape):
        raise NotFollowed("images of a batch are repeated")
    r.add("repeat", [x], y, {"sizes": tuple(sizes[1:])})


def read_cat(r: Recorder, y: Tensor, tensors: Sequence[Operand], dim: int = 0) -> None:
    """torch.cat."""
    axis = _axis(dim, y.dim() - 1)
    r.add("cat", [r.place(part, y.dim() - 1) for part in tensors], y, {"dim": axis})


def read_arithmetic(r: Recorder, y: Tensor, x: Operand, other, *, alpha=1, rounding_mode=None, out=None):
    """Sums, differences, products and quotients of results, tensors of the network, and constants."""
    if rounding_mode is not None or out is not None:
        raise NotFollowed("rounding and out are not supported")
    kind, swapped = OPERATORS[r.function]
    dims = y.dim() - 1
    for operand in (x, other):
        if isinstance(operand, Operand) and operand.place is not None and operand.dims != dims:
            raise NotFollowed("images of a batch are mixed")
    pair = [r.place(operand, dims) for operand in (x, other)]
    options = {"alpha": alpha} if alpha != 1 else {}
    r.add(kind, pair[::-1] if swapped else pair, y, options)


def read_pow(r: Recorder, y: Tensor, x: Operand, exponent) -> None:
    """torch.pow with a number."""
    if not isinstance(x, Operand) or isinstance(exponent, Operand):
        raise NotFollowed("only powers of a result by a number are supported")
    r.add("pow", [x], y, {"exponent": exponent})


def read_getitem(r: Recorder, y: Tensor, x: Operand, index: Any) -> None:
    """Slices and single indices of an image."""
    index = index if isinstance(index, tuple) else (index,)
    if any(not (item is None or item is ... or isinstance(item, (int, slice))) for item in index):
        raise NotFollowed("only slices and numbers can be indices")
    used = sum(item is not None and item is not ... for item in index)
    if ... in index:
        at = index.index(...)
        index = index[:at] + (slice(None),) * (len(x.shape) - used) + index[at + 1 :]
    if not index or index[0] != slice(None):
        raise NotFollowed("single images of a batch are taken")
    r.add("getitem", [x], y, {"index": index[1:]})


def read_narrow(r: Recorder, y: Tensor, x: Operand, dim: int, start: int, length: int) -> None:
    """torch.narrow."""
    axis = _axis(dim, x.dims)
    r.add("getitem", [x], y, {"index": (*[slice(None)] * axis, slice(start, start + length))})


def read_select(r: Recorder, y: Tensor, x: Operand, dim: int, index: int) -> None:
    """torch.select."""
    r.add("getitem", [x], y, {"index": (*[slice(None)] * _axis(dim, x.dims), index)})


def read_split(r: Recorder, y: Tensor, x: Operand, _size: Any = None, dim: int = 0, **_: Any) -> None:
    """torch.split and chunk: their parts one after the other."""
    axis, start = _axis(dim, x.dims), 0
    for part in y:
        end = start + part.shape[axis + 1]
        r.add("getitem", [x], part, {"index": (*[slice(None)] * axis, slice(start, end))})
        start = end


def read_unbind(r: Recorder, y: Tensor, x: Operand, dim: int = 0) -> None:
    """torch.unbind."""
    for number, part in enumerate(y):
        r.add("getitem", [x], part, {"index": (*[slice(None)] * _axis(dim, x.dims), number)})


def read_permute(r: Recorder, y: Tensor, x: Operand, *dims: Any) -> None:
    """torch.permute."""
    dims = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    if dims[0] != 0:
        raise NotFollowed("the axis of the batch is moved")
    r.add("permute", [x], y, {"dims": tuple(_axis(dim, x.dims) for dim in dims[1:])})


def read_transpose(r: Recorder, y: Tensor, x: Operand, dim0: int, dim1: int) -> None:
    """torch.transpose."""
    dims = list(range(x.dims))
    a, b = _axis(dim0, x.dims), _axis(dim1, x.dims)
    dims[a], dims[b] = b, a
    r.add("permute", [x], y, {"dims": tuple(dims)})


def read_expand(r: Recorder, y: Tensor, x: Operand, *_: Any) -> None:
    """torch.expand and expand_as."""
    if tuple(y.shape) == x.shape:
        r.same(x, y)
    else:
        r.add("expand", [x], y)


def read_pad(r: Recorder, y: Tensor, x: Operand, pad: Sequence[int], mode: str = "constant", value: Any = None) -> None:
    """torch.nn.functional.pad."""
    if len(pad) > 2 * x.dims:
        raise NotFollowed("images of a batch are padded")
    r.add("pad", [x], y, {"pad": list(pad), "mode": mode, "value": value})


def read_softmax(
    r: Recorder, y: Tensor, x: Operand, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> None:
    """torch.softmax and log_softmax."""
    if dtype is not None:
        raise NotFollowed("another precision is not supported")
    if dim is None:
        dim = 0 if len(x.shape) in (1, 3) else 1  # torch's own rule
    r.add(r.function, [x], y, {"dim": _axis(dim, x.dims)})


def read_hardtanh(r: Recorder, y: Tensor, x: Operand, min_val: float = -1.0, max_val: float = 1.0, *_: bool) -> None:
    """torch.nn.functional.hardtanh, which ReLU6 is one of."""
    if (min_val, max_val) == (0.0, 6.0):
        r.add("relu6", [x], y)
    else:
        r.add("hardtanh", [x], y, {"min_val": min_val, "max_val": max_val})


def with_options(kind: str, **options: Any) -> Callable[..., None]:
    """Return the reader of a function that keeps all its arguments but the first; options: those, with their defaults."""
    names = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=value) for name, value in options.items()]
    signature = Signature([*names, Parameter("inplace", Parameter.POSITIONAL_OR_KEYWORD, default=False)])

    def read(r: Recorder, y: Tensor, x: Operand, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        r.add(kind, [x], y, {name: bound.arguments[name] for name in options})

    return read


OPERATORS = {  # function -> kind, and whether the operands are swapped
    **dict.fromkeys(("add", "radd", "iadd"), ("add", False)),
    **dict.fromkeys(("sub", "subtract", "isub"), ("sub", False)),
    **dict.fromkeys(("mul", "multiply", "rmul", "imul"), ("mul", False)),
    **dict.fromkeys(("div", "divide", "truediv", "true_divide", "itruediv", "idiv"), ("div", False)),
    **dict.fromkeys(("maximum", "max"), ("maximum", False)),
    **dict.fromkeys(("minimum", "min"), ("minimum", False)),
    "rsub": ("sub", True),
    **dict.fromkeys(("rdiv", "rtruediv"), ("div", True)),
}
READERS: dict[str, Callable[..., None]] = {
    **dict.fromkeys(OPERATORS, read_arithmetic),
    "conv2d": read_conv,
    "linear": read_linear,
    "batch_norm": read_batch_norm,
    "group_norm": read_group_norm,
    "instance_norm": read_instance_norm,
    "layer_norm": read_layer_norm,
    "prelu": read_prelu,
    "max_pool2d": with_options(
        "max_pool", kernel_size=REQUIRED, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
    ),
    "avg_pool2d": with_options(
        "avg_pool",
        **{"kernel_size": REQUIRED, "stride": None, "padding": 0, "ceil_mode": False},
        **{"count_include_pad": True, "divisor_override": None},
    ),
    "adaptive_avg_pool2d": with_options("adaptive_pool", output_size=REQUIRED),
    "adaptive_max_pool2d": with_options("adaptive_max_pool", output_size=REQUIRED, return_indices=False),
    "interpolate": with_options(
        "interpolate",
        **{"size": None, "scale_factor": None, "mode": "nearest", "align_corners": None},
        **{"recompute_scale_factor": None, "antialias": False},
    ),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"), read_dropout),
    **dict.fromkeys(("feature_dropout", "feature_alpha_dropout"), read_dropout),
    **dict.fromkeys(("view", "reshape", "flatten", "squeeze", "unsqueeze", "unflatten", "view_as"), read_reshape),
    **dict.fromkeys(("reshape_as", "ravel"), read_reshape),
    **dict.fromkeys(("mean", "sum", "amax", "amin"), read_mean),
    **dict.fromkeys(("max", "min"), read_max),
    "repeat": read_repeat,
    **dict.fromkeys(("cat", "concat", "concatenate"), read_cat),
    "pow": read_pow,
    "getitem": read_getitem,
    "narrow": read_narrow,
    "select": read_select,
    **dict.fromkeys(("split", "chunk", "tensor_split", "split_with_sizes"), read_split),
    "unbind": read_unbind,
    "permute": read_permute,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), read_transpose),
    **dict.fromkeys(("expand", "expand_as"), read_expand),
    "pad": read_pad,
    **dict.fromkeys(("softmax", "log_softmax"), read_softmax),
    "hardtanh": read_hardtanh,
    **{
        name: with_options(name)
        for name in (
            *("relu", "relu6", "tanh", "sigmoid", "silu", "hardswish", "hardsigmoid", "softsign", "mish", "selu"),
            *("tanhshrink", "abs", "neg", "exp", "log", "sqrt", "square", "sin", "cos"),
        )
    },
    **dict.fromkeys(("log_sigmoid", "logsigmoid"), with_options("logsigmoid")),
    "gelu": with_options("gelu", approximate="none"),
    "elu": with_options("elu", alpha=1.0),
    "celu": with_options("celu", alpha=1.0),
    "leaky_relu": with_options("leaky_relu", negative_slope=0.01),
    "softplus": with_options("softplus", beta=1.0, threshold=20.0),
    "threshold": with_options("threshold", threshold=REQUIRED, value=REQUIRED),
    "softshrink": with_options("softshrink", lambd=0.5),
    "hardshrink": with_options("hardshrink", lambd=0.5),
    **dict.fromkeys(("clamp", "clip"), with_options("clamp", min=None, max=None)),
    "clamp_min": with_options("clamp", min=REQUIRED),
    "clamp_max": with_options("clamp", max=REQUIRED),
}
