"""How alike two bilinear classifiers are: as functions, exactly, and eigenvector by eigenvector.

A logit is a quadratic function f(x) = x' A x + 2 a' x + α of the pixels. For Gaussian pixels x ~ N(μ, S S'), with x = μ + S g,
it is one of g ~ N(0, I), with A -> S' A S, a -> S' (A μ + a), α -> f(μ), and of two such functions (Isserlis' theorem)

    E f = tr A + α,    Cov(f, h) = 2 tr(A B) + 4 a' b,    E f h = Cov(f, h) + E f E h.

No image is drawn, and nothing depends on how a network is written: on the order of its hidden units, or on their scale in L and R.

Axes: c classes, d pixels times channels, g coordinates of the Gaussian, k eigenvectors.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from stages.bilinear.decomposition import (
    DecompositionArtifacts,
    build_bilinear_tensor,
    check_ranks,
    has_constant,
    order_by_magnitude,
    symmetrize_bilinear_tensor,
)
from stages.bilinear.model import BilinearImageClassifier

SHARED_BEYOND = 0.95  # of the matched eigenvectors of different classes: what is more alike is shared


@dataclass(frozen=True)
class Gaussian:
    """Pixels x = mean + root g with g standard normal; root None: the identity."""

    mean: Float[Tensor, " d"]
    root: Float[Tensor, "d g"] | None = None


def gaussian_of(x: Float[Tensor, "n *chw"]) -> Gaussian:
    """Return the Gaussian that has the mean and the covariance of images."""
    x = x.flatten(1).double()
    mean = x.mean(0)
    moments, directions = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    return Gaussian(mean, directions * moments.clamp(min=0).sqrt())


@dataclass(frozen=True)
class Quadratic:
    """f(g) = g' form g + 2 linear . g + constant."""

    form: Float[Tensor, "g g"]
    linear: Float[Tensor, " g"]
    constant: Tensor

    @property
    def mean(self) -> Tensor:
        """The expectation for g ~ N(0, I)."""
        return self.form.trace() + self.constant

    def covariance(self, other: "Quadratic") -> Tensor:
        """The covariance with another function, for g ~ N(0, I)."""
        return 2 * (self.form * other.form).sum() + 4 * self.linear @ other.linear


def logit_functions(model: BilinearImageClassifier, pixels: Gaussian) -> Iterator[Quadratic]:
    """Yield each class's logit less the mean over classes, which no prediction depends on, as a function of the Gaussian's g.

    ValueError unless the network has exactly one bilinear layer.
    """
    forms = symmetrize_bilinear_tensor(build_bilinear_tensor(model))
    forms = forms - forms.mean(0)
    embedding = model.embedding_weight
    shift, read = embedding @ pixels.mean, embedding if pixels.root is None else embedding @ pixels.root
    if not has_constant(model):
        for form in forms:
            yield Quadratic(read.T @ form @ read, read.T @ (form @ shift), shift @ form @ shift)
        return
    for form in forms:
        square, half, constant = form[:-1, :-1], form[:-1, -1], form[-1, -1]
        at_mean = shift @ square @ shift + 2 * half @ shift + constant
        yield Quadratic(read.T @ square @ read, read.T @ (square @ shift + half), at_mean)


@dataclass(frozen=True)
class FunctionalSimilarity:
    """Of every class of one network with every class of another; and of all logits together, as one function to R^c.

    cosine: E f h / sqrt(E f² E h²). correlation: the same of what varies, f - E f and h - E h. Each in -1 to 1.
    """

    cosine: Float[Tensor, "c c"]
    correlation: Float[Tensor, "c c"]
    total_cosine: float
    total_correlation: float


def functional_similarity(
    a: BilinearImageClassifier, b: BilinearImageClassifier, pixels: Gaussian
) -> FunctionalSimilarity:
    """Return how alike two networks of one layer are as functions of Gaussian pixels, exactly."""
    of_a, of_b = list(logit_functions(a, pixels)), list(logit_functions(b, pixels))

    def covariances(left: list[Quadratic], right: list[Quadratic]) -> Float[Tensor, "c c"]:
        return torch.stack([torch.stack([f.covariance(h) for h in right]) for f in left])

    def alike(moments: Float[Tensor, "c c"], own_a: Float[Tensor, " c"], own_b: Float[Tensor, " c"]) -> Tensor:
        return moments / (own_a[:, None] * own_b).sqrt()

    def whole(moments: Float[Tensor, "c c"], own_a: Float[Tensor, " c"], own_b: Float[Tensor, " c"]) -> float:
        return (moments.trace() / (own_a.sum() * own_b.sum()).sqrt()).item()

    mean_a, mean_b = (torch.stack([f.mean for f in functions]) for functions in (of_a, of_b))
    varying = covariances(of_a, of_b), *(torch.stack([f.covariance(f) for f in fs]) for fs in (of_a, of_b))
    full = varying[0] + mean_a[:, None] * mean_b, varying[1] + mean_a.square(), varying[2] + mean_b.square()
    return FunctionalSimilarity(alike(*full), alike(*varying), whole(*full), whole(*varying))


@dataclass(frozen=True)
class Matches:
    """The strongest eigenvectors of a class of one network, each with its partner of another network; strongest first."""

    of_a: list[int]
    of_b: list[int]
    cosines: list[float]  # absolute; 0 where only one of opposite eigenvalue was left


def match_eigenvectors(
    a: DecompositionArtifacts, b: DecompositionArtifacts, classes: tuple[int, int], rank: int
) -> Matches:
    """Match the `rank` strongest eigenvectors of a class of either network one to one, so that the sum of |cosine| is the largest.

    Cosines are those in input space. Eigenvectors of opposite eigenvalue do not match.
    """
    check_ranks([rank])

    def top(artifacts: DecompositionArtifacts, c: int) -> tuple[Tensor, Tensor, Tensor]:
        order = order_by_magnitude(artifacts.eigenvalues)[c, :rank]
        return order, normalize(artifacts.eigenvectors_input[c, order], dim=1), artifacts.eigenvalues[c, order].sign()

    (order_a, vectors_a, signs_a), (order_b, vectors_b, signs_b) = top(a, classes[0]), top(b, classes[1])
    cosines = ((vectors_a @ vectors_b.T).abs() * (signs_a[:, None] == signs_b)).cpu().numpy()
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    return Matches(order_a[rows].tolist(), order_b[columns].tolist(), cosines[rows, columns].tolist())


def chance_cosine(a: DecompositionArtifacts, b: DecompositionArtifacts, rank: int) -> float:
    """Return the |cosine| that SHARED_BEYOND of the matched eigenvectors of different classes stay below: what images have in common."""
    classes = range(len(a.eigenvalues))
    others = [match_eigenvectors(a, b, (c, d), rank).cosines for c in classes for d in classes if c != d]
    return float(np.quantile(np.concatenate(others), SHARED_BEYOND))
