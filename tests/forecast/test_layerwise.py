"""A forecaster that is linear in each weight's past, with coefficients read from its layer."""

import pytest
import torch

from stages.common.vectors import Layout
from stages.forecast.examples import Examples, draw_origins, example, network_errors, relative_loss, thin
from stages.forecast.layerwise import MEANS, LayerForecaster
from stages.forecast.trajectory import WINDOW, Trajectory

LAYOUT = Layout({"a.weight": (4, 5), "a.bias": (4,), "b.weight": (3, 4)})
HORIZONS = (1, 3)


def walk(n=30, seed=0) -> Trajectory:
    steps = torch.randn(n, LAYOUT.size, generator=torch.Generator().manual_seed(seed))
    return Trajectory(LAYOUT, steps.cumsum(0), None)


@pytest.fixture
def model() -> LayerForecaster:
    """One that moves."""
    model = LayerForecaster(HORIZONS, 8, seed=0)
    torch.nn.init.normal_(model.head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return model.requires_grad_(False)


def test_it_starts_as_no_change():
    run = walk()
    assert torch.equal(LayerForecaster(HORIZONS, 8, seed=0).predict(run, 20), run.weights[20].expand(2, -1))


@pytest.mark.parametrize("t", [WINDOW, 15, 28])
def test_nothing_of_the_future_and_nothing_older_than_it_says_is_read(model, t):
    run = walk(80)
    ahead = model.predict(run, t)
    spoilt = run.weights.clone()
    spoilt[t + 1 :] = torch.nan
    spoilt[1 : max(1, t - MEANS[-1])] = torch.nan
    assert torch.equal(ahead, model.predict(Trajectory(LAYOUT, spoilt, None), t))


def test_some_weights_are_forecast_as_all_are(model):
    run, index = walk(), torch.tensor([0, 3, 19, 22, 24, 35])
    whole = model.predict(run, 20) - run.weights[20]
    assert torch.allclose(model.movements(run, 20, index), whole[:, index], atol=1e-5)
    assert torch.allclose(model.movements(run, 20, torch.arange(0, 20, 3)), whole[:, :20:3], atol=1e-5)


def test_it_does_not_depend_on_units_nor_on_the_order_of_weights(model):
    run = walk()
    moved = model.predict(run, 20) - run.weights[20]
    scaled = Trajectory(LAYOUT, 7.0 * run.weights, None)
    assert torch.allclose(model.predict(scaled, 20) - scaled.weights[20], 7 * moved, rtol=1e-3, atol=1e-4)
    order = torch.cat([torch.randperm(20), 20 + torch.randperm(4), 24 + torch.randperm(12)])
    shuffled = Trajectory(LAYOUT, run.weights[:, order], None)
    assert torch.allclose(model.predict(shuffled, 20) - shuffled.weights[20], moved[:, order], rtol=1e-3, atol=1e-4)


def test_moments_tell_the_error_exactly(model):
    run = walk()
    one = example(run, 20, HORIZONS, layers=5)
    errors, kept = network_errors(model(one.read), one)
    truth = run.weights[[21, 23]]
    direct = (model.predict(run, 20) - truth).square().sum(1), (run.weights[20] - truth).square().sum(1)
    assert torch.allclose(errors[0] / kept[0], direct[0] / direct[1], rtol=1e-3)
    assert torch.allclose(kept[0, 0] / kept[0, 1], direct[1][0] / direct[1][1], rtol=1e-3)


def test_horizons_that_a_run_does_not_reach_do_not_count(model):
    run = walk()
    short = Trajectory(LAYOUT, run.weights[:23], None)
    one, other = example(run, 20, HORIZONS, layers=3), example(short, 20, HORIZONS, layers=3)
    assert one.known.tolist() == [[True, True]] and other.known.tolist() == [[True, False]]
    errors, kept = network_errors(model(other.read), other)
    assert errors[0, 1] == kept[0, 1] == 0
    assert relative_loss(model(other.read), other).item() == pytest.approx((errors[0, 0] / kept[0, 0]).item())


def test_thinned_runs_are_runs_recorded_more_rarely():
    run = walk()
    assert torch.equal(thin(run, 2, 3).weights, run.weights[2::3])
    drawn = draw_origins(run, 3, HORIZONS, 6, 3, torch.Generator().manual_seed(0))
    assert len(drawn) == 6 and all(one.known[0, 0] for one in drawn)
    assert draw_origins(run, 5, HORIZONS, 6, 3, torch.Generator().manual_seed(0)) == []  # six snapshots are too few


def test_it_learns_to_take_back_what_is_noise():
    """Weights that jitter about fixed ones: the best forecast is their mean, with half the error of keeping the last."""
    runs = [
        Trajectory(LAYOUT, torch.randn(40, LAYOUT.size, generator=torch.Generator().manual_seed(i)), None)
        for i in range(8)
    ]
    random = torch.Generator().manual_seed(0)
    examples = Examples.cat([one for run in runs for one in draw_origins(run, 1, HORIZONS, 6, 3, random)])
    model = LayerForecaster(HORIZONS, 16, seed=0)
    model.standardise(examples.read[examples.share > 0])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(120):
        loss = relative_loss(model(examples.read), examples)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.62
