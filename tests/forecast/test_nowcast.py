"""Nowcasting changes nothing unless a validation batch agrees, can be interrupted, and is charged for what it does."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from stages.common.stage import InputError
from stages.common.vectors import Layout
from stages.forecast.forecasters import build_forecaster
from stages.forecast.nowcast import NowcastOptimizer
from stages.forecast.nowcast_training import choose_learning_rate, compare, cost_to, loss_at_costs
from stages.forecast.regimes import direction
from stages.forecast.trajectory import WINDOW, Trajectory

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


@pytest.mark.filterwarnings("ignore:Adagrad keeps no direction")
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
    parameters = [p for p in model.parameters() if p.requires_grad]
    layout = Layout({str(i): tuple(p.shape) for i, p in enumerate(parameters)})
    snapshots = []

    def snapshot() -> None:
        weights = torch.cat([p.detach().flatten() for p in parameters])
        states = [direction(p, optimizer.state.get(p, {}), optimizer.param_groups[0]) for p in parameters]
        snapshots.append((weights, torch.cat([s.flatten() for s in states])))

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


def nowcast_around(model, kind="adam", loss=None, every=1, **settings) -> NowcastOptimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return NowcastOptimizer(OPTIMIZERS[kind](trained), jump(), loss or validation(model), every, **settings)


def test_it_is_an_optimizer_whose_groups_and_state_are_the_bare_ones():
    model = network()
    nowcast = nowcast_around(model)
    bare = nowcast.optimizer
    assert isinstance(nowcast, torch.optim.Optimizer)
    train(model, nowcast, 3)
    assert nowcast.param_groups is bare.param_groups
    assert nowcast.state is bare.state
    bare.load_state_dict(bare.state_dict())  # makes new groups and a new state
    assert nowcast.param_groups is bare.param_groups
    assert nowcast.state is bare.state
    nowcast.param_groups[0]["lr"] = 0.5
    assert bare.param_groups[0]["lr"] == 0.5
    assert "lr: 0.5" in repr(nowcast)
    nowcast.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def warmup_then_decay(optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    lr = torch.optim.lr_scheduler
    warmup, decay = lr.LinearLR(optimizer, 0.1, total_iters=9), lr.CosineAnnealingLR(optimizer, 30)
    return lr.SequentialLR(optimizer, [warmup, decay], [9])


def test_with_schedulers_scaler_closure_and_hooks_it_is_the_bare_optimiser_to_the_bit():
    results, calls = [], []
    for wrap in (False, True):
        torch.manual_seed(0)
        model = network()
        bare = OPTIMIZERS["adam"](model.parameters())
        optimizer = NowcastOptimizer(bare, jump(), rising(), every=2, patience=10**6) if wrap else bare
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        scaler, schedule = torch.amp.GradScaler("cpu", init_scale=1024.0), warmup_then_decay(optimizer)
        for step in range(40):
            loss = mse_loss(model(X), Y)
            optimizer.zero_grad()
            scaler.scale(loss * (float("inf") if step == 20 else 1)).backward()  # a step that the scaler leaves out
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()

        def closure(model=model, optimizer=optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = mse_loss(model(X), Y)
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == pytest.approx(mse_loss(model(X), Y).item(), rel=0.1)
        assert len(calls) == 40  # 39 that the scaler lets pass, and the closure's
        calls.clear()
        results.append((model.state_dict(), optimizer.param_groups[0]["lr"]))
    assert optimizer.chosen == ["stay"] * 2
    (first, rate), (second, same_rate) = results
    assert rate == same_rate
    assert all(torch.equal(first[name], second[name]) for name in first)


class Partly(nn.Module):
    """A layer that learns, one that is frozen but handed to the optimiser, and one that the loss does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.learns, self.frozen, self.unused = nn.Linear(6, 3), nn.Linear(3, 3), nn.Linear(16, 16)
        self.empty, self.scale = nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.tensor(1.0))
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.frozen(self.learns(x))


def test_what_is_frozen_or_has_no_gradient_keeps_every_bit():
    model = Partly()
    before = copy.deepcopy(model.state_dict())
    falling = iter(range(10**6, 0, -1))  # the last proposal, a jump, is the best each time
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    nowcast = NowcastOptimizer(optimizer, jump(), lambda: float(next(falling)), every=1)
    train(model, nowcast, WINDOW)
    trained = copy.deepcopy(model.state_dict())
    train(model, nowcast, 1)
    assert nowcast.chosen == ["jump"]
    assert not torch.equal(model.learns.weight, trained["learns.weight"])
    assert not torch.equal(model.scale, trained["scale"])
    for name, value in model.state_dict().items():
        if name.startswith(("frozen", "unused", "empty")):
            assert torch.equal(value, before[name]), name


def test_a_head_without_a_gradient_at_the_moment_is_not_moved():
    """Two tasks in turn: when it is proposed, one head has moved lately, but the loss does not reach it."""
    body, heads = nn.Linear(6, 4), [nn.Linear(4, 3), nn.Linear(4, 3)]
    parameters = [p for module in (body, *heads) for p in module.parameters()]
    falling = iter(range(10**6, 0, -1))
    nowcast = NowcastOptimizer(torch.optim.Adam(parameters, 1e-2), jump(), lambda: float(next(falling)), every=1)
    for step in range(WINDOW + 1):
        before = [head.weight.detach().clone() for head in heads]
        nowcast.zero_grad()
        mse_loss(heads[step % 2](body(X)), Y).backward()
        nowcast.step()
    assert nowcast.chosen == ["jump"]
    assert torch.equal(heads[(step + 1) % 2].weight, before[(step + 1) % 2])
    assert not torch.equal(heads[step % 2].weight, before[step % 2])


def test_moves_end_when_a_layer_is_frozen_and_snapshots_start_anew_when_parameters_come():
    model = network()
    nowcast = nowcast_around(model, loss=rising(), every=1, patience=10**6)
    train(model, nowcast, WINDOW - 1)
    extra = nn.Linear(2, 2)
    nowcast.add_param_group({"params": extra.parameters(), "lr": 0.5})
    assert len(nowcast.optimizer.param_groups) == 2
    train(model, nowcast, 2)
    assert nowcast.chosen == []  # too few of the same parameters
    train(model, nowcast, WINDOW + 1)
    assert nowcast.chosen == ["stay"]
    frozen = model[3].weight.requires_grad_(False).clone()
    nowcast.validation_loss = validation(model)
    train(model, nowcast, 2 * (WINDOW + 1))
    assert nowcast.chosen[-1] != "stay"
    assert torch.equal(model[3].weight, frozen)


@pytest.mark.parametrize("dtypes", [(torch.float64,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.float64)])
@pytest.mark.parametrize("best", ["stay", "jump"])
def test_in_any_precision_to_stay_loses_no_bit_and_a_jump_is_that_of_float32(dtypes, best):
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8).to(dtypes[0]), nn.Linear(8, 3).to(dtypes[1])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x.to(dtypes[0])).tanh().to(dtypes[1])).float()

    bare, model = (copy.deepcopy(m) for m in [Mixed()] * 2)
    losses = iter(range(10**6)) if best == "stay" else iter(range(10**6, 0, -1))
    nowcast = nowcast_around(model, loss=lambda: float(next(losses)), every=1)
    train(bare, OPTIMIZERS["adam"](bare.parameters()), WINDOW + 1)
    train(model, nowcast, WINDOW + 1)
    assert nowcast.chosen == [best]
    for p, q in zip(model.parameters(), bare.parameters(), strict=True):
        assert p.dtype == q.dtype
        assert torch.equal(p, q) == (best == "stay")
        assert (p - q).abs().max() < 0.1


def test_an_optimiser_whose_state_is_not_known_is_forecast_from_weights_alone():
    model = network()
    with pytest.warns(UserWarning, match="RMSprop keeps no direction that the forecaster knows"):
        nowcast = NowcastOptimizer(torch.optim.RMSprop(model.parameters(), 1e-3, momentum=0.9), jump(), rising(), 1)
    train(model, nowcast, WINDOW + 1)
    assert nowcast.optimizer.state[model[3].weight]["momentum_buffer"].abs().sum() > 0
    assert all((states == 0).all() for _, states in nowcast.recent)
    with pytest.warns(UserWarning, match="SGD keeps no direction"):
        NowcastOptimizer(torch.optim.SGD(model.parameters(), 1e-3), jump(), rising(), 1)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_proposal_without_a_finite_loss_is_not_taken(loss):
    losses = iter([1.0, loss, loss])
    model = network()
    nowcast = nowcast_around(model, loss=lambda: next(losses))
    train(model, nowcast, WINDOW + 1)
    assert nowcast.chosen == ["stay"]


def test_a_finite_loss_is_taken_where_to_stay_has_none():
    losses, model = iter([float("nan"), 2.0, 1.0]), network()
    nowcast = nowcast_around(model, loss=lambda: next(losses))
    train(model, nowcast, WINDOW + 1)
    assert nowcast.chosen == ["jump"]


def test_a_group_whose_learning_rate_is_0_keeps_every_bit():
    model = network()
    still, before = model[3], copy.deepcopy(model[3].state_dict())
    groups = [{"params": model[0].weight}, {"params": still.parameters(), "lr": 0.0}]
    falling = iter(range(10**6, 0, -1))
    nowcast = NowcastOptimizer(torch.optim.Adam(groups, 1e-2), jump(), lambda: float(next(falling)), every=1)
    train(model, nowcast, WINDOW + 1)
    assert nowcast.chosen == ["jump"]
    assert all(torch.equal(value, before[name]) for name, value in still.state_dict().items())


def test_a_validation_that_fails_leaves_the_weights_of_training():
    bare, model = (copy.deepcopy(m) for m in [network()] * 2)

    losses = iter([1.0, 1.0])

    def fail() -> float:
        """At the last proposal, when the weights are a jump's."""
        if (loss := next(losses, None)) is None:
            raise RuntimeError("no images")
        return loss

    train(bare, OPTIMIZERS["adam"](p for p in bare.parameters() if p.requires_grad), WINDOW + 1)
    with pytest.raises(RuntimeError, match="no images"):
        train(model, nowcast_around(model, loss=fail), WINDOW + 1)
    assert all(torch.equal(p, q) for p, q in zip(bare.parameters(), model.parameters(), strict=True))


def test_its_state_passes_through_a_file_and_a_bare_optimisers_state_begins_anew(tmp_path):
    model = network()
    nowcast = nowcast_around(model)
    train(model, nowcast, 17)
    torch.save(nowcast.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert {"state", "param_groups"} < state.keys()
    again = nowcast_around(model)
    again.load_state_dict(state)
    assert (again.steps, again.chosen, len(again.recent)) == (17, nowcast.chosen, len(nowcast.recent))
    assert all(
        torch.equal(a, b) for x, y in zip(again.recent, nowcast.recent, strict=True) for a, b in zip(x, y, strict=True)
    )
    again.load_state_dict(nowcast.optimizer.state_dict())
    assert (again.steps, again.chosen, len(again.recent)) == (0, [], 0)
    assert copy.deepcopy(nowcast).chosen == nowcast.chosen


def test_what_it_cannot_do_is_said_in_one_line_at_construction():
    model = network()
    adam, body = OPTIMIZERS["adam"](model.parameters()), jump().body
    for make, message in [
        (lambda: NowcastOptimizer(model, None, rising(), 1), "a torch.optim.Optimizer to wrap, got Sequential"),
        (lambda: NowcastOptimizer(adam, (jump(), {}), rising(), 1), "load_forecaster.*, got tuple"),
        (lambda: NowcastOptimizer(adam, body, rising(), 1), "tune_jump.* got TransformerForecaster"),
        (lambda: NowcastOptimizer(adam, jump().double(), rising(), 1), "float32 on the processor"),
        (lambda: NowcastOptimizer(adam, None, rising(), 0), "positive every and patience, got 0 and 3"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            make()
        assert "\n" not in str(error.value)


def test_costs_and_targets():
    history = [{"cost": cost, "loss": loss} for cost, loss in [(1, 4.0), (5, 2.0), (6, 3.0)]]
    assert loss_at_costs(history, np.array([1, 4, 5, 6, 9])).tolist() == [4, 4, 2, 3, 3]
    assert cost_to(history, 2.5) == 5
    assert cost_to(history, 1.0) is None
    assert choose_learning_rate({0.1: [3.0], 0.2: [1.0], 0.3: [2.0]}) == (0.2, True)
    assert choose_learning_rate({0.1: [1.0], 0.2: [1.5], 0.3: [2.0]}) == (0.1, False)


def test_what_diverges_is_neither_chosen_nor_compared():
    nan = float("nan")
    assert choose_learning_rate({0.1: [nan, 1.0], 0.2: [2.0, 2.0], 0.3: [3.0, 3.0]})[0] == 0.2
    fine, diverged = ([{"seed": 0, "step": 1, "cost": 1, "loss": loss}] for loss in (1.0, nan))
    compare({"adam": [fine, fine], "tuned": [fine, fine]}, 1)
    with pytest.raises(InputError, match="tuned, seed 0, step 1: training diverged"):
        compare({"adam": [fine, fine], "tuned": [fine, diverged]}, 1)
