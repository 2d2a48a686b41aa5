"""The zoo on disk: the images that its networks see, and the networks with what was measured of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import interpolate

from stages.common.files import Rows, load_json, load_metadata, load_table, remedy, require
from stages.common.images import ImageSet, load_images, split_validation
from stages.common.stage import InputError, StageParams
from stages.weightnet.tracing.program import Program
from stages.weightnet.tracing.saved import from_plain
from stages.weightnet.tracing.symmetry import Symmetry, derive_symmetry
from stages.weightnet.zoo.architectures import zoo_program
from stages.weightnet.zoo.networks import Networks
from stages.weightnet.zoo.properties import PROPERTIES

ZOO = Path("models/build_zoo")
OWN = "own"  # what params.yaml calls all zoos of one's own

MOST_PAIRS = 1 << 22  # of neurons that weights join, in networks read at a time: about 2 GB while WeightNet learns


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
    """The networks of one architecture, a row for each snapshot of each run, in the order of the index.

    files: the index and the shards; shards: the weights [m_i, p], read from disk where they are used.
    """

    architecture: str
    program: Program
    symmetry: Symmetry
    files: tuple[Path, ...]
    shards: tuple[Float[Tensor, "_ p"], ...]
    tanh: Bool[Tensor, " m"]
    run: Int[Tensor, " m"]  # the number of the row's run
    snapshot: list[str]
    index: dict[str, list[Any]]  # all columns of the index
    measured: tuple[str, ...] = (
        PROPERTIES  # the names of the properties; of a zoo of one's own, a network may lack some: NaN
    )
    hyperparameters: tuple[str, ...] | None = None  # the columns of hyper-parameters, of a zoo of one's own

    def __len__(self) -> int:
        return len(self.tanh)

    def flat(self, rows: Int[Tensor, " n"]) -> Float[Tensor, "n p"]:
        """Return all weights of some networks."""
        found = self.shards[0].new_empty(len(rows), self.program.layout.size)
        ends = torch.tensor([len(shard) for shard in self.shards]).cumsum(0)
        numbers = torch.bucketize(rows, ends, right=True)
        for number in numbers.unique().tolist():
            shard, here = self.shards[number], numbers == number
            found[here] = shard[rows[here] - (ends[number] - len(shard))]
        return found

    def networks(self, rows: Int[Tensor, " n"]) -> Networks:
        """Return some of the networks."""
        return Networks(self.program, self.symmetry, self.program.layout.unflatten(self.flat(rows)), self.tanh[rows])

    def at_a_time(self, most: int) -> int:
        """Return how many networks to read at a time: at most `most`, fewer where networks are large."""
        pairs = sum(self.symmetry.sizes[edge.target] * self.symmetry.sizes[edge.source] for edge in self.symmetry.edges)
        return min(most, max(1, MOST_PAIRS // pairs))

    def column(self, name: str) -> Float[np.ndarray, " m"]:
        """Return a column of numbers."""
        return np.array(self.index[name], dtype=float)

    def properties(self, rows: Int[Tensor, " n"]) -> Float[Tensor, "n k"]:
        """Return what was measured of some networks."""
        return torch.from_numpy(np.stack([self.column(name) for name in self.measured], 1)).float()[rows]

    def name_of(self, row: int) -> str:
        """Return a network's name: its run's, with its snapshot if that is not the last, or its file's in a zoo of one's own."""
        if "file" in self.index:
            return str(self.index["file"][row])
        snapshot = self.snapshot[row]
        return f"{self.architecture}-{self.run[row]}" + ("" if snapshot == "final" else f" ({snapshot})")


def own_zoo_path(name: str) -> Path:
    """Return the file that says what a zoo of one's own has."""
    return ZOO / f"{name}.json"


def own_zoo(dataset: str) -> dict[str, list[str]]:
    """Return what `gather_zoo` says of a zoo of one's own; nothing if `dataset` is none.

    The names of its architectures, of those that may be left out, of its properties and hyper-parameters.
    """
    path = own_zoo_path(dataset)
    return dict(load_json(path)) if path.is_file() else {}


def load_zoo(dataset: str, architecture: str) -> Zoo:
    """Return the zoo of one architecture, on the processor; InputError if it is missing or damaged."""
    folder = ZOO / f"{dataset}-{architecture}"
    index = load_table(folder / "index.parquet")
    files = tuple(require(folder / name) for name in dict.fromkeys(index["shard"]))
    metadata: Rows = [load_metadata(file) for file in files]
    own = metadata[0] if "program" in metadata[0] else None
    if own is None:
        program, symmetry = zoo_program(architecture, *metadata[0]["input"])
    else:  # its steps came along: nobody's code is run
        program = from_plain(own["program"])
        symmetry = derive_symmetry(program)
    shards = tuple(load_file(file)["weights"] for file in files)
    if sum(map(len, shards)) != len(index["run"]):
        raise InputError(f"{folder}: its index and its shards do not belong together{remedy(files[0], '-f ')}")
    return Zoo(
        architecture=architecture,
        program=program,
        symmetry=symmetry,
        files=(folder / "index.parquet", *files),
        shards=shards,
        tanh=torch.tensor([value == "tanh" for value in index["activation"]]),
        run=torch.tensor([int(name.rpartition("-")[2]) for name in index["run"]]),
        snapshot=index["snapshot"],
        index=index,
        measured=PROPERTIES if own is None else tuple(own["properties"]),
        hyperparameters=None if own is None else tuple(own["hyperparameters"]),
    )
