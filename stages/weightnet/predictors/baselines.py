"""What WeightNet is measured against: readers of weights of one architecture, or of a part of what WeightNet reads.

Axes: n networks, d neurons that are written to, c neurons that are read, f features, p weights.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu

from stages.weightnet.predictors.layers import WIDTH, Dropout, Features
from stages.weightnet.predictors.weightnet import FREQUENCIES, read_edge, read_vector
from stages.weightnet.zoo.networks import Networks


class NeuralFunctional(nn.Module):
    """Layers of features of weights that move with them under relabelling (NFN, Zhou et al. 2023, arXiv:2302.14040, HNP).

    Each layer adds to a weight's features linear maps of: itself, the means over its row and over its column, over the rows
    and columns of the neighbouring layers that share its neurons, and over its tensor. Of one architecture: every tensor has
    maps of its own. Biases enter as features of their neurons.
    """

    def __init__(self, networks: Networks, d: int, layers: int) -> None:
        super().__init__()
        edges = len(networks.symmetry.edges)
        widths = [2 * FREQUENCIES**2, *[d] * layers]
        self.maps = nn.ModuleList(
            nn.ModuleList(
                nn.ModuleDict(
                    {
                        "own": nn.Linear(w, d),
                        "target": nn.Linear(2 * w + 1, d),
                        "source": nn.Linear(2 * w + 1, d),
                        "all": nn.Linear(w, d),
                    }
                )
                for _ in range(edges)
            )
            for w in widths[:-1]
        )
        self.read = nn.Sequential(nn.Linear(edges * d, WIDTH), nn.GELU())

    def forward(self, networks: Networks) -> Features:
        symmetry = networks.symmetry
        values = [read_edge(networks, edge, nn.Identity()) for edge in symmetry.edges]
        like, sizes = values[0], symmetry.sizes
        vectors = {group: like.new_zeros(len(networks), size, 1) for group, size in sizes.items()}
        for vector in symmetry.vectors:
            vectors[vector.group] = vectors[vector.group] + read_vector(networks, vector)[..., None]
        for maps in self.maps:
            width = values[0].shape[3]
            rows = {group: like.new_zeros(len(networks), size, width) for group, size in sizes.items()}
            columns = dict(rows)
            for edge, x in zip(symmetry.edges, values, strict=True):
                rows[edge.target] = rows[edge.target] + x.mean(2)
                columns[edge.source] = columns[edge.source] + x.mean(1)
            neurons = {group: torch.cat([rows[group], columns[group], vectors[group]], 2) for group in sizes}
            values = [
                gelu(
                    of["own"](x)
                    + of["target"](neurons[edge.target])[:, :, None]
                    + of["source"](neurons[edge.source])[:, None]
                    + of["all"](x.mean((1, 2)))[:, None, None]
                )
                for edge, x, of in zip(symmetry.edges, values, maps, strict=True)
            ]
        return self.read(torch.cat([x.mean((1, 2)) for x in values], 1))


class FlatMLP(nn.Module):
    """All weights in one vector -> features. sort: hidden neurons in the order of their incoming norms (canonicalisation)."""

    def __init__(self, networks: Networks, sort: bool) -> None:
        super().__init__()
        self.sort = sort
        first = nn.Linear(networks.program.layout.size, WIDTH)
        self.body = nn.Sequential(first, nn.GELU(), Dropout(0.2), nn.Linear(WIDTH, WIDTH), nn.GELU(), Dropout(0.2))

    def flatten(self, networks: Networks) -> Float[Tensor, "n p"]:
        """Return the weights of each network in units of He's standard deviation, sorted if they are to be."""
        weights = dict(networks.weights)
        if self.sort:
            from_norms = {}
            for axis in networks.symmetry.axes:
                if axis.axis == 0 and axis.tensor in {edge.tensor for edge in networks.symmetry.edges}:
                    from_norms.setdefault(axis.parts[0].group, weights[axis.tensor].flatten(2).norm(dim=2).argsort(1))
            for axis in networks.symmetry.axes:
                index = []
                for part in axis.parts:
                    still = torch.arange(part.size).expand(len(networks), part.size)
                    order = from_norms[part.group] if part.group in networks.symmetry.hidden else still
                    places = order[..., None] * part.block + torch.arange(part.block)
                    index.append(part.start + places.flatten(1))
                weight = weights[axis.tensor]
                shape = [len(networks)] + [1] * (weight.dim() - 1)
                shape[axis.axis + 1] = -1
                weights[axis.tensor] = weight.gather(axis.axis + 1, torch.cat(index, 1).view(shape).expand_as(weight))
        scaled = [t.flatten(1) * (t[0, 0].numel() / 2) ** 0.5 for t in weights.values()]
        return torch.cat(scaled, 1)

    def forward(self, networks: Networks) -> Features:
        return self.body(self.flatten(networks))


class OneSided(nn.Module):
    """What "attention within layers, then across layers" does if a token is a row of weights in the order of its columns.

    It ignores the order of rows, each layer's by itself: also orders that do not belong together, which change the network.
    """

    def __init__(self, networks: Networks, d: int, heads: int) -> None:
        super().__init__()

        def layer() -> nn.Module:
            return nn.TransformerEncoderLayer(d, heads, 2 * d, 0.0, batch_first=True, activation="gelu")

        self.read = nn.ModuleList(nn.Linear(row.shape[2], d) for row in self.rows(networks))
        self.within = nn.ModuleList(layer() for _ in self.read)
        self.place = nn.Parameter(0.1 * torch.randn(len(self.read), d))
        self.across = layer()
        self.head = nn.Sequential(nn.Linear(d, WIDTH), nn.GELU())

    @staticmethod
    def rows(networks: Networks) -> list[Float[Tensor, "n d c"]]:
        """Return the rows of every weight tensor, in units of He's standard deviation."""
        tensors = [networks.weights[edge.tensor].flatten(2) for edge in networks.symmetry.edges]
        return [t * (t.shape[2] / 2) ** 0.5 for t in tensors]

    def forward(self, networks: Networks) -> Features:
        layers = zip(self.read, self.within, self.rows(networks), strict=True)
        tokens = torch.stack([within(read(rows)).mean(1) for read, within, rows in layers], 1)
        return self.head(self.across(tokens + self.place).mean(1))
