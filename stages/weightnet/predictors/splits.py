"""Which networks a predictor learns from, is chosen on, and is tested on: split by run, never by snapshot."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Int
from pydantic import Field, PositiveInt
from torch import Tensor

from stages.common.randomness import generator
from stages.common.stage import InputError, StageParams
from stages.weightnet.zoo.reading import Zoo

Rows = Int[Tensor, " n"]
Share = Annotated[float, Field(gt=0, le=1)]

ALL, HELD_OUT = "all", "to_"  # names of tasks: of the one with all architectures, and how those start that hold one out


@dataclass(frozen=True)
class Task:
    """Which architectures are learned from, and which are tested; one in both is split by runs.

    splits: how often; seeds: predictors that are trained alike, whose mean counts; share: of the runs to learn from; pooled:
    whether statistics are pooled over layers, as networks of several architectures need.
    """

    train: list[str]
    test: list[str]
    splits: int = 1
    seeds: int = 1
    share: float = 1.0
    pooled: bool = True


class TaskParams(StageParams):
    """What the tasks follow from."""

    architectures: list[str]  # whose zoos are read
    main: str  # the one that most is asked of
    splits: PositiveInt  # of its runs
    seeds: PositiveInt  # predictors of its tasks that are trained alike, from other first weights: their mean predicts
    shares: list[Share]  # of its runs to learn from, for a learning curve
    hold_out: bool  # each architecture once, learned from all others
    share_of_others: Share  # of the runs to learn from there


def plan_tasks(params: TaskParams) -> dict[str, Task]:
    """Return the tasks by name: of the main architecture, whose own is called as it is and comes first, and of all.

    InputError if there is no zoo of the main architecture.
    """
    main, architectures = params.main, params.architectures
    if main not in architectures:
        raise InputError(
            f"train_weightnet.tasks.main is {main}, but train_weightnet.tasks.architectures are {', '.join(architectures)}"
        )
    tasks = {main: Task([main], [main], params.splits, params.seeds, pooled=False)}
    tasks |= {
        f"{main}_{share:g}": Task([main], [main], 1, params.seeds, share, pooled=False) for share in params.shares
    }
    tasks[ALL] = Task(architectures, architectures)
    for held_out in architectures if params.hold_out else []:
        if others := [name for name in architectures if name != held_out]:
            tasks[HELD_OUT + held_out] = Task(others, [held_out], share=params.share_of_others)
    return tasks


def plan_own(architectures: list[str], held_out: list[str], params: TaskParams) -> dict[str, Task]:
    """Return the tasks of a zoo of one's own, whose architectures have too few networks each for tasks of their own.

    held_out: the architectures that may be left out.
    """
    tasks = {ALL: Task(architectures, architectures, params.splits, params.seeds)}
    for name in held_out if params.hold_out else []:
        tasks[HELD_OUT + name] = Task([other for other in architectures if other != name], [name])
    return tasks


@dataclass(frozen=True)
class Split:
    """Rows of the zoo of each architecture. Snapshots of one run are all in the same part."""

    train: dict[str, Rows]
    validation: dict[str, Rows]
    test: dict[str, Rows]


def rows_of(zoo: Zoo, runs: Int[Tensor, " r"], snapshots: Sequence[str]) -> Rows:
    """Return the rows of some runs at some snapshots."""
    wanted = torch.tensor([name in snapshots for name in zoo.snapshot])
    return (torch.isin(zoo.run, runs) & wanted).nonzero()[:, 0]


def split_zoos(
    zoos: dict[str, Zoo],
    train: list[str],
    test: list[str],
    fractions: tuple[float, float],
    snapshots: Sequence[str],
    share: float,
    seed: int,
) -> Split:
    """Return the split number `seed`: of an architecture to train on, shares of its runs validate and test.

    An architecture that is only tested gives all its runs. fractions: to validate and to test. snapshots: those to learn
    from; validated and tested is on final networks. share: of the runs that are left, how many are learned from. InputError if a
    part would be empty.
    """
    if all(zoo.hyperparameters is not None for zoo in zoos.values()):
        return split_groups({name: zoos[name] for name in dict.fromkeys([*train, *test])}, train, test, fractions, seed)
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
        learned = order[n_validation + n_test :]
        parts[0][name] = rows_of(zoo, learned[: max(1, round(share * len(learned)))], snapshots)
        parts[1][name] = rows_of(zoo, order[:n_validation], ["final"])
        if name in test:
            parts[2][name] = rows_of(zoo, order[n_validation : n_validation + n_test], ["final"])
    return Split(*parts)


def split_groups(
    zoos: dict[str, Zoo], train: list[str], test: list[str], fractions: tuple[float, float], seed: int
) -> Split:
    """Return a split of a zoo of one's own: by groups, over all architectures together, since a group may have several.

    A group of which an architecture that is only tested has a network is not learned from. InputError if a part would be empty.
    """
    left_out = [zoos[name].run for name in test if name not in train]
    groups = torch.cat([zoos[name].run for name in train]).unique()
    groups = groups[~torch.isin(groups, torch.cat(left_out))] if left_out else groups
    order = groups[torch.randperm(len(groups), generator=generator(seed, "split of groups"))]
    n_validation = max(1, round(fractions[0] * len(order)))
    n_test = 0 if left_out else max(1, round(fractions[1] * len(order)))
    if n_validation + n_test >= len(order):
        raise InputError(f"{len(groups)} groups of networks are too few to split: give fewer networks one group")
    chosen = order.split([n_validation, n_test, len(order) - n_validation - n_test])

    def rows(names: list[str], some: Int[Tensor, " r"]) -> dict[str, Rows]:
        found = {name: rows_of(zoos[name], some, ["final"]) for name in names}
        return {name: rows for name, rows in found.items() if len(rows)}

    tested = {name: torch.arange(len(zoos[name])) for name in test} if left_out else rows(test, chosen[1])
    return Split(rows(train, chosen[2]), rows(train, chosen[0]), tested)
