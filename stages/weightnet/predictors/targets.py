"""The properties as predictors learn them: on scales on which errors are alike, in units of their spread."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from stages.weightnet.zoo.properties import PROPERTIES

EDGE = 0.005  # accuracies nearer to 0 or 1 are taken for this
LEAST_LOSS, LARGEST_LOSS = 1e-6, 1e3  # nats: far from what was learned from, predicted logarithms are of no number


def to_scale(values: Float[Tensor, "n k"], names: Sequence[str] = PROPERTIES) -> Float[Tensor, "n k"]:
    """Return the properties with accuracies as log-odds and the loss as its logarithm; NaN stays what is not known."""
    columns = []
    for name, value in zip(names, values.unbind(1), strict=True):
        if name.endswith("_acc"):
            columns.append(value.clamp(EDGE, 1 - EDGE).logit())
        else:
            columns.append(value.clamp(min=LEAST_LOSS).log() if name == "test_loss" else value)
    return torch.stack(columns, 1)


def own_units(
    values: Float[Tensor, "n k"], scale: dict[str, Float[Tensor, " f"]], names: Sequence[str] = PROPERTIES
) -> Float[Tensor, "n k"]:
    """Return standardised properties in their own units; scale: mean and deviation of those learned from."""
    return from_scale(values * scale["target_std"] + scale["target_mean"], names)


def from_scale(values: Float[Tensor, "n k"], names: Sequence[str] = PROPERTIES) -> Float[Tensor, "n k"]:
    """Return the properties in their own units, losses up to LARGEST_LOSS."""
    columns = []
    for name, value in zip(names, values.unbind(1), strict=True):
        if name.endswith("_acc"):
            columns.append(value.sigmoid())
        else:
            columns.append(value.exp().clamp(max=LARGEST_LOSS) if name == "test_loss" else value)
    return torch.stack(columns, 1)
