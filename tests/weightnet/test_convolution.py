"""Stacked convolutions are torch's."""

import pytest
import torch

from stages.weightnet.tracing.convolution import convolve


@pytest.fixture
def empties_are_nan():
    """Memory that is not initialised holds NaNs."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("side", "taps", "stride", "padding"),
    [
        (8, (3, 3), (2, 2), (1, 1)),
        (4, (3, 3), (2, 2), (1, 1)),
        (2, (3, 3), (2, 2), (1, 1)),
        (9, (5, 5), (1, 1), (2, 2)),
        (6, (1, 1), (1, 1), (0, 0)),
        (9, (2, 2), (3, 3), (1, 1)),
        (12, (5, 5), (2, 2), (0, 0)),
        (9, (3, 1), (1, 2), (1, 0)),
        (9, (2, 3), (2, 1), (0, 1)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.usefixtures("empties_are_nan")
def test_convolutions_and_their_gradients_are_torch_s(side, taps, stride, padding, channels, shared):
    n, c, d = 2, channels, 4
    x = torch.randn(1 if shared else n, 5, side, side, c, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(n, d, c, *taps, dtype=torch.float64, requires_grad=True)
    y = convolve(x, weight, stride, padding)
    expected = torch.stack(
        [
            torch.conv2d(x[min(i, len(x) - 1)].permute(0, 3, 1, 2), weight[i], stride=stride, padding=padding)
            for i in range(n)
        ]
    ).permute(0, 1, 3, 4, 2)
    torch.testing.assert_close(y, expected)
    direction = torch.randn_like(y)
    got, reference = (torch.autograd.grad((v * direction).sum(), (x, weight)) for v in (y, expected))
    for a, b in zip(got, reference, strict=True):
        torch.testing.assert_close(a, b)
