"""What calls of this system's library are refused for: each says what was expected, and what it got."""

from typing import Any, get_args

import torch
from torch import Tensor


def check_choice(name: str, value: object, literal: Any) -> None:
    """ValueError unless `value` is one of the choices of a `Literal`."""
    choices = get_args(literal)
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_positive(**values: float) -> None:
    """ValueError unless every value is a finite number above 0."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}: expected a number above 0, got {value!r}")


def check_counts(at_least: int = 1, **values: int) -> None:
    """ValueError unless every value is a number of things, `at_least` so many."""
    for name, value in values.items():
        if value < at_least:
            raise ValueError(f"{name}: expected {at_least} or more, got {value!r}")


def check_fraction(**values: float) -> None:
    """ValueError unless every value is in 0 to 1."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected 0 to 1, got {value!r}")


def check_labels(labels: Tensor, count: int, classes: int) -> None:
    """ValueError unless these are `count` integers of 0 to classes - 1."""
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != (count,):
        got = f"{labels.dtype} of shape {list(labels.shape)}"
        raise ValueError(f"labels: expected integers of shape [{count}], one for each input, got {got}")
    if count and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        raise ValueError(f"labels: expected 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}")


def check_label(label: int, classes: int) -> None:
    """ValueError unless this is one of 0 to classes - 1."""
    if not 0 <= label < classes:
        raise ValueError(f"label: expected 0 to {classes - 1}, got {label}")
