"""Numbers that are reported are what their names say."""

import numpy as np
import pytest
import torch
from scipy.special import expit

from stages.common.metrics import binary_calibration_error, bootstrap_interval, calibration_error, headline_metrics


def test_calibration_error_of_the_sure_and_right_is_zero_and_of_the_sure_and_wrong_one():
    labels = torch.arange(10)
    sure = 50 * torch.eye(10)[None]
    assert calibration_error(sure, labels).item() == pytest.approx(0, abs=1e-9)
    assert calibration_error(sure, labels.roll(1)).item() == pytest.approx(1, abs=1e-9)


def test_the_binary_calibration_error_is_the_distance_of_confidence_from_accuracy():
    random = np.random.default_rng(0)
    p = random.random(50000)
    assert binary_calibration_error(p, random.random(50000) < p) < 0.01
    true = random.random(50000) < p
    logits = np.log(p / (1 - p))
    sure = expit(3 * logits)
    expected = np.abs(np.maximum(sure, 1 - sure) - np.maximum(p, 1 - p)).mean()
    assert expected > 0.1
    assert binary_calibration_error(sure, true) == pytest.approx(expected, abs=0.01)
    assert binary_calibration_error(np.full(10, 0.9), np.arange(10) < 7) == pytest.approx(0.2)
    assert binary_calibration_error(np.full(10, 0.1), np.arange(10) < 3) == pytest.approx(0.2)
    assert binary_calibration_error(np.ones(4), np.ones(4, bool)) == 0
    assert binary_calibration_error(
        np.repeat([0.9, 0.6], 10), np.r_[np.arange(10) < 7, np.arange(10) < 7]
    ) == pytest.approx(0.15)


def test_both_calibration_errors_agree_on_two_classes():
    """Confidences of two classes lie above 0.5: ten bins there are twenty from 0 to 1."""
    p = torch.rand(2000, dtype=torch.float64)
    labels = (torch.rand(2000) < 0.3).long()
    of_logits = calibration_error(torch.stack([(1 - p).log(), p.log()], 1)[None], labels, bins=20)
    assert of_logits.item() == pytest.approx(binary_calibration_error(p.numpy(), labels.numpy() == 1, bins=10))


def test_a_bootstrap_interval_holds_the_mean_as_students_does_and_shrinks_with_the_root_of_n():
    values = np.random.default_rng(1).normal(3, 1, 4000)
    widths = []
    for n in (40, 4000):
        found = bootstrap_interval(lambda x: x.mean(-1), values[:n])
        assert found["mean"] == pytest.approx(values[:n].mean())
        assert found["low"] < found["mean"] < found["high"]
        widths.append(found["high"] - found["low"])
        assert widths[-1] == pytest.approx(2 * 1.96 * values[:n].std() / n**0.5, rel=0.2)
    assert bootstrap_interval(lambda x: x.sum(-1), np.ones(40)) == {"mean": 40.0, "low": 40.0, "high": 40.0}


def test_items_of_several_arrays_are_drawn_together():
    x = np.random.default_rng(2).normal(size=50)
    interval = bootstrap_interval(lambda a, b: (a / b).mean(-1), 3 * x, x)
    assert list(interval.values()) == pytest.approx([3, 3, 3])


def test_headlines_are_the_numbers_at_their_places_and_of_spreads_the_mean():
    summary = {"a": {"b": {"mean": 0.5, "std": 0.1, "n": 3}, "c": 2}, "d": 0}
    places = {"half": "a/b", "two": "a/c", "none": "d", "skipped": "a/e", "deeper": "d/f"}
    assert headline_metrics(summary, places) == {"half": 0.5, "two": 2, "none": 0}
