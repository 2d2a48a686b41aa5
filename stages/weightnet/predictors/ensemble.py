"""Predictors of a network's properties: one reader of networks or several, a head, and ensembles of them on disk."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stages.common.checkpoints import load_torch
from stages.common.metrics import COVERAGE
from stages.common.randomness import generator, seeded_init
from stages.weightnet.predictors.baselines import FlatMLP, NeuralFunctional, OneSided
from stages.weightnet.predictors.layers import WIDTH, Dropout, Features, last_layers, two_layers
from stages.weightnet.predictors.probe import Probe
from stages.weightnet.predictors.statistics import pooled_statistics
from stages.weightnet.predictors.targets import own_units
from stages.weightnet.predictors.weightnet import WeightNet
from stages.weightnet.tracing.symmetry import OUTPUT
from stages.weightnet.zoo.networks import Networks

Kind = Literal["weightnet", "probe", "hybrid", "nfn", "mlp", "stats", "canonical", "one_sided"]


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


def load_predictors(path: Path, example: Networks) -> dict[str, Kept]:
    """Return the kept predictors of a family; `example`: networks of an architecture that they learned from."""
    found = {}
    for name, kept in load_torch(path, set()).items():
        models = [Predictor(kept["config"], example, kept["inputs"].shape[1], seed=0) for _ in kept["state_dicts"]]
        for model, state in zip(models, kept["state_dicts"], strict=True):
            model.load_state_dict(state)
        found[name] = Kept(models, kept["scale"], kept["errors"], kept["inputs"])
    return found
