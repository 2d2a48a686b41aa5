"""Which networks a predictor learns from, is chosen on, and is tested on: split by run, never by snapshot."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from stages.common.command import InputError
from stages.common.runtime import generator
from stages.weightnet.zoo import Zoo

Rows = Int[Tensor, " n"]


@dataclass(frozen=True)
class Split:
    """Rows of the zoo of each architecture. Snapshots of one run are all in the same part."""

    train: dict[str, Rows]
    validation: dict[str, Rows]
    test: dict[str, Rows]


def rows_of(zoo: Zoo, runs: Int[Tensor, " r"], snapshots: list[str]) -> Rows:
    """Return the rows of some runs at some snapshots."""
    wanted = torch.tensor([name in snapshots for name in zoo.snapshot])
    return (torch.isin(zoo.run, runs) & wanted).nonzero()[:, 0]


def split_zoos(
    zoos: dict[str, Zoo],
    train: list[str],
    test: list[str],
    fractions: tuple[float, float],
    snapshots: list[str],
    share: float,
    seed: int,
) -> Split:
    """Return the split number `seed`: of an architecture to train on, shares of its runs validate and test.

    An architecture that is only tested gives all its runs. fractions: to validate and to test. snapshots: those to learn
    from; validated and tested is on final networks. share: of the runs that are left, how many are learnt from. InputError if a
    part would be empty.
    """
    parts: tuple[dict[str, Rows], ...] = ({}, {}, {})
    for name in dict.fromkeys([*train, *test]):
        zoo = zoos[name]
        runs = zoo.run.unique()
        if name not in train:
            parts[2][name] = rows_of(zoo, runs, ["final"])
            continue
        order = runs[torch.randperm(len(runs), generator=generator(seed, f"split of {name}"))]
        n_validation, n_test = (round(share * len(runs)) for share in fractions)
        if not 0 < n_validation < n_validation + n_test < len(runs):
            raise InputError(f"{len(runs)} runs of {name} are too few to split: raise build_zoo.variants.{name}.runs")
        learnt = order[n_validation + n_test :]
        parts[0][name] = rows_of(zoo, learnt[: max(1, round(share * len(learnt)))], snapshots)
        parts[1][name] = rows_of(zoo, order[:n_validation], ["final"])
        if name in test:
            parts[2][name] = rows_of(zoo, order[n_validation : n_validation + n_test], ["final"])
    return Split(*parts)
