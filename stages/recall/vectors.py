"""Networks as vectors of their weights."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from stages.recall.vit import Weights

Layout = Mapping[str, torch.Size]


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


def initialise(layout: Layout, random: torch.Generator) -> Float[Tensor, " p"]:
    """Return random first weights: Glorot's for matrices, norms that do nothing, biases of zero."""
    parts = []
    for name, shape in layout.items():
        fans = shape[0] + math.prod(shape[1:])
        constant = 1.0 if name.endswith("weight") else 0.0
        matrix = torch.randn(shape, generator=random) * (2 / fans) ** 0.5
        parts.append(matrix if len(shape) > 1 else torch.full(shape, constant))
    return flatten(dict(zip(layout, parts, strict=True)))
