"""A measured curve carried on: by what is known, in the way that was best so far, never worse than keeping it by its own account."""

import numpy as np
import pytest

from stages.common.stage import InputError
from stages.forecast.curves import WAYS, carry_on, read_curve, worth

T = np.arange(1.0, 41)
NOISE = np.random.default_rng(0).standard_normal(40)


@pytest.mark.parametrize(
    ("curve", "way", "ahead"),
    [
        (0.3 + 2 * T**-0.5, "power law", 0.3 + 2 * 50.0**-0.5),
        (1.0 - 0.01 * T, "line", 0.5),
        (np.full(40, 0.7), "keep", 0.7),
    ],
)
def test_curves_of_each_kind_are_carried_on_exactly(curve, way, ahead):
    (row,) = carry_on(curve, [10])
    assert row["expected"] == pytest.approx(ahead, abs=1e-6)
    assert row["way"] == way
    assert row["error"] == pytest.approx(0, abs=1e-6) and row["error_keep"] >= row["error"]


def test_noise_is_no_reason_to_train_on_and_a_fall_is():
    flat = 0.5 + 0.01 * NOISE
    rows = carry_on(flat, [1, 5, 10])
    assert all(row["way"] in ("mean of 3", "power law") for row in rows)
    assert "no change is expected" in worth(rows, flat)
    falling = 1.0 - 0.01 * T + 0.001 * NOISE
    assert "expected to fall from 0.6" in worth(carry_on(falling, [5, 10]), falling)
    assert "too short" in worth(carry_on(flat[:6], [5]), flat[:6])


def test_what_is_taken_is_never_worse_than_to_keep_the_value_so_far():
    for seed in range(5):
        curve = np.random.default_rng(seed).standard_normal(30).cumsum()
        assert all(row["error"] <= row["error_keep"] for row in carry_on(curve, [1, 5]))


def test_errors_are_those_of_points_that_were_carried_on_by_what_came_before_them():
    curve = np.random.default_rng(1).standard_normal(30).cumsum()
    (row,) = carry_on(curve, [5])
    wrong = [abs(WAYS[row["way"]](curve[:n], 5) - curve[n + 4]) for n in range(5, 26)]
    assert row["origins"] == len(wrong)
    assert row["error"] == pytest.approx(np.mean(wrong))


def test_columns_of_a_file(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("name,step,loss\na,1,0.5\nb,2,0.25\n")
    assert read_curve(path, None, 2).tolist() == [0.5, 0.25]
    assert read_curve(path, "step", 2).tolist() == [1, 2]
    for match, column, n in (
        ("got name, step, loss", "acc", 2),
        ("in name", "name", 2),
        ("each of 3 snapshots, got 2", None, 3),
    ):
        with pytest.raises(InputError, match=match):
            read_curve(path, column, n)
    path.write_text("a\nx\n")
    with pytest.raises(InputError, match="in a column"):
        read_curve(path, None, 1)
    with pytest.raises(InputError, match="is missing"):
        read_curve(tmp_path / "none.csv", None, 1)
