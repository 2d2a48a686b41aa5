"""Layers that all readers of networks share: from what a reader makes of a network to its properties."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

Features = Float[Tensor, "n f"]


WIDTH = 64  # of what goes into the last layers


class Dropout(nn.Module):
    """Dropout that draws from a generator of its own, since several predictors train side by side."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.random = rate, torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand(x.shape, generator=self.random) >= self.rate) / (1 - self.rate)


def two_layers(width: int) -> nn.Sequential:
    """Return a small network from `width` numbers to features."""
    return nn.Sequential(nn.Linear(width, WIDTH), nn.GELU(), Dropout(0.1), nn.Linear(WIDTH, WIDTH), nn.GELU())


def last_layers(width: int, properties: int) -> nn.Sequential:
    """Return what predicts properties from features."""
    last = nn.Linear(WIDTH, properties)
    return nn.Sequential(Dropout(0.1), nn.Linear(width, WIDTH), nn.GELU(), last)
