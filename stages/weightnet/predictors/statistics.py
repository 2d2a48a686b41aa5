"""Numbers about weights that do not depend on the order of hidden neurons: what the simple predictors read."""

import torch
from jaxtyping import Float
from torch import Tensor

from stages.common.metrics import QUANTILES
from stages.weightnet.tracing.symmetry import Edge
from stages.weightnet.zoo.networks import Networks

STATISTICS = 2 + len(QUANTILES)


def seven_statistics(x: Float[Tensor, "n m"]) -> Float[Tensor, "n 7"]:
    """Return mean, variance and five quantiles of each row (Unterthiner et al. 2020, section 4)."""
    variance, mean = torch.var_mean(x, 1, correction=0)
    quantiles = torch.quantile(x, torch.tensor(QUANTILES, dtype=x.dtype), 1).T
    return torch.cat([mean[:, None], variance[:, None], quantiles], 1)


def tensor_statistics(networks: Networks) -> Float[Tensor, "n f"]:
    """Return the statistics of every tensor, and the activation: of networks of one architecture."""
    parts = [seven_statistics(tensor.flatten(1)) for tensor in networks.weights.values()]
    return torch.cat([*parts, networks.tanh[:, None].to(parts[0])], 1)


def pooled_statistics(networks: Networks) -> Float[Tensor, "n f"]:
    """Return statistics that networks of any architecture have, of weights in units of He's standard deviation.

    Of the first weights, the mean over those between, and the last, each with the mean over the vectors of its neurons; then
    the number of weight tensors, the logarithm of the number of weights, and the activation.
    """
    vectors: dict[str, list[Tensor]] = {}
    for vector in networks.symmetry.vectors:
        values = networks.weights[vector.tensor][:, vector.rows]
        vectors.setdefault(vector.group, []).append(seven_statistics(values.flatten(1)))
    edges: dict[tuple[str, int], Edge] = {}
    for edge in networks.symmetry.edges:  # a layer whose rows fall into several groups counts once
        edges.setdefault((edge.tensor, edge.columns.start), edge)
    layers = []
    for edge in edges.values():
        weight = networks.weights[edge.tensor]
        own = seven_statistics(weight.flatten(1) * (weight[0, 0].numel() / 2) ** 0.5)
        nothing = [own.new_zeros(len(own), STATISTICS)]
        layers.append(torch.cat([own, torch.stack(vectors.get(edge.target, nothing)).mean(0)], 1))
    between = torch.stack(layers[1:-1]).mean(0) if len(layers) > 2 else torch.zeros_like(layers[0])
    sizes = torch.tensor([len(layers), networks.program.layout.size]).log().expand(len(networks), 2)
    return torch.cat([layers[0], between, layers[-1], sizes.to(between), networks.tanh[:, None].to(between)], 1)


NAMES = ("mean", "variance", "least", "lower quartile", "median", "upper quartile", "largest")
PARTS = tuple(
    f"{what} of {place} layer" for place in ("the first", "a hidden", "the last") for what in ("weights", "biases")
)
DEPTH = len(PARTS) * STATISTICS  # where the number of weight tensors lies
BEYOND = 0.1  # of the zoo's range: what lies less far outside it is no other kind of network


def range_of_statistics(values: Float[Tensor, "n f"]) -> Float[Tensor, "2 f"]:
    """Return the least and the largest of each statistic."""
    return torch.stack([values.amin(0), values.amax(0)])


def what_is_outside(values: Float[Tensor, " f"], ranges: Float[Tensor, "2 f"]) -> list[str]:
    """Return in words which parts of a network lie outside what a zoo has: scales of weights and biases, depth, size."""
    low, high = ranges
    excess = torch.maximum(values - high, low - values) / (high - low + 1e-6)
    found = []
    for number, part in enumerate(PARTS):
        places = slice(number * STATISTICS, (number + 1) * STATISTICS)
        most = int(excess[places].argmax())
        place = places.start + most
        if excess[place] > BEYOND:
            ends = f"the zoo's {low[place]:.2g} to {high[place]:.2g}"
            found.append(f"{part}: {NAMES[most]} {values[place]:.2g}, {ends}")
    for place, name in ((DEPTH, "layers with weights"), (DEPTH + 1, "weights")):
        if excess[place] > BEYOND:
            ends = f"the zoo's {low[place].exp():.0f} to {high[place].exp():.0f}"
            found.append(f"{name}: {values[place].exp():.0f}, {ends}")
    return found
