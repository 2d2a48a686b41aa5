"""A change of a large network in few numbers: every matrix between random directions, the same for all who ask.

Of a matrix's change D [o, i] is kept L^T D R / k with L [o, k] and R [i, k] of random signs: inner products of changes stay what they are
on average (Johnson and Lindenstrauss 1984), sums and negatives commute with it, and of a low-rank change nothing large is ever formed.

Axes: n networks, w weights of a network, s numbers of a sketch, o outputs and i inputs of a matrix, r ranks, k directions.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from stages.common.randomness import generator
from stages.common.vectors import Layout


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a tensor is read as a matrix."""
    return len(shape) > 1 and shape[0] > 1


@dataclass(frozen=True)
class Sketch:
    """How changes of a network are cut down to at most `directions` rows and columns of each matrix; vectors stay as they are."""

    network: Layout
    directions: int

    @cached_property
    def layout(self) -> Layout:
        """How a sketch is cut into tensors."""
        k = self.directions
        small = {
            n: (min(s[0], k), min(self.inputs(n), k)) if is_matrix(s) else s for n, s in self.network.shapes.items()
        }
        return Layout(small)

    def inputs(self, name: str) -> int:
        """Return the number of columns of a matrix."""
        shape = self.network.shapes[name]
        return Layout({name: shape}).size // shape[0]

    @cached_property
    def sides(self) -> dict[str, tuple[Float[Tensor, "o k"], Float[Tensor, "i k"]]]:
        """Each matrix's directions; where there are no more rows than directions, the rows themselves."""
        sides = {}
        for name, shape in self.network.shapes.items():
            if is_matrix(shape):
                sizes = shape[0], self.inputs(name)
                sides[name] = tuple(self._signs(f"{name} {side}", size) for side, size in zip("LR", sizes, strict=True))
        return sides

    def _signs(self, purpose: str, size: int) -> Float[Tensor, "z k"]:
        k = self.directions
        if size <= k:
            return torch.eye(size)
        return (2.0 * torch.randint(2, (size, k), generator=generator(0, purpose)) - 1) / k**0.5

    @cached_property
    def sha256(self) -> str:
        """The hash of all directions: another version of the generator must not go unseen."""
        digest = hashlib.sha256()
        for left, right in self.sides.values():
            digest.update((left > 0).numpy().tobytes() + (right > 0).numpy().tobytes())
        return digest.hexdigest()

    def of(self, change: Mapping[str, Tensor]) -> Float[Tensor, "*n s"]:
        """Return the sketch of changes [*n, *shape] of every tensor."""
        parts = {}
        for name, (left, right) in self.sides.items():
            tensor = change[name]
            stacked = tensor.shape[: tensor.dim() - len(self.network.shapes[name])]
            matrix = tensor.reshape(*stacked, len(left), len(right))
            parts[name] = left.T.to(matrix) @ matrix @ right.to(matrix)
        return self.layout.flatten({name: parts.get(name, change.get(name)) for name in self.layout.shapes})

    def of_factors(
        self, factors: Mapping[str, tuple[Float[Tensor, "n o r"], Float[Tensor, "n r i"]]]
    ) -> Float[Tensor, "n s"]:
        """Return the sketch of changes B A of some matrices; all else stays."""
        first = next(iter(factors.values()))[0]
        parts = {name: first.new_zeros(len(first), *shape) for name, shape in self.layout.shapes.items()}
        for name, (b, a) in factors.items():
            left, right = self.sides[name]
            parts[name] = (left.T.to(b) @ b) @ (a @ right.to(a))
        return self.layout.flatten(parts)
