"""The published forecaster: it is the file that its card describes, small, and works without training anything first."""

import json
import shutil

import pytest
import torch
from reproduction import ROOT

from stages.common.stage import InputError
from stages.common.vectors import Layout
from stages.forecast.released import OUTPUTS, RELEASED, STATE, default_forecaster, load_released, load_with_state
from stages.forecast.trajectory import Trajectory

LAYOUT = Layout({"a.weight": (40, 50), "a.bias": (40,)})


@pytest.mark.parametrize("path", [RELEASED, OUTPUTS, STATE])
def test_the_file_and_its_card_belong_together(path):
    model, prior, card = load_released(ROOT / path)
    assert (ROOT / path).stat().st_size < 300_000 and card["file"] == path.name
    assert {"learned_from", "scores", "scored_on", "limits", "made_by"} <= set(card)
    assert len(prior.factor) == len(prior.strength) == len(model.horizons)
    assert ((prior.factor >= 0) & (prior.factor <= 1)).all() and prior.worth > 0


def test_it_takes_back_noise_and_goes_on_with_what_goes_on():
    """Weights that jitter about fixed ones return to them; weights that drift go on: less error than keeping the last."""
    model = load_released(ROOT / RELEASED)[0]
    noise = torch.randn(60, LAYOUT.size, generator=torch.Generator().manual_seed(0))
    drift = torch.linspace(0, 30, 60)[:, None] * torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(1))
    for weights, most in ((noise, 0.8), (drift + 0.1 * noise, 0.5)):
        run, t = Trajectory(LAYOUT, weights, None), 39
        truth = weights[[t + h for h in model.horizons]]
        errors = (model.predict(run, t) - truth).square().sum(1) / (weights[t] - truth).square().sum(1)
        assert (errors < most).all(), errors


def test_what_is_believed_of_each_horizon_is_believed_of_the_forecaster_that_serves_it():
    model, prior, card = load_with_state(ROOT / STATE)
    believed = {path: load_released(ROOT / path)[1] for path in (RELEASED, STATE)}
    for i, h in enumerate(model.horizons):
        own = believed[STATE if h in card["serves"] else RELEASED]
        assert (prior.factor[i], prior.spread[i]) == (own.factor[i], own.spread[i])


def test_it_serves_a_loop_that_runs_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert default_forecaster().gains == load_released(ROOT / OUTPUTS)[0].gains
    assert "models/released/forecaster-outputs.safetensors" in capsys.readouterr().err


def test_what_does_not_belong_together_is_refused_in_one_line(tmp_path):
    file, card = tmp_path / "forecaster.safetensors", tmp_path / "forecaster.json"
    with pytest.raises(InputError, match="is missing"):
        load_released(file)
    shutil.copy(ROOT / RELEASED, file)
    card.write_text(json.dumps({"config": {}}))
    with pytest.raises(InputError, match="is no card of a forecaster: it has no 'prior'"):
        load_released(file)
    described = json.loads((ROOT / RELEASED).with_suffix(".json").read_text())
    card.write_text(json.dumps(described))
    with pytest.raises(InputError, match="expected a forecaster that reads the optimiser's state"):
        load_with_state(file)
    card.write_text(json.dumps(described | {"sha256": "0" * 64}))
    with pytest.raises(InputError, match="its SHA-256 is another"):
        load_released(file)
