"""Boosting and the nearest neighbour know what they should."""

from dataclasses import replace

import numpy as np
import torch
from small_networks import seeded
from torch import Tensor

from stages.weightnet.build_zoo import MEASURED
from stages.weightnet.evaluate_weightnet import score
from stages.weightnet.predictors.data import Data, prepare, statistics_of
from stages.weightnet.predictors.simple import boost, nearest
from stages.weightnet.predictors.splits import Split, split_zoos
from stages.weightnet.zoo.reading import Zoo


def data_of(zoo: Zoo, split: Split, kind: str = "gbm") -> Data:
    return prepare({"cnn3": zoo}, split, kind, {("cnn3", False): statistics_of(zoo, False)}, pooled=False)


def halves(zoo: Zoo, seed: int, snapshots: list[str]) -> Split:
    """An eighth of the runs validates, a half tests."""
    return split_zoos({"cnn3": zoo}, ["cnn3"], ["cnn3"], (0.125, 0.5), snapshots, 1.0, seed)


def tau_of_accuracy(zoo: Zoo, split: Split, predicted: Tensor) -> float:
    return score(zoo.column("test_acc")[split.test["cnn3"]], predicted[:, 0].numpy())["tau"]


def test_from_shuffled_labels_nothing_is_learnt_and_from_true_ones_much(built):
    order = torch.randperm(len(built.zoo) // 3, generator=seeded()).repeat_interleave(3) * 3 + torch.arange(3).repeat(
        256
    )
    columns = {name: [built.zoo.index[name][i] for i in order.tolist()] for name in MEASURED}
    shuffled = replace(built.zoo, index=built.zoo.index | columns)
    taus: dict[str, list[float]] = {"true": [], "shuffled": []}
    for name, zoo in (("true", built.zoo), ("shuffled", shuffled)):
        for seed in range(3):
            split = halves(zoo, seed, ["final"])
            taus[name].append(tau_of_accuracy(zoo, split, boost(data_of(zoo, split), 15)[1]))
    assert abs(np.mean(taus["shuffled"])) < 0.1
    assert np.mean(taus["true"]) > 0.4


def test_a_nearest_neighbour_knows_nothing_unless_snapshots_of_a_run_are_on_both_sides(built):
    zoo = built.zoo
    honest, leaky = [], []
    for seed in range(8):
        split = halves(zoo, seed, ["middle", "final"])
        honest.append(tau_of_accuracy(zoo, split, nearest(data_of(zoo, split))[1]))
        trained = torch.tensor([i for i, name in enumerate(zoo.snapshot) if name != "initial"])
        rows = trained[torch.randperm(len(trained), generator=seeded(seed))]
        mixed = Split({"cnn3": rows[150:]}, {"cnn3": rows[:20]}, {"cnn3": rows[20:150]})
        leaky.append(tau_of_accuracy(zoo, mixed, nearest(data_of(zoo, mixed))[1]))
    assert abs(np.mean(honest)) < 0.15
    assert np.mean(leaky) > np.mean(honest) + 0.2
