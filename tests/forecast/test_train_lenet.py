"""Runs that are killed are not lost, and do not come out otherwise."""

from pathlib import Path

import pytest
from reproduction import set_params
from running import start

from stages.common.stage import InputError
from stages.datasets import fetch_data
from stages.forecast import train_lenet
from stages.forecast.lenet import LeNet
from stages.forecast.train_lenet import Params


def outputs(project: Path) -> dict[str, bytes]:
    folders = [project / part / "train_lenet/digits" for part in ("models", "reports")]
    return {path.name: path.read_bytes() for folder in folders for path in folder.iterdir()}


def test_a_killed_stage_trains_only_what_is_missing_to_the_same_bytes(project, monkeypatch):
    set_params(project / "params.yaml", ["train_lenet.steps=4"])
    start(monkeypatch, fetch_data, dataset="digits")
    start(monkeypatch, train_lenet, dataset="digits")
    whole, trained, train = outputs(project), [], train_lenet.train_lenet
    assert not any((project / ".work/train_lenet/digits").iterdir())

    def train_or_die(data, name, *recipe):
        trained.append(name)
        if name == "adam-200" and trained.count(name) == 1:
            raise KeyboardInterrupt
        return train(data, name, *recipe)

    monkeypatch.setattr(train_lenet, "train_lenet", train_or_die)
    monkeypatch.setattr(train_lenet, "parallel_map", lambda f, names, *_: [f(name) for name in names])
    with pytest.raises(KeyboardInterrupt):
        start(monkeypatch, train_lenet, dataset="digits")
    start(monkeypatch, train_lenet, dataset="digits")
    assert trained == ["adam-0", "sgd-0", "adam-100", "adam-200", "adam-200", "adam-201"]
    assert outputs(project) == whole


def test_runs_are_disjoint_and_known():
    values = {
        "image_size": 16,
        "validation_fraction": 0.1,
        "split_seed": 0,
        "steps": 1,
        "batch_size": 1,
        "snapshot_every": 1,
        "evaluation_images": 1,
        "regimes": {"adam": {"optimizer": "adam", "learning_rate": 0.1, "schedule": "constant"}},
        "runs": {"train": ["adam-0"], "validation": ["adam-1"], "test": ["adam-0"]},
    }
    with pytest.raises(InputError, match="runs named twice: adam-0"):
        Params.parse(values, ".".join)
    values["runs"]["test"] = ["sgd-3"]
    with pytest.raises(InputError, match="unknown regimes: sgd"):
        Params.parse(values, ".".join)


def test_lenet_has_the_weights_that_it_should():
    assert sum(p.numel() for p in LeNet(28, 10, seed=0).parameters()) == 61_706
    with pytest.raises(ValueError, match="16 pixels or more, got 8"):
        LeNet(8, 10, seed=0)
