"""Schedules begin above 0, peak once and end at 0."""

import math

import pytest
import torch

from stages.common.optim import require_convergence, set_learning_rate, warmup_cosine, warmup_times_cosine
from stages.common.stage import InputError


def test_warmup_cosine_rises_to_one_and_falls_to_zero():
    factor = warmup_cosine(steps=100, warmup_fraction=0.09)
    assert [factor(0), factor(4), factor(9), factor(100)] == pytest.approx([0.1, 0.5, 1, 0])
    assert max(map(factor, range(101))) == factor(9)
    assert warmup_cosine(steps=1, warmup_fraction=0.05)(0) > 0  # even a single step moves


def test_warmup_times_cosine_is_the_product_of_both():
    rate = warmup_times_cosine(2.0, steps=100, warmup_fraction=0.1)
    for step in range(101):
        expected = (
            2 * min(1, (step + 1) / 10) * math.cos(math.pi * step / 200) ** 2
        )  # half of 1 + cos x is cos² of x / 2
        assert rate(step) == pytest.approx(expected, abs=1e-12)
    assert 0 < rate(0) < rate(9) < 2
    assert max(map(rate, range(101))) == rate(9)
    assert rate(100) == pytest.approx(0)


def test_the_learning_rate_of_every_group_is_set():
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 1.0 + i} for i, weight in enumerate(weights)])
    set_learning_rate(optimizer, 0.25)
    for weight in weights:
        weight.grad = torch.ones(1)
    optimizer.step()
    assert [weight.item() for weight in weights] == [0.75, 0.75]


def test_divergence_is_a_loss_far_above_that_of_the_untrained_network_or_no_number():
    for loss in (0.0, 1.0, 2.3, 2 * 2.3):
        require_convergence(loss, "run 1", "lower the rate", 2.3)
    with pytest.raises(
        InputError, match=r"^run 1: training diverged, its loss is 60 and was 2.3 untrained: lower the rate$"
    ):
        require_convergence(60.0, "run 1", "lower the rate", 2.3)
    for loss in (math.nan, math.inf):
        with pytest.raises(InputError, match=r"^run 1: training diverged, its loss is not finite: lower the rate$"):
            require_convergence(loss, "run 1", "lower the rate")
