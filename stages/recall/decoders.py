"""Linear decoders from condensed fine-tunes to what they were trained on, with intervals and probabilities that hold.

Axes: n fine-tunes, f columns of a representation, t targets, g groups of predictions.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import expit
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.model_selection import KFold, cross_val_predict

from stages.common.metrics import COVERAGE, RESAMPLES, bootstrap_interval

Arrays = dict[str, np.ndarray]

REPRESENTATIONS = {  # what a decoder reads: descriptions, each with the number of its leading columns or all
    "statistics": {"statistics": None},
    "spectrum": {"spectrum": None},
    "statistics_and_spectrum": {"statistics": None, "spectrum": None},
    "low_rank": {"low_rank": None},
    "components_16": {"change": 16},
    "components_32": {"change": 32},
    "change": {"change": None},
    "responses": {"responses": None},
    "both": {"change": None, "responses": None},
    "all": {"change": None, "responses": None, "spectrum": None, "statistics": None},
}
ALPHAS = np.logspace(-5, 3, 9)  # penalties, of descriptions whose mean square norm is 1
FOLDS = 5
GROUPS = (0.5, 0.8)  # of predictions, as quantiles: half of the classes are absent
ENOUGH = 1000  # errors to tell groups apart
EPSILON = 1e-12
LEAST_PART = 0.5  # of a half-width that an interval keeps inside the range of its values
PLATT_PENALTY = 1e3  # inverse: two numbers of some hundred predictions need next to none


def read(descriptions: Arrays, representation: str) -> Float[np.ndarray, "n f"]:
    """Return a representation of fine-tunes from their descriptions."""
    columns = REPRESENTATIONS[representation]
    return np.concatenate([descriptions[name][:, :count] for name, count in columns.items()], 1).astype(np.float64)


@dataclass(frozen=True)
class Decoder:
    """y = x W + b by ridge regression; once calibrated, with half-widths and the scores' meaning as probabilities."""

    weights: Float[np.ndarray, "f t"]
    offset: Float[np.ndarray, " t"]
    alphas: Float[np.ndarray, " t"] | None = None
    errors: Float[np.ndarray, " t"] | None = None  # mean squared, each fine-tune left out in turn
    edges: Float[np.ndarray, " g-1"] | None = None  # of the groups of predictions that have a half-width of their own
    half_widths: Float[np.ndarray, " g"] | None = None
    predicted_range: Float[np.ndarray, " 2"] | None = None  # of predictions out of fold
    true_range: Float[np.ndarray, " 2"] | None = None  # of the targets learned from
    slope_and_offset: Float[np.ndarray, " 2"] | None = None

    def predict(self, x: Float[np.ndarray, "n f"]) -> Float[np.ndarray, "n t"]:
        """Return what is decoded."""
        return x @ self.weights + self.offset

    def half_width(self, predicted: Float[np.ndarray, "n t"]) -> Float[np.ndarray, "n t"]:
        """Return how far the truth is from a prediction at most, for 90 % of targets like it."""
        return self.half_widths[np.digitize(predicted, self.edges)]

    def known(self, predicted: Float[np.ndarray, "n t"]) -> Float[np.ndarray, "n t"]:
        """Return predictions, drawn back to at most a half-width beyond those that were made while calibrating."""
        half, (least, most) = self.half_width(predicted), self.predicted_range
        return np.clip(predicted, least - half, most + half)

    def doubt(self, predicted: Float[np.ndarray, "n t"]) -> Float[np.ndarray, "n t"]:
        """Return by which factor a prediction is less sure than those known: 1, and more by every half-width beyond them."""
        beyond = np.abs(predicted - self.known(predicted))
        return 1 + beyond / np.maximum(self.half_width(predicted), EPSILON)

    def interval(
        self, predicted: Float[np.ndarray, "n t"], ends: tuple[float, float], doubt: Float[np.ndarray, "n t"]
    ) -> tuple[Float[np.ndarray, "n t"], Float[np.ndarray, "n t"], Float[np.ndarray, "n t"]]:
        """Return value, low and high end: inside a range, half-widths `doubt` times as wide, and never of width zero."""
        value, half = self.known(predicted), self.half_width(predicted) * doubt
        low, high = np.clip(value - half, *ends), np.clip(value + half, *ends)
        # of an interval that its range cuts off, a part stays
        high = np.maximum(high, np.minimum(ends[0] + LEAST_PART * half, ends[1]))
        low = np.minimum(low, np.maximum(ends[1] - LEAST_PART * half, ends[0]))
        return np.clip(value, *ends), low, high

    def probabilities(
        self, scores: Float[np.ndarray, "n t"], doubt: float | Float[np.ndarray, "n t"] = 1.0
    ) -> Float[np.ndarray, "n t"]:
        """Return the probability that a binary target is 1, by Platt's scaling; with doubt it is nearer to even odds."""
        slope, offset = self.slope_and_offset
        return expit((slope * scores + offset) / doubt)

    def calibrate(
        self,
        x: Float[np.ndarray, "n f"],
        y: Float[np.ndarray, "n t"],
        binary: bool,
        unsure: float | Float[np.ndarray, "n 1"] = 1.0,
    ) -> Self:
        """Return the decoder with conformal half-widths and, of binary targets, probabilities: from predictions out of fold.

        Half-widths are those of a fine-tune of which `unsure` is 1; they are to be multiplied by that of others.

        Half-widths are quantiles of errors out of fold, as in cross-validation+ (Barber et al. 2021, arXiv:1905.02928) but around
        this decoder's own prediction, so without its guarantee. Where errors are many, low, middle and high predictions have
        their own. Coverage is over all targets of a group.
        """
        predicted = cross_val_predict(Ridge(alpha=self.alphas), x, y, cv=KFold(FOLDS)).reshape(y.shape)
        errors, level = np.abs(predicted - y) / unsure, min(1.0, COVERAGE * (1 + 1 / len(y)))
        edges = np.quantile(predicted, GROUPS if errors.size >= ENOUGH else ())
        group = np.digitize(predicted, edges)
        widths = np.array([np.quantile(errors[group == g], level) for g in range(len(edges) + 1)])
        platt = None
        if binary:
            model = LogisticRegression(C=PLATT_PENALTY).fit(predicted.reshape(-1, 1), y.reshape(-1) > 0.5)
            platt = np.array([model.coef_[0, 0], model.intercept_[0]])
        ranges = {"predicted_range": ends_of(predicted), "true_range": ends_of(y)}
        return replace(self, edges=edges, half_widths=widths, slope_and_offset=platt, **ranges)

    def to_arrays(self) -> Arrays:
        """Return what a calibrated decoder needs to decode, as named arrays."""
        names = ("weights", "offset", "edges", "half_widths", "predicted_range", "true_range", "slope_and_offset")
        return {name: array for name in names if (array := getattr(self, name)) is not None}


def ends_of(values: np.ndarray) -> Float[np.ndarray, " 2"]:
    """Return the least and the largest value."""
    return np.array([values.min(), values.max()])


def fit_decoder(x: Float[np.ndarray, "n f"], y: Float[np.ndarray, "n t"]) -> Decoder:
    """Return a ridge regression whose penalty is chosen for each target by leaving one fine-tune out."""
    model = RidgeCV(ALPHAS, alpha_per_target=True).fit(x, y)
    weights, errors = model.coef_.reshape(y.shape[1], -1).T, -np.atleast_1d(model.best_score_)
    return Decoder(weights, np.atleast_1d(model.intercept_), np.atleast_1d(model.alpha_), errors)


def r_squared(
    predicted: Float[np.ndarray, "n t"], true: Float[np.ndarray, "n t"], mean: Float[np.ndarray, " t"]
) -> float:
    """Return the fraction of the squared distance from the training mean that is explained: 0 for a decoder that ignores its input."""
    return float(1 - ((predicted - true) ** 2).sum() / ((true - mean) ** 2).sum())


def r_squared_interval(
    predicted: Float[np.ndarray, "n t"],
    true: Float[np.ndarray, "n t"],
    mean: Float[np.ndarray, " t"],
    resamples: int = RESAMPLES,
) -> dict[str, float]:
    """Return `r_squared` with its bootstrap interval over items."""
    errors, spreads = (((x - true) ** 2).sum(1) for x in (predicted, mean))
    return bootstrap_interval(lambda e, s: 1 - e.sum(-1) / s.sum(-1), errors, spreads, resamples=resamples)


def mean_of_items(values: Float[np.ndarray, "*r n"]) -> Float[np.ndarray, "*r"]:
    """Return means over the last axis, in float64."""
    return values.mean(-1, dtype=np.float64)


def right_bits(predicted: Float[np.ndarray, "n t"], true: Float[np.ndarray, "n t"]) -> Bool[np.ndarray, "n t"]:
    """Return which binary targets are decoded right."""
    return (predicted > 0.5) == (true > 0.5)


def directions(rows: Float[np.ndarray, "n w"]) -> Float[np.ndarray, "n w"]:
    """Return rows over their norms."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def retrieved(
    predicted: Float[np.ndarray, "n t"], true: Float[np.ndarray, "n t"], mean: Float[np.ndarray, " t"]
) -> Bool[np.ndarray, " n"]:
    """Return whether each prediction is nearest, by cosine around the training mean, to its own truth among all."""
    return (directions(predicted - mean) @ directions(true - mean).T).argmax(1) == np.arange(len(true))
