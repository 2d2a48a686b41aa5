"""The runs of train_lenet, as its parameters split them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from stages.common.files import load_json, load_metadata
from stages.common.images import ImageSet, load_images, split_validation
from stages.common.vectors import Layout
from stages.forecast.lenet import to_lenet_input
from stages.forecast.trajectory import Trajectory

RUNS = Path("models/train_lenet")


@dataclass(frozen=True)
class RunSplit:
    """Trajectories by name; no run is in two of them.

    recipe: image_size in pixels, steps, batch_size, snapshot_every in steps, validation_fraction and split_seed.
    """

    train: dict[str, Trajectory]
    validation: dict[str, Trajectory]
    test: dict[str, Trajectory]
    recipe: dict[str, Any]


def load_runs(dataset: str) -> RunSplit:
    """Return the runs of one data set, on the processor; InputError if they are missing or damaged."""
    folder = RUNS / dataset
    recipe = load_json(folder / "runs.json")
    parts = {
        part: {name: load_run(folder / f"{name}.safetensors") for name in names}
        for part, names in recipe.pop("runs").items()
    }
    return RunSplit(**parts, recipe=recipe)


@dataclass(frozen=True)
class LeNetData:
    """Images as the networks of the runs see them [n, 1, s, s], with labels: seen in training, held out of it, test images."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: list[str]


def load_lenet_data(dataset: str, recipe: dict[str, Any], device: torch.device, test_images: int) -> LeNetData:
    """Return the images of a recipe, split as it says; the first `test_images` of the test images."""
    images, test = load_images(dataset, device)
    train, held_out = split_validation(images, recipe["validation_fraction"], recipe["split_seed"])

    def seen(part: ImageSet) -> tuple[Tensor, Tensor]:
        return to_lenet_input(part.pixels(), recipe["image_size"]), part.labels

    return LeNetData(seen(train), seen(held_out), seen(test.subset(slice(test_images))), images.classes)


def load_run(path: Path) -> Trajectory:
    """Return one run's trajectory."""
    layout = Layout.from_metadata(load_metadata(path))
    tensors = load_file(path)
    return Trajectory(layout, tensors["weights"], tensors["state"])


def regime_of(name: str) -> str:
    """Return the regime of a run, <regime>-<seed>."""
    return name.rpartition("-")[0]
