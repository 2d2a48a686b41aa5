"""Muon: what it takes for orthogonal, and that it is torch's, but for the precision."""

import pytest
import torch
from torch import nn

from stages.vit_memory.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(64, 64), (192, 64), (64, 256)])
def test_singular_values_end_near_one_and_the_singular_vectors_stay(shape):
    x = torch.randn(shape)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    y = orthogonalised(x)
    large = s > 0.05 * s[0]
    values = (u.mT @ y @ v.mT)[large][:, large]
    assert values.diag().min() > 0.6
    assert values.diag().max() < 1.3
    torch.testing.assert_close(values - values.diag().diag(), torch.zeros_like(values), atol=1e-3, rtol=0)
    torch.testing.assert_close(orthogonalised(100 * x), y, atol=1e-4, rtol=1e-4)


def test_steps_are_those_of_torch_up_to_its_bfloat16():
    start = torch.randn(32, 16)
    mine, its = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = Muon([mine], 0.02, 0.1), torch.optim.Muon([its], 0.02, weight_decay=0.1)
    for _ in range(5):
        gradient = torch.randn(32, 16)
        mine.grad, its.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (its - start).norm()
    assert (mine - its).norm() < 0.02 * moved


def test_what_is_no_matrix_is_an_error():
    with pytest.raises(ValueError, match=r"expected matrices, got shapes \[\[3\]\]"):
        Muon([nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3))], 0.1)
