"""Honest fine-tunes pass, and what people do to fine-tunes is recognised."""

import numpy as np
import pytest
from known_fleets import CENTER, LAYOUT, PARAMETERS, READ_OUT, RESPONSES, draw, linear_fleet

from stages.common.stage import InputError
from stages.recall.honesty import (
    LEAST,
    MOST,
    REST,
    SPARSE,
    SUSPICIONS,
    TRAITS,
    Honesty,
    Judgement,
    alter,
    check,
    check_marks,
    floors_of,
    folds_of,
    nan_mean,
    squared_distance,
    traits,
)
from stages.recall.reading import READS, Reader, References
from stages.recall.tampering import alterations, tampered

BASE = draw(np.random.default_rng(9), PARAMETERS)
REFERENCES = References(np.array([0, 1, 2, 0, 1]), np.zeros(RESPONSES), 3)
MIX = draw(np.random.default_rng(2), PARAMETERS, RESPONSES) / 10


def respond(change: np.ndarray) -> np.ndarray:
    """Responses that follow from a change."""
    return np.tanh(change @ MIX + READ_OUT[0]).astype(np.float32)


def networks(change: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return change.astype(np.float32), respond(change)


@pytest.fixture(scope="module")
def known() -> tuple[np.ndarray, Reader, Honesty, np.ndarray]:
    """Changes of test fine-tunes, and what was fitted on others."""
    drawn = linear_fleet(train=300, test=300)
    train, test = drawn.change[drawn.learned], drawn.change[drawn.held_out]
    reader = Reader.fit(*networks(train), LAYOUT, REFERENCES, 2)
    fold = folds_of(len(train))
    altered = alter(train.astype(np.float32), fold, alterations("whole", LAYOUT).values(), respond)
    honesty, distances = Honesty.fit(networks(train), altered, fold, reader, 2, ["all"] * len(altered))
    return test, reader, honesty, distances


def test_honest_ones_pass_as_often_as_promised_and_their_distances_are_those_of_fine_tunes_left_out(known):
    test, reader, honesty, distances = known
    found = honesty.judge(networks(test), reader).distance
    assert (found > 1).mean() < 0.05
    assert np.median(found) == pytest.approx(np.median(distances), rel=0.1)
    assert (distances > 1).mean() <= (1 - REST) + 4 * MOST + 0.01


@pytest.mark.parametrize(
    ("name", "share"), [("negated", 0.9), ("ties", 0.9), ("dare", 0.9), ("foreign", 0.9), ("average_of_two", 0.2)]
)
def test_what_was_done_to_a_change_is_recognised(known, name, share):
    test, reader, honesty, _ = known
    altered = tampered(test, BASE, LAYOUT, "whole")[name].astype(np.float32)
    assert (honesty.judge(networks(altered), reader).distance > 1).mean() > share, name


def test_a_suspicion_refuses_no_more_honest_ones_than_it_needs():
    honest = np.linspace(0, 2, 20_001)[:, None].repeat(3, 1)
    altered = np.stack([honest[:, 0] - 5, honest[:, 0] - 1, honest[:, 0] - 1.985], 1)  # apart, mixed, and touching
    refused = (honest < floors_of(honest, altered)).mean(0)
    assert refused == pytest.approx([LEAST, MOST, LEAST], abs=2e-4)
    refused = (honest < floors_of(honest, altered, (MOST, 0.002, MOST))).mean(0)
    assert refused == pytest.approx([LEAST, 0.002, LEAST], abs=2e-4)
    assert floors_of(honest, honest - 1.974)[0] == pytest.approx(2 * 0.99 - 1.974)  # between: what catches 99 %


def test_what_a_suspicion_is_not_told_by_does_not_move_it():
    train = linear_fleet(train=120, test=10).change[:120].astype(np.float32)
    reader, fold = Reader.fit(*networks(train), LAYOUT, REFERENCES, 2), folds_of(len(train))
    altered = alter(train, fold, [np.negative] * 2, respond)
    honesty, _ = Honesty.fit(networks(train), altered, fold, reader, 2, ["direction_and_answers", "all"])
    sizes = {name: len(mean) for name, mean in reader.means.items()}
    starts = dict(zip(READS["all"], np.cumsum([0, *(sizes[name] for name in READS["all"])]), strict=False))
    for name in READS["all"]:
        weights = honesty.suspicions[:, starts[name] : starts[name] + sizes[name]]
        assert weights[0].any() == (name in READS["direction_and_answers"]), name
    assert honesty.suspicions[1, starts["token_change"] :].any()


def test_a_change_a_hundred_times_as_large_or_small_is_refused_in_words(known):
    test, reader, honesty, _ = known
    for factor, words in ((100.0, "more|larger"), (0.01, "hardly|less")):
        judged = honesty.judge(networks(factor * test[:1]), reader)
        with pytest.raises(InputError, match=r"tuned\.pt: its change .*(" + words + ")"):
            check("tuned.pt", judged, list(SUSPICIONS))


def judgement(suspected: list[float], far: float) -> Judgement:
    standard = np.zeros((1, len(TRAITS)))
    standard[0, 2] = far
    return Judgement(np.array([suspected]), standard, np.array([far]))


def test_the_oddest_respect_counts():
    assert check("x", judgement([0.2, 0.6], 0.4), ["negated", "foreign"]) == 0.6
    with pytest.raises(InputError, match="x: its change is of another base"):
        check("x", judgement([0.2, 1.6], 0.4), ["negated", "foreign"])
    with pytest.raises(InputError, match=r"is noisy .*: its noise is \+2\.0 standard deviations"):
        check("x", judgement([0.2, 1.6], 2.0), ["negated", "foreign"])


def test_traits_are_what_they_say():
    change = CENTER[None].copy()
    reader = Reader.fit(*networks(linear_fleet().change), LAYOUT, REFERENCES, 2)
    names = list(TRAITS)
    once, tenfold = (traits(factor * change, respond(change), reader)[0] for factor in (1, 10))
    assert tenfold[names.index("size")] - once[names.index("size")] == pytest.approx(np.log(10))
    for name in ("descent", "noise", "evenness"):
        assert tenfold[names.index(name)] == pytest.approx(once[names.index(name)], abs=1e-5), name
    only_biases = change.copy()
    for name in ("first.weight", "second.weight", "patch"):
        only_biases[:, LAYOUT.slices[name]] = 0
    found = traits(only_biases, respond(only_biases), reader)[0]
    assert np.isnan(found[[names.index("descent"), names.index("noise")]]).all() and np.isfinite(found[0])


def test_means_leave_out_what_is_no_number_and_distances_are_mahalanobis():
    a, b = np.array([1.0, np.nan, np.nan]), np.array([3.0, 5.0, np.nan])
    assert nan_mean([a, b])[:2].tolist() == [2, 5] and np.isnan(nan_mean([a, b])[2])
    points, covariance = draw(np.random.default_rng(0), 20, 3), np.diag([1.0, 4.0, 9.0])
    expected = (points**2 / np.diag(covariance)).sum(1)
    assert np.allclose(squared_distance(points, np.linalg.inv(covariance)), expected, rtol=1e-5)


def test_single_weights_bear_marks_and_half_precision_is_none():
    random = np.random.default_rng(0)
    change = 0.05 * draw(random, PARAMETERS)
    check_marks("x", BASE + change, change, LAYOUT)
    half = (BASE + change).astype(np.float16).astype(np.float32)
    check_marks("x", half, half - BASE, LAYOUT)
    pruned = (BASE + change) * (np.abs(BASE + change) > 0.3)
    with pytest.raises(InputError, match=r"x: \d+% of \w+(\.\w+)? are zeros \(pruned\)"):
        check_marks("x", pruned, pruned - BASE, LAYOUT)
    sparse = change * (random.random(PARAMETERS) > 2 * SPARSE)
    with pytest.raises(InputError, match=r"in tensors that moved are the base's \(a sparse change"):
        check_marks("x", BASE + sparse, sparse, LAYOUT)
    frozen = change.copy()
    frozen[LAYOUT.slices["first.weight"]] = 0
    check_marks("x", BASE + frozen, frozen, LAYOUT)
