"""Refusals: what passes and what does not."""

from typing import Literal

import pytest
import torch

from stages.vit_memory.checks import (
    check_choice,
    check_counts,
    check_fraction,
    check_label,
    check_labels,
    check_positive,
)


def test_what_is_right_passes():
    check_choice("colour", "red", Literal["red", "blue"])
    check_counts(n=1)
    check_counts(at_least=0, n=0)
    check_fraction(low=0, high=1)
    check_positive(beta=0.125)
    check_label(2, 3)
    check_labels(torch.tensor([0, 2, 1]), 3, 3)
    check_labels(torch.tensor([], dtype=torch.long), 0, 3)
    check_labels(torch.tensor([1, 2], dtype=torch.uint8), 2, 3)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (
            lambda: check_choice("colour", "green", Literal["red", "blue"]),
            "colour: expected one of red, blue, got 'green'",
        ),
        (lambda: check_counts(n=0), "n: expected 1 or more, got 0"),
        (lambda: check_counts(at_least=0, n=-1), "n: expected 0 or more, got -1"),
        (lambda: check_fraction(share=1.01), "share: expected 0 to 1, got 1.01"),
        (lambda: check_positive(beta=float("inf")), "beta: expected a number above 0, got inf"),
        (lambda: check_positive(beta=float("nan")), "beta: expected a number above 0, got nan"),
        (lambda: check_label(3, 3), "label: expected 0 to 2, got 3"),
        (lambda: check_labels(torch.tensor([0, 3]), 2, 3), "labels: expected 0 to 2, got 0 to 3"),
        (lambda: check_labels(torch.tensor([-1, 2]), 2, 3), "labels: expected 0 to 2, got -1 to 2"),
        (lambda: check_labels(torch.tensor([True]), 1, 3), r"labels: expected integers of shape \[1\].*torch.bool"),
        (lambda: check_labels(torch.tensor([[1]]), 1, 3), r"got torch.int64 of shape \[1, 1\]"),
    ],
)
def test_what_is_wrong_says_what_was_expected_and_what_it_got(check, message):
    with pytest.raises(ValueError, match=message):
        check()
