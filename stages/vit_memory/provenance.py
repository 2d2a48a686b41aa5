"""A memory of single images: what every answer came from is known, and an image can be taken out again exactly.

Axes: m stored images, n queries, d features, c classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from stages.vit_memory.checks import check_counts, check_label, check_labels, check_positive
from stages.vit_memory.hopfield import associate


@dataclass(frozen=True)
class Source:
    """A stored image that an answer came from."""

    name: str
    label: int
    weight: float  # of all that was retrieved, 0 to 1


class ImageMemory:
    """An associative memory with a pattern for each image, under the image's name.

    An answer is the share of attention that each class's images get (Ramsauer et al. 2020, arXiv:2008.02217, eq. 3), so it is a sum
    of the images' weights and of nothing else. Nothing is kept but the images' features: what is derived from several, as the origin
    of the keys, is derived anew at every question. So a memory that has forgotten an image is, bit for bit, one that never saw it.
    """

    def __init__(self, dim: int, num_classes: int, beta: float = 16.0) -> None:
        check_counts(dim=dim, num_classes=num_classes)
        check_positive(beta=beta)
        self.num_classes, self.beta = num_classes, beta
        self.x, self.labels = torch.zeros(0, dim), torch.zeros(0, dtype=torch.long)
        self.names: list[str] = []

    def __len__(self) -> int:
        return len(self.names)

    def write(self, x: Float[Tensor, "n d"], labels: Int[Tensor, " n"], names: Sequence[str]) -> None:
        """Store images' features under names that are new; ValueError if one is not, or if the numbers differ."""
        check_labels(labels, len(x), self.num_classes)
        if x.shape[1:] != self.x.shape[1:] or len(names) != len(x):
            got = f"{list(x.shape)} and {len(names)} names"
            raise ValueError(f"x: expected [n, {self.x.shape[1]}] and a name for each, got {got}")
        if len({*self.names, *names}) < len(self) + len(names):
            raise ValueError("names: expected each image once, got one that is stored already, or twice")
        self.x, self.labels = torch.cat([self.x.to(x), x]), torch.cat([self.labels.to(labels), labels])
        self.names += names

    def attend(self, queries: Float[Tensor, "n d"]) -> Float[Tensor, "n m"]:
        """Return the weight of each stored image in the answer to each query: rows sum to 1. ValueError if nothing is stored."""
        if not self.names:
            raise ValueError("memory: expected an image or more, got none: call write() first")
        centre = self.x.mean(0)
        return associate(normalize(self.x - centre, dim=1), normalize(queries - centre, dim=1), self.beta)

    def answer(self, queries: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
        """Return the weight of each class: the largest is the answer."""
        weights = self.attend(queries)
        return weights @ one_hot(self.labels, self.num_classes).to(weights)

    def sources(self, queries: Float[Tensor, "n d"], count: int = 5) -> list[list[Source]]:
        """Return the stored images that the answer to each query came from most, largest weight first."""
        check_counts(count=count)
        weights, places = self.attend(queries).topk(min(count, len(self)))
        labels = self.labels.tolist()
        return [
            [Source(self.names[i], labels[i], weight) for i, weight in zip(row, of_row, strict=True)]
            for row, of_row in zip(places.tolist(), weights.tolist(), strict=True)
        ]

    def forget_image(self, name: str) -> None:
        """Take one image out; ValueError if it is not stored."""
        if name not in self.names:
            raise ValueError(f"name: expected one of the {len(self)} stored images, got {name!r}")
        self._keep(torch.tensor([other != name for other in self.names]))

    def forget(self, label: int) -> None:
        """Take all images of a class out."""
        check_label(label, self.num_classes)
        self._keep(self.labels.cpu() != label)

    def _keep(self, kept: Bool[Tensor, " m"]) -> None:
        self.names = [name for name, keep in zip(self.names, kept.tolist(), strict=True) if keep]
        kept = kept.to(self.x.device)
        self.x, self.labels = self.x[kept], self.labels[kept]
