"""What is kept of each function of torch that a network may call: one reader for each, with the function's own arguments.

Python binds the arguments, so a call with an option that a reader does not name is refused.
"""

import math
from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from stages.weightnet.tracing.operations import POOLS
from stages.weightnet.tracing.recording import NOWHERE, Batch, NotFollowed, Operand, Recorder

REQUIRED = Parameter.empty
LETTERS, SUMMED = "abcdefgh", "z"  # of the axes of products
HIDDEN = -1e30  # what a mask adds to scores that a softmax is to leave out


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    both = (value, value) if isinstance(value, int) else tuple(value)
    return both[0], both[-1]


def _alike(r: Recorder, x: Operand) -> Operand:
    """Return a constant that is made for each image of a batch as what is given to each of them, and all else as it is."""
    constant = x.place is None and x.name is None and x.batch.axis is None and x.shape[0] == r.batch
    if constant and bool((x.tensor == x.tensor[:1]).all()):
        return Operand(x.tensor, x.shape, batch=Batch())
    return x


def _plain(x: Operand) -> None:
    """Refuse what layers of images do not expect."""
    if not x.plain:
        raise NotFollowed("it is given a batch whose images are cut into parts, or lie along another axis")


Size = int | Sequence[int]
Dims = int | Sequence[int] | None  # axes; None: all of them
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
    x = _alike(r, x)
    shared = x.batch.axis is None and x.shape[0] == 1  # of no image: it is given to all of them later
    if shared:
        x = r.add("reshape", [x], x.tensor.detach().squeeze(0))
    else:
        _plain(x)
    if weight.name is None and weight.place is None and bias is None and groups == len(weight.tensor) and not shared:
        sizes = {"stride": _pair(stride), "padding": padding, "dilation": _pair(dilation), "groups": groups}
        r.add("filter", [x], y, {"kernel": weight.tensor.tolist(), **sizes})
        return
    made = weight.place is not None and weight.batch.axis is None and not shared
    kind, kernel = ("conv_of", [weight]) if made else ("conv", [])
    tensors, source = r.weights(**({"bias": bias} if made else {"weight": weight, "bias": bias})), x
    stride, dilation = _pair(stride), _pair(dilation)
    if isinstance(padding, str):
        taps = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        padding = [tap // 2 for tap in taps]
        if any(tap % 2 for tap in taps):
            border = [0, taps[1] % 2, 0, taps[0] % 2]
            source = r.add("pad", [x], pad(x.tensor, border), {"pad": border, "mode": "constant", "value": 0.0})
    options = {"stride": stride, "padding": _pair(padding), "groups": groups}
    options |= {"dilation": dilation} if dilation != (1, 1) else {}
    if shared:
        r.add("reshape", [r.add("conv", [source], y.squeeze(0), options, tensors)], y)
    else:
        r.add(kind, [source, *kernel], y, options, tensors, name=r.made_of(weight) if made else None)


def read_conv1d(
    r: Recorder,
    y: Tensor,
    x: Operand,
    weight: Operand,
    bias: Layer = None,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> None:
    """torch.conv1d."""
    _plain(x)
    if isinstance(padding, str):
        raise NotFollowed("padding by its name is not supported")
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    r.add("conv1d", [x], y, options, r.weights(weight=weight, bias=bias))


def read_linear(r: Recorder, y: Tensor, x: Operand, weight: Operand, bias: Layer = None) -> None:
    """torch.nn.functional.linear; a bias that is made of tensors is added."""
    if weight.place is not None and weight.batch.axis is None and (bias is None or bias.name is not None):
        r.add("linear_of", [x, weight], y, {}, r.weights(bias=bias), name=r.made_of(weight))
        return
    if bias is None or bias.name is not None:
        r.add("linear", [x], y, {}, r.weights(weight=weight, bias=bias))
        return
    product = r.add("linear", [x], linear(x.tensor, weight.tensor), {}, r.weights(weight=weight))
    r.add("add", [product, r.place(bias, product.batch, y.dim())], y)


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
    """torch.nn.functional.batch_norm; of kernels, which are the same for all images, each row is normalised by itself."""
    if training and x.batch.axis is None and len(x.shape) == 3 and x.shape[0] == 1 and bias is None:
        read_norm_of_kernels(r, y, x, weight, eps)
        return
    if training or running_mean is None:
        raise NotFollowed("a norm without running statistics mixes the images of a batch")
    tensors = r.weights(running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    axis = {"axis": x.axis(1)} if x.axis(1) else {}
    r.add("batch_norm", [x], y, {"eps": eps, "momentum": momentum, **axis}, tensors)


def read_norm_of_kernels(r: Recorder, y: Tensor, x: Operand, weight: Layer, eps: float) -> None:
    """(x - mean) / sqrt(var + eps), times a weight of each row: of kernels [1, o, c k k] (Qiao et al. 2019), as timm writes it."""
    mean, variance = x.tensor.mean((0, 2), keepdim=True), x.tensor.var((0, 2), correction=0, keepdim=True)
    along = {"dims": (0, 2), "keepdim": True}
    centred = r.add("sub", [x, r.add("reduction", [x], mean, {"of": "mean", **along})], x.tensor - mean)
    spread = r.add("reduction", [x], variance, {"of": "var", **along, "correction": 0})
    root = r.add("sqrt", [r.add("add", [spread, r.place(eps, NOWHERE, 3)], variance + eps)], (variance + eps).sqrt())
    if weight is None:
        r.add("div", [centred, root], y)
        return
    ratio = r.add("div", [centred, root], (x.tensor - mean) / (variance + eps).sqrt())
    gain = r.add("reshape", [weight], weight.tensor.detach().view(1, -1, 1), batch=NOWHERE)
    r.add("mul", [ratio, gain], y)


def read_group_norm(
    r: Recorder, y: Tensor, x: Operand, num_groups: int, weight: Layer = None, bias: Layer = None, eps: float = 1e-5
) -> None:
    """torch.nn.functional.group_norm."""
    _plain(x)
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
    _plain(x)
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
    _plain(x)
    r.add("prelu", [x], y, {}, r.weights(weight=weight))


def read_dropout(r: Recorder, y: Tensor, x: Operand, p: float = 0.5, training: bool = True, *_: bool) -> None:
    """torch.nn.functional.dropout: nothing is dropped when a network is used."""
    if training and p > 0:
        raise NotFollowed("it drops values at random even in eval mode: pass training=self.training, or use nn.Dropout")
    if r.function == "dropout":
        r.add("dropout", [x], y)
    else:
        r.same(x, y)


def read_reshape(r: Recorder, y: Tensor, x: Operand, *_: object, **__: object) -> None:
    """view, reshape, flatten, squeeze, unsqueeze, unflatten: the shape of the result says all.

    Images stay together if as many numbers lie before the axis of the batch as there did; the axis may be cut into parts.
    """
    if tuple(y.shape) == x.shape:
        r.same(x, y)
        return
    if x.batch.axis is None:
        r.add("reshape", [x], y)
        return
    before = math.prod(x.shape[: x.batch.axis])
    for axis, size in enumerate(y.shape):
        parts = size // r.batch
        if math.prod(y.shape[:axis]) == before and size % r.batch == 0 and (before == 1 or parts == x.batch.parts):
            r.add("flatten" if y.dim() == 2 and x.plain and parts == 1 else "reshape", [x], y, batch=Batch(axis, parts))
            return
    raise NotFollowed("images of a batch are mixed")


def _reduced(x: Operand, dim: Dims, keepdim: bool) -> tuple[tuple[int, ...], Batch]:
    """Return the axes of an image over which a reduction goes, and where its images lie then."""
    if dim is None or dim == ():
        dim = list(range(len(x.shape)))
    every = [d % len(x.shape) for d in ([dim] if isinstance(dim, int) else dim)]
    dims = tuple(sorted(x.axis(d) for d in every))
    if x.batch.axis is None or keepdim:
        return dims, x.batch
    return dims, Batch(x.batch.axis - sum(d < x.batch.axis for d in every), x.batch.parts)


def read_mean(
    r: Recorder, y: Tensor, x: Operand, dim: Dims = None, keepdim: bool = False, dtype: torch.dtype | None = None
) -> None:
    """torch.mean, sum, amax and amin."""
    if dtype is not None:
        raise NotFollowed("another precision is not supported")
    dims, batch = _reduced(x, dim, keepdim)
    if r.function == "mean" and dims == (1, 2) and x.dims == 3 and not keepdim and x.plain:
        r.add("mean", [x], y)
    else:
        r.add("reduction", [x], y, {"of": r.function, "dims": dims, "keepdim": keepdim}, batch=batch)


def read_norm(
    r: Recorder,
    y: Tensor,
    x: Operand,
    p: float | str | None = 2,
    dim: Dims = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """torch.norm and torch.linalg.vector_norm: Euclidean ones."""
    if dtype is not None or p not in (2, "fro", None):
        raise NotFollowed("norms but Euclidean ones are not supported")
    dims, batch = _reduced(x, dim, keepdim)
    r.add("reduction", [x], y, {"of": "norm", "dims": dims, "keepdim": keepdim}, batch=batch)


def read_spread(
    r: Recorder, y: Tensor, x: Operand, dim: Any = None, unbiased: bool = True, keepdim: bool = False, **options: Any
) -> None:
    """torch.std and var."""
    correction = options.pop("correction", 1)
    if isinstance(dim, bool):  # var(unbiased)
        dim, unbiased = None, dim
    if options:
        raise NotFollowed("it is called in a way that is not supported")
    dims, batch = _reduced(x, dim, keepdim)
    how = {"of": r.function, "dims": dims, "keepdim": keepdim, "correction": correction if unbiased else 0}
    r.add("reduction", [x], y, how, batch=batch)


def read_weight_norm(r: Recorder, y: Tensor, v: Operand, g: Operand, dim: int = 0) -> None:
    """torch._weight_norm: a tensor over its norms along all axes but one, times g (Salimans and Kingma 2016)."""
    dims = tuple(axis for axis in range(len(v.shape)) if axis != dim % len(v.shape) or dim == -1)
    norms = v.tensor.detach().norm(2, dims, keepdim=True)
    length = r.add("reduction", [v], norms, {"of": "norm", "dims": dims, "keepdim": True}, batch=NOWHERE)
    direction = r.add("div", [v, length], v.tensor.detach() / norms, batch=NOWHERE)
    r.add("mul", [direction, r.place(g, NOWHERE, y.dim())], y, batch=NOWHERE)


def read_product_with_vector(r: Recorder, y: Tensor, x: Operand, other: Operand) -> None:
    """torch.mv, dot and vdot."""
    contract(r, y, (x, LETTERS[: len(x.shape) - 1] + SUMMED), (other, SUMMED), LETTERS[: len(x.shape) - 1])


def read_normalize(
    r: Recorder, y: Tensor, x: Operand, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None
) -> None:
    """torch.nn.functional.normalize: results over their norms."""
    if p != 2.0 or out is not None:
        raise NotFollowed("norms but Euclidean ones are not supported")
    size = x.tensor.norm(2, dim, keepdim=True)
    norms = r.add("reduction", [x], size, {"of": "norm", "dims": (x.axis(dim),), "keepdim": True})
    r.add("div", [x, r.add("clamp", [norms], size.clamp(min=eps), {"min": eps})], y)


def read_rms_norm(
    r: Recorder, y: Tensor, x: Operand, normalized_shape: Sequence[int], weight: Layer = None, eps: float | None = None
) -> None:
    """torch.nn.functional.rms_norm."""
    options = {"normalized_shape": tuple(normalized_shape), "eps": eps}
    r.add("rms_norm", [x], y, options, r.weights(weight=weight))


def read_adaptive_mean(r: Recorder, y: Tensor, x: Operand, output_size: object) -> None:
    """torch.nn.functional.adaptive_avg_pool1d, to one number."""
    if output_size not in (1, (1,), [1]):
        raise NotFollowed("pools along one axis to more than one number are not supported")
    r.add("reduction", [x], y, {"of": "mean", "dims": (x.axis(-1),), "keepdim": True})


def read_mean_pool(
    r: Recorder, y: Tensor, x: Operand, kernel_size: Size, stride: Size | None = None, padding: Size = 0, *_: object
) -> None:
    """torch.avg_pool1d of windows that lie side by side: they become an axis, over which the mean goes."""
    sizes = [
        value[0] if isinstance(value, (tuple, list)) and value else value for value in (kernel_size, stride, padding)
    ]
    size, step, border = sizes
    if step not in (None, (), size) or border != 0:
        raise NotFollowed("pools along one axis that overlap are not supported")
    used = x.tensor.detach()[..., : y.shape[-1] * size]
    windows = used.unflatten(-1, (-1, size))
    _part(r, used, x, -1, slice(0, used.shape[-1]))
    long = r.add("reshape", [r.operand(used)], windows)
    r.add("reduction", [long], y, {"of": "mean", "dims": (long.axis(-1),), "keepdim": False})


def read_max(
    r: Recorder,
    y: Tensor,
    x: Operand,
    other: Operand | int | None = None,
    keepdim: bool = False,
    *,
    dim: int | None = None,
) -> None:
    """torch.max and min: of two results, or along an axis, of which the indices are not followed."""
    if isinstance(other, Operand):
        read_arithmetic(r, y, x, other)
        return
    axis = other if dim is None else dim
    dims, batch = _reduced(x, axis, keepdim)
    r.add(
        "reduction",
        [x],
        y[0] if axis is not None else y,
        {"of": f"a{r.function}", "dims": dims, "keepdim": keepdim},
        batch=batch,
    )


def _for_each_image(r: Recorder, y: Tensor, x: Operand) -> Operand | None:
    """Return what all images share without its first axis, if it is given to each image of a batch along that axis, else None."""
    if x.batch.axis is not None or y.shape[0] != r.batch or y.dim() != len(x.shape) or x.shape[0] != 1:
        return None
    return r.add("reshape", [x], x.tensor.detach().squeeze(0), batch=NOWHERE)


def _spread(values: Sequence[Size]) -> tuple[int, ...]:
    """Return the numbers that a function is given, f(1, 2) and f((1, 2)) alike."""
    return tuple(number for value in values for number in ((value,) if isinstance(value, int) else value))


def read_repeat(r: Recorder, y: Tensor, x: Operand, *given: Size) -> None:
    """torch.Tensor.repeat."""
    sizes = _spread(given)
    if (shared := _for_each_image(r, y, x)) is not None:
        r.add("repeat", [shared], y, {"sizes": tuple(sizes[1:])}, batch=Batch())
        return
    if len(sizes) != len(x.shape) or (x.batch.axis is not None and sizes[x.batch.axis] != 1):
        raise NotFollowed("images of a batch are repeated")
    own = [size for axis, size in enumerate(sizes) if axis != x.batch.axis]
    r.add("repeat", [x], y, {"sizes": (*[1] * (x.batch.parts > 1), *own)})


def read_repeat_interleave(
    r: Recorder, y: Tensor, x: Operand, repeats: int, dim: int | None = None, **_: object
) -> None:
    """torch.repeat_interleave along an axis: of the batch, every image is given to each of its parts."""
    if dim is None or not isinstance(repeats, int):
        raise NotFollowed("it is called in a way that is not supported")
    if repeats == 1:
        r.same(x, y)
    elif dim % len(x.shape) == x.batch.axis == 0 and x.batch.parts == 1:
        r.add("expand", [x], y, batch=Batch(0, repeats))
    else:
        places = [place for place in range(x.shape[dim]) for _ in range(repeats)]
        r.add("index", [x], y, {"axis": x.axis(dim), "places": places})


def read_unfold(
    r: Recorder, y: Tensor, x: Operand, dim: Any, size: Any = None, step: Any = None, **options: Any
) -> None:
    """torch.Tensor.unfold: windows along an axis, whose places are the last axis."""
    if options or not all(isinstance(value, int) for value in (dim, size, step)):
        raise NotFollowed("it is called in a way that is not supported")
    dim = dim % len(x.shape)
    places = [start * step + i for start in range(y.shape[dim]) for i in range(size)]
    taken = x.tensor.detach().index_select(dim, torch.tensor(places))
    windows = taken.unflatten(dim, (-1, size))
    long = r.add("index", [x], taken, {"axis": x.axis(dim), "places": places})
    read_reshape(r, windows, long)
    read_movedim(r, y, r.operand(windows), dim + 1, -1)


def read_unfold_or_patches(r: Recorder, y: Tensor, x: Operand, *given: Any, **options: Any) -> None:
    """torch.Tensor.unfold, and torch.nn.functional.unfold, which goes by the same name and gives three axes of an image's four."""
    if len(x.shape) == 4 and y.dim() == 3:
        read_patches(r, y, x, *given, **options)
    else:
        read_unfold(r, y, x, *given, **options)


def read_patches(
    r: Recorder, y: Tensor, x: Operand, kernel_size: Size, dilation: Size = 1, padding: Size = 0, stride: Size = 1
) -> None:
    """torch.nn.functional.unfold: of each axis of pixels, the places that each tap sees; then all taps, and all patches, in a row."""
    _plain(x)
    images, operand = x.tensor.detach(), x
    if any(_pair(padding)):
        down, across = _pair(padding)
        border = [across, across, down, down]
        images = pad(images, border)
        operand = r.add("pad", [x], images, {"pad": border, "mode": "constant", "value": 0.0})
    for axis, k, d, s in (
        (2, *(_pair(v)[0] for v in (kernel_size, dilation, stride))),
        (4, *(_pair(v)[1] for v in (kernel_size, dilation, stride))),
    ):
        count = (images.shape[axis] - d * (k - 1) - 1) // s + 1
        places = [tap * d + patch * s for tap in range(k) for patch in range(count)]
        images = images.index_select(axis, torch.tensor(places))
        operand = r.add("index", [operand], images, {"axis": axis - 1, "places": places})
        images = images.unflatten(axis, (k, count))
        operand = r.add("reshape", [operand], images)
    images = images.permute(0, 1, 2, 4, 3, 5)
    r.add("reshape", [r.add("permute", [operand], images, {"dims": (0, 1, 3, 2, 4)})], y)


def _batch_of(operands: Sequence[object]) -> Batch:
    """Return where images lie in results that are joined."""
    found = [operand.batch for operand in operands if isinstance(operand, Operand) and operand.batch.axis is not None]
    return found[0] if found else NOWHERE


def read_zero(r: Recorder, y: Tensor, x: Operand) -> None:
    """torch.Tensor.zero_ of a part of a vector of the network: the vector with zeros there."""
    whole = y._base
    operand = r.operand(whole) if whole is not None else x
    if whole is None or whole.dim() != 1 or operand.name is None or y.stride() != (1,):
        raise NotFollowed("zero_ is supported of a part of a copied vector of the network alone")
    start, end, size = y.storage_offset(), y.storage_offset() + len(y), len(whole)
    parts = [
        r.add("getitem", [operand], whole[a:b], {"index": (slice(a, b),)})
        for a, b in ((0, start), (end, size))
        if a < b
    ]
    zeros = Operand(torch.zeros(len(y)), (len(y),), batch=NOWHERE)
    parts.insert(start > 0, zeros)
    r.add("cat", parts, whole, {"dim": 0}, batch=NOWHERE)


def read_cat(r: Recorder, y: Tensor, tensors: Sequence[Operand], dim: int = 0) -> None:
    """torch.cat; what is not followed in it has the axes of the others, and is a constant."""
    batch = _batch_of(tensors)
    axis = Operand(y, tuple(y.shape), batch=batch).axis(dim)
    r.add("cat", [r.place(part, batch, y.dim()) for part in tensors], y, {"dim": axis}, batch=batch)


def read_stack(r: Recorder, y: Tensor, tensors: Sequence[Operand], dim: int = 0) -> None:
    """torch.stack: a concatenation along a new axis."""
    batch, dim = _batch_of(tensors), dim % y.dim()
    after = batch if batch.axis is None else Batch(batch.axis + (dim <= batch.axis), batch.parts)
    axis = Operand(y, tuple(y.shape), batch=after).axis(dim)
    places = [r.place(part, batch, y.dim() - 1) for part in tensors]
    parts = [
        r.add("reshape", [place], part.tensor.unsqueeze(dim), batch=after)
        for place, part in zip(places, tensors, strict=True)
    ]
    r.add("cat", parts, y, {"dim": axis}, batch=after)


def read_arithmetic(r: Recorder, y: Tensor, x: Operand, other, *, alpha=1, rounding_mode=None, out=None):
    """Sums, differences, products and quotients of results, tensors of the network, and constants."""
    if rounding_mode is not None or out is not None:
        raise NotFollowed("rounding and out are not supported")
    kind, swapped = OPERATORS[r.function]
    batch = _batch_of((x, other))
    pair = [r.place(operand, batch, y.dim()) for operand in (x, other)]
    options = {"alpha": alpha} if alpha != 1 else {}
    r.add(kind, pair[::-1] if swapped else pair, y, options, batch=batch)


def read_addcmul(r: Recorder, y: Tensor, x: Operand, first: Operand, second: Operand, *, value: float = 1) -> None:
    """torch.addcmul: a sum with a product."""
    product = first.tensor * second.tensor
    batch = _batch_of((first, second))
    both = r.add("mul", [r.place(operand, batch, product.dim()) for operand in (first, second)], product, batch=batch)
    whole = _batch_of((x, both))
    r.add("add", [r.place(x, whole, y.dim()), r.place(both, whole, y.dim())], y, {"alpha": value}, batch=whole)


def contract(r: Recorder, y: Tensor, first: tuple[Operand, str], second: tuple[Operand, str], to: str) -> Operand:
    """Add a sum of products as torch.einsum has it, whose letters are those of the tensors' axes, the batch among them."""
    pairs = (first, second)
    letter = next((letters[x.batch.axis] for x, letters in pairs if x.batch.axis is not None), "")
    parts = _batch_of([x for x, _ in pairs]).parts

    def own(letters: str) -> str:
        return (letter if parts > 1 else "") + letters.replace(letter or " ", "")

    inputs, of = [], []
    for x, letters in pairs:
        if x.batch.axis is not None:
            if letters[x.batch.axis] != letter or x.batch.parts != parts:
                raise NotFollowed("images of a batch are mixed")
            inputs.append(x)
            of.append(own(letters))
        elif letter and letter in letters:
            axis = letters.index(letter)
            if x.shape[axis] != 1:
                raise NotFollowed("images of a batch are mixed")
            inputs.append(r.add("reshape", [x], x.tensor.detach().squeeze(axis), batch=NOWHERE))
            of.append(letters.replace(letter, ""))
        else:
            inputs.append(x)
            of.append(letters)
    if letter not in to:
        raise NotFollowed("it acts across the images of a batch")
    options = {"of": tuple(of), "to": own(to)}
    return r.add("contract", inputs, y, options, batch=Batch(to.index(letter), parts) if letter else NOWHERE)


def read_matmul(r: Recorder, y: Tensor, x: Operand, other: Operand) -> None:
    """torch.matmul and bmm, of matrices."""
    if min(len(x.shape), len(other.shape)) < 2:
        raise NotFollowed("products with vectors are not supported")
    letters = LETTERS[: y.dim()]
    rows, columns = letters[-2], letters[-1]
    first = letters[y.dim() - len(x.shape) : -2] + rows + SUMMED
    second = letters[y.dim() - len(other.shape) : -2] + SUMMED + columns
    contract(r, y, (x, first), (other, second), letters)


def read_einsum(r: Recorder, y: Tensor, equation: str, *operands: Any) -> None:
    """torch.einsum of two tensors."""
    operands = operands[0] if len(operands) == 1 and not isinstance(operands[0], Operand) else operands
    of, _, to = equation.replace(" ", "").partition("->")
    if len(operands) != 2 or "." in equation or not to:
        raise NotFollowed("einsum is supported of two tensors, without dots")
    first, second = of.split(",")
    contract(r, y, (operands[0], first), (operands[1], second), to)


def read_attention(
    r: Recorder,
    y: Tensor,
    query: Operand,
    key: Operand,
    value: Operand,
    attn_mask: Layer = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    """torch.nn.functional.scaled_dot_product_attention: products, a mask, a softmax, products."""
    if dropout_p > 0 or enable_gqa:
        raise NotFollowed("attention with dropout or shared keys is not supported")
    letters = LETTERS[: y.dim() - 2]
    scores = query.tensor @ key.tensor.mT
    step = contract(r, scores, (query, f"{letters}TD"), (key, f"{letters}SD"), f"{letters}TS")
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = scores * factor
    step = r.add("mul", [step, r.place(factor, step.batch, y.dim())], scores)
    if is_causal:
        attn_mask = Operand(
            torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), tuple(scores.shape[-2:]), batch=NOWHERE
        )
    if attn_mask is not None:
        if attn_mask.tensor.dtype == torch.bool:
            mask = torch.where(attn_mask.tensor, 0.0, HIDDEN).double()
            attn_mask = Operand(mask, tuple(mask.shape), batch=NOWHERE)
        scores = scores + attn_mask.tensor
        step = r.add("add", [step, r.place(attn_mask, step.batch, y.dim())], scores)
    step = r.add("softmax", [step], scores.softmax(-1), {"dim": step.axis(-1)})
    contract(r, y, (step, f"{letters}TS"), (value, f"{letters}SD"), f"{letters}TD")


def read_pow(r: Recorder, y: Tensor, x: Operand, exponent) -> None:
    """torch.pow with a number."""
    if not isinstance(x, Operand) or isinstance(exponent, Operand):
        raise NotFollowed("only powers of a result by a number are supported")
    r.add("pow", [x], y, {"exponent": exponent})


def read_getitem(r: Recorder, y: Tensor, x: Operand, index: Any) -> None:
    """Slices and single indices of an image, and places along one of its axes."""
    index = index if isinstance(index, tuple) else (index,)
    if any(not (item is None or item is ... or isinstance(item, (int, slice, list, Operand))) for item in index):
        raise NotFollowed("only slices, numbers and constants can be indices")
    used = sum(item is not None and item is not ... for item in index)
    if any(item is ... for item in index):
        at = next(place for place, item in enumerate(index) if item is ...)
        index = index[:at] + (slice(None),) * (len(x.shape) - used) + index[at + 1 :]
    if many := [place for place, item in enumerate(index) if isinstance(item, (list, Operand))]:
        if len(many) > 1 or any(item != slice(None) for place, item in enumerate(index) if place != many[0]):
            raise NotFollowed("indices along several axes are not supported")
        read_index_select(r, y, x, many[0], index[many[0]])
        return
    own, axis, after, batch = [slice(None)] * (x.batch.parts > 1), 0, 0, x.batch
    for item in index:
        if axis == x.batch.axis and item is not None:
            if item != slice(None):
                raise NotFollowed("single images of a batch are taken")
            batch = Batch(after, batch.parts)
        else:
            own.append(item)
        axis, after = axis + (item is not None), after + (not isinstance(item, int))
    if x.batch.axis is not None and axis <= x.batch.axis:
        batch = Batch(x.batch.axis - axis + after, batch.parts)
    r.add("getitem", [x], y, {"index": tuple(own)}, batch=batch)


def read_index_select(r: Recorder, y: Tensor, x: Operand, dim: int, index: Operand | list[int]) -> None:
    """torch.index_select, and indexing by constants along one axis, which may have several axes themselves."""
    if isinstance(index, Operand) and (index.place is not None or index.name is not None):
        raise NotFollowed("only slices, numbers and constants can be indices")
    places = index.tensor if isinstance(index, Operand) else torch.tensor(index)
    places = places.nonzero()[:, 0] if places.dtype == torch.bool and places.dim() == 1 else places
    taken = x.tensor.detach().index_select(dim, places.flatten())
    options = {"axis": x.axis(dim), "places": places.flatten().tolist()}
    if taken.shape == y.shape:
        r.add("index", [x], y, options)
    else:
        read_reshape(r, y, r.add("index", [x], taken, options))


def read_embedding(
    r: Recorder, y: Tensor, x: Operand, weight: Operand, padding_idx: int | None = None, **_: Any
) -> None:
    """torch.nn.functional.embedding: rows of a table by their places, the same for all images (learned positions)."""
    del padding_idx  # of training
    if x.place is not None or weight.name is None:
        raise NotFollowed("only tables of the network are looked up, at places that are the same for all images")
    alike = y.dim() > 2 and len(y) == r.batch and bool((x.tensor == x.tensor[:1]).all())
    places = x.tensor[:1] if alike else x.tensor
    rows = weight.tensor.detach()[places] if alike else y
    read_index_select(r, rows, weight, 0, Operand(places, tuple(places.shape), batch=NOWHERE))
    if alike:
        read_expand(r, y, r.operand(rows))


def read_flip(r: Recorder, y: Tensor, x: Operand, *given: Size) -> None:
    """torch.flip along one axis."""
    dims = _spread(given)
    if len(dims) != 1:
        raise NotFollowed("flips along several axes are not supported")
    r.add("index", [x], y, {"axis": x.axis(dims[0]), "places": list(range(x.shape[dims[0]]))[::-1]})


def read_roll(r: Recorder, y: Tensor, x: Operand, shifts: Size, dims: Dims = None) -> None:
    """torch.roll along axes."""
    shifts, dims = ((value,) if isinstance(value, int) else tuple(value or ()) for value in (shifts, dims))
    if not dims:
        raise NotFollowed("images of a batch are mixed")
    r.add("roll", [x], y, {"shifts": shifts, "dims": tuple(x.axis(dim) for dim in dims)})


def _part(r: Recorder, y: Tensor, x: Operand, dim: int, item: int | slice) -> None:
    """Note what lies at a place of an axis, or at some."""
    read_getitem(r, y, x, (*[slice(None)] * (dim % len(x.shape)), item))


def read_narrow(r: Recorder, y: Tensor, x: Operand, dim: int, start: int, length: int) -> None:
    """torch.narrow."""
    _part(r, y, x, dim, slice(start, start + length))


def read_select(r: Recorder, y: Tensor, x: Operand, dim: int, index: int) -> None:
    """torch.select."""
    _part(r, y, x, dim, index)


def read_split(r: Recorder, y: Tensor, x: Operand, _size: object = None, dim: int = 0, **_: object) -> None:
    """torch.split and chunk: their parts one after the other."""
    start = 0
    for part in y:
        end = start + part.shape[dim]
        _part(r, part, x, dim, slice(start, end))
        start = end


def read_unbind(r: Recorder, y: Tensor, x: Operand, dim: int = 0) -> None:
    """torch.unbind."""
    for number, part in enumerate(y):
        _part(r, part, x, dim, number)


def read_glu(r: Recorder, y: Tensor, x: Operand, dim: int = -1) -> None:
    """torch.nn.functional.glu: one half times the sigmoid of the other."""
    first, second = x.tensor.detach().chunk(2, dim)
    for part, start in ((first, 0), (second, first.shape[dim])):
        _part(r, part, x, dim, slice(start, start + first.shape[dim]))
    gate = r.add("sigmoid", [r.operand(second)], second.sigmoid())
    r.add("mul", [r.operand(first), gate], y)


def read_permute(r: Recorder, y: Tensor, x: Operand, *given: Size) -> None:
    """torch.permute."""
    dims = [dim % len(x.shape) for dim in _spread(given)]
    own = [x.axis(dim) for dim in dims if dim != x.batch.axis]
    batch = x.batch if x.batch.axis is None else Batch(dims.index(x.batch.axis), x.batch.parts)
    if own == sorted(own):
        r.places[y] = (r.source(x), y._version, batch)
    else:
        r.add("permute", [x], y, {"dims": (*[0] * (x.batch.parts > 1), *own)}, batch=batch)


def read_transpose(r: Recorder, y: Tensor, x: Operand, dim0: int = -2, dim1: int = -1) -> None:
    """torch.transpose, t, T, mT."""
    dims = list(range(len(x.shape)))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    read_permute(r, y, x, dims)


def read_movedim(r: Recorder, y: Tensor, x: Operand, source: int, destination: int) -> None:
    """torch.movedim of one axis."""
    dims = list(range(len(x.shape)))
    dims.insert(destination % len(dims), dims.pop(source))
    read_permute(r, y, x, dims)


def read_expand(r: Recorder, y: Tensor, x: Operand, *_: object) -> None:
    """torch.expand and expand_as."""
    if tuple(y.shape) == x.shape:
        r.same(x, y)
    elif (shared := _for_each_image(r, y, x)) is not None:
        r.add("expand", [shared], y, batch=Batch())
    elif x.batch.axis is None:
        r.add("expand", [x], y)
    else:
        r.add("expand", [x], y, batch=Batch(x.batch.axis + y.dim() - len(x.shape), x.batch.parts))


def read_pad(
    r: Recorder, y: Tensor, x: Operand, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> None:
    """torch.nn.functional.pad."""
    if x.batch.axis is not None and len(pad) > 2 * (len(x.shape) - 1 - x.batch.axis):
        raise NotFollowed("images of a batch are padded")
    r.add("pad", [x], y, {"pad": list(pad), "mode": mode, "value": value})


def read_softmax(
    r: Recorder, y: Tensor, x: Operand, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> None:
    """torch.softmax and log_softmax."""
    if dtype is not None:
        raise NotFollowed("another precision is not supported")
    if dim is None:
        dim = 0 if len(x.shape) in (1, 3) else 1  # torch's own rule
    r.add(r.function, [x], y, {"dim": x.axis(dim)})


def read_hardtanh(r: Recorder, y: Tensor, x: Operand, min_val: float = -1.0, max_val: float = 1.0, *_: bool) -> None:
    """torch.nn.functional.hardtanh, which ReLU6 is one of."""
    if (min_val, max_val) == (0.0, 6.0):
        r.add("relu6", [x], y)
    else:
        r.add("hardtanh", [x], y, {"min_val": min_val, "max_val": max_val})


def with_options(kind: str, **options: object) -> Callable[..., None]:
    """Return the reader of a function that keeps all its arguments but the first; options: those, with their defaults."""
    names = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=value) for name, value in options.items()]
    signature = Signature([*names, Parameter("inplace", Parameter.POSITIONAL_OR_KEYWORD, default=False)])

    def read(r: Recorder, y: Tensor, x: Operand, *args: object, **kwargs: object) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = {name: bound.arguments[name] for name in options}
        if kind in POOLS and x.batch.axis is None and x.shape[0] == 1:  # of no image: it is given to all of them later
            alone = r.add("reshape", [x], x.tensor.detach().squeeze(0))
            r.add("reshape", [r.add(kind, [alone], y.squeeze(0), given)], y)
            return
        if kind in POOLS:
            _plain(x)
        r.add(kind, [x], y, given)

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
    "conv1d": read_conv1d,
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
    **dict.fromkeys(("repeat", "tile"), read_repeat),
    **dict.fromkeys(("norm", "linalg_norm", "linalg_vector_norm"), read_norm),
    **dict.fromkeys(("std", "var"), read_spread),
    "weight_norm": read_weight_norm,
    **dict.fromkeys(("mv", "dot", "vdot"), read_product_with_vector),
    "normalize": read_normalize,
    "rms_norm": read_rms_norm,
    "avg_pool1d": read_mean_pool,
    "adaptive_avg_pool1d": read_adaptive_mean,
    "stack": read_stack,
    "zero": read_zero,
    "addcmul": read_addcmul,
    **dict.fromkeys(("matmul", "bmm"), read_matmul),
    "einsum": read_einsum,
    "scaled_dot_product_attention": read_attention,
    "index_select": read_index_select,
    "embedding": read_embedding,
    "repeat_interleave": read_repeat_interleave,
    "unfold": read_unfold_or_patches,
    "flip": read_flip,
    "roll": read_roll,
    "glu": read_glu,
    **dict.fromkeys(("movedim", "moveaxis"), read_movedim),
    **dict.fromkeys(("cat", "concat", "concatenate"), read_cat),
    "pow": read_pow,
    "getitem": read_getitem,
    "narrow": read_narrow,
    "select": read_select,
    **dict.fromkeys(("split", "chunk", "tensor_split", "split_with_sizes"), read_split),
    "unbind": read_unbind,
    "permute": read_permute,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "t", "T", "mT"), read_transpose),
    **dict.fromkeys(("expand", "expand_as"), read_expand),
    "pad": read_pad,
    **dict.fromkeys(("softmax", "log_softmax"), read_softmax),
    "hardtanh": read_hardtanh,
    **{
        name: with_options(name)
        for name in (
            *("relu", "relu6", "tanh", "sigmoid", "silu", "hardswish", "hardsigmoid", "softsign", "mish", "selu"),
            *("tanhshrink", "abs", "neg", "exp", "log", "sqrt", "square", "sin", "cos", "rsqrt", "erf", "reciprocal"),
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
