"""Is it worth training on? A measured curve, such as test loss at each snapshot, carried on into the future.

Several ways of carrying it on are tried at every past point by what was known there; the one with the least error so far is taken,
and keeping the last value stands beside it.

Axes: t points.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from stages.common.files import load_csv, require
from stages.common.stage import InputError

FEWEST = 5  # points from which a curve is carried on
POWERS = (0.25, 0.5, 1.0, 2.0)  # of a power law
COVERAGE = 0.9  # of past errors

Curve = Float64[ndarray, " t"]


def keep(curve: Curve, h: int) -> float:  # noqa: ARG001 (as the others)
    """The last value."""
    return float(curve[-1])


def latest_mean(curve: Curve, h: int) -> float:  # noqa: ARG001 (as the others)
    """The mean of the last three."""
    return float(curve[-3:].mean())


def straight_line(curve: Curve, h: int) -> float:
    """The straight line through the last five, by least squares."""
    slope, level = np.polyfit(np.arange(-4.0, 1.0), curve[-5:], 1)
    return float(level + slope * h)


def power_law(curve: Curve, h: int) -> float:
    """The best a + b t^-c by least squares: how losses of long training fall."""
    t = np.arange(1.0, len(curve) + 1)
    fits = []
    for c in POWERS:
        design = np.stack([np.ones_like(t), t**-c], 1)
        solution = np.linalg.lstsq(design, curve, rcond=None)[0]
        fits.append((float(np.square(design @ solution - curve).sum()), c, solution))
    _, c, (a, b) = min(fits, key=lambda fit: fit[0])
    return float(a + b * (len(curve) + h) ** -c)


WAYS: dict[str, Callable[[Curve, int], float]] = {
    "keep": keep,
    "mean of 3": latest_mean,
    "line": straight_line,
    "power law": power_law,
}


class Expected(TypedDict):
    """A value that a curve is expected to have: in what way, and how wrong that was so far.

    low, high: between them lie the values that COVERAGE of past errors allow.
    """

    h: int  # snapshots ahead
    expected: float
    low: float
    high: float
    way: str
    error: float
    error_keep: float  # of keeping the last value
    origins: int


def carry_on(curve: Curve, horizons: Sequence[int]) -> list[Expected]:
    """Return a row for each horizon that the past can be asked about."""
    rows: list[Expected] = []
    for h in horizons:
        origins = range(FEWEST, len(curve) - h + 1)
        if len(origins) < 2:
            continue
        wrong = {name: np.array([way(curve[:n], h) - curve[n + h - 1] for n in origins]) for name, way in WAYS.items()}
        best = min(WAYS, key=lambda name: float(np.abs(wrong[name]).mean()))
        expected, margin = WAYS[best](curve, h), float(np.quantile(np.abs(wrong[best]), COVERAGE))
        rows.append(
            {
                "h": h,
                "expected": expected,
                "low": expected - margin,
                "high": expected + margin,
                "way": best,
                "error": float(np.abs(wrong[best]).mean()),
                "error_keep": float(np.abs(wrong["keep"]).mean()),
                "origins": len(origins),
            }
        )
    return rows


def worth(rows: list[Expected], curve: Curve) -> str:
    """Return in words whether the value is expected to leave the mean of the last three by more than past errors."""
    now = latest_mean(curve, 0)
    if not rows:
        return "is it worth training on? the curve is too short to tell"
    changes = [row for row in rows if not row["low"] <= now <= row["high"]]
    if not changes:
        return "is it worth training on? no change is expected that is larger than past errors"
    row = changes[0]
    way = "fall" if row["expected"] < now else "rise"
    return f"is it worth training on? it is expected to {way} from {now:.4g} to {row['expected']:.4g}, {row['h']} snapshots ahead"


def read_curve(path: Path, column: str | None, snapshots: int) -> Curve:
    """Return a column of numbers, by default the last one that has only these; InputError if there is none, or one of another length."""
    rows = load_csv(require(path))
    columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else {})}
    if column is not None and column not in columns:
        raise InputError(f"{path}: expected a column {column}, got {', '.join(columns) or 'nothing'}")
    numbers = {name: curve for name, texts in columns.items() if (curve := _numbers(texts)) is not None}
    if (column not in numbers) if column else not numbers:
        raise InputError(
            f"{path}: expected finite numbers in {column or 'a column'}: name one that has them by --column"
        )
    curve = numbers[column] if column else list(numbers.values())[-1]
    if len(curve) != snapshots:
        raise InputError(f"{path}: expected a row for each of {snapshots} snapshots, got {len(curve)}")
    return curve


def _numbers(texts: list[str]) -> Curve | None:
    try:
        curve = np.array([float(text) for text in texts])
    except (TypeError, ValueError):
        return None
    return curve if all(map(math.isfinite, curve)) else None
