"""The table of a checkpoint rebuilds its logits, and what is no such checkpoint is refused in a line."""

import numpy as np
import pytest
import torch

from stages.bilinear import decompose as command
from stages.bilinear.decompose import decompose
from stages.bilinear.model import build_image_classifier
from stages.common.stage import InputError

CONFIG = {"d_input": 16, "d_hidden": 8, "d_output": 3, "bias": False, "residual": False}


@pytest.fixture
def checkpoint(tmp_path):
    def write(n_layer: int):
        config = {"model": CONFIG | {"n_layer": n_layer}, "seed": 0}
        model = build_image_classifier(config["model"], 0)
        path = tmp_path / f"{n_layer}.pt"
        saved = {"model_state_dict": model.state_dict(), "config": config, "epoch": 0, "metrics": {}}
        torch.save(saved, path)
        return path, model

    return write


def test_the_rows_of_a_class_sum_to_its_logit(checkpoint):
    path, model = checkpoint(1)
    table = decompose(path)
    x = torch.rand(5, 1, 4, 4)
    for label, rows in table.groupby("label"):
        read = np.stack(rows["eigenvector"]) @ x.flatten(1).double().numpy().T
        logit = (rows["eigenvalue"].to_numpy()[:, None] * read**2).sum(0)
        np.testing.assert_allclose(logit, model(x)[:, label].detach().numpy(), rtol=1e-4, atol=1e-5)


def test_the_strongest_come_first_and_shares_sum_to_one(checkpoint):
    table = decompose(checkpoint(1)[0])
    for _, rows in table.groupby("label"):
        assert rows["share"].is_monotonic_decreasing
        assert rows["share"].sum() == pytest.approx(1)


def test_two_layers_have_no_such_table(checkpoint):
    with pytest.raises(InputError, match=r"2\.pt: expected"):
        decompose(checkpoint(2)[0])


def test_the_command_prints_and_writes_the_table(checkpoint, tmp_path, monkeypatch, capsys):
    path, _ = checkpoint(1)
    monkeypatch.setattr("sys.argv", ["decompose", str(path), "--each", "2", "--output", str(tmp_path / "all.csv")])
    command.main()
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 * CONFIG["d_output"]
    assert (tmp_path / "all.csv").read_text().startswith("label,eigenvalue,share,constant\n")
