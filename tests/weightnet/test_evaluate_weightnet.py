"""Scores are of what they name."""

import pytest
import torch
from reproduction import set_params
from running import start
from small_networks import seeded

from stages.common.files import save_table
from stages.datasets import fetch_data
from stages.weightnet import build_zoo, evaluate_weightnet, train_weightnet
from stages.weightnet.evaluate_weightnet import by_architecture, learning_curve, load_predictions, score
from stages.weightnet.predictors.targets import from_scale, to_scale
from stages.weightnet.zoo.properties import PROPERTIES, REFERENCES


def test_scales_of_properties_are_inverted():
    values = torch.rand(20, len(PROPERTIES)) * 0.9 + 0.05
    torch.testing.assert_close(from_scale(to_scale(values)), values)


def test_a_prediction_far_from_all_that_is_known_is_a_number():
    far = torch.full((1, len(PROPERTIES)), 1e4)
    assert from_scale(far).isfinite().all() and from_scale(-far).isfinite().all()


def test_a_family_whose_members_are_all_left_out_predicts_nothing(project):
    for family, rows in {"exam": [{"predictor": "exam", "split": 0}], "ablations": []}.items():
        save_table(project / f"models/train_weightnet/digits-{family}/predictions.parquet", rows)
    assert load_predictions("digits").columns["predictor"].tolist() == ["exam"]


def test_scores_of_perfect_reversed_and_constant_predictions():
    truth = torch.rand(50, generator=seeded()).numpy()
    assert score(truth, truth) == {"tau": pytest.approx(1), "rho": pytest.approx(1), "r2": pytest.approx(1)}
    assert score(truth, -truth)["tau"] == pytest.approx(-1)
    assert score(truth, 0 * truth)["tau"] == 0


def test_summaries_are_of_the_rows_that_they_name():
    def row(predictor, task, split, architecture, tau, name="test_acc"):
        who = {"predictor": predictor, "task": task, "split": split, "architecture": architecture, "property": name}
        return who | {"tau": tau, "r2": 0.0}

    held = by_architecture(
        [row("p", "to_a", 0, "a", 0.2), row("p", "to_b", 0, "b", 0.6), row("p", "to_b", 0, "b", 0, "gap")]
    )
    assert {name: found["p"]["mean"] for name, found in held.items()} == pytest.approx(
        {"a": 0.2, "b": 0.6, "mean": 0.4}
    )
    assert by_architecture([]) == {"mean": {}}
    rows = [
        row("p", "a", 0, "a", 0.5),
        row("p", "a", 1, "a", 0.9),
        row("p", "a_0.5", 0, "a", 0.3),
        row("q", "a", 0, "a", 1),
    ]
    curve = learning_curve(rows, {("p", "a"): 100, ("p", "a_0.5"): 50})
    assert {n: point["mean"] for n, point in curve["p"].items()} == {"50": 0.3, "100": 0.5}
    assert set(curve) == {"p"}


def test_predictors_that_a_data_set_skips_are_not_scored(project, monkeypatch):
    skipped = ["probe", "stats_gbm", "stats", "mlp", "nfn", "no_cross", "no_intra", "no_augmentation", "canonical"]
    settings = [f"train_weightnet.skipped=[{','.join([*skipped, 'one_sided'])}]"]
    set_params(project / "params.yaml", [*settings, "train_weightnet.tasks.architectures=[cnn3,flat]"])
    start(monkeypatch, fetch_data, dataset="digits")
    for variant in ("cnn3", "flat"):
        start(monkeypatch, build_zoo, dataset="digits", variant=variant)
    for variant in ("exam", "weightnet", "baselines"):
        start(monkeypatch, train_weightnet, dataset="digits", variant=variant)
    start(monkeypatch, evaluate_weightnet, dataset="digits")
    scores = (project / "reports/evaluate_weightnet/digits/scores.csv").read_text().splitlines()[1:]
    found = {line.split(",")[0] for line in scores}
    assert {"weightnet", "exam", "nearest", "hyperparameters", *REFERENCES} <= found
    assert not found & {*skipped, "one_sided"}
