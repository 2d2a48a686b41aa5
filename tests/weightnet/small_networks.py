"""Small networks, predictors and parts of zoos that tests share."""

import json
from dataclasses import replace

import benchmark_zoo
import torch
from torch import Tensor, nn

from stages.common.checkpoints import save_torch
from stages.weightnet import predict
from stages.weightnet.predictors.data import Member
from stages.weightnet.predictors.ensemble import Predictor
from stages.weightnet.predictors.statistics import pooled_statistics, range_of_statistics
from stages.weightnet.tracing.program import Weights, run_stack
from stages.weightnet.tracing.symmetry import permute, random_permutations
from stages.weightnet.zoo.architectures import ARCHITECTURES, build_network, zoo_program
from stages.weightnet.zoo.networks import Networks
from stages.weightnet.zoo.properties import PROPERTIES
from stages.weightnet.zoo.reading import Zoo

SHAPE = (1, 10, 8)  # channels, classes, pixels of a side

RECIPE = benchmark_zoo.RECIPE.model_copy(
    update={"weight_decay": (1e-4, 1e-1), "train_fraction": (0.2, 1.0), "steps": (3, 9), "batch_size": 8}
)


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_weights(shapes, n=3) -> Weights:
    """Weights of n networks in float64, none of them zero: variances positive."""
    return {
        name: torch.rand(n, *shape, dtype=torch.float64) + 0.5
        if name.endswith("running_var")
        else 0.5 * torch.randn(n, *shape, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def zoo_networks(name: str, n=3) -> Networks:
    program, symmetry = zoo_program(name, *SHAPE)
    return Networks(program, symmetry, random_weights(program.layout.shapes, n), torch.arange(n) % 2 == 1)


def outputs(networks: Networks, images: Tensor) -> Tensor:
    return run_stack(networks.program, networks.weights, images, networks.tanh)


def relabelled(networks: Networks) -> Networks:
    moved = permute(networks.weights, networks.symmetry, random_permutations(networks.symmetry, seeded()))
    return replace(networks, weights=moved)


class Dense(nn.Module):
    """What densely connected networks do: concatenate what came before."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3, 1, 1), nn.Conv2d(4, 3, 3, 1, 1), nn.Conv2d(7, 5, 1)
        self.norm, self.pool, self.head = nn.BatchNorm2d(7), nn.MaxPool2d(2), nn.Linear(5 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = torch.cat([x, torch.relu(self.b(x))], 1)
        return self.head(torch.flatten(self.pool(self.c(torch.relu(self.norm(x)))), 1))


class Depthwise(nn.Module):
    """What mobile networks do: a depthwise convolution inside a residual block, and hidden activations that are not ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.wide, self.deep, self.narrow = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 6, 1)
        self.grouped, self.act, self.head = nn.GroupNorm(2, 6), nn.SiLU(), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = x + self.narrow(self.act(self.deep(self.wide(x))))
        return self.head(self.grouped(x).mean((2, 3)))


class Normed(nn.Module):
    """Batch norms, which normalise by the batch in training and by running statistics afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, 2, 1, bias=False), nn.Conv2d(4, 4, 3, 1, 1, bias=False)
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=0.3, eps=1e-3)
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(self.a(x)))
        return self.head(torch.relu(self.second(self.b(x)) + x).mean((2, 3)))


NETWORKS = [*ARCHITECTURES, Dense, Depthwise, Normed]


def build(kind) -> nn.Module:
    return build_network(kind, *SHAPE) if isinstance(kind, str) else kind()


def training_data() -> tuple[Tensor, Tensor]:
    return torch.randn(64, 1, 8, 8, generator=seeded()).double(), torch.randint(10, (64,), generator=seeded(1))


CONFIG = {"d": 8, "heads": 2, "rounds": 2, "cross": True, "intra": True, "probes": 8, "properties": len(PROPERTIES)}


INVARIANT = ["weightnet", "probe", "nfn", "canonical"]


def untrained(kind: str, networks: Networks) -> Predictor:
    return Predictor(CONFIG | {"kind": kind}, networks, 5, seed=0).double().eval()


def member(kind: str, **changes) -> Member:
    values = {"tasks": "main", "epochs": 1, "learning_rate": 4e-3, "augment": True}
    names = set(CONFIG) - {"properties"}
    return Member(kind=kind, **{k: CONFIG[k] for k in names} | values | changes)


def select(zoo: Zoo, rows: Tensor) -> Zoo:
    index = {key: [column[i] for i in rows.tolist()] for key, column in zoo.index.items()}
    parts = {"shards": (zoo.flat(rows),), "tanh": zoo.tanh[rows], "run": zoo.run[rows]}
    return replace(zoo, **parts, snapshot=index["snapshot"], index=index)


def keep_untrained(project) -> None:
    """Write WeightNet as train_weightnet keeps it, untrained."""
    networks = zoo_networks("cnn3", 8)
    inputs = pooled_statistics(networks).float()
    model = Predictor(CONFIG | {"kind": "weightnet"}, networks, inputs.shape[1], seed=0)
    scale = {
        f"{what}_{k}": f(n)
        for what, n in (("input", inputs.shape[1]), ("target", len(PROPERTIES)))
        for k, f in (("mean", torch.zeros), ("std", torch.ones))
    }
    kept = {
        "config": CONFIG | {"kind": "weightnet"},
        "input_shape": [1, 8, 8],
        "classes": 10,
        "state_dicts": [model.state_dict()],
        "ranges": range_of_statistics(inputs),
        "names": [f"cnn3-{i}" for i in range(8)],
        "targets": torch.zeros(8, len(PROPERTIES)),
    }
    kept |= {"scale": scale, "errors": torch.rand(20, len(PROPERTIES)), "inputs": inputs.clamp(-6, 6)}
    save_torch(project / "models/train_weightnet/digits-weightnet/predictors.pt", {"weightnet": kept})


def ask(monkeypatch, capsys, *words: str) -> dict:
    monkeypatch.setattr("sys.argv", ["predict", *words, "--json"])
    predict.main()
    return json.loads(capsys.readouterr().out)
