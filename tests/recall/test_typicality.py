"""Known fine-tunes pass, and what people do to fine-tunes is recognised."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from known_fleets import LAYOUT, PARAMETERS, draw, linear_fleet

from stages.common.stage import InputError
from stages.recall.condense import Span
from stages.recall.typicality import (
    RIDGE,
    SPARSE,
    Traits,
    Typicality,
    check,
    common_direction,
    read_traits,
    tail,
)


def test_the_limit_lets_further_fine_tunes_pass_and_no_stranger():
    drawn = linear_fleet(train=100, test=400)
    train, test = drawn.change[drawn.learned], drawn.change[drawn.held_out]
    span = Span.fit(train, LAYOUT)
    limits = Typicality.fit(train, LAYOUT, span)
    limit, (least, most) = limits.limit, limits.sizes
    sizes = span.size(test)
    assert (sizes < least).mean() < 0.03 and (sizes > most).mean() < 0.03
    assert sizes == pytest.approx(np.sqrt(((test * span.scale) ** 2).sum(1)), rel=1e-5)
    assert most < 3 * least  # no limits that everything passes
    further = span.outside(test)
    assert (further > limit).mean() < 0.02
    assert further.mean() > 0.5 * limit / 2  # no limit that everything passes
    few = linear_fleet(train=20, test=1).change[:20]
    left_out = [Span.fit(np.delete(few, np.s_[k::5], 0), LAYOUT).outside(few[k::5]).max() for k in range(5)]
    assert Typicality.fit(few, LAYOUT, Span.fit(few, LAYOUT)).limit == pytest.approx(max(left_out))
    random = np.random.default_rng(0)
    wide = draw(random, 100, PARAMETERS) * np.linalg.norm(train[0]) / PARAMETERS**0.5
    strangers = span.outside(span.mean + wide / span.scale / np.linalg.norm(wide, axis=1, keepdims=True))
    assert strangers.min() > limit


@pytest.fixture(scope="module")
def known() -> tuple[np.ndarray, np.ndarray, Span, Typicality]:
    """Changes of training and of test fine-tunes, what they span and their limits."""
    drawn = linear_fleet(train=60, test=300, noise=1.0)
    train, test = drawn.change[drawn.learned], drawn.change[drawn.held_out]
    span = Span.fit(train, LAYOUT)
    return train, test, span, Typicality.fit(train, LAYOUT, span)


def traits_of(change: np.ndarray, known: tuple) -> Traits:
    _, _, span, typical = known
    return read_traits(change.astype(np.float32), LAYOUT, span, typical.direction)


def refusals(change: np.ndarray, known: tuple) -> list[str]:
    """What each of the changes is refused for; empty if it passes."""
    messages = []
    for row in change:
        try:
            check("tuned.pt", traits_of(row[None], known), known[3])
            messages.append("")
        except InputError as error:
            messages.append(str(error))
    return messages


def matrices(change: np.ndarray, alter: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Changes whose matrices are altered."""
    altered = change.copy()
    for name in ("first.weight", "second.weight", "patch"):
        where, shape = LAYOUT.slices[name], LAYOUT.shapes[name]
        matrix = change[:, where].reshape(len(change), shape[0], -1)
        altered[:, where] = alter(matrix).reshape(len(change), -1)
    return altered


def of_rank(k: int) -> Callable[[np.ndarray], np.ndarray]:
    def truncate(matrix: np.ndarray) -> np.ndarray:
        u, s, v = np.linalg.svd(matrix, full_matrices=False)
        return (u[..., :k] * s[:, None, :k]) @ v[:, :k]

    return truncate


def test_the_common_direction_is_linear_discriminant_analysis():
    drawn = linear_fleet(train=40)
    change = drawn.change[drawn.learned]
    span = Span.fit(change, LAYOUT)
    x = change.astype(np.float64) * span.scale
    covariance = np.cov(x.T, bias=True)
    ridge = RIDGE * np.trace(covariance) * len(x) / len(x)
    expected = np.linalg.solve(len(x) * covariance + ridge * np.eye(PARAMETERS), x.mean(0))
    found = common_direction(change, span) / span.scale
    assert found == pytest.approx(expected / (expected @ x.mean(0)), rel=1e-4, abs=1e-8)
    assert (change @ common_direction(change, span)).mean() == pytest.approx(1, abs=1e-5)


def test_traits_are_what_they_say(known):
    _, test, span, typical = known
    traits = traits_of(test, known)
    x = (test.astype(np.float64) - span.mean) * span.scale
    total = traits.inside_norm**2 + traits.outside_norm**2
    assert total == pytest.approx((x**2).sum(1), rel=1e-4)
    assert traits.outside_norm**2 / total == pytest.approx(traits.outside, abs=1e-4)
    assert traits.progress.mean() == pytest.approx(1, abs=0.05)
    assert traits_of(-test, known).progress == pytest.approx(-traits.progress)
    assert (traits.unmoved < 0.05).all()
    still = test.copy()
    still[:, LAYOUT.slices["second.weight"]] = 0
    assert traits_of(still, known).unmoved == pytest.approx(60 / PARAMETERS, abs=0.03)
    assert (traits_of(matrices(test, of_rank(2)), known).tail < 1e-6).all()
    u = np.eye(4, 12)[None] * np.array([2.0, 1.0, 1.0, 1.0])[:, None]  # singular values 2, 1, 1, 1
    change = np.zeros((1, PARAMETERS))
    for name in ("first.weight", "second.weight"):
        change[0, LAYOUT.slices[name]] = 1.0  # of rank one
    change[0, LAYOUT.slices["patch"]] = u.ravel()
    assert tail(change, LAYOUT) == pytest.approx((0 + 0 + 2 / 7) / 3, abs=1e-9)
    assert typical.unmoved == SPARSE


def test_further_fine_tunes_pass_without_a_warning(known):
    _, test, _, typical = known
    assert np.mean([bool(message) for message in refusals(test, known)]) <= 0.05
    distance = typical.distance(traits_of(test, known))
    assert (distance > 1).mean() <= 0.05
    assert 0.2 < np.median(distance) < 0.9  # no limit that everything passes


ANY = np.array([-np.inf, np.inf])
OPEN = {"limit": np.array(1.0), "sizes": ANY, "progress": ANY, "log_tail": ANY, "unmoved": np.array(1.0)}


@pytest.mark.parametrize(
    ("alter", "trait", "message"),
    [
        (lambda change: -change, "progress", "is turned round"),
        (lambda change: change - np.roll(change, 1, 0), "progress", "is turned round"),
        (lambda change: change + np.roll(change, 1, 0), "progress", "was scaled or added"),
        (lambda change: 0.01 * change, "sizes", "its change has a size of"),
        (lambda change: 3 * change, "sizes", "its change has a size of"),
        (lambda change: matrices(change, of_rank(1)), "log_tail", "is of low rank"),
        (lambda change: matrices(change, of_rank(2)), "log_tail", "is of low rank"),
        (
            lambda change: np.where(np.arange(PARAMETERS) % 5 == 0, 0, change),
            "unmoved",
            "of its weights are the base's",
        ),
    ],
)
def test_what_people_do_to_fine_tunes_is_recognised(known, alter, trait, message):
    train, test, span, typical = known
    altered = alter(test)
    one = train, test, span, replace(typical, **{name: limit for name, limit in OPEN.items() if name != trait})
    found = refusals(altered, one)
    assert np.mean([message in text for text in found if text]) == 1
    assert np.mean([bool(text) for text in found]) > 0.95
    assert np.mean([bool(text) for text in refusals(altered, known)]) > 0.95
    assert not any(refusals(test[:50], (train, test, span, replace(typical, **OPEN))))
    assert all(text.startswith("tuned.pt") and "\n" not in text for text in found if text)


def test_noise_in_a_change_is_recognised_by_its_spectrum():
    """Smooth changes, whose matrices have small singular values, and such with noise that the span does not betray."""
    drawn = linear_fleet(train=150, test=100, noise=1.0)

    def smooth(matrix: np.ndarray) -> np.ndarray:
        u, s, v = np.linalg.svd(matrix, full_matrices=False)
        return (u * (s * 0.3 ** np.arange(s.shape[1]))[:, None]) @ v

    change = matrices(drawn.change, smooth)
    train, test = change[drawn.learned], change[drawn.held_out]
    span = Span.fit(train, LAYOUT)
    known = train, test, span, Typicality.fit(train, LAYOUT, span)
    assert np.mean([bool(message) for message in refusals(test, known)]) <= 0.05
    noise = np.random.default_rng(0).standard_normal(test.shape)
    noisy = test + 0.3 * noise * np.linalg.norm(test, axis=1, keepdims=True) / np.linalg.norm(
        noise, axis=1, keepdims=True
    )
    assert np.mean(["is noisy" in message or "lies outside" in message for message in refusals(noisy, known)]) > 0.95
    assert (known[3].distance(traits_of(noisy, known)) > 1).mean() > 0.95
    slightly = test + 0.1 * (noisy - test)
    assert np.mean([bool(message) for message in refusals(slightly, known)]) <= 0.05


def test_limits_are_of_fine_tunes_left_out_and_a_margin(known):
    train, _, _, typical = known
    values, tails = [], []
    for k in range(5):
        others = np.delete(train, np.s_[k::5], 0)
        span = Span.fit(others, LAYOUT)
        direction = common_direction(others, span)
        traits = read_traits(train[k::5], LAYOUT, span, direction)
        values, tails = [*values, *traits.progress], [*tails, *np.log(traits.tail + 1e-8)]
    for limits, seen in ((typical.progress, values), (typical.log_tail, tails)):
        margin = 0.25 * (max(seen) - min(seen))
        assert limits == pytest.approx([min(seen) - margin, max(seen) + margin])
