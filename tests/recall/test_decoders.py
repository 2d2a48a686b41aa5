"""Decoders are ridge regressions, with intervals and probabilities that hold."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from stages.common.metrics import binary_calibration_error
from stages.recall.decoders import ALPHAS, Decoder, fit_decoder, r_squared, retrieved


def test_a_decoder_is_ridge_regression_and_its_errors_are_of_each_left_out():
    random = np.random.default_rng(0)
    x, noise = random.standard_normal((30, 12)), random.standard_normal((30, 3))
    y = x @ random.standard_normal((12, 3)) + noise * [1.0, 10.0, 100.0]
    decoder = fit_decoder(x, y)
    assert len(set(decoder.alphas)) > 1  # each target's own
    for target, alpha in enumerate(decoder.alphas):
        model = Ridge(alpha=alpha).fit(x, y[:, target])
        assert decoder.predict(x)[:, target] == pytest.approx(model.predict(x), abs=1e-6)
        errors = {}
        for candidate in {alpha, *ALPHAS[::4]}:
            guessed = [
                Ridge(alpha=candidate).fit(np.delete(x, i, 0), np.delete(y[:, target], i)).predict(x[i : i + 1])[0]
                for i in range(30)
            ]
            errors[candidate] = ((guessed - y[:, target]) ** 2).mean()
        assert decoder.errors[target] == pytest.approx(errors[alpha], rel=1e-4)
        assert errors[alpha] == min(errors.values())


def test_r_squared_is_about_the_mean_that_was_learned_and_retrieval_about_it_too():
    random = np.random.default_rng(0)
    true, mean = random.standard_normal((50, 4)) + 3, np.full(4, 3.0)
    assert r_squared(true + 0.5 * (mean - true), true, mean) == pytest.approx(0.75)
    assert r_squared(2 * mean - true, true, mean) == pytest.approx(-3)
    assert retrieved(mean + 0.1 * (true - mean), true, mean).all()  # direction counts, not size
    assert not retrieved(2 * mean - true, true, mean).any()
    order = random.permutation(50)
    assert (retrieved(true[order], true, mean) == (order == np.arange(50))).all()


def test_intervals_hold_for_nine_of_ten_and_probabilities_mean_what_they_say():
    covered, errors, blunt = [], [], []
    for seed in range(12):
        random = np.random.default_rng(seed)
        weights = random.standard_normal((20, 3))

        def sample(n: int, random=random, weights=weights) -> tuple[np.ndarray, np.ndarray]:
            x = random.standard_normal((n, 20))
            return x, x @ weights + 2 * random.standard_normal((n, 3))

        (x, y), (new_x, new_y) = sample(80), sample(1000)
        decoder = fit_decoder(x, y).calibrate(x, y, binary=False)
        assert decoder.slope_and_offset is None
        predicted = decoder.predict(new_x)
        covered.append((np.abs(predicted - new_y) <= decoder.half_width(predicted)).mean())
        naive = np.quantile(np.abs(decoder.predict(x) - y), 0.9)  # of what it was fitted on
        blunt.append((np.abs(decoder.predict(new_x) - new_y) <= naive).mean())
        decoder = fit_decoder(x, y > 0).calibrate(x, y > 0, binary=True)
        scores = decoder.predict(new_x)
        errors.append(binary_calibration_error(decoder.probabilities(scores).ravel(), (new_y > 0).ravel()))
    assert 0.88 < np.mean(covered) < 0.93
    assert all(0.8 < share < 0.97 for share in covered)
    assert np.mean(blunt) < np.mean(covered) - 0.03
    assert np.mean(errors) < 0.03


def calibrated(**changes) -> Decoder:
    """A decoder of one number, by name of what it would have learned from values of 0.1 to 0.4."""
    given = {
        "weights": np.ones((1, 1)),
        "offset": np.zeros(1),
        "edges": np.zeros(0),
        "half_widths": np.array([0.1]),
        "predicted_range": np.array([0.0, 0.5]),
        "true_range": np.array([0.1, 0.4]),
    }
    return Decoder(**given | changes)


def test_within_what_is_known_an_interval_is_the_prediction_and_its_half_width():
    decoder, predicted = calibrated(), np.array([0.2, -0.04, 0.55])
    assert decoder.doubt(predicted) == pytest.approx(np.ones(3))
    value, low, high = decoder.interval(predicted, (0.0, 1.0), decoder.doubt(predicted))
    assert value == pytest.approx([0.2, 0.0, 0.55])
    assert low == pytest.approx([0.1, 0.0, 0.45])
    assert high == pytest.approx([0.3, 0.06, 0.65])


def test_beyond_what_is_known_intervals_are_wider_by_the_distance_and_never_of_width_zero():
    decoder = calibrated()
    predicted = np.array([-0.1, -5.0, 0.7, 1.6, 100.0])
    assert decoder.known(predicted) == pytest.approx([-0.1, -0.1, 0.6, 0.6, 0.6])
    doubt = decoder.doubt(predicted)
    assert doubt == pytest.approx([1, 50, 2, 11, 995])
    value, low, high = decoder.interval(predicted, (0.0, 1.0), doubt)
    assert value == pytest.approx([0, 0, 0.6, 0.6, 0.6])
    assert low == pytest.approx([0, 0, 0.4, 0, 0])
    assert high == pytest.approx([0.05, 1, 0.8, 1, 1])  # of the first, half of a half-width remains
    _, low, high = decoder.interval(np.array([0.2]), (0.0, 1.0), np.array([2.0]))
    assert (low, high) == (0.0, pytest.approx(0.4))
    high_up = calibrated(predicted_range=np.array([0.0, 1.5]))
    value, low, high = high_up.interval(np.array([1.5]), (0.0, 1.0), np.ones(1))
    assert (value, low, high) == (1.0, pytest.approx(0.95), 1.0)
    rng = np.random.default_rng(0)
    predicted = rng.standard_normal(200)
    value, low, high = decoder.interval(predicted, (0.0, 1.0), decoder.doubt(predicted))
    assert ((high - low >= 0.049) & (low <= value) & (value <= high) & (low >= 0) & (high <= 1)).all()


def test_doubt_draws_probabilities_to_even_odds():
    decoder = calibrated(slope_and_offset=np.array([10.0, -5.0]))
    scores = np.array([0.1, 0.5, 0.9])
    p = decoder.probabilities(scores)
    assert p == pytest.approx(1 / (1 + np.exp(5 - 10 * scores)))
    doubted = decoder.probabilities(scores, np.array([2.0, 2.0, 100.0]))
    assert doubted == pytest.approx(1 / (1 + np.exp([2.0, 0.0, -0.04])))


def test_calibration_keeps_what_was_known():
    random = np.random.default_rng(0)
    x, y = random.standard_normal((50, 3)), random.random((50, 2))
    decoder = fit_decoder(x, y).calibrate(x, y, binary=False)
    assert decoder.true_range == pytest.approx([y.min(), y.max()])
    guesses = [
        Ridge(alpha=decoder.alphas).fit(np.delete(x, rows, 0), np.delete(y, rows, 0)).predict(x[rows])
        for rows in np.split(np.arange(50), 5)
    ]
    assert decoder.predicted_range == pytest.approx([np.min(guesses), np.max(guesses)])
    assert set(decoder.to_arrays()) == {
        "weights", "offset", "edges", "half_widths", "predicted_range", "true_range",
    }  # fmt: skip


def test_intervals_of_what_is_unsure_are_as_much_wider_and_hold_as_often():
    random = np.random.default_rng(0)
    x, unsure = random.standard_normal((2000, 3)), np.where(np.arange(2000) % 2, 3.0, 1.0)[:, None]
    y = x @ np.array([[1.0], [-1.0], [0.5]]) + 0.3 * unsure * random.standard_normal((2000, 1))
    decoder = fit_decoder(x[:1000], y[:1000]).calibrate(x[:1000], y[:1000], False, unsure[:1000])
    predicted, true, times = decoder.predict(x[1000:]), y[1000:], unsure[1000:]
    inside = np.abs(predicted - true) <= decoder.half_width(predicted) * times
    for sure in (1.0, 3.0):
        assert inside[times == sure].mean() == pytest.approx(0.9, abs=0.05)
