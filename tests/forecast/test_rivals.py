"""What a forecast has to beat while training, and how a race is judged."""

import copy

import pytest
import torch
from torch import nn

from stages.common.checkpoints import save_torch
from stages.common.stage import InputError
from stages.common.vectors import Layout
from stages.forecast.layerwise import LayerForecaster
from stages.forecast.nowcast import NowcastOptimizer, expected_gain
from stages.forecast.race_to_target import (
    Clock,
    Data,
    Method,
    Task,
    evaluate,
    reached_at,
    reaches,
    train,
    weights_of,
)
from stages.forecast.rivals import ExponentialAverage, Forecast, Last, LatestAverage, Line, Nino
from stages.forecast.trajectory import WINDOW, Trajectory

LAYOUT = Layout({"0.weight": (4, 3), "0.bias": (4,)})


def path(n=60) -> torch.Tensor:
    return torch.randn(n, LAYOUT.size, generator=torch.Generator().manual_seed(0)).cumsum(0)


def moving() -> LayerForecaster:
    model = LayerForecaster((1, 5), 8, seed=0)
    torch.nn.init.normal_(model.head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return model.eval().requires_grad_(False)


def read(reader, weights):
    for step, row in enumerate(weights, 1):
        reader.observe(step, row)
    return reader.weights()


def test_averages_are_what_they_are_called():
    weights = path()
    assert torch.equal(read(Last(), weights), weights[-1])
    assert torch.allclose(read(LatestAverage(every=10, snapshots=3), weights), weights[[39, 49, 59]].mean(0))
    shares = 0.1 * 0.9 ** torch.arange(59, -1, -1.0)
    shares[0] = 0.9**59
    assert torch.allclose(read(ExponentialAverage(0.9), weights), shares @ weights, atol=1e-5)


def test_a_forecast_reads_snapshots_of_the_path_and_waits_for_enough():
    weights, model = path(), moving()
    assert read(Forecast(model, LAYOUT, 10, 5), weights) is None
    ahead = read(Forecast(model, LAYOUT, 5, 5), weights)
    run = Trajectory(LAYOUT, torch.cat([weights[:1], weights[4::5]]), None)
    assert torch.equal(ahead, model.predict(run, len(run) - 1)[1])


def test_a_line_goes_on_exactly_where_weights_move_evenly_and_is_the_best_fit_elsewhere():
    times = torch.arange(9.0)[:, None]
    start, slope = path(2)
    even = Trajectory(LAYOUT, start + times * slope, None)
    assert torch.allclose(Line(5, (1, 4)).predict(even, 6), start + torch.tensor([[7.0], [10.0]]) * slope, atol=1e-5)
    uneven = Trajectory(LAYOUT, path(9), None)
    design = torch.cat([torch.ones(5, 1), times[2:7]], 1)
    fitted = torch.linalg.lstsq(design, uneven.weights[2:7]).solution
    assert torch.allclose(Line(5, (4,)).predict(uneven, 6)[0], fitted[0] + 10 * fitted[1], atol=1e-4)


@pytest.fixture
def nino_file(tmp_path):
    random = torch.Generator().manual_seed(0)
    shapes = {"edge_proj.fc.0.weight": (8, 5), "edge_proj.fc.0.bias": (8,), "layer_embed.weight": (9, 8)}
    for i in range(4):
        shapes |= {
            f"edge_mlp.fc.{2 * i}.weight": (40 if i == 3 else 8, 8),
            f"edge_mlp.fc.{2 * i}.bias": (40 if i == 3 else 8,),
        }
    state = {name: torch.randn(shape, generator=random) / 3 for name, shape in shapes.items()}
    save_torch(tmp_path / "nino.pt", {"state_dict": state})
    return tmp_path / "nino.pt", state


def test_nino_is_read_as_its_recipe_says(nino_file):
    file, state = nino_file
    run = Trajectory(LAYOUT, path(8), None)
    states = run.weights[2:7]
    mlp = nn.Sequential(*(m for i in range(4) for m in (nn.Linear(8, 40 if i == 3 else 8), nn.SiLU())))[:-1]
    mlp.load_state_dict({name.removeprefix("edge_mlp.fc."): x for name, x in state.items() if "edge_mlp" in name})
    expected = []
    for where, row in ((slice(0, 12), 1), (slice(12, 16), 2)):  # a matrix, a bias
        w = states[:, where]
        z = (w - w.mean()) / (w.std() + 1e-6)
        hidden = (
            z.T @ state["edge_proj.fc.0.weight"].T + state["edge_proj.fc.0.bias"] + state["layer_embed.weight"][row]
        )
        expected.append((z[-1] + mlp(hidden)[:, 6]) * w.std() + w.mean())
    ahead = Nino(file).predict(run, 6)[Nino.horizons.index(7)]
    assert torch.allclose(ahead, torch.cat(expected).detach(), atol=1e-5)


def test_another_file_is_no_nino(tmp_path):
    save_torch(tmp_path / "other.pt", {"state_dict": {"a": torch.zeros(1)}})
    with pytest.raises(InputError, match=r"expected NiNo's nino_mlp.pt, which has 'edge_proj"):
        Nino(tmp_path / "other.pt")


def test_a_target_is_reached_when_it_is():
    rows = [{"step": s, "test": a} for s, a in ((100, 0.5), (200, 0.9), (300, 0.8))]
    assert reached_at(rows, "test", 0.9)["step"] == 200
    assert reached_at(rows, "test", 0.95) is None


def test_the_optimiser_takes_the_forecast_that_validates_best_and_nothing_worse():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4), torch.randn(64, 3)
    y = torch.randn(64, 4)
    losses: list[float] = []

    def loss():
        losses.append(nn.functional.mse_loss(model(x), y).item())
        return losses[-1]

    optimizer = NowcastOptimizer(torch.optim.Adam(model.parameters(), 0.05), moving(), loss, every=1, patience=100)
    snapshots = [weights_of(model)]
    for _ in range(WINDOW + 1):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[:8]), y[:8]).backward()
        bare = copy.deepcopy(model)
        optimizer.step()
        snapshots.append(weights_of(model) if not optimizer.chosen else weights_of(bare))
    assert len(losses) == 4  # to stay, the average, two horizons
    assert nn.functional.mse_loss(model(x), y).item() == min(losses)
    assert optimizer.chosen[0] in ("stay", "average", "ahead 1", "ahead 5")
    assert optimizer.record.startswith("1 times it proposed")


def test_snapshots_of_an_average_are_those_of_every_step_and_a_state_keeps_them():
    torch.manual_seed(0)
    x, y = torch.randn(64, 3), torch.randn(64, 4)

    def around(model, **settings):
        loss = lambda: 0.0  # noqa: E731 (every proposal is as good as to stay)
        return NowcastOptimizer(
            torch.optim.Adam(model.parameters(), 0.05), moving(), loss, every=2, patience=100, **settings
        )

    def steps(model, optimizer, n):
        path = []
        for _ in range(n):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            path.append(weights_of(model))
        return path

    model = nn.Linear(3, 4)
    twin, bare = copy.deepcopy(model), copy.deepcopy(model)
    optimizer, other = around(model, decay=0.9), around(twin, decay=0.9)
    path = steps(model, optimizer, 20)
    assert optimizer.chosen == ["stay"]
    for name, value in zip(path, steps(bare, torch.optim.Adam(bare.parameters(), 0.05), 20), strict=True):
        assert torch.equal(name, value)  # training takes no notice of the average
    assert torch.allclose(optimizer.recent[-1][0], read(ExponentialAverage(0.9), path), atol=1e-6)

    steps(twin, other, 9)
    resumed = around(twin, decay=0.9)
    resumed.load_state_dict(copy.deepcopy(other.state_dict()))
    steps(twin, resumed, 11)
    assert torch.equal(resumed.recent[-1][0], optimizer.recent[-1][0])
    with pytest.raises(ValueError, match="expected decay in 0 to 1, got 1"):
        around(model, decay=1)


@pytest.mark.parametrize(("gains", "tried"), [([-0.1, -0.1], 0), ([0.1, -0.1], 1), ([0.1, 0.1], 2)])
def test_only_forecasts_that_are_expected_to_gain_are_tried(gains, tried):
    torch.manual_seed(0)
    model, losses = nn.Linear(3, 4), []
    forecaster = moving()
    forecaster.gains = {"weights": {2: gains, 100: [1.0, 1.0]}, "average": {5: [1.0, 1.0]}}
    optimizer = NowcastOptimizer(
        torch.optim.Adam(model.parameters(), 0.05),
        forecaster,
        lambda: losses.append(0) or float(len(losses)),  # whatever is proposed is worse than to stay
        every=1,
        patience=100,
    )
    for _ in range(WINDOW + 1):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
    assert len(losses) == 2 + tried
    assert optimizer.foretold == (tried, 0)
    assert ("came true" in optimizer.record) == bool(tried)
    for total, n in optimizer.gains.values():
        assert total < 0 and n == 1
        assert expected_gain(0.1, (total, n)) < 0.1  # it is believed less now
    assert NowcastOptimizer(torch.optim.SGD(model.parameters(), 1), forecaster, lambda: 0.0, 1, decay=0.9)._tried() == [
        "ahead 1",
        "ahead 5",
    ]


def test_test_images_are_asked_only_where_validation_images_say_so_and_weights_stay():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 2))
    images = torch.randn(9, 3), torch.zeros(9, dtype=torch.long)
    data = Data(images, images, images, channels=1, classes=2)
    reader = Last()
    right = torch.cat([torch.zeros(6), torch.tensor([1.0, -1.0])])  # always the first class
    reader.observe(1, right)
    before = weights_of(network)
    for test_from, test in ((1.0, 1.0), (1.1, None)):
        clock = Clock({"training": 2.0})
        (row,) = evaluate(1, network, {"a": reader}, data, test_from, clock)
        assert (row["method"], row["validation"], row["test"]) == ("a", 1.0, test)
        assert row["seconds"] == clock.spent["training"] + clock.spent["a"]
        assert reaches(row, "validation", 1.0) and reaches(row, "test", 1.0) == (test is not None)
    assert torch.equal(weights_of(network), before)


def test_a_rate_is_that_of_a_task_with_as_much():
    random = torch.Generator().manual_seed(0)
    images = torch.rand(40, 1, 28, 28, generator=random), torch.randint(3, (40,), generator=random)
    data = Data(images, images, images, channels=1, classes=3)

    def raced(times: float, learning_rate: float) -> torch.Tensor:
        last = Last()
        task = Task(dataset="fashion_mnist", width=4, learning_rate=learning_rate, target=2.0)
        judged = {"evaluate_every": 5, "evaluate_from": 5, "judged_on": ["validation"]}
        train(data, Method(lambda _: {"a": last}, rate=times), 0, task, steps=5, batch_size=8, **judged)
        return last.weights()

    assert torch.equal(raced(2.0, 1e-3), raced(1.0, 2e-3))
    assert not torch.equal(raced(2.0, 1e-3), raced(1.0, 1e-3))
