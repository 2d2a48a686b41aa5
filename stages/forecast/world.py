"""Small networks of several kinds, how each is trained, and their runs: the world from which forecasters learn that serve any run.

Axes: b images, c channels, s pixels of a side, t snapshots, p weights.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

from stages.common.files import load_metadata
from stages.common.optim import warmup_cosine
from stages.common.randomness import seeded_init
from stages.common.stage import StageParams
from stages.common.vectors import Layout
from stages.forecast.regimes import direction
from stages.forecast.trajectory import Trajectory

WARMUP_FRACTION = 0.05  # of the steps of a schedule that warms up
MOMENTUM = 0.9  # of SGD
MUON_SHARE = 0.1  # of Muon's rate: the rate at which AdamW moves what is no matrix


def strided(channels: int, width: int, classes: int) -> nn.Sequential:
    """Three convolutions of 3x3, the first with stride 2 and no padding, and a linear layer on global averages (NiNo's tasks)."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )


def pooled(channels: int, width: int, classes: int) -> nn.Sequential:
    """Two convolutions of 5x5 with pooling and two linear layers: LeNet's shape, of any width and image."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 5, padding=2),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(3),
        nn.Flatten(),
        nn.Linear(18 * width, 6 * width),
        nn.ReLU(),
        nn.Linear(6 * width, classes),
    )


def perceptron(channels: int, width: int, classes: int) -> nn.Sequential:
    """Two hidden layers on 8x8 averages of the pixels."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(8),
        nn.Flatten(),
        nn.Linear(64 * channels, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


class Block(nn.Module):
    """A residual block with batch normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.c2, self.n2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Float[Tensor, "b c s s"]) -> Float[Tensor, "b c s s"]:
        return relu(x + self.n2(self.c2(relu(self.n1(self.c1(x))))))


def residual(channels: int, width: int, classes: int) -> nn.Sequential:
    """Two residual blocks at half the resolution."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Block(width),
        Block(width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, classes),
    )


NETWORKS: dict[str, Callable[[int, int, int], nn.Sequential]] = {
    "strided": strided,
    "pooled": pooled,
    "perceptron": perceptron,
    "residual": residual,
}


class Recipe(StageParams):
    """How one run of the world is trained."""

    network: str  # of NETWORKS
    width: PositiveInt
    image_size: PositiveInt  # pixels, to which images are resized
    optimizer: str  # adam, adamw, sgd with MOMENTUM, or muon with AdamW for what is no matrix
    learning_rate: PositiveFloat
    schedule: str  # constant or cosine
    batch_size: PositiveInt
    steps: PositiveInt
    seed: NonNegativeInt


def build_network(recipe: Recipe, channels: int, classes: int) -> nn.Sequential:
    """Return the untrained network of a recipe, drawn by its seed."""
    with seeded_init(recipe.seed):
        return NETWORKS[recipe.network](channels, recipe.width, classes)


def build_optimizers(network: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return what steps together: one optimiser, or Muon for matrices and AdamW for the rest."""
    parameters, rate = list(network.parameters()), recipe.learning_rate
    match recipe.optimizer:
        case "adam":
            return [torch.optim.Adam(parameters, rate, fused=True)]
        case "adamw":
            return [torch.optim.AdamW(parameters, rate, fused=True)]
        case "sgd":
            return [torch.optim.SGD(parameters, rate, momentum=MOMENTUM, fused=True)]
        case "muon":
            matrices = [p for p in parameters if p.dim() == 2]
            rest = [p for p in parameters if p.dim() != 2]
            return [torch.optim.Muon(matrices, rate), torch.optim.AdamW(rest, MUON_SHARE * rate, fused=True)]
        case other:
            raise ValueError(f"expected adam, adamw, sgd or muon, got {other!r}")


def directions_of(network: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Float[Tensor, " p"]:
    """Return the `direction` of all weights, in the order of the network's parameters; 0 before the first step."""
    known = {
        p: direction(p, optimizer.state.get(p, {}), group)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    return torch.cat([known[p].reshape(-1) for p in network.parameters()]).detach()


def rate_factor(recipe: Recipe) -> Callable[[int], float]:
    """Return step -> factor of the learning rate."""
    return warmup_cosine(recipe.steps, WARMUP_FRACTION) if recipe.schedule == "cosine" else lambda _: 1.0


def world_input(pixels: Float[Tensor, "n c h w"], image_size: int) -> Float[Tensor, "n c s s"]:
    """Return images resized, each channel standardised by its own mean and spread over all of them."""
    if pixels.shape[-2:] != (image_size, image_size):
        pixels = interpolate(pixels, (image_size, image_size), mode="bilinear", antialias=True)
    mean, std = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True)
    return (pixels - mean) / std


def load_world_run(path: Path, with_state: bool) -> tuple[Trajectory, Recipe]:
    """Return a run of train_world, with the optimiser's state or of weights alone, and its recipe."""
    metadata = load_metadata(path)
    with safe_open(path, "pt") as file:
        weights, state = file.get_tensor("weights"), file.get_tensor("state") if with_state else None
    return Trajectory(Layout.from_metadata(metadata), weights, state), Recipe(**metadata["recipe"])
