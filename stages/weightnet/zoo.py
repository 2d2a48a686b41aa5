"""The zoo on disk: the images that its networks see, and the networks with what was measured of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.numpy import load_file
from torch import Tensor
from torch.nn.functional import interpolate

from stages.common.artifacts import load_metadata, require
from stages.common.images import ImageSet, load_images, split_validation
from stages.common.params import StageParams
from stages.common.tables import load_table
from stages.weightnet.networks import zoo_program
from stages.weightnet.program import Program
from stages.weightnet.properties import PROPERTIES
from stages.weightnet.symmetry import Networks, Symmetry
from stages.weightnet.training import unflatten

ZOO = Path("models/build_zoo")


class ImageParams(StageParams):
    """Which images the networks of the zoo see."""

    image_size: int  # pixels of a side, to which images are averaged
    train_images: int  # at most
    test_images: int  # at most
    validation_fraction: float  # of the training images: networks never see them
    split_seed: int


@dataclass(frozen=True)
class Images:
    """Images in units of the training pixels' standard deviation around their mean, with labels."""

    train: tuple[Float[Tensor, "n c s s"], Int[Tensor, " n"]]
    validation: tuple[Float[Tensor, "n c s s"], Int[Tensor, " n"]]
    test: tuple[Float[Tensor, "n c s s"], Int[Tensor, " n"]]
    classes: int

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.train[0].shape[1]


def zoo_images(dataset: str, params: ImageParams, device: torch.device) -> Images:
    """Return the images of a data set as the zoo's networks see them."""
    train, test = load_images(dataset, device)
    train, validation = split_validation(train, params.validation_fraction, params.split_seed)
    train, test = train.subset(slice(params.train_images)), test.subset(slice(params.test_images))

    def small(data: ImageSet) -> Float[Tensor, "n c s s"]:
        return interpolate(data.pixels(), size=(params.image_size, params.image_size), mode="area")

    mean, std = small(train).mean(), small(train).std()
    parts = [((small(data) - mean) / std, data.labels) for data in (train, validation, test)]
    return Images(*parts, classes=len(train.classes))


@dataclass(frozen=True)
class Zoo:
    """The networks of one architecture, a row for each snapshot of each run, in the order of the index."""

    architecture: str
    program: Program
    symmetry: Symmetry
    flat: Float[Tensor, "m p"]
    tanh: Bool[Tensor, " m"]
    run: Int[Tensor, " m"]  # the number of the row's run
    snapshot: list[str]
    index: dict[str, list[Any]]  # all columns of the index

    def __len__(self) -> int:
        return len(self.flat)

    def networks(self, rows: Int[Tensor, " n"]) -> Networks:
        """Return some of the networks."""
        return Networks(self.program, self.symmetry, unflatten(self.flat[rows], self.program), self.tanh[rows])

    def column(self, name: str) -> Float[np.ndarray, " m"]:
        """Return a column of numbers."""
        return np.array(self.index[name], dtype=float)

    def properties(self, rows: Int[Tensor, " n"]) -> Float[Tensor, "n k"]:
        """Return what was measured of some networks."""
        return torch.from_numpy(np.stack([self.column(name) for name in PROPERTIES], 1)).float()[rows]


def zoo_files(dataset: str, architecture: str) -> list[Path]:
    """Return the index of a zoo and its shards; InputError if one is missing."""
    folder = ZOO / f"{dataset}-{architecture}"
    index = folder / "index.parquet"
    return [index, *(require(folder / name) for name in dict.fromkeys(load_table(index)["shard"]))]


def load_zoo(dataset: str, architecture: str) -> Zoo:
    """Return the zoo of one architecture, on the processor; InputError if it is missing or damaged."""
    path, *shards = zoo_files(dataset, architecture)
    index = load_table(path)
    metadata: dict[str, Any] = load_metadata(shards[0])
    flat = np.concatenate([load_file(shard)["weights"] for shard in shards])
    program, symmetry = zoo_program(architecture, *metadata["input"])
    return Zoo(
        architecture=architecture,
        program=program,
        symmetry=symmetry,
        flat=torch.from_numpy(flat),
        tanh=torch.tensor([value == "tanh" for value in index["activation"]]),
        run=torch.tensor([int(name.rpartition("-")[2]) for name in index["run"]]),
        snapshot=index["snapshot"],
        index=index,
    )
