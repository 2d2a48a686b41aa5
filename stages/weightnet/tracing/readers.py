"""What is kept of each function of torch that a network may call: one reader for each, with the function's own arguments.

Python binds the arguments, so a call with an option that a reader does not name is refused.
"""

import math
from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from stages.weightnet.tracing.recording import NotFollowed, Operand, Recorder

REQUIRED = Parameter.empty


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    both = (value, value) if isinstance(value, int) else tuple(value)
    return both[0], both[-1]


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
