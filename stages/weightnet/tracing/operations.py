"""What each kind of step computes, for n networks at once.

Axes: n networks, b images, c channels, h and w pixels, f features. Results are [n, b, h, w, c] of images and [n, b, ...] of all
else, with n = 1 as long as all networks share them. `torch_order` and `own_order` lead to and from [n, b, c, h, w].
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from stages.weightnet.tracing.convolution import convolve


@dataclass(frozen=True)
class Step:
    """One operation of a network.

    name: of the layer, or where in the network it is; inputs: indices of the steps that it reads; shape: of its result for one
    image; tensors: the names of those that it uses, by their parts in it.
    """

    kind: str
    name: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)


POINTWISE: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "logsigmoid": F.logsigmoid,
    "mish": F.mish,
    "selu": F.selu,
    "celu": F.celu,
    "threshold": F.threshold,
    "tanhshrink": F.tanhshrink,
    "softshrink": F.softshrink,
    "hardshrink": F.hardshrink,
    "clamp": torch.clamp,
    "abs": torch.abs,
    "neg": torch.neg,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "sin": torch.sin,
    "cos": torch.cos,
    "pow": torch.pow,
    "rsqrt": torch.rsqrt,
    "erf": torch.erf,
    "reciprocal": torch.reciprocal,
}
ARITHMETIC: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}
REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "amax": torch.amax,
    "amin": torch.amin,
    "norm": torch.linalg.vector_norm,
    "std": torch.std,
    "var": torch.var,
}
POOLS: dict[str, Callable[..., Tensor]] = {
    "max_pool": F.max_pool2d,
    "avg_pool": F.avg_pool2d,
    "adaptive_pool": F.adaptive_avg_pool2d,
    "adaptive_max_pool": F.adaptive_max_pool2d,
    "interpolate": F.interpolate,
}
CHANNELS_LAST = {0: 4, 1: 2, 2: 3}  # where an axis of an image lies in [n, b, h, w, c]


def torch_order(x: Float[Tensor, "n b ..."]) -> Float[Tensor, "n b ..."]:
    """Return results in the order of torch's axes: channels before pixels."""
    return x.permute(0, 1, 4, 2, 3) if x.dim() == 5 else x


def own_order(x: Float[Tensor, "n b ..."]) -> Float[Tensor, "n b ..."]:
    """Return results in torch's order in ours: channels after pixels."""
    return x.permute(0, 1, 3, 4, 2) if x.dim() == 5 else x


def by_network(function: Callable[..., Tensor], x: Float[Tensor, "n b ..."], *args: Any, **options: Any) -> Tensor:
    """Return what a function of torch, for a batch of images, gives for those of all networks."""
    y = function(torch_order(x).flatten(0, 1), *args, **options)
    return own_order(y.unflatten(0, x.shape[:2]))


def over_channels(vector: Float[Tensor, "n c"], x: Float[Tensor, "n b ..."]) -> Tensor:
    """Return one number for each channel in the shape in which it is broadcast over results."""
    if x.dim() in (3, 5):  # channels are the last axis
        return vector.view(len(vector), *[1] * (x.dim() - 2), -1)
    return vector.view(len(vector), 1, -1, *[1] * (x.dim() - 3))


def along_axis(vector: Float[Tensor, "n c"], x: Float[Tensor, "n b ..."], axis: int) -> Tensor:
    """Return one number for each place along an axis of images in the shape in which it is broadcast over results."""
    shape = [1] * x.dim()
    shape[CHANNELS_LAST[axis] if x.dim() == 5 else axis + 2] = -1
    return vector.view(len(vector), *shape[1:])


def affine(y: Tensor, weight: Float[Tensor, "n c"] | None, bias: Float[Tensor, "n c"] | None) -> Tensor:
    """Return normalised results times the weight of their channel plus its bias."""
    if weight is None:
        return y
    if bias is None:
        return y * over_channels(weight, y)
    return torch.addcmul(over_channels(bias, y), y, over_channels(weight, y))


def run_conv(step: Step, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a convolution."""
    y = convolve(x, weight, **step.options)
    if bias is not None:
        y += bias[:, None, None, None]
    return y


def run_conv_of(
    step: Step, x: Tensor, kernel: Float[Tensor, "n 1 o c k k"], bias: Float[Tensor, "n o"] | None = None
) -> Tensor:
    """Return a convolution with a kernel that is the result of a step."""
    return run_conv(step, x, kernel[:, 0], bias)


def run_linear_of(
    step: Step, x: Tensor, matrix: Float[Tensor, "n 1 k f"], bias: Float[Tensor, "n k"] | None = None
) -> Tensor:
    """Return a linear map of the last axis by a matrix that is the result of a step."""
    return run_linear(step, x, matrix[:, 0], bias)


def run_filter(step: Step, x: Float[Tensor, "n b h w c"]) -> Float[Tensor, "n b o p c"]:
    """Return a convolution of every channel by itself with kernels that are constants."""
    options = {key: value for key, value in step.options.items() if key != "kernel"}
    return by_network(F.conv2d, x, torch.tensor(step.options["kernel"]).to(x), **options)


def run_conv1d(step: Step, x: Float[Tensor, "n b c t"], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a convolution along one axis."""
    y = torch.stack([F.conv1d(x[min(i, len(x) - 1)], one, None, **step.options) for i, one in enumerate(weight)])
    return y if bias is None else y + bias[:, None, :, None]


def run_linear(_step: Step, x: Tensor, weight: Float[Tensor, "n k f"], bias: Tensor | None = None) -> Tensor:
    """Return a linear map of the last axis."""
    rows = torch_order(x)
    y = torch.matmul(rows if x.dim() == 3 else rows.flatten(1, -2), weight.mT)
    if bias is not None:
        y = y + bias[:, None]
    return y if x.dim() == 3 else own_order(y.unflatten(1, rows.shape[1:-1]))


def run_batch_norm(
    step: Step,
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return results normalised by a mean and a variance of each channel."""
    scale = torch.rsqrt(running_var + step.options["eps"])
    scale = scale if weight is None else weight * scale
    if axis := step.options.get("axis", 0):
        mean, scale, bias = (t if t is None else along_axis(t, x, axis) for t in (running_mean, scale, bias))
        y = (x - mean) * scale
        return y if bias is None else y + bias
    y = (x - over_channels(running_mean, x)) * over_channels(scale, x)
    return y if bias is None else y + over_channels(bias, x)


def run_group_norm(step: Step, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Return results normalised over pixels and the channels of a group."""
    groups, eps = step.options["groups"], step.options["eps"]
    if x.dim() == 5:
        grouped = x.unflatten(4, (groups, -1)).movedim(4, 2)
        y = F.layer_norm(grouped, grouped.shape[3:], eps=eps).movedim(2, 4).flatten(4)
    else:
        y = by_network(F.group_norm, x, groups, eps=eps)
    return affine(y, weight, bias)


def run_instance_norm(step: Step, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Return results normalised over the pixels of each channel."""
    return affine(by_network(F.instance_norm, x, eps=step.options["eps"]), weight, bias)


def run_layer_norm(step: Step, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Return results normalised over their last axes, which the weights have too."""
    x = torch_order(x)
    shape = step.options["normalized_shape"]
    y = F.layer_norm(x, shape, eps=step.options["eps"])
    for tensor, apply in ((weight, torch.mul), (bias, torch.add)):
        if tensor is not None:
            y = apply(y, tensor.view(len(tensor), *[1] * (x.dim() - 1 - len(shape)), *shape))
    return own_order(y)


def run_rms_norm(step: Step, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return results over the root of their mean square over their last axes, which the weights have too."""
    x = torch_order(x)
    shape = step.options["normalized_shape"]
    y = F.rms_norm(x, shape, eps=step.options["eps"])
    return own_order(y if weight is None else y * weight.view(len(weight), *[1] * (x.dim() - 1 - len(shape)), *shape))


def run_contract(step: Step, x: Tensor, y: Tensor) -> Tensor:
    """Return a sum of products."""
    first, second = step.options["of"]
    return own_order(torch.einsum(f"NB{first},NB{second}->NB{step.options['to']}", torch_order(x), torch_order(y)))


def run_index(step: Step, x: Tensor) -> Tensor:
    """Return what lies at some places of an axis."""
    places = torch.tensor(step.options["places"], device=x.device)
    return own_order(torch_order(x).index_select(step.options["axis"] + 2, places))


def run_roll(step: Step, x: Tensor) -> Tensor:
    """Return images shifted around axes."""
    return own_order(torch_order(x).roll(step.options["shifts"], [dim + 2 for dim in step.options["dims"]]))


def run_prelu(_step: Step, x: Tensor, weight: Float[Tensor, "n c"]) -> Tensor:
    """Return values where they are positive, and times a learned slope where they are not."""
    slope = weight.view(-1, *[1] * (x.dim() - 1)) if weight.shape[1] == 1 else over_channels(weight, x)
    return torch.where(x > 0, x, slope * x)


def run_mean(_step: Step, x: Float[Tensor, "n b h w c"]) -> Float[Tensor, "n b c"]:
    """Return means over all pixels."""
    return x.mean((2, 3))


def run_reduction(step: Step, x: Tensor) -> Tensor:
    """Return a mean, sum or extreme over some axes."""
    dims = [dim + 2 for dim in step.options["dims"]]
    options = {name: value for name, value in step.options.items() if name not in ("of", "dims")}
    return own_order(REDUCTIONS[step.options["of"]](torch_order(x), dim=dims, **options))


def run_flatten(_step: Step, x: Tensor) -> Float[Tensor, "n b f"]:
    """Return all numbers of an image in the order of torch's images: channel by channel."""
    return x.movedim(4, 2).flatten(2) if x.dim() == 5 else x.flatten(2)


def run_reshape(step: Step, x: Tensor) -> Tensor:
    """Return the numbers of an image in another shape."""
    return own_order(torch_order(x).reshape(*x.shape[:2], *step.shape))


def run_getitem(step: Step, x: Tensor) -> Tensor:
    """Return a part of an image."""
    return own_order(torch_order(x)[(slice(None), slice(None), *step.options["index"])])


def run_permute(step: Step, x: Tensor) -> Tensor:
    """Return an image with its axes in another order."""
    return own_order(torch_order(x).permute(0, 1, *[dim + 2 for dim in step.options["dims"]]))


def run_expand(step: Step, x: Tensor) -> Tensor:
    """Return an image repeated along axes of size one."""
    x = torch_order(x)
    x = x.view(*x.shape[:2], *[1] * (len(step.shape) + 2 - x.dim()), *x.shape[2:])
    return own_order(x.expand(*x.shape[:2], *step.shape))


def run_repeat(step: Step, x: Tensor) -> Tensor:
    """Return an image several times along its axes."""
    return own_order(torch_order(x).repeat(1, 1, *step.options["sizes"]))


def run_pad(step: Step, x: Tensor) -> Tensor:
    """Return an image with a border."""
    return by_network(F.pad, x, **step.options)


def run_softmax(step: Step, x: Tensor) -> Tensor:
    """Return a softmax, or its logarithm, along an axis."""
    function = F.softmax if step.kind == "softmax" else F.log_softmax
    return own_order(function(torch_order(x), dim=step.options["dim"] + 2))


def run_pool(step: Step, x: Float[Tensor, "n b h w c"]) -> Float[Tensor, "n b o p c"]:
    """Return what a pooling makes of each channel."""
    return by_network(POOLS[step.kind], x, **step.options)


def run_arithmetic(step: Step, x: Tensor, y: Tensor) -> Tensor:
    """Return a sum, difference, product or quotient, broadcast over images, channels and pixels."""
    function = ARITHMETIC[step.kind]
    if x.dim() == y.dim():
        return function(x, y, **step.options)
    x, y = torch_order(x), torch_order(y)
    dims = max(x.dim(), y.dim())
    x, y = (t.view(*t.shape[:2], *[1] * (dims - t.dim()), *t.shape[2:]) for t in (x, y))
    return own_order(function(x, y, **step.options))


def run_cat(step: Step, *parts: Tensor) -> Tensor:
    """Return results one after the other along an axis."""
    dim = step.options["dim"]
    n, b = (max(part.shape[axis] for part in parts) for axis in (0, 1))
    if any(part.shape[:2] != (n, b) for part in parts):  # what networks share beside what they do not
        parts = tuple(part.expand(n, b, *part.shape[2:]) for part in parts)
    return torch.cat(parts, CHANNELS_LAST[dim] if parts[0].dim() == 5 else dim + 2)


def run_constant(step: Step) -> Float[Tensor, "1 1 ..."]:
    """Return a constant, the same for all networks and images, in float64."""
    return own_order(torch.tensor(step.options["value"], dtype=torch.float64)[None, None])


def run_parameter(step: Step, value: Float[Tensor, "n ..."]) -> Float[Tensor, "n 1 ..."]:
    """Return a tensor of the networks, the same for all images."""
    return own_order(value.reshape(len(value), 1, *step.shape))


def run_same(_step: Step, x: Tensor) -> Tensor:
    """Return results as they are."""
    return x


RUN: dict[str, Callable[..., Tensor]] = {
    "conv": run_conv,
    "conv_of": run_conv_of,
    "linear_of": run_linear_of,
    "filter": run_filter,
    "conv1d": run_conv1d,
    "linear": run_linear,
    "batch_norm": run_batch_norm,
    "group_norm": run_group_norm,
    "instance_norm": run_instance_norm,
    "layer_norm": run_layer_norm,
    "rms_norm": run_rms_norm,
    "contract": run_contract,
    "index": run_index,
    "roll": run_roll,
    "prelu": run_prelu,
    "mean": run_mean,
    "reduction": run_reduction,
    "flatten": run_flatten,
    "reshape": run_reshape,
    "getitem": run_getitem,
    "permute": run_permute,
    "expand": run_expand,
    "repeat": run_repeat,
    "pad": run_pad,
    "softmax": run_softmax,
    "log_softmax": run_softmax,
    "cat": run_cat,
    "constant": run_constant,
    "parameter": run_parameter,
    "dropout": run_same,
    **dict.fromkeys(ARITHMETIC, run_arithmetic),
    **dict.fromkeys(POOLS, run_pool),
}


def run_step(step: Step, inputs: list[Tensor], tensors: dict[str, Tensor]) -> Tensor:
    """Return the result of a step from those that it reads and the tensors that it uses, [n, ...] each."""
    if step.kind in POINTWISE:
        return POINTWISE[step.kind](inputs[0], **step.options)
    return RUN[step.kind](step, *inputs, **tensors)


def batch_statistics(
    x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the mean and variance of a batch, and the running ones [n, c] after it."""
    variance, mean = torch.var_mean(x, tuple(range(1, x.dim() - 1)), correction=0)
    count = x[0, ..., 0].numel()
    unbiased = variance * (count / (count - 1))
    after = {
        "running_mean": torch.lerp(running_mean, mean, momentum).detach(),
        "running_var": torch.lerp(running_var, unbiased, momentum).detach(),
    }
    return {"running_mean": mean, "running_var": variance}, after
