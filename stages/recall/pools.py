"""Disjoint pools of a data set's training images: what one network learned from, no other has seen."""

from typing import Literal

import torch

from stages.common.images import ImageSet
from stages.common.randomness import generator

Pool = Literal["base", "train", "test"]
# of the base network; of fine-tunes to learn from; of those to test on
POOLS: tuple[Pool, ...] = ("base", "train", "test")


def pool(images: ImageSet, name: Pool) -> ImageSet:
    """Return a random third of a data set's training images, the same for everyone who asks."""
    order = torch.randperm(len(images), generator=generator(0, "pools")).to(images.labels.device)
    return images.subset(order[POOLS.index(name) :: len(POOLS)])
