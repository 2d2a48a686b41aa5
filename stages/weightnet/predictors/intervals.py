"""Intervals that hold for as many new networks as they say, whatever the predictor: split conformal prediction."""

import torch
from jaxtyping import Float
from torch import Tensor

from stages.common.metrics import COVERAGE

ROUNDING = 1e-9  # of sums of weights


def conformal_quantile(errors: Float[Tensor, "v k"], weights: Float[Tensor, " v"] | None = None) -> Float[Tensor, " k"]:
    """Return what 90 % of new networks' errors stay within, by the errors on v networks that were not learned from.

    The quantile of split conformal prediction (Lei et al. 2018, section 2.2), so on average over those networks, which count by
    their weights, by default alike; the largest error if fewer than 9 networks tell. Where validation runs also chose an epoch, it
    is a little small. Errors may be divided by how uncertain each prediction is (section 5.2): then the half of an interval is
    the quantile times how uncertain the new prediction is. NaN: not known; infinity where nothing is known of a property.
    """
    n = len(errors)
    if errors.isnan().any():
        return torch.cat([_of_known(column, weights) for column in errors.T])
    weights = torch.ones(n, dtype=torch.float64) if weights is None else weights.double()
    values, order = errors.abs().sort(0)
    below = (weights / weights.sum())[order].cumsum(0)
    level = min(1.0, COVERAGE * (n + 1) / n)
    first = (below < level - ROUNDING).sum(0).clamp(max=n - 1)
    return values.gather(0, first[None])[0]


def _of_known(errors: Float[Tensor, " v"], weights: Float[Tensor, " v"] | None) -> Float[Tensor, " 1"]:
    known = ~errors.isnan()
    if not known.any():
        return errors.new_full((1,), torch.inf)
    return conformal_quantile(errors[known, None], None if weights is None else weights[known])
