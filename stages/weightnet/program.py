"""A network as a list of steps, traced by torch.fx, and many networks of one kind run at once.

Everything that treats networks as data reads this list: the trainer runs stacks of networks along it, the symmetry is derived
from it, and probes are sent through it. A step that is not understood is refused by name, never guessed.
"""

import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, fx, nn

from stages.common.stage import InputError, one_line
from stages.common.vectors import Layout
from stages.weightnet.convolution import convolve

Weights = dict[str, Tensor]  # of n networks, every tensor [n, *shape]

POINTWISE: dict[Any, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
}
MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.Tanh: "tanh",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.Sigmoid: "sigmoid",
    nn.ELU: "elu",
    nn.LeakyReLU: "leaky_relu",
    nn.Conv2d: "conv",
    nn.Linear: "linear",
    nn.GroupNorm: "group_norm",
    nn.BatchNorm2d: "batch_norm",
    nn.MaxPool2d: "max_pool",
    nn.AvgPool2d: "avg_pool",
    nn.AdaptiveAvgPool2d: "adaptive_pool",
    nn.Flatten: "flatten",
    nn.Dropout: "dropout",
    nn.Identity: "identity",
}
FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.tanh: "tanh",
    F.gelu: "gelu",
    F.silu: "silu",
    torch.flatten: "flatten",
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    torch.cat: "cat",
    torch.mean: "mean",
    F.max_pool2d: "max_pool",
    F.avg_pool2d: "avg_pool",
    F.adaptive_avg_pool2d: "adaptive_pool",
    F.dropout: "dropout",
    "flatten": "flatten",
    "mean": "mean",
    "relu": "relu",
    "tanh": "tanh",
    "add": "add",
}


@dataclass(frozen=True)
class Step:
    """One operation. inputs: indices of the steps that it reads; shape: of its result for one image."""

    kind: str
    name: str  # of the module, whose tensors are <name>.weight and so on
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """The steps of a network in order, the last of which is its output, and how its tensors lie in a vector."""

    steps: tuple[Step, ...]
    layout: Layout

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image."""
        return self.steps[0].shape

    def tensors_of(self, step: Step) -> list[str]:
        """Return the names of the tensors that a step uses."""
        return self._tensors.get(step.name, [])

    def may_overwrite(self, place: int) -> bool:
        """Return whether the reader of a step's result may write over it: a convolution's, if nothing else reads it."""
        return self.steps[place].kind == "conv" and self._reads[place] == 1

    @cached_property
    def _reads(self) -> Counter[int]:
        return Counter(place for step in self.steps for place in step.inputs)

    @cached_property
    def _tensors(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.layout.shapes:
            found.setdefault(name.rpartition(".")[0], []).append(name)
        return found

    def numbers_of(self, kind: str) -> list[int]:
        """Return how many numbers each step of a kind gives for one image."""
        return [math.prod(step.shape) for step in self.steps if step.kind == kind]


class Shapes(fx.Interpreter):
    """Runs a traced network, and notes the shape of every result. (torch.fx's own ShapeProp imports sympy: 0.4 s and 40 MB.)"""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta["shape"] = tuple(result.shape[1:]) if isinstance(result, Tensor) else ()
        return result


def trace(model: nn.Module, input_shape: tuple[int, ...]) -> Program:
    """Return the program of a network of images [c, h, w]; InputError names what cannot be followed."""
    try:
        with torch.random.fork_rng(devices=[]):
            graph = fx.symbolic_trace(model.eval())
            Shapes(graph).run(torch.zeros(1, *input_shape))
    except Exception as error:  # torch.fx runs the user's code, which may raise anything
        raise InputError(f"{type(model).__name__} cannot be traced by torch.fx: {one_line(error)}") from None
    steps: list[Step] = []
    place: dict[fx.Node, int] = {}
    for node in graph.graph.nodes:
        if node.op == "output":
            if node.args[0] is not node.prev:
                raise InputError(f"{type(model).__name__} returns {node.args[0]}: expected the result of its last step")
            continue
        module = graph.get_submodule(node.target) if node.op == "call_module" else None
        kind, options = _describe(node, module)
        inputs = tuple(place[argument] for argument in node.all_input_nodes)
        place[node] = len(steps)
        name = str(node.target) if module is not None else node.name
        steps.append(Step(kind, name, inputs, node.meta["shape"], options))
    held = {name.rpartition(".")[0] for name in model.state_dict()}
    if unread := sorted(held - {step.name for step in steps}):
        raise InputError(f"tensors of {unread[0] or 'the network itself'} are used in a way that cannot be followed")
    layout = Layout.of({name: t for name, t in model.state_dict().items() if t.is_floating_point()})
    return Program(tuple(steps), layout)


def _describe(node: fx.Node, module: nn.Module | None) -> tuple[str, dict[str, Any]]:
    """Return the kind and the options of a traced node."""
    if node.op == "placeholder":
        return "input", {}
    kind = MODULES.get(type(module)) if module is not None else FUNCTIONS.get(node.target)
    if kind is None:
        target = type(module).__name__ if module is not None else getattr(node.target, "__name__", node.target)
        raise InputError(f"step {node.name} is {target}, which is not supported")
    match module:
        case nn.Conv2d():
            if module.padding_mode != "zeros" or isinstance(module.padding, str):
                raise InputError(f"step {node.name}: a convolution padded with {module.padding_mode} is not supported")
            if module.dilation != (1, 1):
                raise InputError(f"step {node.name}: a dilated convolution is not supported")
            names = ("stride", "padding", "groups")
            return kind, {name: getattr(module, name) for name in names}
        case nn.GroupNorm() | nn.BatchNorm2d():
            if not module.affine or (isinstance(module, nn.BatchNorm2d) and not module.track_running_stats):
                raise InputError(f"step {node.name}: a norm without weights or running statistics is not supported")
            own = {"groups": module.num_groups} if kind == "group_norm" else {"momentum": module.momentum}
            return kind, {"eps": module.eps} | own
        case nn.MaxPool2d() | nn.AvgPool2d():
            names = ("kernel_size", "stride", "padding", "ceil_mode")
            return kind, {name: getattr(module, name) for name in names}
        case nn.AdaptiveAvgPool2d():
            return kind, {"output_size": module.output_size}
    if kind == "mean" and sorted(_argument(node, 1, "dim")) not in ([2, 3], [-2, -1]):
        raise InputError(f"step {node.name}: only means over height and width are supported")
    if kind == "cat" and _argument(node, 1, "dim") not in (1, -3):
        raise InputError(f"step {node.name}: only channels can be concatenated")
    if kind == "flatten" and module is None and _argument(node, 1, "start_dim") != 1:
        raise InputError(f"step {node.name}: only a flattening of all but the first axis is supported")
    if kind == "add" and len(node.all_input_nodes) != 2:
        raise InputError(f"step {node.name}: only two results can be added")
    if kind in ("max_pool", "avg_pool", "adaptive_pool"):
        names = ("output_size",) if kind == "adaptive_pool" else ("kernel_size", "stride", "padding")
        return kind, dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    return kind, {}


def _argument(node: fx.Node, place: int, name: str) -> Any:
    """Return a positional or named argument of a call."""
    value = node.args[place] if len(node.args) > place else node.kwargs.get(name)
    return list(value) if isinstance(value, (tuple, list)) else value


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
    Inside, results are [n, b, h, w, c] or [n, b, f], with n = 1 as long as all networks share them.
    """
    results: list[Tensor] = []
    masks = iter(dropout)
    for step in program.steps:
        x, y = (results[step.inputs[0]] if step.inputs else images), None
        option = step.options
        tensor = {key.rpartition(".")[2]: weights[key] for key in program.tensors_of(step)}
        match step.kind:
            case "input":
                y = (images if images.dim() == 5 else images[None]).permute(0, 1, 3, 4, 2)
            case "conv":
                y = convolve(x, tensor["weight"], option["stride"], option["padding"], option["groups"])
                if "bias" in tensor:
                    y += tensor["bias"][:, None, None, None]
            case "linear":
                y = torch.matmul(x, tensor["weight"].mT)
                if "bias" in tensor:
                    y = y + tensor["bias"][:, None]
            case "relu" if tanh is not None:
                y = _relu_or_tanh(x, tanh, program.may_overwrite(step.inputs[0]))
            case "group_norm":
                grouped = x.unflatten(4, (option["groups"], -1)).movedim(4, 2)
                y = F.layer_norm(grouped, grouped.shape[3:], eps=option["eps"]).movedim(2, 4).flatten(4)
                y = torch.addcmul(tensor["bias"][:, None, None, None], y, tensor["weight"][:, None, None, None])
            case "batch_norm":
                mean, variance = tensor["running_mean"], tensor["running_var"]
                if running is not None:
                    variance, mean = torch.var_mean(x, (1, 2, 3), correction=0)
                    pixels = x[0, ..., 0].numel()
                    unbiased = variance * (pixels / (pixels - 1))
                    for key, value in (("running_mean", mean), ("running_var", unbiased)):
                        running[f"{step.name}.{key}"] = torch.lerp(tensor[key], value, option["momentum"]).detach()
                scale = tensor["weight"] * torch.rsqrt(variance + option["eps"])
                y = (x - mean[:, None, None, None]) * scale[:, None, None, None] + tensor["bias"][:, None, None, None]
            case "max_pool":
                y = _by_channel(F.max_pool2d, x, option)
            case "avg_pool":
                y = _by_channel(F.avg_pool2d, x, option)
            case "adaptive_pool":
                y = _by_channel(F.adaptive_avg_pool2d, x, option)
            case "mean":
                y = x.mean((2, 3))
            case "flatten":  # in the order of torch's images: channel by channel
                y = x.movedim(4, 2).flatten(2) if x.dim() == 5 else x
            case "add":
                y = x + results[step.inputs[1]]
            case "cat":
                y = torch.cat([results[i] for i in step.inputs], -1)
            case "dropout":
                y = x * next(masks).view(x.shape) if dropout else x
            case "identity":
                y = x
            case _:
                y = POINTWISE[step.kind](x)
        results.append(y)
    return results[-1]


def _by_channel(function: Callable[..., Tensor], x: Float[Tensor, "n b h w c"], options: dict[str, Any]) -> Tensor:
    """Return what a pooling of images [b, c, h, w] makes of those of all networks."""
    y = function(x.flatten(0, 1).permute(0, 3, 1, 2), **options)
    return y.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def _relu_or_tanh(x: Tensor, tanh: Bool[Tensor, " n"], overwrite: bool) -> Tensor:
    """Return tanh of the networks that are flagged and ReLU of the others, in the memory of x if it may be overwritten."""
    if tanh.all():
        return x.tanh_() if overwrite else x.tanh()
    if not tanh.any():
        return x.relu_() if overwrite else x.relu()
    return torch.where(tanh.view(-1, *[1] * (x.dim() - 1)), torch.tanh(x), torch.relu(x))
