"""Anybody's snapshots: read in order, of any network, and refused in one line."""

import json
import pickle

import pytest
import torch
from reproduction import ROOT
from safetensors.torch import load_file, save_file
from torch import nn

from stages.common.checkpoints import save_torch
from stages.common.stage import InputError
from stages.common.work import fingerprint
from stages.forecast.forecast_snapshots import (
    errors_so_far,
    forecast,
    forecasts_of,
    load_any,
    main,
    read_trajectory,
    state_ahead,
)
from stages.forecast.forecasters import build_forecaster
from stages.forecast.layerwise import LayerForecaster
from stages.forecast.released import RELEASED, STATE, load_with_state
from stages.forecast.shrinkage import Prior, compare_with_past
from stages.forecast.snapshots import find_snapshots
from stages.forecast.trajectory import WINDOW

CONFIG = {"kind": "transformer", "horizons": [1, 2], "with_state": False, "with_context": True, "d_model": 8, "seed": 0}


def states(n=12) -> list[dict[str, torch.Tensor]]:
    """Snapshots of a network with batch normalisation, whose counter is no weight, in half precision in part."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2).half())
    out = []
    for t in range(n):
        out.append({name: x.clone() for name, x in model.state_dict().items()})
        for x in model.parameters():
            x.data += 0.1 * torch.randn_like(x)
        model[1].num_batches_tracked += 5 + t
    return out


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    for t, state in enumerate(states()):
        if t % 2:
            torch.save({"epoch": t, "state_dict": state}, path / f"v2-step{t}.pt")
        else:
            save_file(state, path / f"v2-step{t}.safetensors")
    return path


def start(monkeypatch, folder, tmp_path, *flags) -> None:
    model = build_forecaster(CONFIG | {"n_layers": 4})
    save_torch(tmp_path / "forecaster.pt", {"config": CONFIG | {"n_layers": 4}, "state_dict": model.state_dict()})
    words = [str(folder), "--forecaster", str(tmp_path / "forecaster.pt"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["forecast_snapshots", *words, *flags])
    main()


def moving_forecaster():
    """One that moves all weights that it is asked for, standing or not."""
    model = build_forecaster(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def recorded(tmp_path, snapshots):
    paths = [tmp_path / f"step_{t}.pt" for t in range(len(snapshots))]
    for path, state in zip(paths, snapshots, strict=True):
        torch.save(state, path)
    return read_trajectory(paths)


def last_forecast(record) -> dict[str, torch.Tensor]:
    run = record.trajectory
    return state_ahead(record, forecast(moving_forecaster(), run, len(run) - 1)[0])


def test_the_order_taken_is_printed(folder, monkeypatch, tmp_path, capsys):
    (folder / "last.ckpt").write_bytes(b"")
    start(monkeypatch, folder, tmp_path)
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "12 snapshots by step, every 1: v2-step0.safetensors, v2-step1.pt, ..., v2-step11.pt"
    assert second == "left out: last.ckpt"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_stands_still_keeps_every_bit_and_the_rest_moves_in_its_own_precision(tmp_path, dtype):
    still, half = torch.randn(3, 4, dtype=dtype) / 3, torch.randn(6, 5, dtype=dtype) / 3
    walk = torch.randn(12, 6, 5).cumsum(0).to(dtype)
    mask = torch.rand(6, 5) < 0.5  # of a layer that is frozen in part
    states = [{"still": still, "walk": walk[t], "half": torch.where(mask, half, walk[t] / 2)} for t in range(12)]
    ahead = last_forecast(recorded(tmp_path, states))
    assert torch.equal(ahead["still"], still)
    assert torch.equal(ahead["half"][mask], half[mask])
    for name in ("walk", "half"):
        assert ahead[name].dtype == dtype
        assert (ahead[name] != states[-1][name])[~mask].float().mean() > 0.8


def test_tied_weights_stay_tied_and_count_once(tmp_path):
    walk = torch.randn(12, 4, 3).cumsum(0)
    states = []
    for t in range(12):
        shared = walk[t].clone()
        states.append({"a": shared, "b": 2 * walk[t], "c": shared, "d": walk[t].clone()})
    record = recorded(tmp_path, states)
    assert list(record.trajectory.layout.shapes) == ["a", "b"]
    assert record.ties == {"c": "a", "d": "a"}
    ahead = last_forecast(record)
    assert not torch.equal(ahead["a"], states[-1]["a"])
    assert torch.equal(ahead["a"], ahead["c"])
    assert torch.equal(ahead["a"], ahead["d"])
    save_file(ahead, tmp_path / "ahead.safetensors")  # which refuses tensors that share memory


def test_equal_for_once_is_not_tied(tmp_path):
    walk = torch.randn(12, 2, 4, 3).cumsum(0)
    walk[-1, 1] = walk[-1, 0]
    record = recorded(tmp_path, [{"a": w[0].clone(), "b": w[1].clone()} for w in walk])
    assert record.ties == {}


def test_counters_and_tensors_without_elements_pass_through(tmp_path):
    states = [
        {
            "w": torch.randn(3, 2),
            "scalar": torch.randn(()),
            "empty": torch.zeros(0),
            "columns": torch.zeros(5, 0),
            "steps": torch.tensor(t),
            "mask": torch.ones(4, dtype=torch.bool),
            "parameter": nn.Parameter(torch.randn(2)),
            "transposed": torch.randn(2, 3).t(),
            "n.running_mean": torch.randn(2),
        }
        for t in range(10)
    ]
    ahead = last_forecast(recorded(tmp_path, states))
    assert ahead.keys() == states[-1].keys()
    for name, value in ahead.items():
        assert (value.shape, value.dtype) == (states[-1][name].shape, states[-1][name].dtype)
        kept = name in ("empty", "columns", "steps", "mask", "n.running_mean")
        assert torch.equal(value, states[-1][name]) == kept, name
        assert not value.requires_grad


def test_uneven_steps_are_forecast_from_an_even_subset_alone(monkeypatch, tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    for t, state in enumerate(states(12)):
        torch.save(state, path / f"step{t if t < 9 else 100 + t}.pt")
    with pytest.raises(InputError, match=r"9 snapshots every 1, step0.pt to step8.pt, are: take these alone by --even"):
        start(monkeypatch, path, tmp_path)
    start(monkeypatch, path, tmp_path, "--even")
    ahead = load_file(tmp_path / "out/forecast-1.safetensors")  # of an untrained forecaster: the last snapshot
    last = torch.load(path / "step8.pt")
    assert all(torch.equal(ahead[name], last[name]) for name in last)


def test_an_untrained_forecaster_keeps_the_last_snapshot(folder, monkeypatch, tmp_path, capsys):
    start(monkeypatch, folder, tmp_path)
    record = read_trajectory(find_snapshots(folder, WINDOW + 1).paths)
    last, shapes = record.last, record.trajectory.layout.shapes
    assert "1.bias" in shapes
    assert not any("running" in name or "batches" in name for name in shapes)
    for h in (1, 2):
        ahead = load_file(tmp_path / f"out/forecast-{h}.safetensors")
        assert ahead.keys() == last.keys()
        assert all(torch.equal(ahead[name], last[name]) and ahead[name].dtype == last[name].dtype for name in last)
    assert "1.000" in capsys.readouterr().out  # as good as keeping the last weights


def test_linear_extrapolation_of_a_straight_path_is_exact(tmp_path):
    start_at, slope = torch.randn(2, 3, 4)
    for t in range(12):
        save_file({"w": start_at + t * slope}, tmp_path / f"{t}.safetensors")
    run = read_trajectory(find_snapshots(tmp_path, WINDOW + 1).paths).trajectory
    agreement = compare_with_past(build_forecaster(CONFIG), run)
    rows = errors_so_far(agreement, run, Prior.sceptical(2))
    assert [row["h"] for row in rows] == [1, 2]
    assert all(row["forecast"] == row["shrunk"] == pytest.approx(1) and row["linear"] < 1e-6 for row in rows)
    assert [row["origins"] for row in rows] == [5, 4]  # from snapshot 6 on


def test_a_forecaster_that_knows_nothing_keeps_the_last_weights_and_says_so(monkeypatch, tmp_path, capsys):
    """Snapshots that are noise about fixed weights are no news to a forecaster that walks at random."""
    path, noise = tmp_path / "run", torch.Generator().manual_seed(0)
    path.mkdir()
    states = [{"w": torch.randn(20, 30, generator=noise).cumsum(0)} for _ in range(40)]
    for t, state in enumerate(states):
        torch.save(state, path / f"step{t}.pt")
    model = moving_forecaster()
    save_torch(tmp_path / "moving.pt", {"config": CONFIG | {"n_layers": 1}, "state_dict": model.state_dict()})
    moved = []
    for flags in ((), ("--raw",)):
        words = [str(path), "--forecaster", str(tmp_path / "moving.pt"), "--output", str(tmp_path / "out"), *flags]
        monkeypatch.setattr("sys.argv", ["forecast_snapshots", *words])
        main()
        ahead = load_file(tmp_path / "out/forecast-1.safetensors")
        moved.append((ahead["w"] - states[-1]["w"]).norm().item())
    assert moved[0] < moved[1]
    assert "how far to trust it: " in capsys.readouterr().out


def test_mistakes_are_one_line(folder, monkeypatch, tmp_path):
    def refused(match, *flags) -> None:
        with pytest.raises(InputError, match=match) as error:
            start(monkeypatch, folder, tmp_path, *flags)
        assert "\n" not in str(error.value)

    refused("--horizons: 3 is not among those trained: 1, 2", "--horizons", "3")
    (folder / "start.pt").write_bytes(b"")
    refused(r"no number in the name of start.pt.*: give the order by --order '-step\(\\d\+\)' or --order mtime")
    (folder / "start.pt").unlink()
    (folder / "v2-step5.safetensors").write_bytes(b"x")
    refused("have the same number")
    (folder / "v2-step5.safetensors").unlink()
    kept = (folder / "v2-step5.pt").read_bytes()
    for garbage, why in (
        (b"garbage", "is text"),
        (pickle.dumps(nn.Linear), "is a plain pickle"),
        (kept[:100], "cut off"),
    ):
        (folder / "v2-step5.pt").write_bytes(garbage)
        refused(f"v2-step5.pt .*{why}")
    torch.save({"state_dict": {"a": 1}}, folder / "v2-step5.pt")
    refused("v2-step5.pt is no state_dict")
    torch.save({"3.weight": torch.zeros(2, 2)}, folder / "v2-step5.pt")
    refused(r"v2-step5.pt: 0.bias is missing, but \(3,\) in .*v2-step0.safetensors: choose snapshots of one network")
    state = states(1)[0]
    torch.save(state | {"3.bias": torch.full((2,), torch.nan)}, folder / "v2-step5.pt")
    refused("v2-step5.pt: 3.bias has values that are not finite")
    torch.save(state | {"3.bias": torch.full((2,), 1e300, dtype=torch.float64)}, folder / "v2-step5.pt")
    refused("v2-step5.pt: 3.bias has weights too large for float32")
    torch.save(state | {"3.fft": torch.zeros(2, dtype=torch.complex64)}, folder / "v2-step5.pt")
    refused("v2-step5.pt: 3.fft is complex")
    for path in list(folder.glob("v2-step*"))[3:]:
        path.unlink()
    refused("expected 7 snapshots or more .* got 3")


def test_a_run_that_does_not_move_is_refused(tmp_path):
    """The usual reason: state_dict() without a copy, of which all snapshots are the last."""
    state = {"w": torch.randn(3, 2), "steps": torch.tensor(0)}
    with pytest.raises(
        InputError, match=r"step_9.pt: no weight differs from those of the 6 snapshots before: copy each"
    ):
        recorded(tmp_path, [state | {"steps": torch.tensor(t)} for t in range(10)])


@pytest.fixture
def with_state(tmp_path):
    """Snapshots of a network and of its optimiser."""
    path, model = tmp_path / "with state", nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    path.mkdir()
    optimizer, random = torch.optim.Adam(model.parameters(), 1e-2), torch.Generator().manual_seed(0)
    for t in range(12):
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path / f"step{t}.pt")
        for _ in range(5):
            model.zero_grad()
            x = torch.randn(8, 6, generator=random)
            (model(x) - x[:, :3]).square().mean().backward()
            optimizer.step()
    return path


def without_state(folder, tmp_path):
    """Return a folder of the same weights alone."""
    path = tmp_path / "without"
    path.mkdir()
    for file in folder.iterdir():
        torch.save(torch.load(file)["model"], path / file.name)
    return path


def test_an_optimisers_state_is_read_with_the_weights_where_it_helps(with_state, tmp_path):
    """Horizons that the forecaster with state does not serve are those of the one of weights alone; of the others, it has its own past."""
    serves = load_with_state(ROOT / STATE)[2]["serves"]
    assert serves
    found = [
        forecasts_of(find_snapshots(path, 7), None, None, True)
        for path in (with_state, without_state(with_state, tmp_path))
    ]
    assert [f.forecaster for f in found] == [STATE, RELEASED]
    for h in found[0].horizons:
        assert torch.equal(*(f.weights[h] for f in found)) == (h not in serves)
    asked = forecasts_of(find_snapshots(with_state, 7), STATE, None, True)
    assert torch.equal(asked.weights[serves[0]], found[0].weights[serves[0]])
    model, run = load_any(ROOT / STATE, None)[0], asked.recorded.trajectory
    index = torch.arange(3, run.layout.size, 2)
    moved = model.predict(run, len(run) - 1) - run.weights[-1]
    assert torch.allclose(model.movements(run, len(run) - 1, index), moved[:, index], atol=1e-6)


@pytest.mark.parametrize("kind", ["none in one", "of another network", "moving average"])
def test_a_state_that_cannot_be_read_is_said_in_one_line_and_weights_alone_are_read(with_state, tmp_path, capsys, kind):
    spoilt = torch.load(with_state / "step5.pt")
    moments = {"step": 1, "exp_avg": torch.ones(2, 2), "exp_avg_sq": torch.ones(2, 2)}
    match kind:
        case "none in one":
            torch.save({"model": spoilt["model"]}, with_state / "step5.pt")
        case "of another network":
            spoilt["optimizer"]["state"] = dict.fromkeys(range(4), moments)
            torch.save(spoilt, with_state / "step5.pt")
        case _:
            for file in with_state.iterdir():
                snapshot = torch.load(file)
                torch.save(snapshot | {"ema": snapshot["model"]}, file)
    found, alone = (
        forecasts_of(find_snapshots(path, 7), None, None, False)
        for path in (with_state, without_state(with_state, tmp_path))
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if line.endswith("; weights alone are read")]
    assert len(lines) == 1 and found.forecaster == RELEASED
    assert all(torch.equal(found.weights[h], alone.weights[h]) for h in found.horizons)
    with pytest.raises(InputError):
        forecasts_of(find_snapshots(with_state, 7), STATE, None, False)


def test_a_forecaster_with_state_asks_for_one(folder):
    with pytest.raises(InputError, match="reads the optimiser's state, of which there is none: leave --forecaster out"):
        forecasts_of(find_snapshots(folder, 7), STATE, None, False)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_another_forecaster_that_reads_the_optimisers_state_is_refused(tmp_path, suffix):
    file, config = tmp_path / f"forecaster{suffix}", CONFIG | {"with_state": True}
    if suffix == ".pt":
        save_torch(file, {"config": config, "state_dict": build_forecaster(config | {"n_layers": 1}).state_dict()})
    else:
        save_file(LayerForecaster([1, 2], 8, seed=0, with_state=True).state_dict(), file)
        prior = {name: [0.0, 0.0] for name in ("factor", "strength", "spread", "noise")} | {"worth": 1.0}
        card = {"config": config | {"kind": "layerwise"}, "prior": prior, "sha256": fingerprint(file)}
        file.with_suffix(".json").write_text(json.dumps(card))
    with pytest.raises(InputError, match="expected a forecaster that reads weights alone, of any network"):
        load_any(file, None)
