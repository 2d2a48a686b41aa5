"""Forecasts judged by what the networks answer."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from stages.common.vectors import Layout
from stages.forecast.function_space import Reference, averaged, judge_as_functions
from stages.forecast.layerwise import LayerForecaster
from stages.forecast.rivals import ExponentialAverage
from stages.forecast.trajectory import Trajectory

LAYOUT = Layout({"weight": (4, 3)})
ORIGINS = [6, 9, 18]


def walk(n=20) -> Trajectory:
    steps = torch.randn(n, LAYOUT.size, generator=torch.Generator().manual_seed(0))
    return Trajectory(LAYOUT, steps.cumsum(0), None)


def model(moves: bool) -> LayerForecaster:
    made = LayerForecaster((1, 3), 8, seed=0)
    if moves:
        nn.init.normal_(made.head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return made.eval().requires_grad_(False)


@pytest.fixture
def reference() -> Reference:
    random = torch.Generator().manual_seed(2)
    x, y = torch.randn(30, 3, generator=random), torch.randint(4, (30,), generator=random)
    return Reference(nn.Linear(3, 4, bias=False), x, y)


def test_of_a_linear_network_the_error_is_that_of_weights_weighed_by_its_inputs_second_moments(reference):
    run, forecaster = walk(), model(moves=True)
    judged = judge_as_functions(forecaster, run, run, reference, ORIGINS)
    moments = reference.images.T @ reference.images / len(reference.images)
    for o, t in enumerate(ORIGINS):
        for i, (h, ahead) in enumerate(zip(forecaster.horizons, forecaster.predict(run, t), strict=True)):
            loss, kept_loss = (
                cross_entropy(linear(reference.images, w.view(4, 3)), reference.labels) for w in (ahead, run.weights[t])
            )
            assert judged.gain[o, i].item() == pytest.approx(max(-1, 1 - (loss / kept_loss).item()), abs=1e-5)
            if t + h >= len(run):
                assert judged.error[o, i].isnan() and judged.kept[o, i].isnan()
                continue
            for found, weights in ((judged.error, ahead), (judged.kept, run.weights[t])):
                d = (weights - run.weights[t + h]).view(4, 3)
                assert found[o, i].item() == pytest.approx((d @ moments @ d.T).trace().item() / 4, rel=1e-4)


def test_no_change_gains_nothing(reference):
    run = walk()
    judged = judge_as_functions(model(moves=False), run, run, reference, ORIGINS)
    assert torch.equal(judged.ratios, torch.ones(2, dtype=torch.float64))
    assert torch.equal(judged.gain, torch.zeros(3, 2, dtype=torch.float64))


def test_an_average_over_snapshots_is_that_of_training():
    run, reader = walk(), ExponentialAverage(0.9)
    for step, weights in enumerate(run.weights, 1):
        reader.observe(step, weights)
    assert torch.allclose(averaged(run, 0.9).weights[-1], reader.weights(), atol=1e-6)
