"""Descriptions are centred, weigh alike, and keep what they should."""

import numpy as np
import pytest
from known_fleets import ANSWERS, BITS, LAYOUT, PARAMETERS, condenser_of, draw, linear_fleet, norms

from stages.recall.condense import Condenser, Span, sureness


@pytest.mark.parametrize("answers", [ANSWERS, (1, 15), (0, 5)])
def test_descriptions_of_training_fine_tunes_are_centred_and_weigh_alike(answers):
    drawn = linear_fleet(noise=1.0)
    train, test, change, responses = drawn.learned, drawn.held_out, drawn.change, drawn.responses
    condenser = Condenser.fit(change[train], responses[train], LAYOUT, answers)
    found = condenser.condense(change, responses)
    for name, rows in found.items():
        assert np.abs(rows[train].mean(0)).max() < 1e-4, name
        parts = np.split(rows, [len(condenser.response_axes)], axis=1) if name == "responses" else [rows]
        parts = [part for part in parts if part.size]
        assert len(parts) == 1 + (name == "responses" and answers[0] > 1)  # what is answered, and how sure
        for part in parts:
            assert norms(part[train]) == pytest.approx(1, abs=1e-3), name
            assert norms(part[test]) != pytest.approx(1, abs=1e-3), name
    deviations = found["statistics"][train].std(0)
    assert deviations == pytest.approx(deviations.mean(), rel=1e-3)  # every one weighs alike
    scaled = (change[train] - change[train].mean(0)) * condenser.span.scale
    ends = np.cumsum(LAYOUT.sizes)[:-1]
    assert [norms(part) for part in np.split(scaled, ends, axis=1)] == pytest.approx([1 / 5] * 5, rel=1e-4)


@pytest.mark.parametrize("noise", [1.0, 1e-2, 2e-3])
def test_axes_are_orthonormal_and_keep_all_that_training_fine_tunes_are_to_each_other(noise):
    drawn = linear_fleet(noise=noise)
    change = drawn.change[drawn.learned]
    span = Span.fit(change, LAYOUT)
    axes, x = span.axes.astype(np.float64), (change - span.mean) * span.scale
    assert np.abs(axes @ axes.T - np.eye(len(axes))).max() < 1e-5
    found = x @ axes.T
    assert found @ found.T == pytest.approx(x @ x.T, abs=2e-4)
    sizes = (found**2).sum(0)
    assert (np.diff(sizes) <= 1e-6).all()  # the leading ones hold most
    singular = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    assert sizes == pytest.approx(singular[: len(sizes)] ** 2, rel=1e-2, abs=1e-5)


def test_rounding_is_no_axis():
    change = linear_fleet(noise=0.0).change
    assert len(Span.fit(change, LAYOUT).axes) == BITS + 1


def test_renaming_hidden_neurons_changes_no_statistics_and_no_spectrum():
    drawn = linear_fleet()
    order = np.random.default_rng(0).permutation(10)
    ends = np.cumsum(LAYOUT.sizes)[:-1]
    parts = dict(zip(LAYOUT.shapes, np.split(drawn.change, ends, axis=1), strict=True))
    n = len(drawn.change)
    parts["first.weight"] = parts["first.weight"].reshape(n, 10, 8)[:, order].reshape(n, -1)
    parts["first.bias"] = parts["first.bias"][:, order]
    parts["second.weight"] = parts["second.weight"].reshape(n, 6, 10)[..., order].reshape(n, -1)
    renamed = np.concatenate(list(parts.values()), 1)
    condenser = condenser_of(drawn)
    first, second = (condenser.condense(change, drawn.responses) for change in (drawn.change, renamed))
    for name in ("statistics", "spectrum", "responses"):
        np.testing.assert_allclose(first[name], second[name], atol=1e-3)
    for name in ("change", "low_rank"):
        assert norms(first[name] - second[name]) > 0.5 * norms(first[name])


def test_sureness_is_of_the_probabilities_and_margins_of_the_reference_inputs():
    logits = np.array([[[3.0, 0.0, 1.0], [0.0, 0.0, 5.0]]])  # of two inputs
    p = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
    entropy = -(p * np.log(p)).sum(2)[0]
    columns = sureness(np.concatenate([logits.reshape(1, 6), np.full((1, 4), 99.0)], 1), classes=3, inputs=2)[0]
    largest, margins = p.max(2)[0], np.array([2.0, 5.0])
    expected = [entropy.mean(), entropy.std(), largest.mean(), largest.std(), margins.mean(), logits.std()]
    assert columns[:6] == pytest.approx(expected, abs=1e-6)
    assert columns[6:9] == pytest.approx(np.sort(p.mean(1)[0]))
    assert columns[9:] == pytest.approx(np.quantile(largest, [0, 0.25, 0.5, 0.75, 1]))
    assert sureness(np.ones((4, 6)), classes=1, inputs=2).shape == (4, 0)


def test_the_low_rank_core_has_the_directions_in_which_matrices_vary_most():
    random, n = np.random.default_rng(0), 60
    left, right = np.linalg.qr(random.standard_normal((10, 3)))[0], np.linalg.qr(random.standard_normal((8, 3)))[0]
    causes = random.standard_normal((n, 3)) * [5.0, 2.0, 0.3]
    change = 0.01 * draw(random, n, PARAMETERS)
    change[:, LAYOUT.slices["first.weight"]] += np.einsum("nk,ik,jk->nij", causes, left, right).reshape(n, -1)
    condenser = Condenser.fit(change, draw(random, n, 25), LAYOUT, ANSWERS)
    for found, directions in ((condenser.left, left), (condenser.right, right)):
        assert np.abs(found["first.weight"].T @ directions[:, :2]) == pytest.approx(np.eye(2), abs=0.05)
    cores = condenser.low_rank(change)[:, 6:10].reshape(n, 2, 2)  # behind the first bias
    centred = causes - causes.mean(0)
    assert np.abs(cores[:, 0, 0]) == pytest.approx(np.abs(centred[:, 0]), abs=0.1)
    assert np.abs(cores[:, 1, 1]) == pytest.approx(np.abs(centred[:, 1]), abs=0.3)
    assert condenser.low_rank(change)[:, :6] == pytest.approx((change - change.mean(0))[:, :6])
