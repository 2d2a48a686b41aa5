"""What is learned from is never tested on."""

import pytest
import torch

from stages.common.stage import InputError
from stages.weightnet.predictors.splits import ALL, Task, TaskParams, plan_tasks, split_zoos


def test_no_run_is_in_two_parts_of_a_split(built):
    zoos = {"cnn3": built.zoo, "other": built.zoo}
    split = split_zoos(zoos, ["cnn3"], ["cnn3", "other"], (0.2, 0.2), ["middle", "final"], 1.0, 0)
    parts = [part["cnn3"] for part in (split.train, split.validation, split.test)]
    for column in (built.zoo.run.tolist(), built.zoo.index["config"]):
        found = [{column[i] for i in part.tolist()} for part in parts]
        assert sum(map(len, found)) == len(set.union(*found)) == 256
    assert {built.zoo.snapshot[i] for i in parts[0]} == {"middle", "final"}
    assert {built.zoo.snapshot[i] for i in parts[2]} == {"final"}
    assert len(split.test["other"]) == 256
    less = split_zoos(zoos, ["cnn3"], ["cnn3"], (0.2, 0.2), ["middle", "final"], 0.5, 0)
    assert torch.equal(less.test["cnn3"], split.test["cnn3"])
    assert set(less.train["cnn3"].tolist()) < set(split.train["cnn3"].tolist())
    with pytest.raises(InputError, match=r"too few to split: raise build_zoo.variants.cnn3.runs"):
        split_zoos(zoos, ["cnn3"], ["cnn3"], (0.5, 0.5), ["final"], 1.0, 0)


def plan(architectures: list[str], main: str, **changes) -> TaskParams:
    values = {"splits": 1, "seeds": 1, "shares": [], "hold_out": True, "share_of_others": 0.25}
    return TaskParams(architectures=architectures, main=main, **values | changes)


def test_a_held_out_architecture_is_never_learnt_from_and_all_others_are():
    names = ["a", "b", "c"]
    tasks = plan_tasks(plan(names, "b", splits=4, seeds=3, shares=[0.5]))
    assert list(tasks) == ["b", "b_0.5", ALL, "to_a", "to_b", "to_c"]
    assert tasks["b"] == Task(["b"], ["b"], splits=4, seeds=3, pooled=False)
    for name in names:
        assert {*tasks[f"to_{name}"].train, name} == set(names)
        assert tasks[f"to_{name}"].test == [name]
        assert name not in tasks[f"to_{name}"].train
    assert list(plan_tasks(plan(["b"], "b"))) == ["b", ALL]
    assert list(plan_tasks(plan(names, "b", hold_out=False))) == ["b", ALL]
    with pytest.raises(InputError, match="main is d, but"):
        plan_tasks(plan(names, "d"))
