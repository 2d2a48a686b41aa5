"""Training chooses on validation images, and its artifacts keep their contract."""

import copy
import csv
import json

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from stages.bilinear.model import build_image_classifier
from stages.bilinear.training import (
    build_image_dataloaders,
    evaluate,
    load_checkpoint,
    load_model,
    train_image_experiment,
)
from stages.common.images import load_images
from stages.common.runtime import autocast, resolve_device
from stages.common.stage import InputError

METRICS = ["epoch", "train_loss", "train_acc", "val_loss", "val_acc", "lr"]


@pytest.fixture
def config(digits):
    return {
        "dataset": {"name": "digits", "validation_fraction": 0.2, "split_seed": 0},
        "model": {"d_hidden": 16, "n_layer": 1, "bias": False, "residual": False},
        "train": {
            "epochs": 6,
            "batch_size": 64,
            "learning_rate": 0.02,
            "weight_decay": 0.1,
            "warmup_fraction": 0.1,
            "shift": 1,
            "input_noise": 0.1,
        },
        "seed": 0,
        "run_dir": str(digits / "run"),
    }


def test_artifact_contract(config):
    paths = train_image_experiment(config)
    assert {"run_dir", "metrics_path", "best_checkpoint_path", "latest_checkpoint_path"} <= paths.keys()
    best, latest = (load_checkpoint(paths[f"{kind}_checkpoint_path"]) for kind in ("best", "latest"))
    for checkpoint in (best, latest):
        assert list(checkpoint) == ["model_state_dict", "config", "epoch", "metrics"]
        assert list(checkpoint["metrics"]) == METRICS
        assert checkpoint["epoch"] == checkpoint["metrics"]["epoch"]
        model = build_image_classifier(checkpoint["config"]["model"], seed=1)
        model.load_state_dict(checkpoint["model_state_dict"])  # strict
    assert latest["epoch"] == 6
    with paths["metrics_path"].open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == METRICS
    assert [int(row["epoch"]) for row in rows] == list(range(1, 7))
    rates = [float(row["lr"]) for row in rows]  # after each epoch: from its top down to zero
    assert 0.8 * 0.02 < rates[0] <= 0.02
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-6)
    # the best epoch is the one that validation says, and the test accuracy is its network's
    assert best["metrics"]["val_acc"] == pytest.approx(max(float(row["val_acc"]) for row in rows), abs=1e-5)
    summary = json.loads(paths["summary_path"].read_text())
    model, _ = load_model(paths["best_checkpoint_path"])
    _, test = load_images("digits", torch.device("cpu"))
    assert summary["test_acc"] == (model(test.pixels()).argmax(1) == test.labels).double().mean().item()
    assert summary["test_acc"] > 0.6  # chance: 0.1


def test_of_epochs_that_are_as_accurate_the_one_of_lowest_loss_is_best(config, monkeypatch):
    losses = iter([0.5, 0.3, 0.4, 0.3, 0.6, 0.7, 0.0])  # of six epochs, and of the test
    monkeypatch.setattr("stages.bilinear.training.evaluate", lambda *_: (next(losses), 0.9))
    paths = train_image_experiment(config)
    assert load_checkpoint(paths["best_checkpoint_path"])["epoch"] == 2  # the first of its kind


def test_test_images_do_not_influence_training(config, project):
    before = train_image_experiment(config)
    weights = load_checkpoint(before["best_checkpoint_path"])["model_state_dict"]
    _, test = load_images("digits", torch.device("cpu"))
    test.images.random_(0, 256)  # in place, in the cached data set
    after = train_image_experiment(config | {"run_dir": str(project / "again")})
    assert json.loads(after["summary_path"].read_text())["test_acc"] < 0.4
    for name, weight in load_checkpoint(after["best_checkpoint_path"])["model_state_dict"].items():
        assert torch.equal(weight, weights[name])


def test_permuted_labels_give_chance(config):
    train, _ = load_images("digits", torch.device("cpu"))
    train.labels.copy_(train.labels[torch.randperm(len(train))])
    paths = train_image_experiment(config)
    assert json.loads(paths["summary_path"].read_text())["test_acc"] < 0.25


def test_the_same_config_gives_the_same_bytes_and_another_seed_others(config, project):
    runs = [config, config | {"run_dir": str(project / "b")}, config | {"seed": 1, "run_dir": str(project / "c")}]
    a, b, c = (train_image_experiment(run) for run in runs)
    assert a["metrics_path"].read_bytes() == b["metrics_path"].read_bytes() != c["metrics_path"].read_bytes()


def test_training_that_diverges_is_named_and_leaves_no_result(config, project):
    for rate, said in ((1e30, "is not finite"), (3.0, r"is \S+ and was 2\.3 untrained")):
        config["train"] |= {"learning_rate": rate, "weight_decay": 0.0}
        with pytest.raises(
            InputError, match=rf"epoch \d: training diverged, its loss {said}: lower train_bilinear.learning_rate"
        ):
            train_image_experiment(config)
    assert not (project / "run").exists()


def test_a_clipped_gradient_is_no_longer_than_the_clip(config, monkeypatch):
    """Plain gradient steps of rate 1 are the clipped gradients themselves."""
    steps: list[float] = []

    class Recording(torch.optim.SGD):
        def __init__(self, parameters, lr, weight_decay, fused):
            del weight_decay, fused
            super().__init__(parameters, lr)

        def step(self, closure=None):
            steps.append(torch.stack([p.grad.norm() for p in self.param_groups[0]["params"]]).norm().item())
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Recording)
    config["train"] |= {"epochs": 1, "learning_rate": 1e-3}
    train_image_experiment(config)
    free, steps = steps, []
    config["train"]["gradient_clip"] = min(free) / 2
    train_image_experiment(config)
    assert steps == pytest.approx([min(free) / 2] * len(free), rel=1e-4)


def test_values_that_a_recipe_may_leave_out_count_where_it_has_them(config, project):
    config["train"]["epochs"] = 1
    plain = load_checkpoint(train_image_experiment(config)["latest_checkpoint_path"])["model_state_dict"]
    for key, value in {"gradient_clip": 0.1, "noise_bank": 4, "mirror": True}.items():
        other = config | {"train": config["train"] | {key: value}, "run_dir": str(project / key)}
        weights = load_checkpoint(train_image_experiment(other)["latest_checkpoint_path"])["model_state_dict"]
        assert not torch.equal(weights["embed.weight"], plain["embed.weight"])


def test_evaluate_is_the_mean_over_images_for_any_batch_size(config):
    model = build_image_classifier(config["model"] | {"d_input": 64, "d_output": 10}, seed=0)
    data = build_image_dataloaders(config["dataset"], config["train"])
    loss, accuracy = evaluate(model, data.test_loader, nn.CrossEntropyLoss(), torch.device("cpu"))
    _, test = load_images("digits", torch.device("cpu"))
    logits = model(test.pixels())
    assert loss == pytest.approx(cross_entropy(logits, test.labels).item(), rel=1e-5)
    assert accuracy == (logits.argmax(1) == test.labels).double().mean().item()
    smaller = copy.copy(data.test_loader)
    smaller.batch_size = 7
    assert evaluate(model, smaller, nn.CrossEntropyLoss(), torch.device("cpu")) == pytest.approx((loss, accuracy))
    for mode in (True, False):
        evaluate(model.train(mode), smaller, nn.CrossEntropyLoss(), torch.device("cpu"))
        assert model.training == mode
    with pytest.raises(ValueError, match="loader: expected at least one batch, got none"):
        evaluate(model, [], nn.CrossEntropyLoss(), torch.device("cpu"))


OTHER_RECIPE = {
    "epochs": 3,
    "batch_size": 32,
    "learning_rate": 0.01,
    "weight_decay": 0.5,
    "warmup_fraction": 0.3,
    "shift": 0,
    "input_noise": 0.0,
}


@pytest.mark.parametrize(("key", "value"), OTHER_RECIPE.items())
def test_each_value_of_a_recipe_counts(config, project, key, value):
    config["train"]["epochs"] = 2
    other = config | {"train": config["train"] | {key: value}, "run_dir": str(project / "other")}
    weights = [
        load_checkpoint(train_image_experiment(run)["latest_checkpoint_path"])["model_state_dict"]
        for run in (config, other)
    ]
    assert not torch.equal(weights[0]["embed.weight"], weights[1]["embed.weight"])


def test_damaged_checkpoints_are_refused_in_one_line(config, tmp_path):
    path = train_image_experiment(config)["best_checkpoint_path"]
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no checkpoint"):
        path.write_bytes(content)
        with pytest.raises(InputError) as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value)
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="expected config, epoch, metrics, model_state_dict, got weights"):
        load_checkpoint(tmp_path / "other.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "pickle.pt")  # a class: would run code
    with pytest.raises(InputError, match="holds a whole pickled model"):
        load_checkpoint(tmp_path / "pickle.pt")


def test_processors_multiply_in_float32_unless_asked(monkeypatch):
    cpu = torch.device("cpu")

    def product() -> torch.dtype:
        with autocast(cpu):
            return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    monkeypatch.setattr("stages.common.runtime.has_native_bfloat16", lambda _device: True)
    expected = {None: torch.float32, "float32": torch.float32, "auto": torch.bfloat16, "bfloat16": torch.bfloat16}
    for value, dtype in expected.items():
        monkeypatch.delenv("WEIGHTLENS_PRECISION", raising=False)
        if value:
            monkeypatch.setenv("WEIGHTLENS_PRECISION", value)
        assert product() == dtype, value
    monkeypatch.setenv("WEIGHTLENS_PRECISION", "half")
    with pytest.raises(InputError, match="expected auto, float32 or bfloat16"):
        autocast(cpu)


def test_unknown_devices_are_refused():
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(InputError, match="device 'abacus'"):
        resolve_device("abacus")
