"""Anybody's snapshots: read in order, of any network, and refused in one line."""

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stages.common.checkpoints import save_torch
from stages.common.stage import InputError
from stages.forecast.forecast_snapshots import errors_so_far, find_snapshots, main, read_trajectory
from stages.forecast.forecasters import build_forecaster

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


def test_snapshots_are_in_the_order_of_their_numbers(folder):
    assert [path.stem for path in find_snapshots(folder)] == [f"v2-step{t}" for t in range(12)]


def test_an_untrained_forecaster_keeps_the_last_snapshot(folder, monkeypatch, tmp_path, capsys):
    start(monkeypatch, folder, tmp_path)
    last = load_file(folder / "v2-step10.safetensors")
    trajectory, last = read_trajectory(find_snapshots(folder))
    assert "1.bias" in trajectory.layout.shapes
    assert not any("running" in name or "batches" in name for name in trajectory.layout.shapes)
    for h in (1, 2):
        ahead = load_file(tmp_path / f"out/forecast-{h}.safetensors")
        assert ahead.keys() == last.keys()
        assert all(torch.equal(ahead[name], last[name]) and ahead[name].dtype == last[name].dtype for name in last)
    assert "1.000" in capsys.readouterr().out  # as good as keeping the last weights


def test_linear_extrapolation_of_a_straight_path_is_exact(tmp_path):
    start_at, slope = torch.randn(2, 3, 4)
    for t in range(12):
        save_file({"w": start_at + t * slope}, tmp_path / f"{t}.safetensors")
    run, _ = read_trajectory(find_snapshots(tmp_path))
    rows = errors_so_far(build_forecaster(CONFIG), run)
    assert [row["h"] for row in rows] == [1, 2]
    assert all(row["forecast"] == pytest.approx(1) and row["linear"] < 1e-6 for row in rows)
    assert [row["origins"] for row in rows] == [5, 4]  # from snapshot 6 on


def test_mistakes_are_one_line(folder, monkeypatch, tmp_path):
    def refused(match, *flags) -> None:
        with pytest.raises(InputError, match=match) as error:
            start(monkeypatch, folder, tmp_path, *flags)
        assert "\n" not in str(error.value)

    refused("--horizons: 3 is not among those trained: 1, 2", "--horizons", "3")
    (folder / "last.pt").write_bytes(b"")
    refused("no number in the name of last.pt")
    (folder / "last.pt").unlink()
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
    refused(r"v2-step5.pt: 0.bias is missing, but \(3,\) in v2-step0.safetensors")
    state = states(1)[0]
    torch.save(state | {"3.bias": torch.full((2,), torch.nan)}, folder / "v2-step5.pt")
    refused("v2-step5.pt: 3.bias has values that are not finite")
    torch.save(state | {"3.bias": torch.full((2,), 1e300, dtype=torch.float64)}, folder / "v2-step5.pt")
    refused("v2-step5.pt has weights too large for float32")
    for path in list(folder.glob("v2-step*"))[3:]:
        path.unlink()
    refused("expected 7 snapshots or more .* got 3")
