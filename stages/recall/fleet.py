"""Fleets: many short fine-tunes of one base, each on a data set of its own, trained together."""

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import grad, vmap

from stages.recall.vit import Weights

Layout = Mapping[str, torch.Size]

BETAS = (0.9, 0.99)  # of Adam: a fine-tune has some tens of steps


def layout_of(weights: Weights) -> Layout:
    """Return the shapes by which a vector of all weights is cut."""
    return {name: weight.shape for name, weight in weights.items()}


def flatten(weights: Weights) -> Float[Tensor, " p"]:
    """Return all weights as one vector."""
    return torch.cat([weight.flatten() for weight in weights.values()])


def unflatten(vector: Float[Tensor, " p"], layout: Layout) -> Weights:
    """Return the weights of which `vector` is made."""
    parts = vector.split([math.prod(shape) for shape in layout.values()])
    return {name: part.view(shape) for (name, shape), part in zip(layout.items(), parts, strict=True)}


def train_stack(
    loss: Callable[..., Float[Tensor, ""]],
    first: Float[Tensor, "m p"],
    frozen: Weights,
    batch: Callable[[int], tuple[Tensor, ...]],
    learning_rates: Float[Tensor, " m"],
    steps: Int[Tensor, " m"],
    schedule: Callable[[int], float] = lambda _step: 1.0,
) -> Float[Tensor, "m p"]:
    """Train m networks at once by Adam, each at its own rate for its own number of steps; return their weights.

    `loss` is of one network's weight vector, its frozen weights and its part of a batch; `frozen` has all networks', stacked, and
    `batch` gives theirs at a step; `schedule` gives a factor of all rates.
    """
    w, m, v = first.clone(), torch.zeros_like(first), torch.zeros_like(first)
    gradient = vmap(grad(loss))
    for t in range(int(steps.max())):
        active = steps > t
        g = gradient(w, frozen, *batch(t))
        m.lerp_(g, 1 - BETAS[0])
        v.lerp_(g.square(), 1 - BETAS[1])
        size = -schedule(t) * learning_rates * active / (1 - BETAS[0] ** (t + 1))
        w.addcdiv_(m * size[:, None], (v / (1 - BETAS[1] ** (t + 1))).sqrt_().add_(1e-8))
    return w


def initialise(layout: Layout, random: torch.Generator) -> Float[Tensor, " p"]:
    """Return random first weights: Glorot's for matrices, norms that do nothing, biases of zero."""
    parts = []
    for name, shape in layout.items():
        fans = shape[0] + math.prod(shape[1:])
        constant = 1.0 if name.endswith("weight") else 0.0
        matrix = torch.randn(shape, generator=random) * (2 / fans) ** 0.5
        parts.append(matrix if len(shape) > 1 else torch.full(shape, constant))
    return flatten(dict(zip(layout, parts, strict=True)))
