"""Image data sets as tensors on the device, and batches of them by index."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from stages.common.files import load_metadata
from stages.common.randomness import generator
from stages.common.stage import InputError

DATA = Path("data")


@dataclass(frozen=True)
class ImageSet:
    """Images with their labels, and the names of the classes."""

    images: UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Int[Tensor, " m"]) -> "ImageSet":
        """Return the images at `index`."""
        return ImageSet(self.images[index], self.labels[index], self.classes)

    def pixels(self) -> Float[Tensor, "n c h w"]:
        """Return all images as floats in 0 to 1."""
        return self.images.float() / 255


@cache
def load_images(dataset: str, device: torch.device) -> tuple[ImageSet, ImageSet]:
    """Return the training and the test images of data/<dataset>.safetensors, on `device`; InputError if the file is missing or damaged."""
    path = DATA / f"{dataset}.safetensors"
    classes = load_metadata(path)["classes"]
    tensors = load_file(path, device=str(device))
    train, test = (
        ImageSet(tensors[f"{split}_images"], tensors[f"{split}_labels"], classes) for split in ("train", "test")
    )
    return train, test


def split_validation(train: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Return a random `fraction` of the training images as (rest, validation); InputError if either would be empty."""
    order = torch.randperm(len(train), generator=generator(seed, "validation split")).to(train.labels.device)
    n = round(fraction * len(train))
    if not 0 < n < len(train):
        raise InputError(
            f"validation_fraction {fraction} of {len(train)} images leaves {n} to validate, {len(train) - n} to train"
        )
    return train.subset(order[n:].sort().values), train.subset(order[:n].sort().values)


class NoiseBank:
    """Gaussian noise of mean 0 and variance 1 that is drawn once and given out in random slices, for a fraction of what drawing costs.

    A slice is `count` numbers that follow each other on a ring of `batches * count`, from a random place on and with a random sign.
    Over places and signs each number of a slice has mean 0 and variance 1 exactly; two of a slice are as correlated as independent
    ones are in a sample of the ring's length, and two of different slices are not at all: their signs are independent.
    """

    def __init__(self, count: int, batches: int, random: torch.Generator) -> None:
        ring = torch.randn(batches * count, generator=random, device=random.device)
        ring /= ring.square().mean().sqrt()
        self.count, self.places, self.random = count, len(ring), random
        self.ring = torch.cat([ring, ring[: count - 1]])

    def draw(self) -> tuple[Float[Tensor, " count"], int]:
        """Return a slice of the bank, and its sign: 1 or -1."""
        place, sign = torch.randint(2 * self.places, (), generator=self.random, device=self.random.device).item(), 1
        if place >= self.places:
            place, sign = place - self.places, -1
        return self.ring[place : place + self.count], sign


class Batches:
    """Batches of an ImageSet as (images: float [b, c, h, w] in 0 to 1, labels: int [b]); iterating is one pass.

    In order and complete unless `seed` is given: then each pass is a new permutation without its last, incomplete batch,
    moved by up to `shift` pixels (zeros move in), half of them mirrored if `mirror`, with Gaussian `noise` added (standard
    deviation, in units of the pixel range), which is drawn anew for each batch, or comes from a `NoiseBank` of `noise_bank` batches.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        seed: int | None = None,
        shift: int = 0,
        noise: float = 0.0,
        noise_bank: int | None = None,
        mirror: bool = False,
    ) -> None:
        self.labels, self.noise, self.mirror = data.labels, noise, mirror
        self.n, (h, w) = len(data), data.images.shape[-2:]
        self.batch_size = min(batch_size, self.n)
        self.random = None if seed is None else generator(seed, "batches", data.labels.device)
        # A view of every shifted copy of every image, [n, c, 2 shift + 1, 2 shift + 1, h, w]: shifting is indexing.
        self.shifted = pad(data.images, [shift] * 4).unfold(2, h, 1).unfold(3, w, 1)
        self.bank = None
        if seed is not None and noise and noise_bank:
            random = generator(seed, "noise bank", data.labels.device)
            self.bank = NoiseBank(self.batch_size * data.images[0].numel(), noise_bank, random)

    def __len__(self) -> int:
        return self.n // self.batch_size if self.random else -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"]]]:
        device = self.labels.device
        if self.random is None:
            for start in range(0, self.n, self.batch_size):
                rows = slice(start, start + self.batch_size)
                yield self.shifted[rows, :, 0, 0].float() / 255, self.labels[rows]
            return
        order = torch.randperm(self.n, generator=self.random, device=device)
        for rows in order[: len(self) * self.batch_size].split(self.batch_size):
            down, right = torch.randint(self.shifted.shape[2], (2, len(rows)), generator=self.random, device=device)
            images = self.shifted[rows, :, down, right].float().div_(255)
            if self.mirror:
                mirrored = torch.rand(len(rows), generator=self.random, device=device) < 0.5
                images[mirrored] = images[mirrored].flip(-1)
            yield self._noisy(images), self.labels[rows]

    def _noisy(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return images with noise; they are changed in place."""
        if self.bank is not None:
            noise, sign = self.bank.draw()
            images.view(-1).add_(noise, alpha=sign * self.noise)
        elif self.noise:
            images += self.noise * torch.randn(images.shape, generator=self.random, device=images.device)
        return images
