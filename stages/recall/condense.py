"""Short descriptions of how fine-tuning changed a network, and of how it answers: fitted on training fine-tunes, always centred."""

import numpy as np
from jaxtyping import Bool, Float

from stages.common.metrics import QUANTILES
from stages.common.vectors import Layout, gram_spectrum

Arrays = dict[str, np.ndarray]

SINGULAR_VALUES = 16  # of each matrix
RANK = 2  # of the low-rank core of each matrix
FOLDS = 5
EPSILON = 1e-8
RANK_TOLERANCE = 1e-6  # of the largest variance: changes are differences of weights in single precision


def parts(change: Float[np.ndarray, "n p"], layout: Layout) -> dict[str, Float[np.ndarray, "n ..."]]:
    """Return the change of each tensor, as matrices [n, r, c] or vectors [n, s]."""
    found = {}
    for name, shape in layout.shapes.items():
        part = change[:, layout.slices[name]]
        found[name] = part.reshape(len(change), shape[0], -1) if len(shape) > 1 and shape[0] > 1 else part
    return found


def statistics(change: Float[np.ndarray, "n p"], layout: Layout) -> Float[np.ndarray, "n f"]:
    """Return mean, deviation, size and quantiles of each tensor's change, on a logarithmic scale that keeps signs."""
    found = []
    for part in parts(change, layout).values():
        flat = part.reshape(len(part), -1)
        moments = [flat.mean(1), flat.std(1), np.abs(flat).mean(1), np.linalg.norm(flat, axis=1)]
        found += [*moments, *np.quantile(flat, QUANTILES, axis=1)]
    values = np.stack(found, 1)
    return np.sign(values) * np.log1p(1e3 * np.abs(values))


def spectrum(change: Float[np.ndarray, "n p"], layout: Layout) -> Float[np.ndarray, "n f"]:
    """Return the logarithms of each matrix's largest singular values."""
    matrices = [part for part in parts(change, layout).values() if part.ndim == 3]
    values = [np.linalg.svd(matrix, compute_uv=False)[:, :SINGULAR_VALUES] for matrix in matrices]
    return np.log(np.concatenate(values, 1) + EPSILON)


def answer_statistics(responses: Float[np.ndarray, "n r"], classes: int, inputs: int) -> Float[np.ndarray, "n f"]:
    """Return how sure a classifier is over the reference inputs, and how often it gives its classes, in ascending order."""
    answers = responses[:, : inputs * classes].reshape(len(responses), inputs, classes)
    p = np.exp(answers - answers.max(2, keepdims=True))
    p /= p.sum(2, keepdims=True)
    surest, entropy = p.max(2), -(p * np.log(p + EPSILON)).sum(2)
    ordered, shares = np.sort(answers, 2), p.mean(1)
    margin = ordered[..., -1] - ordered[..., -2]
    columns = [entropy.mean(1), entropy.std(1), surest.mean(1), surest.std(1), margin.mean(1), answers.std((1, 2))]
    return np.concatenate([np.stack(columns, 1), np.sort(shares, 1), np.quantile(surest, QUANTILES, axis=1).T], 1)


def fit_axes(x: Float[np.ndarray, "n p"]) -> Float[np.ndarray, "k p"]:
    """Return the principal axes of centred rows, the largest first, without those of rounding."""
    x = x.astype(np.float64)  # small axes are lost in the rounding of single precision
    values, vectors = gram_spectrum(x, RANK_TOLERANCE)
    return ((vectors / np.sqrt(values)).T @ x).astype(np.float32)


def fit_span(change: Float[np.ndarray, "n p"], layout: Layout) -> Arrays:
    """Return the mean of changes, scales by which each tensor weighs alike, and the axes that the scaled changes span."""
    mean = change.mean(0)
    centred = change - mean
    pieces = parts(centred, layout).values()
    norms = np.array([np.sqrt((piece.reshape(len(piece), -1) ** 2).sum(1).mean()) for piece in pieces])
    scale = np.repeat(1 / np.maximum(norms * len(norms) ** 0.5, EPSILON), layout.sizes).astype(np.float32)
    return {"mean": mean, "scale": scale, "axes": fit_axes(centred * scale)}


def fit_limits(change: Float[np.ndarray, "n p"], layout: Layout) -> Arrays:
    """Return what holds of all fine-tunes, each fifth left out in turn: the largest share of a change outside what the others span
    (`limit`), the smallest and the largest size of a change (`sizes`)."""
    fold = np.arange(len(change)) % FOLDS
    shares, sizes = [], []
    for k in range(FOLDS):
        span, left_out = fit_span(change[fold != k], layout), change[fold == k]
        shares.append(outside(left_out, span))
        sizes.append(size(left_out, span))
    found = np.concatenate(sizes)
    return {"limit": np.array(np.concatenate(shares).max()), "sizes": np.array([found.min(), found.max()])}


def fit_condenser(
    change: Float[np.ndarray, "n p"], responses: Float[np.ndarray, "n r"], layout: Layout, answers: tuple[int, int]
) -> Arrays:
    """Return all that `condense` needs: means, scales and axes of training fine-tunes; answers: classes and reference inputs."""
    fitted = fit_span(change, layout) | {"answers": np.array(answers)} | fit_limits(change, layout)
    centred = change - fitted["mean"]
    for name, part in parts(centred, layout).items():
        if part.ndim == 3:
            rows, columns = np.einsum("nij,nkj->ik", part, part), np.einsum("nij,nik->jk", part, part)
            fitted[f"left.{name}"] = np.linalg.eigh(rows)[1][:, : -RANK - 1 : -1]
            fitted[f"right.{name}"] = np.linalg.eigh(columns)[1][:, : -RANK - 1 : -1]
    for name, values in describe(change, responses, layout, fitted).items():
        fitted[f"mean.{name}"], deviation = values.mean(0), values.std(0)
        standard = (values - values.mean(0)) / (deviation + EPSILON)
        fitted[f"scale.{name}"] = 1 / ((deviation + EPSILON) * np.sqrt((standard**2).sum(1).mean()))
    standard = (responses - fitted["mean.responses"]) * fitted["scale.responses"]
    return fitted | {"axes.responses": fit_axes(standard)}


def low_rank(change: Float[np.ndarray, "n p"], layout: Layout, fitted: Arrays) -> Float[np.ndarray, "n f"]:
    """Return each matrix's change between the directions in which it varies most, and vectors' changes as they are."""
    found = []
    for name, part in parts(change - fitted["mean"], layout).items():
        core = fitted[f"left.{name}"].T @ part @ fitted[f"right.{name}"] if part.ndim == 3 else part
        found.append(core.reshape(len(part), -1))
    return np.concatenate(found, 1)


def describe(
    change: Float[np.ndarray, "n p"], responses: Float[np.ndarray, "n r"], layout: Layout, fitted: Arrays
) -> Arrays:
    """Return descriptions that have yet to be centred and scaled."""
    classes, inputs = map(int, fitted["answers"])
    sure = answer_statistics(responses, classes, inputs) if classes > 1 else responses[:, :0]
    return {
        "statistics": statistics(change, layout),
        "spectrum": spectrum(change, layout),
        "low_rank": low_rank(change, layout, fitted),
        "responses": responses,
        "sureness": sure,
    }


def condense(
    change: Float[np.ndarray, "n p"], responses: Float[np.ndarray, "n r"], layout: Layout, fitted: Arrays
) -> Arrays:
    """Return every description [n, f], centred, and of mean square norm 1 over the fine-tunes it was fitted on.

    `change` is all that training fine-tunes span of the change, each tensor weighted alike; `pca` the leading part of it is.
    """
    found = {
        name: (values - fitted[f"mean.{name}"]) * fitted[f"scale.{name}"]
        for name, values in describe(change, responses, layout, fitted).items()
    }
    found["responses"] = np.concatenate([found["responses"] @ fitted["axes.responses"].T, found.pop("sureness")], 1)
    found["change"] = (change - fitted["mean"]) * fitted["scale"] @ fitted["axes"].T
    return {name: values.astype(np.float32) for name, values in found.items()}


def size(change: Float[np.ndarray, "n p"], fitted: Arrays) -> Float[np.ndarray, " n"]:
    """Return how far networks went from their base, each tensor weighted as among the fine-tunes on which this was fitted."""
    return np.linalg.norm(change.astype(np.float64) * fitted["scale"], axis=1)


def outside(change: Float[np.ndarray, "n p"], fitted: Arrays) -> Float[np.ndarray, " n"]:
    """Return the share of each change's square norm that lies outside what the fine-tunes span on which this was fitted: 0 to 1."""
    x = (change.astype(np.float64) - fitted["mean"]) * fitted["scale"]
    inside = x @ fitted["axes"].T
    return 1 - (inside**2).sum(1) / np.maximum((x**2).sum(1), EPSILON)


def split(test: Bool[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of training and of test fine-tunes."""
    return np.flatnonzero(~test), np.flatnonzero(test)
