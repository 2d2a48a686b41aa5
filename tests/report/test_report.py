"""What a table says is best, and how numbers are written."""

import pytest

from stages.common.report import Cell, Table, decimal, percent, points, row, short


def column(*numbers: float, direction: str, baseline: int | None = None) -> list[int]:
    """The places of the best of some numbers."""
    rows = [row(f"{i}", decimal(x), baseline=i == baseline) for i, x in enumerate(numbers)]
    return sorted(place for place, _ in Table("", ["name", "value"], rows, ["", direction]).best())


def test_the_best_is_the_largest_or_the_smallest_and_never_a_baseline():
    assert column(0.1, 0.9, 0.5, direction="high") == [1]
    assert column(0.1, 0.9, 0.5, direction="low") == [0]
    assert column(0.1, 0.9, 0.5, direction="high", baseline=1) == [2]
    assert column(0.1, 0.9, direction="") == []


def test_what_is_written_alike_is_alike_good():
    assert column(0.7312, 0.7288, 0.5, direction="high") == [0, 1]


def test_empty_cells_and_words_are_not_compared():
    rows = [row("a", ""), row("b", "the baseline"), row("c", Cell("1.2", 1.2))]
    assert Table("", ["name", "value"], rows, ["", "low"]).best() == {(2, 1)}


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.614, "0.61"), (12.34, "12.3"), (853.1, "850"), (15_432.0, "15,000"), (-0.07, "-0.07"), (1.0, "1.00")],
)
def test_numbers_are_written_without_powers_of_ten(number, text):
    assert short(number) == text


def test_a_spread_is_shown_where_there_is_one():
    assert percent({"mean": 0.975, "std": 0.0028, "n": 3}).text == "97.5 ± 0.3 %"
    assert percent({"mean": 0.975, "n": 1}).text == "97.5 %"
    assert decimal({"mean": 0.61, "low": 0.42, "high": 0.8}).text == "0.61 [0.42, 0.80]"
    assert decimal({"mean": 1.0, "low": 1.0, "high": 1.0}).text == "1.00"
    assert points({"mean": 0.0124, "low": 0.006, "high": -0.019 + 0.038}).text == "+1.2 [+0.6, +1.9]"
