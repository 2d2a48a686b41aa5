"""Nowcasting changes nothing unless a validation batch agrees, can be interrupted, and is charged for what it does."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from stages.forecast.forecasters import build_forecaster
from stages.forecast.nowcast import NowcastOptimizer
from stages.forecast.nowcast_training import choose_learning_rate, cost_to, loss_at_costs
from stages.forecast.regimes import optimizer_direction
from stages.forecast.trajectory import WINDOW, Layout, Trajectory

RANDOM = torch.Generator().manual_seed(0)
X, Y = torch.randn(64, 6, generator=RANDOM), torch.randn(64, 3, generator=RANDOM)
OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, 1e-2),
    "sgd": lambda parameters: torch.optim.SGD(parameters, 1e-2, momentum=0.9),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, 1e-2),
}


def network() -> nn.Module:
    """No LeNet: normalisation layers, and a parameter that is frozen."""
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
    model[0].bias.requires_grad_(False)
    return model


def jump(seed=0):
    config = {"kind": "jump", "horizons": (1, 5), "with_state": True, "with_context": True, "d_model": 8, "seed": seed}
    model = build_forecaster(config | {"n_layers": 5})
    nn.init.normal_(model.step.weight, std=0.05, generator=torch.Generator().manual_seed(seed))
    return model.requires_grad_(False)


def train(model, optimizer, steps) -> None:
    for _ in range(steps):
        loss = mse_loss(model(X), Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def validation(model):
    """The size of the weights, which a mean of snapshots lowers."""
    return lambda: sum(p.square().sum() for p in model.parameters()).item()


def rising():
    """A validation loss that is higher each time: the first proposal, to stay, is the best."""
    calls = iter(range(10**6))
    return lambda: float(next(calls))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_to_stay_is_the_bare_optimiser_to_the_bit(kind):
    bare, wrapped = (copy.deepcopy(m) for m in [network()] * 2)
    train(bare, OPTIMIZERS[kind](bare.parameters()), 60)
    nowcast = NowcastOptimizer(OPTIMIZERS[kind](wrapped.parameters()), jump(), rising(), every=2, patience=10**6)
    train(wrapped, nowcast, 60)
    assert nowcast.chosen == ["stay"] * (30 // (WINDOW + 1))
    for name, value in bare.state_dict().items():
        assert torch.equal(value, wrapped.state_dict()[name]), name


def test_it_goes_on_from_its_state_to_the_bit():
    whole = network()
    halves = copy.deepcopy(whole)
    one = NowcastOptimizer(
        OPTIMIZERS["adam"](whole.parameters()), jump(), validation(whole), every=2, forecast_cost=3.0
    )
    train(whole, one, 90)
    assert {"average", "jump"} & set(one.chosen), one.chosen
    first = NowcastOptimizer(OPTIMIZERS["adam"](halves.parameters()), jump(), validation(halves), 2, forecast_cost=3.0)
    train(halves, first, 41)
    saved = copy.deepcopy(first.state_dict())
    second = NowcastOptimizer(OPTIMIZERS["adam"](halves.parameters()), jump(), validation(halves), 2, forecast_cost=3.0)
    second.load_state_dict(saved)
    train(halves, second, 49)
    assert (second.chosen, second.charged_steps) == (one.chosen, one.charged_steps)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, halves.state_dict()[name]), name


def test_what_it_takes_is_never_worse_than_to_stay():
    model = network()
    losses = []
    nowcast = NowcastOptimizer(
        OPTIMIZERS["adam"](model.parameters()),
        jump(),
        lambda: losses.append(validation(model)()) or losses[-1],
        every=3,
    )
    train(model, nowcast, 3 * (WINDOW + 1))
    assert len(losses) == 3
    assert validation(model)() == min(losses) <= losses[0]


def test_it_proposes_what_the_forecaster_says_of_the_recorded_run():
    model = network()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    parameters = list(model.parameters())
    layout = Layout({str(i): tuple(p.shape) for i, p in enumerate(parameters)})
    snapshots = []

    def snapshot() -> None:
        weights = torch.cat([p.detach().flatten() for p in parameters])
        snapshots.append((weights, optimizer_direction(optimizer)))

    proposed = []
    nowcast = NowcastOptimizer(optimizer, jump(), lambda: proposed.append(snapshot()) or float(len(proposed)), every=1)
    snapshot()
    for _ in range(WINDOW):
        train(model, nowcast, 1)
        snapshot()
    before = len(snapshots)
    train(model, nowcast, 1)
    stay, average, jumped = (weights for weights, _ in snapshots[before:])
    weights = torch.stack([w for w, _ in snapshots[:before]] + [stay])
    states = torch.stack([s for _, s in snapshots[: before + 1]])
    torch.testing.assert_close(average, weights[-WINDOW - 1 :].mean(0))
    torch.testing.assert_close(jumped, jump().propose(Trajectory(layout, weights, states), len(weights) - 1))


def test_it_switches_itself_off_and_is_charged_for_what_it_tried():
    model = network()
    nowcast = NowcastOptimizer(
        OPTIMIZERS["adam"](model.parameters()),
        jump(),
        rising(),
        every=1,
        patience=2,
        evaluation_cost=0.5,
        forecast_cost=3.0,
    )
    train(model, nowcast, 10 * (WINDOW + 1))
    assert not nowcast.on
    assert nowcast.chosen == ["stay", "stay"]
    assert nowcast.charged_steps == 2 * (3 * 0.5 + 3.0)


def test_a_gain_that_training_would_have_made_for_the_same_cost_is_a_strike():
    model = network()
    falling = iter([10.0, 9.9, 9.9, 5.0, 4.9, 4.9])  # stay, average, jump; training gained 4.9 meanwhile
    nowcast = NowcastOptimizer(
        OPTIMIZERS["adam"](model.parameters()), jump(), lambda: next(falling), every=1, patience=2, forecast_cost=7.0
    )
    train(model, nowcast, 2 * (WINDOW + 1))
    assert nowcast.chosen == ["average", "average"]
    assert nowcast.strikes == 1


def test_costs_and_targets():
    history = [{"cost": cost, "loss": loss} for cost, loss in [(1, 4.0), (5, 2.0), (6, 3.0)]]
    assert loss_at_costs(history, np.array([1, 4, 5, 6, 9])).tolist() == [4, 4, 2, 3, 3]
    assert cost_to(history, 2.5) == 5
    assert cost_to(history, 1.0) is None
    assert choose_learning_rate({0.1: [3.0], 0.2: [1.0], 0.3: [2.0]}) == (0.2, True)
    assert choose_learning_rate({0.1: [1.0], 0.2: [1.5], 0.3: [2.0]}) == (0.1, False)
