"""Low-rank changes (LoRA, Hu et al. 2021, arXiv:2106.09685): how stacks of adapters train, and the form that they are read in.

An adapter changes a matrix W [o, i] to W + scale B A, with B [o, r] and A [r, i]. Of (B, A) and (B G, G⁻¹ A) the change is the same for
every invertible G, so nothing is read but the change: its singular vectors and values.

Axes: w weights of a network, a of its adapter, o outputs and i inputs of a matrix, r ranks.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stages.common.stage import InputError
from stages.common.vectors import Layout
from stages.recall.functional_vit import Weights
from stages.recall.objective import Objective

MATRICES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")  # of a block: what adapters are put on
# Of the largest singular value: what is left of a product that was added to weights in single precision.
ROUNDING = 1e-3
NEGLIGIBLE = 1e-6  # of the largest singular value: rounding of single precision


@dataclass(frozen=True)
class AdapterSpace:
    """The weights of a network's adapters as one vector: of every matrix of its blocks A and B, of at most so many ranks.

    Ranks and matrices that an adapter lacks are rows of A that start at zero, as B does: then no gradient moves either.
    """

    network: Layout
    ranks: int

    @cached_property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The shapes of the matrices that can be adapted."""
        return {name: (s[0], s[1]) for name, s in self.network.shapes.items() if can_adapt(name)}

    @cached_property
    def layout(self) -> Layout:
        """How a vector of adapters is cut."""
        shapes: dict[str, tuple[int, ...]] = {f"A.{name}": (self.ranks, i) for name, (_, i) in self.matrices.items()}
        return Layout(shapes | {f"B.{name}": (o, self.ranks) for name, (o, _) in self.matrices.items()})

    def start(self, random: torch.Generator, rank: int, kinds: tuple[str, ...]) -> Float[Tensor, " a"]:
        """Return an adapter that changes nothing yet, of some ranks on some kinds of matrices: A as peft draws it, B of zeros."""
        parts = {name: torch.zeros(shape) for name, shape in self.layout.shapes.items()}
        for name, (_, i) in self.matrices.items():
            drawn = (2 * torch.rand(rank, i, generator=random) - 1) / i**0.5
            if name.split(".", 2)[-1].removesuffix(".weight") in kinds:
                parts[f"A.{name}"][:rank] = drawn
        return self.layout.flatten(parts)

    def change(self, vector: Float[Tensor, " a"], scale: Float[Tensor, ""]) -> Float[Tensor, " w"]:
        """Return how an adapter changes the network's weights."""
        parts = self.layout.unflatten(vector)
        products = {name: scale * (parts[f"B.{name}"] @ parts[f"A.{name}"]) for name in self.matrices}
        zero = vector.new_zeros(())
        return self.network.flatten({n: products.get(n, zero.expand(s)) for n, s in self.network.shapes.items()})

    def loss(self, objective: Objective) -> Callable[..., Float[Tensor, ""]]:
        """Return the objective's loss as a function of an adapter's vector; its scale lies among the frozen weights."""

        def loss(vector: Float[Tensor, " a"], frozen: Weights, *batch: Tensor) -> Float[Tensor, ""]:
            return objective.loss(objective.start + self.change(vector, frozen["scale"]), frozen, *batch)

        return loss


@dataclass(frozen=True)
class Canonical:
    """A change of low rank by its singular vectors and values: U diag(s) Vᵀ. Signs are such that U's largest entries are positive."""

    u: Float[np.ndarray, "o r"]
    s: Float[np.ndarray, " r"]
    v: Float[np.ndarray, "i r"]

    @property
    def change(self) -> Float[np.ndarray, "o i"]:
        """The change itself."""
        return self.u * self.s @ self.v.T


def canonical(b: Float[np.ndarray, "o r"], a: Float[np.ndarray, "r i"], scale: float = 1.0) -> Canonical:
    """Return the canonical form of scale B A: B = Q R and Aᵀ = P S by QR, then the small R Sᵀ by singular values.

    The change [o, i] is never formed. Ranks that add nothing are left out; those that are left, up to rounding in double precision, do
    not depend on the factors.
    """
    q, r = np.linalg.qr(b.astype(np.float64))
    p, s = np.linalg.qr(a.astype(np.float64).T)
    u, values, vt = np.linalg.svd(scale * (r @ s.T))
    kept = values > NEGLIGIBLE * max(values[0], np.finfo(float).tiny)
    k = int(kept.sum())
    u, v = q @ u[:, :k], p @ vt[:k].T
    signs = np.sign(u[np.abs(u).argmax(0), np.arange(k)])
    return Canonical(u * signs, values[:k], v * signs)


def can_adapt(name: str) -> bool:
    """Whether a weight of a network is a matrix that adapters are put on."""
    return name.endswith(tuple(f"{kind}.weight" for kind in MATRICES))


def moved_matrices(change: Float[np.ndarray, " w"], layout: Layout) -> Iterator[tuple[str, Float[np.ndarray, "o i"]]]:
    """Yield of each weight that a change moves its name and how it moves, as a matrix."""
    for name, where in layout.slices.items():
        if change[where].any():
            yield name, change[where].reshape(layout.shapes[name][0], -1)


def merged_adapter(
    change: Float[np.ndarray, " w"], weights: Float[np.ndarray, " w"], layout: Layout
) -> dict[str, Canonical] | None:
    """Return the adapter that was merged into a network; None if the change is of no adapter.

    An adapter moves only matrices of blocks, and each by at most half of the ranks that it has. weights: after the change. Ranks that
    do not rise above the rounding of the weights are left out: errors of deviation d have singular values up to d (√o + √i).
    """
    forms = {}
    for name, matrix in moved_matrices(change, layout):
        if not can_adapt(name):
            return None
        u, values, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
        noise = rounding_error(weights[layout.slices[name]]) * (len(u) ** 0.5 + vt.shape[1] ** 0.5)
        rank = int((values > max(ROUNDING * values[0], noise)).sum())
        if rank > len(values) // 2:
            return None
        forms[name] = Canonical(u[:, :rank], values[:rank], vt[:rank].T)
    return forms or None


def rounding_error(weights: Float[np.ndarray, " w"]) -> float:
    """Return the deviation of the errors with which weights were saved in half precision; 0 if they were saved in more."""
    values = torch.from_numpy(weights)
    for half in (torch.bfloat16, torch.float16):  # the coarser one first: what it can write the other can, too
        if torch.allclose(values, values.to(half).to(values.dtype), rtol=1e-5, atol=1e-8):
            return float(values.square().mean().sqrt()) * torch.finfo(half).eps / 12**0.5
    return 0.0


def forms_of(change: Float[np.ndarray, " w"], layout: Layout) -> dict[str, Canonical]:
    """Return the canonical forms of the matrices of blocks that a change moves."""
    moved = moved_matrices(change, layout)
    return {name: canonical(matrix, np.eye(matrix.shape[1])) for name, matrix in moved if can_adapt(name)}


def check_ranks(name: str, forms: Mapping[str, Canonical]) -> None:
    """InputError if matrices that an adapter moves have different ranks, as no training of one leaves them.

    Of a sum of two adapters the ranks add up where both lie, so they differ unless both are put on the same matrices.
    """
    ranks = {key: rank_of(key, form) for key, form in forms.items() if len(form.s)}
    most = max(ranks.values(), default=0)
    for key, rank in ranks.items():
        if rank < min(most, len(forms[key].u), len(forms[key].v)):
            raise InputError(
                f"{name}: its change of {key} has rank {rank}, of other matrices {most}: it is a mixture of adapters, or was made with "
                "peft's rank_pattern, which the auditor does not know; give one adapter as training left it"
            )


def rank_of(name: str, form: Canonical) -> int:
    """Return the rank of the adapter that made a change.

    Queries, keys and values are one matrix here. Where each third has directions of its own, so that their ranks add up to the whole's,
    each had an adapter of its own, as transformers' networks have: then it is the largest of theirs.
    """
    if not name.endswith(f"{MATRICES[0]}.weight"):
        return len(form.s)
    parts = [np.linalg.svd(part * form.s, compute_uv=False) for part in np.split(form.u, 3)]
    ranks = [int((values > NEGLIGIBLE * form.s[0]).sum()) for values in parts]
    return max(ranks) if sum(ranks) == len(form.s) else len(form.s)


def dense(adapters: Mapping[str, Canonical], layout: Layout) -> Float[np.ndarray, " w"]:
    """Return the change of a whole network of which some matrices are adapted."""
    change = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in layout.shapes.items()}
    change |= {name: torch.from_numpy(form.change) for name, form in adapters.items()}
    return layout.flatten(change).float().numpy()
