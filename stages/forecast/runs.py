"""The runs of train_lenet, as its parameters split them."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from stages.common.artifacts import load_metadata
from stages.common.command import InputError
from stages.forecast.trajectory import Layout, Trajectory

RUNS = Path("models/train_lenet")


@dataclass(frozen=True)
class RunSplit:
    """Trajectories by name; no run is in two of them."""

    train: dict[str, Trajectory]
    validation: dict[str, Trajectory]
    test: dict[str, Trajectory]


def load_runs(dataset: str) -> RunSplit:
    """Return the runs of one data set, on the processor; InputError if they are missing or damaged."""
    folder = RUNS / dataset
    index = folder / "split.json"
    if not index.is_file():
        raise InputError(f"{index} is missing: run 'dvc repro train_lenet@{dataset}'")
    split = json.loads(index.read_text())
    return RunSplit(
        **{part: {name: load_run(folder / f"{name}.safetensors") for name in split[part]} for part in split}
    )


def load_run(path: Path) -> Trajectory:
    """Return one run's trajectory."""
    layout = Layout({name: tuple(shape) for name, shape in load_metadata(path)["layout"]})
    tensors = load_file(path)
    return Trajectory(layout, tensors["weights"], tensors["state"])
