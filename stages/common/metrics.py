"""Numbers that stages report."""

import statistics
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def accuracy(logits: Float[Tensor, "*r n c"], labels: Int[Tensor, " n"]) -> Float[Tensor, "*r"]:
    """Return the share of images whose largest logit is their label's, in float64."""
    return (logits.argmax(-1) == labels).to(torch.float64).mean(-1)


def mean_std(values: list[float]) -> dict[str, float]:
    """Return mean, sample standard deviation (0 for one value) and number of `values`, as a rule one for each seed."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "n": len(values),
    }


def over_seeds(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return nested mappings of numbers, one for each seed and all alike, as one with `mean_std` in place of numbers."""
    first = results[0]
    return {
        str(key): over_seeds([result[key] for result in results])
        if isinstance(first[key], dict)
        else mean_std([result[key] for result in results])
        for key in first
    }
