"""What the commands print is what their functions return, as a DataFrame, from any folder."""

import json
import math

import pytest
import torch
from reproduction import ROOT
from safetensors.torch import load_file, save_file
from torch import nn

from stages.common.stage import InputError
from stages.forecast import forecast_snapshots
from stages.recall import audit
from stages.weightnet import predict

EXAMPLES = ROOT / "models/released/auditor/examples"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test runs in an empty folder: the published models are found wherever that is."""
    monkeypatch.chdir(tmp_path)


def test_an_audit_as_a_table_says_what_the_command_says(monkeypatch, capsys):
    table = audit.audit(EXAMPLES / "whole.safetensors").set_index(["characteristic", "label"])
    monkeypatch.setattr("sys.argv", ["audit", "--checkpoint", str(EXAMPLES / "whole.safetensors"), "--json"])
    audit.main()
    answer = json.loads(capsys.readouterr().out)
    for name in ("proportions", "images", "label_noise"):
        for label, found in answer[name]["found"].items():
            row = table.loc[(name, label if name == "proportions" else "")]
            assert [row["value"], row["low"], row["high"]] == [found["value"], found["low"], found["high"]]
    for label, found in answer["present"]["found"].items():
        assert table.loc[("present", label)]["value"] == found["probability"]
    assert len(table) == 22


def test_an_adapter_is_audited_and_a_refusal_is_raised():
    assert not audit.audit(adapter=EXAMPLES / "adapter").empty
    with pytest.raises(InputError, match="turned round"):
        audit.audit(EXAMPLES / "negated.safetensors")
    with pytest.raises(InputError, match="one of checkpoint and adapter"):
        audit.audit()


def test_forecasts_as_a_table_are_those_that_the_command_writes(tmp_path, monkeypatch, capsys):
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, generator=random)
    for step in range(20):
        weight = 0.9 * weight + 0.01 * torch.randn(6, 5, generator=random)
        save_file({"layer.weight": weight}, tmp_path / f"step{step}.safetensors")
    table, states = forecast_snapshots.forecast_snapshots(tmp_path)
    monkeypatch.setattr("sys.argv", ["forecast_snapshots", str(tmp_path), "--output", "out"])
    forecast_snapshots.main()
    assert "snapshots ahead" in capsys.readouterr().out
    for h, state in states.items():
        assert torch.equal(load_file(f"out/forecast-{h}.safetensors")["layer.weight"], state["layer.weight"])
    assert table["h"].tolist() == [h for h in states if h < 20 - forecast_snapshots.WINDOW]
    assert (table["shrunk"] < 1).all()


def test_predictions_as_a_table_are_those_that_the_command_prints(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    for name, scale in (("a", 1.0), ("b", 0.3)):
        network = nn.Sequential(
            *(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        )
        save_file({key: scale * value for key, value in network.state_dict().items()}, tmp_path / f"{name}.safetensors")
    layers = [
        {"kind": "Conv2d", "in_channels": 1, "out_channels": 8, "kernel_size": 3},
        {"kind": "ReLU"},
        {"kind": "AdaptiveAvgPool2d", "output_size": 1},
        {"kind": "Flatten"},
        {"kind": "Linear", "in_features": 8, "out_features": 10},
    ]
    (tmp_path / "spec.json").write_text(json.dumps({"layers": layers}))
    files = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    with pytest.raises(
        InputError, match="the zoos of digits, fashion_mnist, mnist: say which it learned by --dataset"
    ):  # of any images
        predict.predict(files, "spec.json", allow_probe=True)
    table = predict.predict(files, "spec.json", dataset="digits", allow_probe=True)
    words = ["predict", *files, "--arch", "spec.json", "--dataset", "digits", "--allow-probe", "--json"]
    monkeypatch.setattr("sys.argv", words)
    predict.main()
    answer = json.loads(capsys.readouterr().out)
    assert list(dict.fromkeys(table["model"])) == answer["ranking"]
    for _, row in table.iterrows():
        found = answer["networks"][row["model"]]
        assert {key: row[key] for key in ("value", "low", "high")} == found["properties"][row["property"]]
        assert (row["unlike"], row["trusted"]) == (found["unlike"], found["trusted"])
        assert math.isnan(row["measured"])
