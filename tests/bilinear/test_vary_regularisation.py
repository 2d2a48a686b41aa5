"""The factorial trains every combination once for each seed, and says of each factor what it changes."""

import json

import pandas as pd
import pytest
import torch
import yaml

from stages.bilinear import vary_regularisation as stage
from stages.bilinear.model import BilinearImageClassifier
from stages.common.images import load_images
from stages.common.metrics import accuracy


@pytest.fixture
def small(digits):
    values = yaml.safe_load((digits / "params.yaml").read_text())
    values["vary_regularisation"] |= {"d_hidden": 16, "seeds": [0, 1, 2]}
    values["vary_regularisation"]["overrides"]["digits"] = {"epochs": 2, "batch_size": 128, "learning_rate": 0.02}
    (digits / "params.yaml").write_text(yaml.safe_dump(values))
    return digits


def test_every_combination_is_measured_and_a_run_that_was_killed_goes_on(small, monkeypatch):
    monkeypatch.setattr("sys.argv", ["vary_regularisation", "--dataset", "digits"])
    trained = []

    def train_run(config):
        trained.append(config)
        if len(trained) == 5:
            raise KeyboardInterrupt
        return original(config)

    original = stage.train_run
    monkeypatch.setattr(stage, "train_run", train_run)
    monkeypatch.setattr("stages.common.work.parallel_map", lambda function, items, *_: list(map(function, items)))
    with pytest.raises(KeyboardInterrupt):
        stage.main()
    stage.main()
    assert len(trained) == 8 * 3 + 1  # four were kept
    reports = small / "reports/vary_regularisation/digits"
    table = pd.read_csv(reports / "conditions.csv")
    assert len(table) == 8 * 5
    summary = json.loads((reports / "summary.json").read_text())
    assert summary["effects"].keys() == {"weight_decay", "input_noise", "shift"}
    acc = table[table["measure"] == "test_acc"]
    for factor, changes in summary["effects"].items():
        by_value = acc.groupby(factor)["mean"].mean()
        assert changes["test_acc"]["mean"] == pytest.approx(by_value.iloc[1] - by_value.iloc[0], abs=1e-5)
    assert acc["mean"].min() > summary["untrained"]["test_acc"]["mean"]
    assert (reports / "factors.png").is_file()


def test_all_eigenvectors_have_the_whole_networks_accuracy(digits):
    del digits
    _, test = load_images("digits", torch.device("cpu"))
    model = BilinearImageClassifier(64, 12, 10, 1, False, False, 0).double().requires_grad_(False)
    found = stage.measure(model, test, rank=12)
    whole = accuracy(model(test.pixels().double()), test.labels).item()
    assert found["truncated_acc"] == found["test_acc"] == pytest.approx(whole)
    assert stage.measure(model, test, rank=1)["truncated_acc"] != found["test_acc"]
