"""The features that extract_features leaves.

Axes: n images, g base images, k kinds of features, d features.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from safetensors.torch import load_file
from torch import Tensor

from stages.common.files import load_metadata
from stages.common.images import ImageSet, load_images
from stages.vit_memory.classifiers import Whitening

FEATURES = Path("models/extract_features")


@dataclass(frozen=True)
class Labelled:
    """Features and labels of some images."""

    x: Float[Tensor, "n k d"]  # class token, mean of patch tokens; or the mean over a CNN's pixels
    labels: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class FeatureSets:
    """Frozen features of a data set by backbone, by random weights, and of images that choices are made on."""

    train: Labelled
    test: Labelled
    random_train: Labelled
    random_test: Labelled
    base: Labelled
    base_images: UInt8[Tensor, "g c h w"]
    base_is_new: bool  # the base classes are none of the data set's, as drawn glyphs are not
    classes: list[str]
    is_vit: bool  # the backbone is one, so that prompts and memories can be put into it

    def whitening(self, x: Float[Tensor, "g d"], shrinkage: float = 0.2) -> Whitening:
        """Return the coordinates in which base classes have unit covariance; `x` are features of the base images.

        Where those are of the data set's own classes, their labels would tell of what is to be learned: then features are centred and
        of unit variance over all, no more. (To whiten by the covariance of all images hides what tells their classes apart.)
        """
        if self.base_is_new:
            return Whitening(x, self.base.labels, shrinkage)
        return Whitening(x, torch.zeros_like(self.base.labels), shrinkage=1.0)


def input_files(dataset: str) -> tuple[Path, Path]:
    """Return the files that `load_featured_images` reads."""
    return FEATURES / dataset / "features.safetensors", Path(f"data/{dataset}.safetensors")


def load_features(dataset: str, device: torch.device) -> FeatureSets:
    """Return the features of one data set; InputError if they are missing or damaged."""
    path, _ = input_files(dataset)
    about = load_metadata(path)
    tensors = load_file(path, device=str(device))
    sets = ("train", "test", "random_train", "random_test", "base")
    parts = {name: Labelled(tensors[name], tensors[f"{name.removeprefix('random_')}_labels"]) for name in sets}
    new, is_vit = about["base_is_new"], about["is_vit"]
    return FeatureSets(
        **parts, base_images=tensors["base_images"], base_is_new=new, classes=about["classes"], is_vit=is_vit
    )


def first(images: ImageSet, count: int) -> ImageSet:
    """Return the first `count` images, or all: no data set has its images in the order of their classes."""
    return images.subset(torch.arange(min(count, len(images))))


def load_featured_images(dataset: str, device: torch.device) -> tuple[FeatureSets, ImageSet, ImageSet]:
    """Return the features of one data set, and the training and test images that they are of."""
    features, (train, test) = load_features(dataset, device), load_images(dataset, device)
    return features, first(train, len(features.train)), first(test, len(features.test))
