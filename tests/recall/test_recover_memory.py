"""What is decoded, beside what ignores the network, on fleets whose changes are known functions of what they were trained on."""

from dataclasses import replace

import numpy as np
import pytest
from known_fleets import BITS, assert_same, condensed, linear_fleet

from stages.recall.decoders import REPRESENTATIONS, fit_decoder, read
from stages.recall.recover_memory import (
    baseline,
    by_name,
    decode_fleet,
    growth,
    mean_image_rows,
    permuted,
    score,
    targets,
)


def binomial(n: int) -> float:
    """Four standard deviations of the mean of so many fair coins."""
    return 4 * 0.5 / n**0.5


def test_a_decoder_that_ignores_weights_is_caught(fleet):
    train, test = fleet.learned, fleet.held_out
    blind = np.zeros((len(fleet.test), 4))
    for name in ("present", "proportions", "log2_size", "mean_image"):
        y = targets(fleet, (name,))
        predicted = fit_decoder(blind[train], y[train]).predict(blind[test])
        found = score(name, predicted, y[test], y[train])
        ignoring = baseline(name, y[test], y[train])
        assert found.keys() == ignoring.keys()
        for measure, value in found.items():
            assert value["mean"] == pytest.approx(ignoring[measure], abs=1e-6)
            if measure == "r2":
                assert ignoring[measure] == 0
            if measure == "retrieved":
                assert ignoring[measure] == 1 / len(test)
            if measure == "bits":
                assert ignoring[measure] == pytest.approx(0.5, abs=0.12)


def test_a_perfect_decoder_has_perfect_scores_and_intervals_are_of_the_fine_tunes(fleet):
    train, test = fleet.learned, fleet.held_out
    for name in ("present", "proportions", "log2_size", "mean_image"):
        y = targets(fleet, (name,))
        for value in score(name, y[test], y[test], y[train]).values():
            assert value == {"mean": 1.0, "low": 1.0, "high": 1.0}
    random = np.random.default_rng(0)
    true = (random.random((400, 5)) < 0.5).astype(float)
    guessed = np.where(random.random((400, 1)) < 0.2, 1 - true, true)  # all bits of a fifth of them wrong
    found = score("present", guessed, true, true)
    assert found["bits"] == found["whole"]
    half = 1.96 * (0.2 * 0.8 / 400) ** 0.5  # as of 400 fine-tunes, not of 2000 bits
    assert found["bits"]["high"] - found["bits"]["low"] == pytest.approx(2 * half, rel=0.25)
    true[:, 0], guessed = 1, true.copy()
    guessed[:, 0] = 0
    found = score("present", guessed, true, true)
    assert found["bits"]["mean"] == 0.8 and found["whole"]["mean"] == 0


def test_characteristics_side_by_side_come_apart_again(fleet):
    names = ("present", "log2_size", "mean_image")
    parts = by_name(targets(fleet, names), fleet, names)
    assert list(parts) == list(names)
    assert_same(parts, {name: fleet.truth[name].astype(np.float64) for name in names})


def test_weights_tell_and_permuted_weights_do_not(fleet):
    found, _ = decode_fleet("classes", fleet)
    bits = len(fleet.held_out) * BITS
    for representation in ("change", "components_16", "responses", "both", "all"):
        assert found["present"][representation]["bits"]["mean"] > 0.95, representation
        assert found["log2_size"][representation]["r2"]["mean"] > 0.8, representation
    assert found["mean_image"]["change"]["retrieved"]["mean"] > 0.9
    assert found["present"]["baseline"]["bits"] == pytest.approx(0.5, abs=binomial(bits))
    control = permuted("classes", fleet, 0)
    for who in ("test", "training"):
        assert control[who]["mean"] == pytest.approx(0.5, abs=binomial(bits)), who
        assert control[who]["n"] == 5
    train, test = fleet.learned, fleet.held_out
    x, y = read(fleet.descriptions, "change"), fleet.truth["present"].astype(np.float64)
    predicted = fit_decoder(x[train], y[train]).predict(x[test])
    random = (np.random.default_rng(0).random(y[test].shape) < 0.5).astype(float)
    assert score("present", predicted, random, y[train])["bits"]["mean"] == pytest.approx(0.5, abs=binomial(bits))


def test_a_fleet_whose_changes_tell_nothing_is_decoded_at_chance():
    drawn = linear_fleet()
    random = np.random.default_rng(3)
    present = (random.random(drawn.truth["present"].shape) < 0.5).astype(np.float32)
    found, _ = decode_fleet("classes", condensed(replace(drawn, truth=drawn.truth | {"present": present})))
    for representation in REPRESENTATIONS:
        measured = found["present"][representation]["bits"]["mean"]
        assert measured == pytest.approx(0.5, abs=binomial(60 * BITS)), representation


def test_more_fine_tunes_decode_better_and_the_last_row_is_what_is_reported(fleet):
    rows = growth("classes", fleet, counts=[8, 30, 500], repeats=3, seed=0)
    found, _ = decode_fleet("classes", fleet)
    for representation in ("change", "responses", "both"):
        scores: dict[int, list[float]] = {}
        for row in rows:
            if row["reads"] == representation:
                scores.setdefault(row["fine_tunes"], []).append(row["score"])
        assert {count: len(values) for count, values in scores.items()} == {8: 3, 30: 3, 120: 1}
        assert len(set(scores[8])) > 1
        means = [np.mean(scores[count]) for count in (8, 30, 120)]
        assert means == sorted(means) and means[0] < means[-1] - 0.02
        assert means[-1] == pytest.approx(found["present"][representation]["bits"]["mean"], abs=0.01)


def test_mean_images_are_shown_as_differences_from_the_fleet_s(fleet):
    _, decoders = decode_fleet("classes", fleet)
    rows = mean_image_rows("classes", fleet, decoders["change"])
    assert list(rows) == ["classes: mean image", "classes: from its weights"]
    true, told = rows.values()
    images = fleet.truth["mean_image"]
    assert true.shape == told.shape == (len(fleet.held_out), 3, 2, 2)
    assert true.reshape(len(true), -1) == pytest.approx(images[fleet.held_out] - images[fleet.learned].mean(0))
    assert ((true - told) ** 2).mean() < 0.2 * (true**2).mean()
