"""LeNet-5 for square grey images, and its weights as one vector.

LeCun et al. 1998, "Gradient-based learning applied to document recognition", with ReLU and max pooling.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d, relu

from stages.common.randomness import generator

CHUNK = 250  # images


class LeNet(nn.Module):
    """Two convolutions and three linear layers: 61,706 weights on 28x28 pixels, 21,386 on 16x16."""

    def __init__(self, size: int, d_output: int, seed: int) -> None:
        """size: height and width in pixels, 16 or more. seed: of the initial weights, drawn as torch draws them."""
        super().__init__()
        if size < 16:
            raise ValueError(f"expected images of 16 pixels or more, got {size}")
        left = (size // 2 - 4) // 2  # pixels after convolutions and pooling
        self.c1 = nn.Conv2d(1, 6, 5, padding=2)
        self.c2 = nn.Conv2d(6, 16, 5)
        self.f1 = nn.Linear(16 * left * left, 120)
        self.f2 = nn.Linear(120, 84)
        self.f3 = nn.Linear(84, d_output)
        random = generator(seed, "lenet weights")
        with torch.no_grad():
            for layer in self.children():
                bound = layer.weight[0].numel() ** -0.5
                for parameter in layer.parameters():
                    parameter.uniform_(-bound, bound, generator=random)

    def forward(self, x: Float[Tensor, "b 1 s s"]) -> Float[Tensor, "b d_output"]:
        x = relu(max_pool2d(self.c1(x), 2))  # the same as pooling after ReLU, on a quarter of the numbers
        x = relu(max_pool2d(self.c2(x), 2))
        x = relu(self.f1(x.flatten(1)))
        return self.f3(relu(self.f2(x)))


@torch.no_grad()
def lenet_logits(network: Callable[[Tensor], Tensor], x: Float[Tensor, "n 1 s s"]) -> Float[Tensor, "n d_output"]:
    """Return the network's outputs for many images, in chunks that fit into the processor's cache."""
    return torch.cat([network(chunk) for chunk in x.split(CHUNK)])


def to_lenet_input(pixels: Float[Tensor, "n c h w"], size: int) -> Float[Tensor, "n 1 s s"]:
    """Return images as grey, standardised to the mean and spread of MNIST's pixels, resized if need be."""
    grey = pixels.mean(1, keepdim=True)
    if grey.shape[-2:] != (size, size):
        grey = interpolate(grey, (size, size), mode="bilinear", antialias=True)
    return ((grey - 0.1307) / 0.3081).contiguous(memory_format=torch.channels_last)
