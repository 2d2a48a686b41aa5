"""Short descriptions of how fine-tuning changed a network, and of how it responds: fitted on training fine-tunes, always centred.

Axes: n fine-tunes, w weights of a network, r responses, f columns of a description, k principal axes.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Float

from stages.common.metrics import QUANTILES
from stages.common.vectors import Layout, gram_spectrum

Arrays = dict[str, np.ndarray]

SINGULAR_VALUES = 16  # of each matrix: half of what one of 32 columns has
RANK = 2  # of the low-rank core of each matrix
EPSILON = 1e-8
CHANGE_UNIT = 1e3  # of statistics: changes of 0.001 and more are read by their logarithm, smaller ones as they are
RANK_TOLERANCE = 1e-6  # of the largest variance: changes are differences of weights in single precision


def tensors_of(change: Float[np.ndarray, "n w"], layout: Layout) -> dict[str, Float[np.ndarray, "n ..."]]:
    """Return the change of each tensor, as matrices [n, rows, columns] or vectors [n, size]."""
    tensors = {}
    for name, shape in layout.shapes.items():
        flat = change[:, layout.slices[name]]
        tensors[name] = flat.reshape(len(change), shape[0], -1) if len(shape) > 1 and shape[0] > 1 else flat
    return tensors


def statistics(change: Float[np.ndarray, "n w"], layout: Layout) -> Float[np.ndarray, "n f"]:
    """Return mean, deviation, size and quantiles of each tensor's change, on a logarithmic scale that keeps signs."""
    columns = []
    for tensor in tensors_of(change, layout).values():
        flat = tensor.reshape(len(tensor), -1)
        columns += [flat.mean(1), flat.std(1), np.abs(flat).mean(1), np.linalg.norm(flat, axis=1)]
        columns += [*np.quantile(flat, QUANTILES, axis=1)]
    values = np.stack(columns, 1)
    return np.sign(values) * np.log1p(CHANGE_UNIT * np.abs(values))


def spectrum(change: Float[np.ndarray, "n w"], layout: Layout) -> Float[np.ndarray, "n f"]:
    """Return the logarithms of each matrix's largest singular values."""
    matrices = [tensor for tensor in tensors_of(change, layout).values() if tensor.ndim == 3]
    values = [np.linalg.svd(matrix, compute_uv=False)[:, :SINGULAR_VALUES] for matrix in matrices]
    return np.log(np.concatenate(values, 1) + EPSILON)


def sureness(responses: Float[np.ndarray, "n r"], classes: int, inputs: int) -> Float[np.ndarray, "n f"]:
    """Return how sure a classifier is over the reference inputs, and how often it answers each class, in ascending order.

    Of networks that do not classify there are no columns.
    """
    if classes <= 1:
        return responses[:, :0]
    logits = responses[:, : inputs * classes].reshape(len(responses), inputs, classes)
    p = np.exp(logits - logits.max(2, keepdims=True))
    p /= p.sum(2, keepdims=True)
    largest, entropy = p.max(2), -(p * np.log(p + EPSILON)).sum(2)
    ordered, frequencies = np.sort(logits, 2), p.mean(1)
    margin = ordered[..., -1] - ordered[..., -2]
    columns = [entropy.mean(1), entropy.std(1), largest.mean(1), largest.std(1), margin.mean(1), logits.std((1, 2))]
    quantiles = np.quantile(largest, QUANTILES, axis=1).T
    return np.concatenate([np.stack(columns, 1), np.sort(frequencies, 1), quantiles], 1)


def principal_axes(x: Float[np.ndarray, "n w"]) -> Float[np.ndarray, "k w"]:
    """Return the principal axes of centred rows, the largest first, without those of rounding."""
    x = x.astype(np.float64)  # small axes are lost in the rounding of single precision
    values, vectors = gram_spectrum(x, RANK_TOLERANCE)
    return ((vectors / np.sqrt(values)).T @ x).astype(np.float32)


@dataclass(frozen=True)
class Span:
    """What changes span: their mean, scales by which each tensor weighs alike, and the axes of the scaled changes."""

    mean: Float[np.ndarray, " w"]
    scale: Float[np.ndarray, " w"]
    axes: Float[np.ndarray, "k w"]

    @classmethod
    def fit(cls, change: Float[np.ndarray, "n w"], layout: Layout) -> Self:
        """Return what the changes of training fine-tunes span."""
        mean = change.mean(0)
        centred = change - mean
        flat = [tensor.reshape(len(tensor), -1) for tensor in tensors_of(centred, layout).values()]
        norms = np.array([np.sqrt((tensor**2).sum(1).mean()) for tensor in flat])
        scale = np.repeat(1 / np.maximum(norms * len(norms) ** 0.5, EPSILON), layout.sizes).astype(np.float32)
        return cls(mean, scale, principal_axes(centred * scale))

    def coordinates(self, change: Float[np.ndarray, "n w"]) -> Float[np.ndarray, "n k"]:
        """Return all of changes that lies inside the span."""
        return (change - self.mean) * self.scale @ self.axes.T


@dataclass(frozen=True)
class Condenser:
    """All that describes fine-tunes, as training fine-tunes are described."""

    layout: Layout
    answers: tuple[int, int]  # classes and reference inputs
    span: Span
    left: Arrays  # of each matrix: directions [rows, RANK] in which its change varies most
    right: Arrays  # [columns, RANK]
    means: Arrays  # of each description
    scales: Arrays
    response_axes: Float[np.ndarray, "k r"]

    @classmethod
    def fit(
        cls,
        change: Float[np.ndarray, "n w"],
        responses: Float[np.ndarray, "n r"],
        layout: Layout,
        answers: tuple[int, int],
    ) -> Self:
        """Return the condenser of training fine-tunes."""
        span = Span.fit(change, layout)
        left, right = {}, {}
        for name, tensor in tensors_of(change - span.mean, layout).items():
            if tensor.ndim == 3:
                rows, columns = np.einsum("nij,nkj->ik", tensor, tensor), np.einsum("nij,nik->jk", tensor, tensor)
                left[name] = np.linalg.eigh(rows)[1][:, : -RANK - 1 : -1]
                right[name] = np.linalg.eigh(columns)[1][:, : -RANK - 1 : -1]
        unfinished = cls(layout, answers, span, left, right, {}, {}, responses[:0])
        means, scales = {}, {}
        for name, values in unfinished.describe(change, responses).items():
            mean, deviation = values.mean(0), values.std(0)
            standard = (values - mean) / (deviation + EPSILON)
            means[name] = mean
            scales[name] = 1 / ((deviation + EPSILON) * np.sqrt((standard**2).sum(1).mean()))
        axes = principal_axes((responses - means["responses"]) * scales["responses"])
        return cls(layout, answers, span, left, right, means, scales, axes)

    def describe(self, change: Float[np.ndarray, "n w"], responses: Float[np.ndarray, "n r"]) -> Arrays:
        """Return descriptions that have yet to be centred and scaled."""
        return {
            "statistics": statistics(change, self.layout),
            "spectrum": spectrum(change, self.layout),
            "low_rank": self.low_rank(change),
            "responses": responses,
            "sureness": sureness(responses, *self.answers),
        }

    def low_rank(self, change: Float[np.ndarray, "n w"]) -> Float[np.ndarray, "n f"]:
        """Return each matrix's change between the directions in which it varies most, and vectors' changes as they are."""
        cores = []
        for name, tensor in tensors_of(change - self.span.mean, self.layout).items():
            core = self.left[name].T @ tensor @ self.right[name] if tensor.ndim == 3 else tensor
            cores.append(core.reshape(len(tensor), -1))
        return np.concatenate(cores, 1)

    def condense(self, change: Float[np.ndarray, "n w"], responses: Float[np.ndarray, "n r"]) -> Arrays:
        """Return every description [n, f], centred, and of mean square norm 1 over the fine-tunes it was fitted on.

        `change` is all that training fine-tunes span of the change, each tensor weighted alike; its leading columns are its
        principal components.
        """
        standard = {
            name: (values - self.means[name]) * self.scales[name]
            for name, values in self.describe(change, responses).items()
        }
        principal = standard["responses"] @ self.response_axes.T
        standard["responses"] = np.concatenate([principal, standard.pop("sureness")], 1)
        standard["change"] = self.span.coordinates(change)
        return {name: values.astype(np.float32) for name, values in standard.items()}
