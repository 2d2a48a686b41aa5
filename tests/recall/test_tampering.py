"""What is done to fine-tunes is what it is called."""

import numpy as np
from known_fleets import LAYOUT, PARAMETERS, draw

from stages.recall.tampering import DROPPED, KEPT, PRUNED, TRUNCATED, tampered

RANDOM = np.random.default_rng(0)
BASE, CHANGE = draw(RANDOM, PARAMETERS), draw(RANDOM, 40, PARAMETERS)
ALTERED = tampered(CHANGE, BASE, LAYOUT, "whole")


def test_dare_keeps_the_mean_and_ties_what_agrees():
    dare = ALTERED["dare"]
    assert abs((dare == 0).mean() - DROPPED) < 0.01
    assert np.allclose(dare[dare != 0], CHANGE[dare != 0] / (1 - DROPPED), rtol=1e-5)
    ties, pair = ALTERED["ties"], np.stack([CHANGE, np.roll(CHANGE, 1, 0)])
    assert KEPT < (ties != 0).mean() < 2 * KEPT
    kept = np.abs(pair) >= np.quantile(np.abs(pair), 1 - KEPT, axis=2, keepdims=True)
    alone = kept.sum(0) == 1
    assert np.allclose(ties[alone], (pair * kept).sum(0)[alone]) and not ties[kept.sum(0) == 0].any()
    assert np.allclose(ALTERED["average_of_two"], pair.mean(0))


def test_quantised_weights_lie_on_a_grid_and_pruned_ones_are_zero():
    for bits in (4, 8):
        weights = BASE + ALTERED[f"quantised_{bits}_bits"]
        for where in LAYOUT.slices.values():
            assert max(len(np.unique(np.round(row, 3))) for row in weights[:, where]) < 2**bits
    weights = BASE + ALTERED["pruned"]
    assert abs((np.abs(weights[:, LAYOUT.slices["first.weight"]]) < 1e-6).mean() - PRUNED) < 0.02
    assert np.allclose(weights[:, LAYOUT.slices["bias"]], (BASE + CHANGE)[:, LAYOUT.slices["bias"]], atol=1e-5)


def test_a_foreign_change_has_the_same_singular_values_and_of_adapters_the_rank_stays():
    for name in ("first.weight", "second.weight"):
        shape = LAYOUT.shapes[name]
        ours, theirs = (c[:, LAYOUT.slices[name]].reshape(-1, *shape) for c in (CHANGE, ALTERED["foreign"]))
        assert np.allclose(*(np.linalg.svd(part, compute_uv=False) for part in (ours, theirs)), atol=1e-5)
        assert not np.allclose(ours, theirs)
    assert set(tampered(CHANGE, BASE, LAYOUT, "adapter")) == {"negated", "average_of_two", "foreign"}


def test_a_truncated_change_is_the_nearest_of_its_rank():
    for name in ("first.weight", "second.weight"):
        shape, where = LAYOUT.shapes[name], LAYOUT.slices[name]
        ours, low = (c[0, where].reshape(shape) for c in (CHANGE, ALTERED["truncated"]))
        values = np.linalg.svd(ours, compute_uv=False)
        assert np.linalg.matrix_rank(low, tol=1e-4) == TRUNCATED
        assert np.isclose(((ours - low) ** 2).sum(), (values[TRUNCATED:] ** 2).sum(), rtol=1e-4)
    assert np.array_equal(ALTERED["truncated"][:, LAYOUT.slices["bias"]], CHANGE[:, LAYOUT.slices["bias"]])
