"""A forecaster that is linear in each weight's past, with coefficients read from its layer."""

import pytest
import torch

from stages.common.vectors import Layout
from stages.forecast.examples import Examples, draw_origins, example, network_errors, relative_loss, thin
from stages.forecast.layerwise import FEATURES, MEANS, LayerForecaster
from stages.forecast.trajectory import WINDOW, Trajectory

LAYOUT = Layout({"a.weight": (4, 5), "a.bias": (4,), "b.weight": (3, 4)})
HORIZONS = (1, 3)


def walk(n=30, seed=0) -> Trajectory:
    steps = torch.randn(n, LAYOUT.size, generator=torch.Generator().manual_seed(seed))
    return Trajectory(LAYOUT, steps.cumsum(0), None)


def led(n=30, seed=0) -> Trajectory:
    """A random walk whose optimiser knows the next step, but for its size."""
    run = walk(n + 1, seed)
    return Trajectory(LAYOUT, run.weights[:-1], 1e-3 * run.weights.diff(dim=0))


def moving(with_state: bool) -> LayerForecaster:
    """A forecaster that moves."""
    model = LayerForecaster(HORIZONS, 8, seed=0, with_state=with_state)
    torch.nn.init.normal_(model.head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return model.requires_grad_(False)


@pytest.fixture
def model() -> LayerForecaster:
    return moving(with_state=False)


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


def learned_from(runs: list[Trajectory], horizons=HORIZONS) -> tuple[LayerForecaster, float]:
    """Return a forecaster that has learned from runs, and its error on them over that of keeping the last weights."""
    random = torch.Generator().manual_seed(0)
    examples = Examples.cat([one for run in runs for one in draw_origins(run, 1, horizons, 6, 3, random)])
    model = LayerForecaster(horizons, 16, seed=0, with_state=runs[0].state is not None)
    model.standardise(examples.read[examples.share > 0])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(120):
        loss = relative_loss(model(examples.read), examples)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False), loss.item()


def test_it_learns_to_take_back_what_is_noise():
    """Weights that jitter about fixed ones: the best forecast is their mean, with half the error of keeping the last."""
    runs = [
        Trajectory(LAYOUT, torch.randn(40, LAYOUT.size, generator=torch.Generator().manual_seed(i)), None)
        for i in range(8)
    ]
    assert learned_from(runs)[1] < 0.62


def test_it_learns_to_go_where_the_optimiser_goes():
    """Of a random walk the past tells nothing; one whose optimiser knows the next step is forecast by it."""
    follower, _ = learned_from([led(40, seed) for seed in range(8)], horizons=(1,))
    blind, _ = learned_from([walk(40, seed) for seed in range(8)], horizons=(1,))
    run = led(40, seed=100)
    errors, kept = (
        sum((w - run.weights[t + 1]).square().sum() for t, w in rows)
        for rows in ([(t, follower.predict(run, t)) for t in range(8, 30)], [(t, run.weights[t]) for t in range(8, 30)])
    )
    assert errors < 0.3 * kept
    assert sum((blind.predict(run, t) - run.weights[t + 1]).square().sum() for t in range(8, 30)) > 0.8 * kept


def test_the_optimisers_state_is_read_at_the_origin_alone_and_in_its_own_unit():
    model, run = moving(with_state=True), led()
    ahead = model.predict(run, 20)
    spoilt = torch.full_like(run.state, torch.nan)
    spoilt[20] = run.state[20]
    assert torch.equal(ahead, model.predict(Trajectory(LAYOUT, run.weights, spoilt), 20))
    assert not torch.allclose(ahead, model.predict(Trajectory(LAYOUT, run.weights, run.state.flip(1)), 20))
    moved = ahead - run.weights[20]
    by_layer = torch.tensor([3.0, 50.0, 0.2]).repeat_interleave(
        torch.tensor(LAYOUT.sizes)
    )  # as SGD's and Adam's differ
    other = Trajectory(LAYOUT, 7.0 * run.weights, by_layer * run.state)
    assert torch.allclose(model.predict(other, 20) - other.weights[20], 7 * moved, rtol=1e-2, atol=1e-3)
    order = torch.cat([torch.randperm(20), 20 + torch.randperm(4), 24 + torch.randperm(12)])
    shuffled = Trajectory(LAYOUT, run.weights[:, order], run.state[:, order])
    assert torch.allclose(model.predict(shuffled, 20) - shuffled.weights[20], moved[:, order], rtol=1e-3, atol=1e-4)


def test_a_state_of_zeros_says_nothing_of_where_weights_go():
    """As before an optimiser's first step, or of one that keeps none."""
    model, run = moving(with_state=True), walk()
    run = Trajectory(LAYOUT, run.weights, torch.zeros_like(run.weights))
    ahead = model.predict(run, 20)
    assert ahead.isfinite().all()
    of_direction = model.head.weight.unflatten(0, (FEATURES + 1, len(HORIZONS)))[FEATURES]
    of_direction.zero_()
    assert torch.equal(ahead, model.predict(run, 20))
    with pytest.raises(ValueError, match="has no optimiser's state"):
        model.predict(walk(), 20)


def test_moments_tell_the_error_exactly_with_the_state_too():
    model, run = moving(with_state=True), led()
    one = example(run, 20, HORIZONS, layers=5)
    errors, kept = network_errors(model(one.read), one)
    truth = run.weights[[21, 23]]
    direct = (model.predict(run, 20) - truth).square().sum(1) / (run.weights[20] - truth).square().sum(1)
    assert torch.allclose(errors[0] / kept[0], direct, rtol=1e-3)
