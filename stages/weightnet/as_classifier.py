"""Others' networks as classifiers of a zoo's images: what they are given, and what of their results are logits.

People flatten images before the network, repeat them to three channels or resize them, return features beside logits, or dictionaries.
The network stays as it is, with its names: hooks before and behind it hand over what it takes and take what is asked of it.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from stages.common.stage import InputError
from stages.weightnet.tracing.recording import plain

# of one image, as a network takes it: channels, height and width; height and width; or numbers in a row
Shape = tuple[int, ...]

SIDES = (32, 64, 96, 128, 224, 299)  # pixels of images that people resize theirs to
TRIED = 2  # images that a network is tried on
LOGITS = "logits"
GIVEN = "images are given to it as"  # how a note begins
WIDEST = 4  # pixels of a black border that people put around images, LeNet-5's two for one


def as_classifier(module: nn.Module, shape: Shape, classes: int, takes: Shape | None = None) -> nn.Module:
    """Return a network in eval mode that gives its logits for images [b, *shape]. takes: the shape that it was made for; None: try.

    It is the same module, in which hooks are left. InputError if it runs on none of the usual shapes, or gives no logits.
    """
    module = getattr(module, "_orig_mod", module).eval()  # which torch.compile wraps
    if isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
        return module
    module.register_forward_hook(partial(take_logits, classes))
    takes = fitting_shape(module, shape) if takes is None else takes
    if takes != shape:
        module.register_forward_pre_hook(partial(give_images, takes))
    return module


def shapes_given(module: nn.Module) -> list[Shape]:
    """Return the shape in which a network that `as_classifier` returned is given images, if that is not their own."""
    hooks = module._forward_pre_hooks.values()
    return [hook.args[0] for hook in hooks if getattr(hook, "func", None) is give_images]


def how_given(module: nn.Module, shape: Shape) -> list[str]:
    """Return what people should know of how images [*shape] are given to a network that `as_classifier` returned."""
    own = "x".join(map(str, shape))
    return [
        f"{GIVEN} {'x'.join(map(str, takes))}, the zoo's are {own}: --input-shape says otherwise"
        for takes in shapes_given(module)
    ]


def border_of(module: nn.Module, shape: Shape) -> int:
    """Return how wide a border would make images [c, h, w] as large as those that a network is given; 0 if that is none that people use."""
    for takes in shapes_given(module):
        more = [taken - own for taken, own in zip(takes[-2:], shape[-2:], strict=True)] if len(takes) > 1 else [0]
        if len(set(more)) == 1 and more[0] % 2 == 0 and 0 < more[0] <= 2 * WIDEST:
            return more[0] // 2
    return 0


def give_images(takes: Shape, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what a network is given in place of images: flat, of other channels, resized."""
    images, *others = args
    return adapted(images, takes), *others


def adapted(images: Tensor, takes: Shape) -> Tensor:
    """Return images [b, c, h, w] in another shape; InputError if there is no way to it.

    One channel is repeated, several become their mean; sizes change as torchvision's Resize changes them (bilinear).
    """
    channels = {3: takes[0], 2: 1}.get(len(takes), images.shape[1])
    if channels != images.shape[1]:
        images = images.mean(1, keepdim=True)
        images = images.expand(-1, channels, -1, -1) if channels > 1 else images
    size = tuple(takes[-2:]) if len(takes) > 1 else tuple(images.shape[2:])
    if size != images.shape[2:]:
        smaller = size[0] < images.shape[2]
        images = interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=smaller)
    given = images if len(takes) == 3 else images.flatten(1) if len(takes) == 1 else images.squeeze(1)
    if tuple(given.shape[1:]) != takes:
        made, asked = (" ".join(map(str, some)) for some in (given.shape[1:], takes))
        raise InputError(
            f"images of {made} cannot be given as {asked}: expected C H W, H W, or as many numbers in a row"
        )
    return given


def usual_shapes(shape: Shape) -> list[Shape]:
    """Return the shapes in which people give such images to networks, the plainest first."""
    channels, *size = shape
    colours = dict.fromkeys((channels, 3))
    rows: list[Shape] = [tuple(size)] if channels == 1 else []
    others = [(c, side, side) for side in SIDES if side > size[0] for c in colours]
    return [shape, (channels * size[0] * size[1],), *rows, *((c, *size) for c in colours if c != channels), *others]


@torch.no_grad()
def fitting_shape(module: nn.Module, shape: Shape) -> Shape:
    """Return the first of the usual shapes on which a network gives a row of numbers for each image; InputError says why none does."""
    first = ""
    tensors = [tensor for tensor in module.state_dict().values() if isinstance(tensor, Tensor)]
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
    for takes in usual_shapes(shape) if len(shape) == 3 else [shape]:
        images = torch.zeros(TRIED, *takes, dtype=dtype)
        try:
            outputs = module(images)
        except Exception as error:  # others' code may raise anything
            first = first or plain(error)
            continue
        if not isinstance(outputs, Tensor):
            first = first or f"it returns {described(outputs)}: expected a tensor of one number for each class"
        elif outputs.dim() == 2 and len(outputs) == TRIED:
            return takes
    if first.startswith("it returns"):
        raise InputError(f"{type(module).__name__}: {first}")
    return shape  # what goes wrong there is told where it is run


def take_logits(classes: int, _module: nn.Module, _args: object, outputs: Any) -> Any:
    """Return what of a network's results are its logits, without axes of one pixel; what cannot be told is left as it is.

    Of a mapping or an object those by that name, of several results the only ones of as many numbers as there are classes.
    """
    named = outputs.get(LOGITS) if isinstance(outputs, Mapping) else getattr(outputs, LOGITS, None)
    if isinstance(named, Tensor):
        outputs = named
    elif isinstance(outputs, Mapping | Sequence):
        tensors = [output for output in results_of(outputs) if isinstance(output, Tensor) and output.dim() > 1]
        fitting = [output for output in tensors if output.shape[1] == classes] if len(tensors) > 1 else tensors
        outputs = fitting[0] if len(fitting) == 1 else outputs
    if isinstance(outputs, Tensor) and outputs.dim() > 2 and outputs[0].numel() == outputs.shape[1]:
        return outputs.flatten(1)
    return outputs


def described(outputs: object) -> str:
    """Return what a network returned, for people: the kind, and the shapes of its tensors."""
    shapes = [str(list(part.shape[1:])) for part in results_of(outputs) if isinstance(part, Tensor)]
    return f"a {type(outputs).__name__}" + (f" of {', '.join(shapes)} for an image" if shapes else "")


def results_of(outputs: object) -> list[Any]:
    """Return the values of a mapping, or what is in a sequence."""
    if isinstance(outputs, Mapping):
        return list(outputs.values())
    return list(outputs) if isinstance(outputs, Sequence) else []
