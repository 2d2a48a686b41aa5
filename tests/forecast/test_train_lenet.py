"""Runs that are killed are not lost, and do not come out otherwise."""

from pathlib import Path

import pytest
from dvc.utils.hydra import apply_overrides
from running import start

from stages.datasets import fetch_data
from stages.forecast import train_lenet


def outputs(project: Path) -> dict[str, bytes]:
    folders = [project / part / "train_lenet/digits" for part in ("models", "reports")]
    return {path.name: path.read_bytes() for folder in folders for path in folder.iterdir()}


def test_a_killed_stage_trains_only_what_is_missing_to_the_same_bytes(project, monkeypatch):
    apply_overrides(project / "params.yaml", ["train_lenet.steps=4"])
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
