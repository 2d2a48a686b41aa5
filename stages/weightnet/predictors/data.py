"""What predictors learn from: networks, what is read of them, and their standardised properties.

Axes: m networks of a zoo, n networks of a part of it, f inputs, k properties.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from stages.common.stage import StageParams
from stages.weightnet.predictors.splits import Rows, Split
from stages.weightnet.predictors.statistics import pooled_statistics, tensor_statistics
from stages.weightnet.predictors.targets import to_scale
from stages.weightnet.tracing.symmetry import permute, random_permutations, rescale
from stages.weightnet.zoo.networks import Networks
from stages.weightnet.zoo.reading import Zoo

Statistics = dict[tuple[str, bool], Float[Tensor, "m f"]]  # of an architecture's networks; whether pooled over layers


class Member(StageParams):
    """One predictor. d, rounds, heads, cross and intra are WeightNet's."""

    kind: Literal[
        "weightnet",
        "probe",
        "nfn",
        "mlp",
        "stats",
        "canonical",
        "one_sided",
        "exam",
        "gbm",
        "hyperparameters",
        "nearest",
    ]
    tasks: Literal["main", "all"]
    epochs: PositiveInt
    d: PositiveInt
    rounds: PositiveInt
    heads: PositiveInt
    cross: bool  # messages along weights
    intra: bool  # attention within layers
    probes: PositiveInt
    augment: bool  # relabel and rescale the neurons of networks to learn from
    learning_rate: PositiveFloat


def augmented(networks: Networks, deviation: float, random: torch.Generator) -> Networks:
    """Return the networks with their neurons relabelled, and rescaled (ReLU) or changed in sign (tanh): the same functions."""
    n, symmetry = len(networks), networks.symmetry
    factors = {}
    for group in symmetry.hidden:
        if group not in symmetry.rigid:
            normal = torch.randn(n, symmetry.sizes[group], generator=random)
            signs = torch.where(normal < 0, -1.0, 1.0)  # not normal.sign(): now and then a draw is 0
            factors[group] = torch.where(networks.tanh[:, None], signs, (deviation * normal).exp())
    weights = rescale(networks.weights, symmetry, factors)
    weights = permute(weights, symmetry, random_permutations(symmetry, random))
    return Networks(networks.program, symmetry, weights, networks.tanh)


def hyperparameters(zoo: Zoo) -> Float[Tensor, "m f"]:
    """Return the hyper-parameters of every network as numbers; of a zoo of one's own, those that all its networks have."""
    if zoo.hyperparameters is not None:
        return torch.from_numpy(
            np.array([zoo.index[name] for name in zoo.hyperparameters], np.float32).reshape(-1, len(zoo)).T
        )
    logs = ("learning_rate", "weight_decay", "init_scale", "train_fraction", "steps")
    columns = [np.log(zoo.column(name)) for name in logs] + [zoo.column(name) for name in ("label_noise", "dropout")]
    columns += [np.array([value == "sgd" for value in zoo.index["optimizer"]]), zoo.tanh.numpy()]
    return torch.from_numpy(np.stack(columns, 1).astype(np.float32))


@dataclass(frozen=True)
class Data:
    """What one task and split give: the zoos, what is read of all their networks beside their weights, standardised targets."""

    zoos: dict[str, Zoo]
    split: Split
    inputs: dict[str, Float[Tensor, "m f"]]
    targets: dict[str, Float[Tensor, "m k"]]
    scale: dict[str, Float[Tensor, " f"]]  # means and deviations of inputs and targets over the networks to learn from

    @property
    def names(self) -> list[str]:
        """The names of the runs to learn from."""
        return [self.zoos[name].name_of(row) for name, rows in self.split.train.items() for row in rows.tolist()]

    @property
    def measured(self) -> tuple[str, ...]:
        """The names of the properties."""
        return next(iter(self.zoos.values())).measured

    def part(self, rows: dict[str, Rows], values: dict[str, Tensor]) -> Float[Tensor, "n f"]:
        """Return the values of some rows of all architectures."""
        return torch.cat([values[name][index] for name, index in rows.items()])


def statistics_of(zoo: Zoo, pooled: bool) -> Float[Tensor, "m f"]:
    """Return the statistics of all networks of a zoo."""
    read = pooled_statistics if pooled else tensor_statistics
    return torch.cat([read(zoo.networks(rows)) for rows in torch.arange(len(zoo)).split(zoo.at_a_time(512))])


def center_and_spread(values: Float[Tensor, "n f"]) -> tuple[Float[Tensor, " f"], Float[Tensor, " f"]]:
    """Return mean and standard deviation of each column; NaN is not known."""
    if not values.isnan().any():
        return values.mean(0), values.std(0)
    known = [column[~column.isnan()] for column in values.T]
    return torch.stack([column.mean() for column in known]), torch.stack([column.std() for column in known])


def prepare(zoos: dict[str, Zoo], split: Split, kind: str, statistics: Statistics, pooled: bool) -> Data:
    """Return inputs and targets in units of their spread over the networks to learn from; pooled: statistics over layers.

    Inputs are statistics of weights, but hyper-parameters where the kind of predictor asks for them.
    """
    names = list(dict.fromkeys([*split.train, *split.test]))
    if kind in ("hyperparameters", "exam"):
        inputs = {name: hyperparameters(zoos[name]) for name in names}
    else:
        inputs = {name: statistics[name, pooled] for name in names}
    targets = {
        name: to_scale(zoos[name].properties(torch.arange(len(zoos[name]))), zoos[name].measured) for name in names
    }
    scale = {}
    for key, values in (("input", inputs), ("target", targets)):
        learned = torch.cat([values[name][rows] for name, rows in split.train.items()])
        mean, std = center_and_spread(learned)
        scale[f"{key}_mean"], scale[f"{key}_std"] = mean, std + 1e-6
    inputs = {name: ((x - scale["input_mean"]) / scale["input_std"]).clamp(-6, 6) for name, x in inputs.items()}
    targets = {name: (y - scale["target_mean"]) / scale["target_std"] for name, y in targets.items()}
    return Data({name: zoos[name] for name in names}, split, inputs, targets, scale)


def batches(data: Data, size: int, random: torch.Generator) -> list[tuple[str, Rows]]:
    """Return one pass over the networks to learn from in random batches, each of one architecture."""
    found = [
        (name, index[part])
        for name, index in data.split.train.items()
        for part in torch.randperm(len(index), generator=random).split(size)
    ]
    return [found[i] for i in torch.randperm(len(found), generator=random).tolist()]
