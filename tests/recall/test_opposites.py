"""A change that was turned round is told from an honest one by what happens within the classes that it raises, and lowers."""

import numpy as np
import pytest
import torch
from known_fleets import draw
from torch.nn.functional import cross_entropy

from stages.recall.opposites import FARTHEST, Turned, loss_within, measure, raised, with_products

RANDOM = np.random.default_rng(0)
CLASSES, EACH = 6, 4
LABELS = np.repeat(np.arange(CLASSES), EACH)
BEFORE = (3 * np.eye(CLASSES)[LABELS] + draw(RANDOM, len(LABELS), CLASSES)).astype(np.float64)


def trained(count: int, sign: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of networks that raise three classes and sharpen what lies within them; those of their opposites; which classes."""
    group = np.stack([np.isin(np.arange(CLASSES), RANDOM.permutation(CLASSES)[:3]) for _ in range(count)])
    sharper = group[:, LABELS, None] * (np.eye(CLASSES)[LABELS] - 1 / 3) * group[:, None]
    step = 4 * group[:, None] + 1.5 * sharper + 0.3 * draw(RANDOM, count, len(LABELS), CLASSES)
    return BEFORE + sign * step, BEFORE - sign * step, group


def test_the_classes_are_cut_where_least_variance_is_left():
    assert raised(np.array([[0.0, 5, 1, 6], [9, 0, 0.1, 0.2]])).tolist() == [[0, 1, 0, 1], [1, 0, 0, 0]]
    after, _, group = trained(20)
    assert (raised((after - BEFORE).mean(1)) == group).all()


def test_the_loss_within_a_group_is_that_of_a_softmax_over_it_and_what_lifts_a_whole_group_does_not_count():
    after, _, group = trained(5)
    lifted = after + 7 * group[:, None] - 3 * ~group[:, None]
    for part in (group, ~group):
        found = loss_within(after, LABELS, part)
        for logits, own, loss in zip(after, part, found, strict=True):
            on = own[LABELS]
            places = np.cumsum(own)[LABELS[on]] - 1
            expected = cross_entropy(torch.from_numpy(logits[on][:, own]), torch.from_numpy(places))
            assert loss == pytest.approx(float(expected))
        assert np.allclose(loss_within(lifted, LABELS, part), found)


def test_measurements_know_a_network_from_its_opposite_and_do_not_know_the_order_of_classes():
    after, opposite, _ = trained(30)
    order = RANDOM.permutation(CLASSES)
    of = np.argsort(order)[LABELS]
    there = measure(BEFORE, (after, opposite), LABELS)
    assert np.isfinite(there).all()
    assert np.allclose(measure(BEFORE[:, order], (after[..., order], opposite[..., order]), of), there)
    assert not np.allclose(measure(BEFORE, (opposite, after), LABELS), there, atol=0.1)


def test_products_are_of_each_two_values_and_nothing_is_far():
    found = with_products(np.array([[2.0, -3, 100]]))[0]
    assert found.tolist() == [2, -3, FARTHEST, 4, -6, 2 * FARTHEST, 9, -3 * FARTHEST, FARTHEST**2]


def test_where_the_floor_lies_is_the_limit():
    blank = np.zeros(1)
    known = Turned(blank, blank, blank, blank, blank, np.array(0.0), np.array(-0.5))
    assert known.oddness(np.array([1.0, 0.25, -0.5, -2.0])) == pytest.approx([0, 0.5, 1, 2])
