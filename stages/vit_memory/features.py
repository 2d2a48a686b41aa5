"""The features that extract_features leaves.

Axes: n images, g glyphs, d features.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from safetensors.torch import load_file
from torch import Tensor

from stages.common.files import load_metadata
from stages.common.images import ImageSet, load_images

FEATURES = Path("models/extract_features")


@dataclass(frozen=True)
class Labelled:
    """Features and labels of some images."""

    x: Float[Tensor, "n 2 d"]  # class token, mean of patch tokens
    labels: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class FeatureSets:
    """Frozen features of a data set by backbone, by random weights, and of glyphs of unseen classes."""

    train: Labelled
    test: Labelled
    random_train: Labelled
    random_test: Labelled
    glyphs: Labelled
    glyphs_images: UInt8[Tensor, "g 1 h w"]
    classes: list[str]


def input_files(dataset: str) -> tuple[Path, Path]:
    """Return the files that `load_featured_images` reads."""
    return FEATURES / dataset / "features.safetensors", Path(f"data/{dataset}.safetensors")


def load_features(dataset: str, device: torch.device) -> FeatureSets:
    """Return the features of one data set; InputError if they are missing or damaged."""
    path, _ = input_files(dataset)
    classes = load_metadata(path)["classes"]
    tensors = load_file(path, device=str(device))
    sets = ("train", "test", "random_train", "random_test", "glyphs")
    parts = {name: Labelled(tensors[name], tensors[f"{name.removeprefix('random_')}_labels"]) for name in sets}
    return FeatureSets(**parts, glyphs_images=tensors["glyphs_images"], classes=classes)


def first(images: ImageSet, count: int) -> ImageSet:
    """Return the first `count` images, or all: no data set has its images in the order of their classes."""
    return images.subset(torch.arange(min(count, len(images))))


def load_featured_images(dataset: str, device: torch.device) -> tuple[FeatureSets, ImageSet, ImageSet]:
    """Return the features of one data set, and the training and test images that they are of."""
    features, (train, test) = load_features(dataset, device), load_images(dataset, device)
    return features, first(train, len(features.train)), first(test, len(features.test))
