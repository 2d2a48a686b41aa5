"""What principal components of training runs hold."""

import pytest
import torch

from stages.common.vectors import Layout, principal_components
from stages.forecast.compress_trajectory import energy_fractions, explained_variance_ratios
from stages.forecast.trajectory import Trajectory


def test_energy_fractions_are_those_of_projections():
    basis = torch.linalg.qr(torch.randn(30, 5)).Q.T
    inside, outside = torch.randn(1, 5) @ basis, torch.randn(1, 30)
    outside -= outside @ basis.T @ basis
    fractions = energy_fractions(torch.cat([inside, outside, inside + outside]), basis, [5, 99])
    expected = (inside.square().sum() / (inside + outside).square().sum()).item()
    torch.testing.assert_close(fractions[:, 0], torch.tensor([1.0, 0.0, expected]), rtol=1e-4, atol=1e-5)
    assert torch.equal(fractions[:, 0], fractions[:, 1])


def test_all_components_explain_all_variance_between_and_within_runs():
    runs = [Trajectory(Layout({"w": (6, 5)}), torch.randn(8, 30) + 3 * torch.randn(1, 30), None) for _ in range(3)]
    mean, basis, _ = principal_components(torch.cat([r.weights for r in runs]), 500)
    ratios = explained_variance_ratios(runs, mean, basis, [1, 500])
    assert ratios["between"][1] == pytest.approx(1, abs=1e-4)
    assert ratios["within"][1] == pytest.approx(1, abs=1e-4)
    assert ratios["within"][0] < ratios["between"][0] < 1  # the first component lies between runs
