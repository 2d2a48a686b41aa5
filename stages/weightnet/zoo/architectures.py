"""The architectures of the zoo: ordinary modules, from whose programs everything else follows. ReLU stands for the activation.

Small ones of our own, and torchvision's, whose millions of weights want an accelerator.
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from stages.common.stage import InputError
from stages.weightnet.tracing.program import Program, trace
from stages.weightnet.tracing.symmetry import Symmetry, derive_symmetry


def convolved(widths: list[int], strides: list[int], channels: int, norm: bool) -> list[nn.Module]:
    """Return 3x3 convolutions, each with a ReLU behind it, and between them a batch norm, which takes the biases' place, if `norm`."""
    layers: list[nn.Module] = []
    for (c, d), stride in zip(pairwise([channels, *widths]), strides, strict=True):
        layers += [nn.Conv2d(c, d, 3, stride, 1, bias=not norm), *([nn.BatchNorm2d(d)] if norm else []), nn.ReLU()]
    return layers


def convolutional(
    widths: list[int], strides: list[int], channels: int, classes: int, norm: bool = False
) -> nn.Sequential:
    """Return 3x3 convolutions, a mean over pixels and a linear layer."""
    layers = convolved(widths, strides, channels, norm)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(widths[-1], classes))


def flattened(channels: int, classes: int, side: int, norm: bool = False) -> nn.Sequential:
    """Return two convolutions whose pixels are flattened into a hidden layer."""
    pixels = (-(-side // 4)) ** 2
    convolutions = convolved([8, 12], [2, 2], channels, norm)
    return nn.Sequential(
        *convolutions, nn.Flatten(), nn.Linear(12 * pixels, 24), nn.ReLU(), nn.Dropout(), nn.Linear(24, classes)
    )


def lenet(channels: int, classes: int, side: int) -> nn.Sequential:
    """Return LeNet-5 (LeCun et al. 1998) with padded convolutions and mean pooling, for small images."""
    pixels = (side // 4) ** 2
    convolutions = [nn.Conv2d(channels, 6, 5, 1, 2), nn.ReLU(), nn.AvgPool2d(2)]
    convolutions += [nn.Conv2d(6, 16, 5, 1, 2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()]
    hidden = [nn.Linear(16 * pixels, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Dropout()]
    return nn.Sequential(*convolutions, *hidden, nn.Linear(84, classes))


def perceptron(channels: int, classes: int, side: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return two hidden layers that read all pixels."""
    hidden = [nn.Linear(channels * side**2, 64), act(), nn.Linear(64, 32), act(), nn.Dropout()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(32, classes))


class Residual(nn.Module):
    """A stem and two residual blocks with layer norms over channels and pixels (GroupNorm of one group)."""

    def __init__(self, channels: int, classes: int, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, 2, 1)
        self.first = self.block(width)
        self.second = self.block(width)
        self.act = nn.ReLU()
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout())
        self.head = nn.Linear(width, classes)

    @staticmethod
    def block(width: int) -> nn.Sequential:
        """Return what a block adds to the stream."""
        first = [nn.Conv2d(width, width, 3, 1, 1), nn.GroupNorm(1, width), nn.ReLU()]
        return nn.Sequential(*first, nn.Conv2d(width, width, 3, 1, 1), nn.GroupNorm(1, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = self.act(x + self.first(x))
        x = self.act(x + self.second(x))
        return self.head(self.pool(x))


# our own, by name: what makes one for images [channels, side, side] and so many classes; a line here is all that another takes
ARCHITECTURES: dict[str, Callable[[int, int, int], nn.Module]] = {
    "cnn3": lambda channels, classes, _: convolutional([16, 16, 16], [2, 2, 2], channels, classes),
    "cnn3_bn": lambda channels, classes, _: convolutional([16, 16, 16], [2, 2, 2], channels, classes, norm=True),
    "cnn4": lambda channels, classes, _: convolutional([12, 12, 16, 16], [2, 1, 2, 1], channels, classes),
    "flat": flattened,
    "flat_bn": partial(flattened, norm=True),
    "lenet": lenet,
    "perceptron": perceptron,
    "residual": lambda channels, classes, _: Residual(channels, classes),
    "sigmoid": partial(perceptron, act=nn.Sigmoid),
    "wide": lambda channels, classes, _: convolutional([24, 24, 24], [2, 2, 2], channels, classes),
}


def build_network(name: str, channels: int, classes: int, side: int) -> nn.Module:
    """Return the network called `name` for images [channels, side, side]: one of ours, or of torchvision's; else InputError."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name](channels, classes, side)
    return of_torchvision(name, channels, classes)


def of_torchvision(name: str, channels: int, classes: int) -> nn.Module:
    """Return torchvision's network called `name`, untrained; its first convolution reads images of `channels` channels."""
    from torchvision import models  # here: 1 s and 160 MB that our own do without

    if name not in models.list_models(models):
        raise InputError(
            f"no architecture is called {name}: there are {', '.join(ARCHITECTURES)}, and torchvision's "
            "(your own: my_code:name with --allow-code)"
        )
    network = models.get_model(name, weights=None, num_classes=classes)
    where, first = next((where, layer) for where, layer in network.named_modules() if isinstance(layer, nn.Conv2d))
    if first.in_channels != channels:
        sizes = (first.kernel_size, first.stride, first.padding)
        network.set_submodule(where, nn.Conv2d(channels, first.out_channels, *sizes, bias=first.bias is not None))
    return network


@cache
def zoo_program(name: str, channels: int, classes: int, side: int) -> tuple[Program, Symmetry]:
    """Return the program and the symmetry of the architecture called `name`."""
    with torch.random.fork_rng(devices=[]):
        program = trace(build_network(name, channels, classes, side), (channels, side, side))
    return program, derive_symmetry(program)
