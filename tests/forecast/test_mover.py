"""A mover reads states at their steps, moves to what is forecast of them, and touches nothing else; the average is that of all steps."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from stages.forecast.layerwise import LayerForecaster
from stages.forecast.mover import HORIZONS, Mover
from stages.forecast.released import RELEASED, load_released
from stages.forecast.rivals import ExponentialAverage, Forecast
from stages.forecast.trajectory import WINDOW

RANDOM = torch.Generator().manual_seed(0)
X, Y = torch.randn(64, 6, generator=RANDOM), torch.randn(64, 3, generator=RANDOM)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def trained_by(model):
    """Two groups with rates of their own, and a schedule."""
    groups = [
        {"params": model[0].parameters()},
        {"params": [*model[1].parameters(), *model[3].parameters()], "lr": 3e-3},
    ]
    optimizer = torch.optim.AdamW(groups, 1e-2)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)


def train(model, optimizer, schedule, mover, steps) -> list[bool]:
    moved = []
    for _ in range(steps):
        loss = mse_loss(model(X), Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moved.append(mover.step() if mover else False)
        schedule.step()
    return moved


def weights_of(model) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def forecaster(std=0.1) -> LayerForecaster:
    """It forecasts "no change" if std is 0."""
    model = LayerForecaster((1, 5), 8, seed=0)
    nn.init.normal_(model.head.weight, std=std, generator=torch.Generator().manual_seed(1))
    return model.requires_grad_(False)


class Recorder:
    """A forecaster that remembers what it was told, and forecasts the last state."""

    horizons = (1, 5)

    def __init__(self) -> None:
        self.told: list[torch.Tensor] = []

    def predict(self, run, t):
        assert t == len(run) - 1
        self.told.append(run.weights.clone())
        return torch.stack([run.weights[-1]] * 2)


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_forecast_of_no_change_is_the_bare_optimiser_to_the_bit(dtype):
    class Cast(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.to(dtype)).to(x.dtype)

    bare = Cast(network().to(dtype))
    moved = copy.deepcopy(bare)
    train(bare, *trained_by(bare[0]), None, 40)
    mover = Mover(moved, forecaster(0.0), every=2, horizons=(5, 1))
    train(moved, *trained_by(moved[0]), mover, 40)
    assert mover.moves == 40 // (2 * (WINDOW + 1))
    assert same(bare, moved)


def test_states_are_the_first_and_those_of_every_so_many_steps_and_begin_anew_after_a_move():
    model, told = network(), Recorder()
    path = [weights_of(model)]
    optimizer, schedule = trained_by(model)
    mover = Mover(model, told, every=3, states=2, horizons=(5, 1))
    for _ in range(13):
        train(model, optimizer, schedule, mover, 1)
        path.append(weights_of(model))
    assert [len(states) for states in told.told] == [3, 3]
    for states, steps in zip(told.told, ((1, 3, 6), (1, 9, 12)), strict=True):
        assert torch.equal(states, torch.stack([path[step] for step in steps]))


@pytest.mark.filterwarnings("ignore:Seems like .optimizer.step.")  # of copies
def test_it_moves_to_what_is_forecast_beside_training_at_one_horizon_after_the_other():
    model, model_of = network(), forecaster()
    optimizer, schedule = trained_by(model)
    mover = Mover(model, model_of, every=1, horizons=(5, 1))
    # a reader of the same run, which training takes no notice of
    for horizon in (5, 1, 1):
        beside = Forecast(model_of, mover.layout, 1, horizon)
        if mover.first is not None:
            beside.first = mover.first
        for step in range(WINDOW + 1):
            bare = copy.deepcopy((model, optimizer, schedule))
            train(*bare, None, 1)
            beside.observe(step + 1, weights_of(bare[0]))
            moved = train(model, optimizer, schedule, mover, 1)
        assert moved == [True]
        assert torch.equal(weights_of(model), beside.weights())
        assert not torch.equal(weights_of(model), weights_of(bare[0]))


def test_a_move_leaves_optimiser_schedule_buffers_and_what_is_frozen_or_stands_still():
    class Partly(nn.Sequential):
        """Whose last layer the loss does not reach."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for module in list(self)[:-1]:
                x = module(x)
            return x

    model = Partly(*network(), nn.Linear(4, 4))
    model[0].bias.requires_grad_(False)
    optimizer, schedule = trained_by(model)
    optimizer.add_param_group({"params": model[4].parameters()})
    mover = Mover(model, forecaster(), every=1, horizons=(5,))
    train(model, optimizer, schedule, mover, WINDOW)
    train(model, optimizer, schedule, None, 1)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    assert mover.step()
    for name, value in model.state_dict().items():
        still = name == "0.bias" or name.startswith(("4", "1.running", "1.num"))
        assert torch.equal(value, before[0][name]) == still, name
    for place, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(value, before[1]["state"][place][name])
    assert optimizer.state_dict()["param_groups"] == before[1]["param_groups"]
    assert schedule.state_dict() == before[2]


def test_the_average_is_that_of_all_steps_and_integers_are_the_last(tmp_path):
    model = network()
    model.register_buffer("index", torch.arange(300))
    optimizer, schedule = trained_by(model)
    mover, average = Mover(model, forecaster(), every=1, horizons=(5,), decay=0.9), ExponentialAverage(0.9)
    means = ExponentialAverage(0.9)
    moves = 0
    for step in range(1, 31):
        moves += sum(train(model, optimizer, schedule, mover, 1))
        average.observe(step, weights_of(model))
        means.observe(step, model[1].running_mean.clone())
    assert moves == 4
    torch.testing.assert_close(weights_of(mover.average), average.weights())
    torch.testing.assert_close(mover.average[1].running_mean, means.weights())
    assert torch.equal(mover.average.index, torch.arange(300))
    assert mover.average[1].num_batches_tracked == 30
    assert not mover.average.training
    torch.save(mover.average.state_dict(), tmp_path / "average.pt")
    other = network()
    other.register_buffer("index", torch.zeros(300, dtype=torch.long))
    other.load_state_dict(torch.load(tmp_path / "average.pt", weights_only=True))  # it is the model's own
    assert same(other, mover.average)


@pytest.mark.parametrize("stop", [5, 14, 17])
def test_it_goes_on_from_its_state_to_the_bit(stop, tmp_path):
    whole = network()
    one = Mover(whole, forecaster(), every=2, horizons=(5, 1))
    train(whole, *trained_by(whole), one, 40)
    assert one.moves == 2

    half = network()
    optimizer, schedule = trained_by(half)
    first = Mover(half, forecaster(), every=2, horizons=(5, 1))
    train(half, optimizer, schedule, first, stop)
    parts = (half, optimizer, schedule, first)
    torch.save([part.state_dict() for part in parts], tmp_path / "run.pt")
    again = network()
    parts = (again, *trained_by(again), Mover(again, forecaster(), every=2, horizons=(5, 1)))
    for part, state in zip(parts, torch.load(tmp_path / "run.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*parts, 40 - stop)
    assert same(whole, again)
    assert same(one.average, parts[-1].average)


def test_states_begin_anew_when_a_layer_is_frozen_or_comes_back():
    model, told = network(), Recorder()
    optimizer, schedule = trained_by(model)
    mover = Mover(model, told, every=1, states=3, horizons=(1,))
    train(model, optimizer, schedule, mover, 2)
    model[0].requires_grad_(False)
    frozen = copy.deepcopy(model[0].state_dict())
    assert train(model, optimizer, schedule, mover, 3) == [False, False, True]
    assert told.told[-1].shape == (4, sum(p.numel() for p in model[1:].parameters()))
    assert all(torch.equal(value, frozen[name]) for name, value in model[0].state_dict().items())
    model.requires_grad_(False)
    assert not any(mover.step() for _ in range(10))


def test_the_published_forecaster_serves_where_none_is_given_and_unless_a_move_is_due_nothing_is():
    model = network()
    mover = Mover(model)
    published = load_released(RELEASED)[0]
    assert set(HORIZONS) <= set(published.horizons)
    assert all(torch.equal(a, b) for a, b in zip(mover.forecaster.parameters(), published.parameters(), strict=True))
    assert not any(train(model, *trained_by(model), mover, 139))
    assert (mover.recent, mover.moves) == ([], 0)
    train(model, *trained_by(model), mover, 1)
    assert len(mover.recent) == 1


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_what_it_cannot_do_is_said_in_one_line_at_once():
    model = network()
    for settings, message in [
        ({"model": nn.Sequential(nn.LazyLinear(2))}, "have no shape yet: run the model once"),
        ({"model": nn.utils.weight_norm(nn.Linear(2, 2))}, "cannot be copied for its average .*: decay=0 keeps none"),
        ({"every": 0}, r"every >= 1 and 0 <= decay < 1, got 0 and 0.995"),
        ({"decay": 1.0}, r"got 140 and 1.0"),
        ({"horizons": (2,)}, r"expected horizons of \[1, 5, 10, 20\], got \[2\]"),
        ({"horizons": ()}, r"expected horizons of"),
        ({"states": 6}, r"expected states > 6, as many as the forecaster reads, got 6"),
        ({"forecaster": LayerForecaster((1,), 8, 0, with_state=True)}, "that reads weights alone"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            Mover(**{"model": model} | settings)
        assert "\n" not in str(error.value)
    state = Mover(model, decay=0.0).state_dict()
    with pytest.raises(ValueError, match="one of the two keeps no average"):
        Mover(model).load_state_dict(state)
