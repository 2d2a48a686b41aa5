"""A network as one vector: how its tensors lie in it, and the principal components of many such vectors.

Axes: n networks or snapshots, p weights, k components.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

RANK_TOLERANCE = 1e-10  # of the largest variance: what is less is rounding, and its axis any direction

Array = TypeVar("Array", Tensor, np.ndarray)


@dataclass(frozen=True)
class Layout:
    """How a network's tensors lie in one vector of p weights: one after the other, each in its own memory's order.

    On disk it is the metadata `layout`, a list of (name, shape): JSON sorts the keys of mappings.
    """

    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Return the layout of named tensors in their order."""
        return cls({name: tuple(tensor.shape) for name, tensor in tensors.items()})

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Self:
        """Return the layout in a file's metadata."""
        return cls({name: tuple(shape) for name, shape in metadata["layout"]})

    @property
    def metadata(self) -> dict[str, object]:
        """The layout as a part of a file's metadata."""
        return {"layout": [[name, list(shape)] for name, shape in self.shapes.items()]}

    @cached_property
    def sizes(self) -> list[int]:
        """The number of weights of each tensor."""
        return [math.prod(shape) for shape in self.shapes.values()]

    @cached_property
    def size(self) -> int:
        """The number of all weights, p."""
        return sum(self.sizes)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each tensor lies."""
        slices, start = {}, 0
        for name, size in zip(self.shapes, self.sizes, strict=True):
            slices[name] = slice(start, start + size)
            start += size
        return slices

    @cached_property
    def layer_of(self) -> Int[Tensor, " p"]:
        """The index of each weight's tensor."""
        return torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))

    def flatten(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, "*n p"]:
        """Return the tensors [*n, *shape] of one network, or of stacked ones, as vectors. ValueError if they have other names or shapes."""
        first, shape = next(iter(self.shapes.items()))
        stacked = tuple(tensors[first].shape[: tensors[first].dim() - len(shape)]) if first in tensors else ()
        expected = {name: stacked + shape for name, shape in self.shapes.items()}
        got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if got != expected:
            raise ValueError(f"expected tensors {expected}, got {got}")
        return torch.cat([tensors[name].reshape(*stacked, -1) for name in self.shapes], -1)

    def unflatten(self, vectors: Float[Tensor, "*n p"]) -> dict[str, Tensor]:
        """Return the tensors [*n, *shape] that vectors are made of, as views of them."""
        stacked = tuple(vectors.shape[:-1])
        parts = zip(self.shapes.items(), vectors.split(self.sizes, -1), strict=True)
        return {name: part.view(stacked + shape) for (name, shape), part in parts}


def gram_spectrum(x: Array, tolerance: float) -> tuple[Array, Array]:
    """Return the eigenvalues [k] of the Gram matrix x xᵀ of rows x [n, p], largest first, and its eigenvectors [n, k].

    For n << p it is the short way to the right singular vectors of x, vectorsᵀ x / sqrt(values): of centred rows their
    principal axes. Those are left out whose value is at most `tolerance` of the largest. Of tensors, or of NumPy's arrays.
    """
    library = torch if isinstance(x, Tensor) else np
    values, vectors = library.linalg.eigh(x @ x.T)
    values, vectors = library.flip(values, (0,)), library.flip(vectors, (1,))
    rank = int((values > tolerance * values[0]).sum())
    return values[:rank], vectors[:, :rank]


def principal_components(
    snapshots: Float[Tensor, "n p"], k: int
) -> tuple[Float[Tensor, " p"], Float[Tensor, "k p"], Float[Tensor, " r"]]:
    """Return the mean, the first k principal axes and the variances along all r that there are.

    There are fewer axes than k if the snapshots span fewer: n - 1 at most, less if some are the same.
    """
    mean = snapshots.mean(0)
    centred = (snapshots - mean).double()
    values, vectors = gram_spectrum(centred, RANK_TOLERANCE)
    basis = (vectors[:, :k].T @ centred) / values[:k, None].sqrt()
    return mean, basis.float(), (values / len(snapshots)).float()
