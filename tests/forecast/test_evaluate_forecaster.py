"""Errors of forecasts over those of doing nothing."""

import pandas as pd
import pytest

from stages.forecast.evaluate_forecaster import error_ratios


def test_ratios_are_of_sums_over_origins_and_intervals_over_runs():
    rows = [
        {"forecaster": f, "run": run, "regime": "adam", "phase": "late", "t": t, "h": 1, "error": error}
        for f, run, t, error in [
            ("persistence", "a", 1, 1.0),
            ("persistence", "a", 2, 3.0),
            ("persistence", "b", 1, 2.0),
            ("mine", "a", 1, 2.0),
            ("mine", "a", 2, 0.0),
            ("mine", "b", 1, 2.0),
        ]
    ]
    table = error_ratios(pd.DataFrame(rows), ["forecaster", "regime", "phase", "h"])
    assert table.loc[("persistence", "adam", "late", 1), ["mean", "low", "high"]].tolist() == [1, 1, 1]
    mine = table.loc[("mine", "adam", "late", 1)]
    assert (mine["mean"], mine["n"]) == (0.75, 2)
    assert mine["high"] - mine["mean"] == pytest.approx(12.706 * 0.3536 / 2**0.5, rel=1e-3)  # of Student's t, 1 degree
