"""Numbers that stages report."""

import math
import statistics
from typing import Any

import torch
from jaxtyping import Float, Int
from scipy.special import stdtrit
from torch import Tensor


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


def over_seeds(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return nested mappings of numbers, one for each seed and all alike, as one with `mean_std` in place of numbers."""
    first = results[0]
    return {
        str(key): over_seeds([result[key] for result in results])
        if isinstance(first[key], dict)
        else mean_std([result[key] for result in results])
        for key in first
    }
