"""Predictors of a network's properties from its weights.

WeightNet reads any architecture: a token for every neuron, and every weight an edge between two tokens. It is exactly invariant
to the order of hidden neurons, because every operation treats the neurons of a group alike. A probe runs the network on inputs
that it learns; a hybrid does both. The others are what they are measured against.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, log_softmax, pad, scaled_dot_product_attention

from stages.common.checkpoints import load_torch
from stages.common.metrics import COVERAGE
from stages.common.randomness import generator, seeded_init
from stages.weightnet.features import pooled_statistics
from stages.weightnet.program import run_stack
from stages.weightnet.symmetry import OUTPUT, Edge, Networks, Vector, is_input
from stages.weightnet.targets import own_units

Features = Float[Tensor, "n f"]
Kind = Literal["weightnet", "probe", "hybrid", "nfn", "mlp", "stats", "canonical", "one_sided"]

FREQUENCIES = 3  # cosines of a kernel, along each axis: all there are of a 3x3 kernel
WIDTH = 64  # of what goes into the last layers
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
    weight = networks.weights[edge.tensor][:, edge.rows, edge.columns]
    weight = weight.unflatten(2, (-1, *edge.taps)) if weight.dim() == 3 else weight
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


Heard = dict[
    str, tuple[list[Tensor], ...]
]  # what comes to each group's neurons along several edges, several kinds of it


def sums(heard: Heard, tokens: Float[Tensor, "n t d"]) -> list[Float[Tensor, "n t d"]]:
    """Return the sum of each kind of what is heard ([n, d, neurons]) for the neurons of all groups, zero where nothing is."""
    result = []
    sizes = [next(t.shape[2] for kind in kinds for t in kind) for kinds in heard.values()]
    for kind in range(len(next(iter(heard.values())))):
        parts = [
            torch.stack(kinds[kind]).sum(0) if kinds[kind] else tokens.new_zeros(len(tokens), tokens.shape[2], size)
            for kinds, size in zip(heard.values(), sizes, strict=True)
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
            normed = [norm(x) for norm, x in zip(self.norms, (tokens, *sums(heard, tokens)), strict=True)]
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
        tokens = tokens + self.encode(torch.cat([*sums(seen, tokens), *sums(vectors, tokens)], 2))
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


class Probe(nn.Module):
    """Networks of any architecture -> features [n, 64] of their answers to inputs that are learned.

    The inputs come from a linear generator (ProbeGen, Kahana et al. 2024, arXiv:2410.10811): a deep linear map keeps them smooth.
    """

    def __init__(self, classes: int, channels: int, side: int, probes: int) -> None:
        super().__init__()
        quarter = -(-side // 4)
        self.code = nn.Parameter(torch.randn(probes, 16, 1, 1))
        self.generate = nn.Sequential(
            nn.ConvTranspose2d(16, 32, quarter),
            nn.ConvTranspose2d(32, 16, 4, 2, 1),
            nn.ConvTranspose2d(16, channels, 4, 2, 1),
        )
        self.read = two_layers(probes * classes)
        self.side = side

    def forward(self, networks: Networks) -> Features:
        inputs = self.generate(self.code)[:, :, : self.side, : self.side]
        answers = run_stack(networks.program, networks.weights, inputs, networks.tanh)
        return self.read(log_softmax(answers, -1).flatten(1))


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


def last_layers(width: int, properties: int) -> nn.Sequential:
    """Return what predicts properties from features."""
    last = nn.Linear(WIDTH, properties)
    return nn.Sequential(Dropout(0.1), nn.Linear(width, WIDTH), nn.GELU(), last)


class Predictor(nn.Module):
    """Networks and their statistics -> standardised properties [n, k]. kind: what it reads them with.

    While a hybrid learns, each of its readers also predicts by itself: by one loss for all of them together, the one that fits
    fastest would keep the others from learning.
    example: a few networks, of the architecture that it is for if it is for one only.
    """

    def __init__(self, config: dict[str, Any], example: Networks, statistics: int, seed: int) -> None:
        super().__init__()
        kind: Kind = config["kind"]
        d, heads, classes = config["d"], config["heads"], example.symmetry.sizes[OUTPUT]
        channels, side, _ = example.program.input_shape
        self.reads_statistics = kind in ("stats", "hybrid")
        with seeded_init(seed):
            readers: list[nn.Module] = []
            if kind in ("weightnet", "hybrid"):
                readers.append(WeightNet(classes, d, config["rounds"], heads, config["cross"], config["intra"]))
            if kind in ("probe", "hybrid"):
                readers.append(Probe(classes, channels, side, config["probes"]))
            if kind == "nfn":
                readers.append(NeuralFunctional(example, d, config["rounds"]))
            if kind in ("mlp", "canonical"):
                readers.append(FlatMLP(example, sort=kind == "canonical"))
            if kind == "one_sided":
                readers.append(OneSided(example, d, heads))
            self.readers = nn.ModuleList(readers)
            if self.reads_statistics:
                self.statistics = two_layers(statistics)
            parts = len(readers) + self.reads_statistics
            self.head = last_layers(WIDTH * parts, config["properties"])
            alone = parts if parts > 1 else 0  # predictions of single readers
            self.heads = nn.ModuleList(last_layers(WIDTH, config["properties"]) for _ in range(alone))
        for module in self.modules():
            if isinstance(module, Dropout):
                module.random = generator(seed, "dropout")

    def forward(self, networks: Networks, statistics: Float[Tensor, "n s"]) -> Float[Tensor, "n k"]:
        return self.head(torch.cat(self.features(networks, statistics), 1))

    def features(self, networks: Networks, statistics: Float[Tensor, "n s"]) -> list[Features]:
        """Return what each reader makes of the networks."""
        features = [reader(networks) for reader in self.readers]
        return [*features, self.statistics(statistics)] if self.reads_statistics else features

    def opinions(self, networks: Networks, statistics: Float[Tensor, "n s"]) -> list[Float[Tensor, "n k"]]:
        """Return the prediction from all features, and of a hybrid also one from those of each reader."""
        features = self.features(networks, statistics)
        alone = [head(own) for head, own in zip(self.heads, features, strict=True)] if self.heads else []
        return [self.head(torch.cat(features, 1)), *alone]


def mean_prediction(
    models: Sequence[Predictor], networks: Networks, statistics: Float[Tensor, "n s"]
) -> Float[Tensor, "n k"]:
    """Return the mean of several predictors' standardised predictions."""
    return torch.stack([model.eval()(networks, statistics) for model in models]).mean(0)


@dataclass(frozen=True)
class Kept:
    """Trained predictors, whose mean counts. errors: sorted absolute errors on validation runs, in units of the spread."""

    models: list[Predictor]
    scale: dict[str, Tensor]
    errors: Float[Tensor, "v k"]
    inputs: Float[Tensor, "m f"]  # statistics of the networks that it learned from, standardised

    @property
    def half_widths(self) -> Float[Tensor, " k"]:
        """Half the widths of intervals for 90 % of new networks, in units of the spread.

        The quantile of split conformal prediction (Lei et al. 2018, section 2.2), so on average over the zoo's architectures; on
        runs that also chose the epoch, so a little narrow; the largest error if fewer than 9 networks validate.
        """
        n = len(self.errors)
        return self.errors[min(n, math.ceil(COVERAGE * (n + 1))) - 1]

    @torch.no_grad()
    def standardised(self, networks: Networks) -> Float[Tensor, "n k"]:
        """Return predictions in units of the properties' spread, in the precision of the weights."""
        dtype = next(iter(networks.weights.values())).dtype
        return mean_prediction([model.to(dtype) for model in self.models], networks, self.statistics(networks))

    def intervals(self, networks: Networks) -> Float[Tensor, "3 n k"]:
        """Return lower ends, predictions and upper ends, in the properties' own units."""
        center = self.standardised(networks)
        ends = torch.stack([center - self.half_widths, center, center + self.half_widths])
        return torch.stack([own_units(end, self.scale) for end in ends])

    def statistics(self, networks: Networks) -> Float[Tensor, "n f"]:
        """Return the standardised statistics of some networks."""
        values = pooled_statistics(networks)
        mean, std = (self.scale[f"input_{key}"].to(values) for key in ("mean", "std"))
        return ((values - mean) / std).clamp(-6, 6)


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


def load_predictors(path: Path, example: Networks) -> dict[str, Kept]:
    """Return the kept predictors of a family; `example`: networks of an architecture that they learned from."""
    found = {}
    for name, kept in load_torch(path, set()).items():
        models = [Predictor(kept["config"], example, kept["inputs"].shape[1], seed=0) for _ in kept["state_dicts"]]
        for model, state in zip(models, kept["state_dicts"], strict=True):
            model.load_state_dict(state)
        found[name] = Kept(models, kept["scale"], kept["errors"], kept["inputs"])
    return found
