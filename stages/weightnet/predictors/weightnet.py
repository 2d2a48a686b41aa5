"""WeightNet: a token for every neuron of a network of any architecture, and every weight an edge between two tokens.

It is exactly invariant to the order of hidden neurons, because every operation treats the neurons of a group alike.
Axes: n networks, t tokens, d width of a token; of an edge: d neurons that are written to, c that are read, f features.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, pad, scaled_dot_product_attention

from stages.weightnet.predictors.layers import WIDTH, Features
from stages.weightnet.tracing.symmetry import OUTPUT, Edge, Vector, is_input, without_groups
from stages.weightnet.zoo.networks import Networks

FREQUENCIES = 3  # cosines of a kernel, along each axis: all there are of a 3x3 kernel


PAIRS = 1 << 14  # of neurons, whose weights are read at a time


def signed_log(x: Tensor) -> Tensor:
    """Return x where it is small, and its order of magnitude with its sign where it is large."""
    return x.sign() * x.abs().log1p()


def cosines(size: int) -> Float[Tensor, "f s"]:
    """Return the first orthonormal cosines over `size` pixels, zero where there are fewer (the discrete cosine transform)."""
    frequency, place = torch.arange(FREQUENCIES)[:, None], torch.arange(size) + 0.5
    basis = (torch.pi * frequency * place / size).cos() * (2 / size) ** 0.5
    basis[0] *= 0.5**0.5
    basis[size:] = 0
    return basis


def read_edge(networks: Networks, edge: Edge, embed: Callable[[Tensor], Tensor]) -> Float[Tensor, "n d c f"]:
    """Return what WeightNet reads of the weights between two groups' neurons: low frequencies of the taps, in two units.

    In units of He's standard deviation, logarithmic; and in units of the network's own. A wider layer looks the same.
    embed: what is made of it, of a few rows at a time: of all, it would not fit into memory for large networks.
    """
    weight = without_groups(networks.weights[edge.tensor], edge.blocks)[:, edge.rows, edge.columns]
    weight = (
        weight.unflatten(2, (-1, *edge.taps))
        if weight.dim() == 3
        else weight.unflatten(3, (*edge.taps,))
        if weight.dim() == 4
        else weight
    )
    rows, columns = (cosines(size).to(weight) for size in edge.taps)
    fan_in = networks.weights[edge.tensor][0, 0].numel()
    numbers = weight.flatten(1)
    own = numbers.std(1) if numbers.shape[1] > 1 else numbers.abs()[:, 0]  # one number has no spread
    own = own[:, None, None, None] + 1e-6
    parts = []
    for part in weight.split(max(1, PAIRS // (len(networks) * weight.shape[2])), 1):
        taps = torch.einsum("ui,ndcij,vj->ndcuv", rows, part, columns).flatten(3)
        parts.append(embed(torch.cat([signed_log(taps * (4 * fan_in**0.5)), taps / own], 3)))
    return torch.cat(parts, 1)


def read_vector(networks: Networks, vector: Vector) -> Float[Tensor, "n size"]:
    """Return one value for each neuron of a group: the mean of a kernel, or of what it has for each pixel."""
    values = networks.weights[vector.tensor][:, vector.rows]
    values = values.flatten(2).mean(2) if values.dim() > 2 else values
    return values.unflatten(1, (-1, vector.block)).mean(2) if vector.block > 1 else values


Heard = dict[
    str, tuple[list[Tensor], ...]
]  # what comes to each group's neurons along several edges, several kinds of it


def sums(heard: Heard, tokens: Float[Tensor, "n t d"], sizes: dict[str, int]) -> list[Float[Tensor, "n t d"]]:
    """Return the sum of each kind of what is heard ([n, d, neurons]) for the neurons of all groups, zero where nothing is."""
    result = []
    for kind in range(len(next(iter(heard.values())))):
        parts = [
            torch.stack(kinds[kind]).sum(0) if kinds[kind] else tokens.new_zeros(len(tokens), tokens.shape[2], size)
            for kinds, size in zip(heard.values(), sizes.values(), strict=True)
        ]
        result.append(torch.cat(parts, 2).mT)
    return result


class Round(nn.Module):
    """Messages along the weights, forward and backward, then attention among the neurons of each layer."""

    def __init__(self, d: int, heads: int, cross: bool, intra: bool) -> None:
        super().__init__()
        self.cross, self.intra, self.heads = cross, intra, heads
        self.send = nn.Linear(d, 2 * d)
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(3))
        self.update = nn.Sequential(nn.Linear(3 * d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.norm = nn.LayerNorm(d)
        self.query_key_value = nn.Linear(d, 3 * d)
        self.mix = nn.Linear(d, d)
        self.feed_forward = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(
        self,
        tokens: Float[Tensor, "n t d"],
        edges: list[tuple[Edge, Float[Tensor, "n d out in"]]],
        sizes: dict[str, int],
    ) -> Float[Tensor, "n t d"]:
        if self.cross:
            forward, backward = (sent.mT.split(list(sizes.values()), 2) for sent in self.send(tokens).chunk(2, 2))
            forward, backward = dict(zip(sizes, forward, strict=True)), dict(zip(sizes, backward, strict=True))
            heard: Heard = {group: ([], []) for group in sizes}
            for edge, weight in edges:  # like the network's own sums, with learned functions of its weights
                d, c = weight.shape[2:]
                heard[edge.target][0].append((weight * forward[edge.source][:, :, None]).sum(3) / c**0.5)
                heard[edge.source][1].append((weight * backward[edge.target][..., None]).sum(2) / d**0.5)
            normed = [norm(x) for norm, x in zip(self.norms, (tokens, *sums(heard, tokens, sizes)), strict=True)]
            tokens = tokens + self.update(torch.cat(normed, 2))
        if self.intra:
            layers = self.by_layer(self.query_key_value(self.norm(tokens)), sizes)
            mixed = torch.cat([scaled_dot_product_attention(*layer) for layer in layers], 2)
            tokens = tokens + self.mix(mixed.transpose(1, 2).flatten(2))
        return tokens + self.feed_forward(tokens)

    def by_layer(self, mapped: Float[Tensor, "n t 3*d"], sizes: dict[str, int]) -> list[tuple[Tensor, ...]]:
        """Return queries, keys and values [n, heads, neurons, d / heads] of the neurons of each layer."""
        parts = mapped.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return list(zip(*(part.split(list(sizes.values()), 2) for part in parts), strict=True))


class WeightNet(nn.Module):
    """Networks of any architecture -> features [n, 64], the same for every order of the hidden neurons.

    classes: outputs of the networks; cross, intra: whether there are messages along weights, and attention within layers.
    """

    def __init__(self, classes: int, d: int, rounds: int, heads: int, cross: bool = True, intra: bool = True) -> None:
        super().__init__()
        self.edge = nn.Linear(2 * FREQUENCIES**2, d)
        self.vector = nn.ModuleDict({role: nn.Linear(2, d) for role in ("bias", "weight", "other")})
        self.place = nn.Linear(5, d)
        self.of_class = nn.Parameter(0.1 * torch.randn(classes, d))
        self.encode = nn.Linear(4 * d, d)
        self.rounds = nn.ModuleList(Round(d, heads, cross, intra) for _ in range(rounds))
        self.read = nn.Sequential(nn.Linear(8 * d, WIDTH), nn.GELU())
        self.d = d

    def forward(self, networks: Networks) -> Features:
        symmetry, n = networks.symmetry, len(networks)
        sizes = symmetry.sizes
        edges = [(e, read_edge(networks, e, self.edge).permute(0, 3, 1, 2).contiguous()) for e in symmetry.edges]
        one = edges[0][1]
        # mean and maximum of what comes in, mean of what goes out
        seen: Heard = {group: ([], [], []) for group in sizes}
        for edge, x in edges:
            active = gelu(x)
            seen[edge.target][0].append(active.mean(3))
            seen[edge.target][1].append(active.amax(3))
            seen[edge.source][2].append(active.mean(2))
        vectors: Heard = {group: ([one.new_zeros(n, self.d, size)],) for group, size in sizes.items()}
        for vector in symmetry.vectors:
            role, values = vector.tensor.rpartition(".")[2], read_vector(networks, vector)
            layer = self.vector[role if role in ("bias", "weight") else "other"]
            vectors[vector.group][0].append(layer(torch.stack([values, signed_log(20 * values)], 2)).mT)
        tokens = self._places(networks, one)
        tokens = tokens + self.encode(torch.cat([*sums(seen, tokens, sizes), *sums(vectors, tokens, sizes)], 2))
        for round_ in self.rounds:
            tokens = round_(tokens, edges, sizes)
        layers = dict(zip(sizes, tokens.split(list(sizes.values()), 1), strict=True))
        pooled = [torch.cat([x.mean(1), x.amax(1)], 1) for x in (layers[group] for group in symmetry.hidden)]
        output = layers[OUTPUT]
        summary = [pooled[0], torch.stack(pooled).mean(0), pooled[-1], output.mean(1), output.amax(1)]
        return self.read(torch.cat(summary, 1))

    def _places(self, networks: Networks, like: Tensor) -> Float[Tensor, "n t d"]:
        """Return what tells the layers apart: depth, whether it is the input or the output, width, activation."""
        groups = networks.symmetry.sizes
        rows = [
            torch.tensor([i / (len(groups) - 1), is_input(group), group == OUTPUT, torch.tensor(size).log() / 4])
            .to(like)
            .expand(len(networks), size, 4)
            for i, (group, size) in enumerate(groups.items())
        ]
        places = torch.cat(rows, 1)
        tanh = networks.tanh[:, None, None].to(like).expand(*places.shape[:2], 1)
        before = places.shape[1] - groups[OUTPUT]  # the output's neurons come last
        known = len(self.of_class) == groups[OUTPUT]  # other classes than the zoo's are all alike
        of_class = self.of_class if known else self.of_class.mean(0).expand(groups[OUTPUT], self.d)
        classes = pad(of_class, (0, 0, before, 0))
        return self.place(torch.cat([places, tanh], 2)) + classes


@torch.no_grad()
def attention_maps(model: WeightNet, networks: Networks) -> list[dict[str, Float[Tensor, "n s s"]]]:
    """Return how much each neuron attends to each of its layer, in every round: means over heads, rows of sum 1."""
    mapped: list[Tensor] = []
    hooks = [
        round_.query_key_value.register_forward_hook(lambda _module, _inputs, result: mapped.append(result))
        for round_ in model.rounds
    ]
    model(networks)
    for hook in hooks:
        hook.remove()
    sizes = networks.symmetry.sizes
    return [
        {
            group: (q @ k.mT / q.shape[3] ** 0.5).softmax(3).mean(1)
            for group, (q, k, _) in zip(sizes, round_.by_layer(result, sizes), strict=True)
        }
        for round_, result in zip(model.rounds, mapped, strict=True)
    ]
