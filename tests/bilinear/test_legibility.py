"""Measures of what is legible and few agree with images and spectra of which it is known."""

import pytest
import torch

from stages.bilinear.legibility import effective_rank, smoothness


def test_the_effective_rank_counts_equal_eigenvalues_of_any_sign_and_scale():
    for r in (1, 3, 10):
        values = torch.zeros(2, 10)
        values[0, :r], values[1, -r:] = 2.0, -0.5
        assert effective_rank(values) == pytest.approx(torch.full((2,), float(r)))
    between = effective_rank(torch.tensor([[1.0, 0.5, 0.1]])).item()
    assert 1 < between < 3


def test_smoothness_is_0_of_noise_1_of_one_value_and_negative_of_a_chequerboard():
    noise = smoothness(torch.randn(500, 28, 28))
    assert noise.mean().abs() < 4 * noise.std() / 500**0.5
    assert smoothness(torch.full((3, 5), 0.7)).item() == pytest.approx(1)
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    assert smoothness(board).item() == pytest.approx(-1)
    image = torch.rand(6, 9)
    assert smoothness(-3 * image).item() == pytest.approx(smoothness(image).item())


def test_a_blurred_image_is_smoother():
    noise = torch.randn(100, 1, 16, 16)
    blurred = torch.nn.functional.avg_pool2d(noise, 3, 1)
    assert smoothness(blurred).mean() > smoothness(noise).mean() + 0.3
