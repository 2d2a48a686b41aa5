"""Kernel ridge regression that chooses its length and its penalty for each target by leaving networks out, exactly.

Axes: n networks that are learned from, m others, f inputs, k targets.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LENGTHS = (0.5, 1.0, 2.0, 4.0)  # times the distance of two inputs that are a deviation apart in every number
PENALTIES = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
LINEAR = 0.1  # weight of the linear part, which goes on where the other has forgotten
FARTHEST = 4.0  # deviations: what lies farther counts as this far


def kernel(a: Float[Tensor, "m f"], b: Float[Tensor, "n f"], length: float) -> Float[Tensor, "m n"]:
    """Return exp(-|a - b|² / (2 f length²)) + LINEAR a·b / f."""
    f = a.shape[1]
    return torch.exp(-torch.cdist(a, b).square() / (2 * f * length**2)) + LINEAR * (a @ b.T) / f


def left_out_errors(
    values: Float[Tensor, " n"], vectors: Float[Tensor, "n n"], targets: Float[Tensor, "n k"], penalty: float
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n k"]]:
    """Return alpha = (K + penalty)⁻¹ y of a kernel matrix's eigenvectors, and the error at each network if it is left out.

    The latter is alpha_i / ((K + penalty)⁻¹)_ii, of the centred targets (Rasmussen and Williams 2006, equation 5.12).
    """
    inverse = 1 / (values.clamp(min=0) + penalty)
    alpha = vectors @ (inverse[:, None] * (vectors.T @ targets))
    return alpha, alpha / (vectors.square() @ inverse)[:, None]


@dataclass(frozen=True)
class KernelRidge:
    """What was learned from n networks. Everything is in float64."""

    center: Float[Tensor, " f"]
    spread: Float[Tensor, " f"]
    known: Float[Tensor, "n f"]  # standardised inputs
    alpha: Float[Tensor, "n k"]
    mean: Float[Tensor, " k"]  # of the targets
    settings: Float[Tensor, "k 2"]  # length and penalty of each target
    told: Bool[Tensor, "n k"] | None = None  # which networks' targets were known, if not all

    def standardised(self, inputs: Float[Tensor, "m f"]) -> Float[Tensor, "m f"]:
        """Return inputs in units of their spread over the networks that were learned from, none farther than FARTHEST."""
        return ((inputs.double() - self.center) / self.spread).clamp(-FARTHEST, FARTHEST)

    def predict(self, inputs: Float[Tensor, "m f"]) -> Float[Tensor, "m k"]:
        """Return predictions for other networks."""
        x = self.standardised(inputs)
        kernels = {length: kernel(x, self.known, length) for length in set(self.settings[:, 0].tolist())}
        columns = [kernels[length] @ self.alpha[:, k] for k, (length, _) in enumerate(self.settings.tolist())]
        return torch.stack(columns, 1) + self.mean

    def deviation(self, inputs: Float[Tensor, "m f"]) -> Float[Tensor, "m k"]:
        """Return how uncertain each prediction is, larger with the distance from what was learned from, and without a unit.

        The standard deviation of the Gaussian process whose mean `predict` is (Rasmussen and Williams 2006, equation 2.26).
        """
        return self.deviation_at(self.standardised(inputs))

    def deviation_at(self, x: Float[Tensor, "m f"]) -> Float[Tensor, "m k"]:
        """Return the same by standardised inputs."""

        @cache
        def of(length: float, penalty: float, rows: tuple[bool, ...] | None) -> Float[Tensor, " m"]:
            known = self.known if rows is None else self.known[torch.tensor(rows)]
            noisy = kernel(known, known, length) + penalty * torch.eye(len(known), dtype=x.dtype)
            across = kernel(x, known, length)
            told = (across.T * torch.linalg.solve(noisy, across.T)).sum(0)
            own = 1 + LINEAR * x.square().mean(1)
            return (own - told).clamp(min=0).add(penalty).sqrt()

        rows = [None] * len(self.settings) if self.told is None else [tuple(row) for row in self.told.T.tolist()]
        return torch.stack([of(*setting, row) for setting, row in zip(self.settings.tolist(), rows, strict=True)], 1)

    def without(self, out: Bool[Tensor, " n"]) -> "KernelRidge":
        """Return what is as uncertain as if some networks had not been learned from; its predictions mean nothing."""
        told = None if self.told is None else self.told[~out]
        return replace(self, known=self.known[~out], told=told)


def fit_kernel_ridge(inputs: Float[Tensor, "n f"], targets: Float[Tensor, "n k"]) -> KernelRidge:
    """Learn from networks; of the lengths and penalties, each target takes those with the least squared error left out.

    A target that is NaN is not known: it is learned from the other networks, and predicted as NaN if it is known of none.
    """
    inputs, targets, told = inputs.double(), targets.double(), ~targets.isnan()
    center, spread = inputs.mean(0), inputs.std(0) + 1e-6
    known = ((inputs - center) / spread).clamp(-FARTHEST, FARTHEST)
    if told.all():
        mean = targets.mean(0)
        alpha, settings = learn(known, targets - mean)
        return KernelRidge(center, spread, known, alpha, mean, settings)
    alpha, settings, means = torch.zeros_like(targets), targets.new_ones(targets.shape[1], 2), []
    for k, rows in enumerate(told.T):
        means.append(targets[rows, k].mean())  # of none NaN
        if rows.any():
            alpha[rows, k : k + 1], settings[k] = learn(known[rows], targets[rows, k : k + 1] - means[k])
    return KernelRidge(center, spread, known, alpha, torch.stack(means), settings, told)


def learn(
    known: Float[Tensor, "n f"], targets: Float[Tensor, "n k"]
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "k 2"]]:
    """Return alpha of centred targets, and the length and the penalty that each takes."""
    settings, alphas, errors = [], [], []
    for length in LENGTHS:
        values, vectors = torch.linalg.eigh(kernel(known, known, length))
        for penalty in PENALTIES:
            alpha, error = left_out_errors(values, vectors, targets, penalty)
            settings.append((length, penalty))
            alphas.append(alpha)
            errors.append(error.square().mean(0))
    best = torch.stack(errors).argmin(0)
    alpha = torch.stack([alphas[place][:, k] for k, place in enumerate(best.tolist())], 1)
    return alpha, torch.tensor(settings, dtype=torch.float64)[best]
