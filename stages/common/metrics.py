"""Numbers that stages report."""

import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.special import stdtrit
from torch import Tensor

from stages.common.files import Summary

COVERAGE = 0.9  # of prediction intervals
RESAMPLES = 2000  # of a bootstrap
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a five-number summary


def accuracy(logits: Float[Tensor, "*r n c"], labels: Int[Tensor, " n"]) -> Float[Tensor, "*r"]:
    """Return the share of images whose largest logit is their label's, in float64."""
    return (logits.argmax(-1) == labels).to(torch.float64).mean(-1)


def majority_accuracy(train_labels: Int[Tensor, " n"], test_labels: Int[Tensor, " m"]) -> float:
    """Return the accuracy of always answering the most frequent class."""
    return (test_labels == train_labels.mode().values).double().mean().item()


def mean_std(values: list[float]) -> dict[str, float]:
    """Return mean, sample standard deviation (none of one value) and number of `values`, as a rule one for each seed."""
    spread = {"std": statistics.stdev(values)} if len(values) > 1 else {}
    return {"mean": statistics.fmean(values), **spread, "n": len(values)}


def mean_interval(values: list[float]) -> dict[str, float]:
    """Return the mean, number and 95 % confidence interval (Student's t; none of one value) of independent `values`."""
    result = {"mean": statistics.fmean(values), "n": len(values)}
    if len(values) > 1:
        half = stdtrit(len(values) - 1, 0.975) * statistics.stdev(values) / math.sqrt(len(values))
        result |= {"low": result["mean"] - half, "high": result["mean"] + half}
    return result


def bootstrap_interval(
    measure: Callable[..., Float[np.ndarray, "*r"]], *values: Float[np.ndarray, " n"], resamples: int = RESAMPLES
) -> dict[str, float]:
    """Return the measure of n items, and its 95 % percentile interval over bootstrap samples of the items.

    `measure` takes one array [..., n] for each of `values` and reduces the last axis.
    """
    from scipy.stats import bootstrap  # here: 0.5 s that most stages do without

    intervals = bootstrap(values, measure, paired=True, n_resamples=resamples, method="percentile", rng=0)
    low, high = intervals.confidence_interval
    return {"mean": float(measure(*values)), "low": float(low), "high": float(high)}


def headline_metrics(summary: Summary, places: dict[str, str]) -> dict[str, float]:
    """Return the few numbers of a summary that `dvc metrics` shows, by names that are short and of one stage alone.

    places: where each lies in the nested summary, as keys joined by slashes; of a mean with a spread the mean is taken. What a
    scale leaves out (a skipped method) is left out.
    """

    def look_up(place: str) -> Any:
        value: Any = summary
        for key in place.split("/"):
            value = value.get(key) if isinstance(value, dict) else None
        return value["mean"] if isinstance(value, dict) else value

    found = {name: look_up(place) for name, place in places.items()}
    return {name: value for name, value in found.items() if value is not None}


def over_seeds(results: list[Summary]) -> Summary:
    """Return nested mappings of numbers, one for each seed and all alike, as one with `mean_std` in place of numbers."""
    first = results[0]
    return {
        str(key): over_seeds([result[key] for result in results])
        if isinstance(first[key], dict)
        else mean_std([result[key] for result in results])
        for key in first
    }


def calibration_error(logits: Float[Tensor, "n b c"], labels: Int[Tensor, " b"], bins: int = 15) -> Float[Tensor, " n"]:
    """Return the expected calibration error of n classifiers, in float64 (Guo et al. 2017, arXiv:1706.04599, eq. 3)."""
    confidence, answer = logits.double().softmax(-1).max(-1)
    excess = (answer == labels).double() - confidence
    places = (confidence * bins).long().clamp(max=bins - 1)
    sums = torch.zeros(len(logits), bins, dtype=torch.float64, device=logits.device).scatter_add_(1, places, excess)
    return sums.abs().sum(1) / logits.shape[1]


def binary_calibration_error(p: Float[np.ndarray, " n"], y: Bool[np.ndarray, " n"], bins: int = 10) -> float:
    """Return the expected calibration error of probabilities p of binary targets y, over bins of confidence from 0.5 to 1."""
    confidence, right = np.maximum(p, 1 - p), (p > 0.5) == y
    place = np.minimum((2 * (confidence - 0.5) * bins).astype(int), bins - 1)
    gaps = [abs(confidence[place == b].mean() - right[place == b].mean()) * (place == b).mean() for b in set(place)]
    return float(sum(gaps))
