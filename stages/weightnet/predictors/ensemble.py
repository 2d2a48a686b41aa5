"""Predictors of a network's properties that learn by gradient descent: a reader of networks, a head, and ensembles of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stages.common.checkpoints import Checkpoint, load_torch
from stages.common.randomness import generator, seeded_init
from stages.weightnet.predictors.baselines import FlatMLP, NeuralFunctional, OneSided
from stages.weightnet.predictors.examiner import Examiner, load_examiner
from stages.weightnet.predictors.intervals import conformal_quantile
from stages.weightnet.predictors.layers import WIDTH, Dropout, Features, last_layers, two_layers
from stages.weightnet.predictors.probe import Probe
from stages.weightnet.predictors.statistics import pooled_statistics
from stages.weightnet.predictors.targets import own_units
from stages.weightnet.predictors.weightnet import WeightNet
from stages.weightnet.tracing.symmetry import OUTPUT
from stages.weightnet.zoo.networks import Networks
from stages.weightnet.zoo.properties import PROPERTIES

Kind = Literal["weightnet", "probe", "nfn", "mlp", "stats", "canonical", "one_sided"]


class Predictor(nn.Module):
    """Networks and their statistics -> standardised properties [n, k]. kind: what it reads them with.

    example: a few networks, of the architecture that it is for if it is for one only.
    """

    def __init__(self, config: dict[str, Any], example: Networks, statistics: int, seed: int) -> None:
        super().__init__()
        self.kind: Kind = config["kind"]
        with seeded_init(seed):
            self.reader = self.make_reader(config, example, statistics)
            self.head = last_layers(WIDTH, config["properties"])
        for module in self.modules():
            if isinstance(module, Dropout):
                module.random = generator(seed, "dropout")

    def make_reader(self, config: dict[str, Any], example: Networks, statistics: int) -> nn.Module:
        """Return what makes features of networks, or of statistics."""
        d, heads, classes = config["d"], config["heads"], example.symmetry.sizes[OUTPUT]
        channels, side, _ = example.program.input_shape
        match self.kind:
            case "weightnet":
                return WeightNet(classes, d, config["rounds"], heads, config["cross"], config["intra"])
            case "probe":
                return Probe(classes, channels, side, config["probes"])
            case "nfn":
                return NeuralFunctional(example, d, config["rounds"])
            case "mlp" | "canonical":
                return FlatMLP(example, sort=self.kind == "canonical")
            case "one_sided":
                return OneSided(example, d, heads)
            case "stats":
                return two_layers(statistics)

    def forward(self, networks: Networks, statistics: Float[Tensor, "n s"]) -> Float[Tensor, "n k"]:
        features: Features = self.reader(statistics if self.kind == "stats" else networks)
        return self.head(features)


def mean_prediction(
    models: Sequence[Predictor], networks: Networks, statistics: Float[Tensor, "n s"]
) -> Float[Tensor, "n k"]:
    """Return the mean of several predictors' standardised predictions."""
    return torch.stack([model.eval()(networks, statistics) for model in models]).mean(0)


@dataclass(frozen=True)
class Ensemble:
    """Trained predictors, whose mean counts. errors: on validation runs, in units of the spread."""

    models: list[Predictor]
    scale: dict[str, Tensor]
    errors: Float[Tensor, "v k"]
    inputs: Float[Tensor, "n f"]  # statistics of the networks that it learned from, standardised
    names: list[str]  # of those networks
    targets: Float[Tensor, "n k"]  # what was measured of them, standardised
    measured: tuple[str, ...] = PROPERTIES  # the names of the properties

    @torch.no_grad()
    def standardised(self, networks: Networks) -> Float[Tensor, "n k"]:
        """Return predictions in units of the properties' spread, in the precision of the weights."""
        dtype = next(iter(networks.weights.values())).dtype
        return mean_prediction([model.to(dtype) for model in self.models], networks, self.read(networks))

    def intervals(self, networks: Networks) -> Float[Tensor, "3 n k"]:
        """Return lower ends, predictions and upper ends, in the properties' own units."""
        center, half = self.standardised(networks), conformal_quantile(self.errors)
        return torch.stack(
            [own_units(end, self.scale, self.measured) for end in (center - half, center, center + half)]
        )

    def read(self, networks: Networks) -> Float[Tensor, "n f"]:
        """Return the standardised statistics of some networks."""
        values = pooled_statistics(networks)
        mean, std = (self.scale[f"input_{key}"].to(values) for key in ("mean", "std"))
        return ((values - mean) / std).clamp(-6, 6)

    def unlike(self, read: Float[Tensor, "1 f"]) -> float:
        """Return how many of the networks that it learned from lie nearer to another than one of which `read` was read."""
        own = torch.cdist(self.inputs, self.inputs).fill_diagonal_(torch.inf).amin(1)
        return (own < torch.cdist(read.to(self.inputs), self.inputs).amin()).double().mean().item()


def load_predictors(path: Path, example: Networks) -> dict[str, Ensemble | Examiner]:
    """Return the kept predictors of a family; `example`: networks of an architecture that they learned from."""
    return {name: revive(state, example) for name, state in load_torch(path, set()).items()}


def revive(state: Checkpoint, example: Networks) -> Ensemble | Examiner:
    """Return the predictor that was kept as plain values and tensors."""
    if "exam" in state:
        return load_examiner(state)
    models = [Predictor(state["config"], example, state["inputs"].shape[1], seed=0) for _ in state["state_dicts"]]
    for model, weights in zip(models, state["state_dicts"], strict=True):
        model.load_state_dict(weights)
    own = {key: state[key] for key in ("scale", "errors", "inputs", "names", "targets")}
    return Ensemble(models, **own, measured=tuple(state.get("measured", PROPERTIES)))
