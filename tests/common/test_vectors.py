"""A network is its vector: cut and joined without loss; and the components of vectors are those of their covariance."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parameters_to_vector

from stages.common.files import load_metadata, save_arrays
from stages.common.vectors import Layout, gram_spectrum, principal_components

SHAPES = {"kernel": (4, 3, 2, 2), "bias": (4,), "scale": (), "matrix": (5, 4), "cls": (1, 1, 7)}


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5))


def vectors(n: int, p: int = 60, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, p, generator=torch.Generator().manual_seed(seed))


# Layouts


@pytest.mark.parametrize("stacked", [(), (6,), (2, 3)])
def test_a_vector_becomes_tensors_and_the_same_vector_again(stacked):
    layout = Layout(SHAPES)
    x = torch.randn(*stacked, layout.size)
    tensors = layout.unflatten(x)
    assert {name: tuple(x.shape) for name, x in tensors.items()} == {k: stacked + shape for k, shape in SHAPES.items()}
    assert torch.equal(layout.flatten(tensors), x)


def test_tensors_become_a_vector_and_the_same_tensors_again_in_the_order_of_torch():
    model = network()
    state = model.state_dict()
    layout = Layout.of(state)
    x = layout.flatten(state)
    assert torch.equal(x, parameters_to_vector(model.parameters()))
    again = layout.unflatten(x)
    assert list(again) == list(state)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert torch.equal(layout.flatten(dict(reversed(state.items()))), x)  # a layout has an order of its own


def test_a_stack_of_vectors_is_each_of_them():
    layout = Layout(SHAPES)
    x = torch.randn(3, layout.size)
    for i in range(3):
        for name, tensor in layout.unflatten(x[i]).items():
            assert torch.equal(layout.unflatten(x)[name][i], tensor)


def test_tensors_are_views_of_their_vector():
    layout = Layout(SHAPES)
    x = torch.zeros(2, layout.size)
    layout.unflatten(x)["matrix"].fill_(1)
    assert x.sum() == 2 * 20
    assert x[:, layout.slices["matrix"]].all()


def test_slices_tile_the_vector_and_every_weight_is_of_the_layer_that_holds_it():
    layout = Layout(SHAPES)
    places = [range(layout.size)[where] for where in layout.slices.values()]
    assert [place for part in places for place in part] == list(range(layout.size))
    assert [len(part) for part in places] == layout.sizes
    assert sum(layout.sizes) == layout.size == len(layout.layer_of)
    for i, where in enumerate(layout.slices.values()):
        assert (layout.layer_of[where] == i).all()


def test_a_layout_comes_back_from_a_file_in_its_order(tmp_path):
    layout = Layout(dict(reversed(SHAPES.items())))
    save_arrays(tmp_path / "a.safetensors", {"x": np.zeros(1)}, layout.metadata | {"more": 1})
    again = Layout.from_metadata(load_metadata(tmp_path / "a.safetensors"))
    assert again == layout
    assert list(again.shapes) == list(layout.shapes) != sorted(layout.shapes)
    assert json.loads(json.dumps(layout.metadata)) == layout.metadata


@pytest.mark.parametrize(
    "wrong", [{"matrix": torch.zeros(4, 5)}, {"more": torch.zeros(1)}, {"bias": torch.zeros(3, 4)}]
)
def test_tensors_of_another_network_are_refused(wrong):
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    with pytest.raises(ValueError, match="expected tensors"):
        Layout(SHAPES).flatten(tensors | wrong)
    with pytest.raises(ValueError, match="expected tensors"):
        Layout(SHAPES).flatten({name: tensor for name, tensor in tensors.items() if name != "kernel"})


def test_gradients_of_a_vector_are_those_of_its_tensors_alone_and_under_vmap():
    model, x = network(), torch.randn(2, 3, 6, 6)
    layout = Layout.of(model.state_dict())
    vector = layout.flatten(model.state_dict())

    def loss(weights: torch.Tensor) -> torch.Tensor:
        return functional_call(model, layout.unflatten(weights), (x,)).square().mean()

    expected = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    torch.testing.assert_close(grad(loss)(vector), torch.cat([gradient.flatten() for gradient in expected]))
    stacked = torch.stack([vector, 2 * vector])
    torch.testing.assert_close(vmap(grad(loss))(stacked), torch.stack([grad(loss)(w) for w in stacked]))


# Principal components


def test_principal_components_are_those_of_the_singular_value_decomposition():
    x = vectors(12) * torch.linspace(0.2, 3, 60)
    mean, basis, variances = principal_components(x, 500)
    _, singular, right = torch.linalg.svd((x - x.mean(0)).double(), full_matrices=False)
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(variances, (singular[:11] ** 2 / 12).float(), rtol=1e-5, atol=0)
    torch.testing.assert_close((basis.double() * right[:11]).sum(1).abs(), torch.ones(11).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(basis @ basis.T, torch.eye(11), rtol=0, atol=1e-6)
    assert (variances.diff() <= 0).all()


@pytest.mark.parametrize("k", [1, 4, 10])
def test_no_other_k_directions_hold_more_than_the_first_k_components(k):
    x = vectors(12)
    mean, basis, variances = principal_components(x, k)
    held = ((x - mean) @ basis.T).square().sum() / 12
    torch.testing.assert_close(held, variances[:k].sum(), rtol=1e-4, atol=0)
    rows = torch.linalg.qr((x - mean)[:k].T).Q  # also of the span of the snapshots
    assert ((x - mean) @ rows).square().sum() / 12 < held


def test_components_turn_with_the_space_and_do_not_see_where_the_mean_is():
    x, turn = vectors(12).double(), torch.linalg.qr(vectors(60, seed=2).double()).Q
    _, basis, variances = principal_components(x, 5)
    _, turned, same = principal_components(x @ turn + 7, 5)
    torch.testing.assert_close(same, variances, rtol=1e-5, atol=0)
    cosines = (turned.double() * (basis.double() @ turn)).sum(1)
    torch.testing.assert_close(cosines.abs(), torch.ones(5).double(), rtol=0, atol=1e-5)


def test_repeated_snapshots_add_no_axis():
    snapshots = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    _, basis, _ = principal_components(torch.cat([snapshots, snapshots[:3]]), 500)
    assert len(basis) == 5
    torch.testing.assert_close(basis @ basis.T, torch.eye(5), atol=1e-5, rtol=0)


def test_principal_components_at_full_rank_reconstruct_exactly():
    snapshots = torch.randn(12, 50)
    mean, basis, variances = principal_components(snapshots, 500)
    assert basis.shape == (11, 50)
    torch.testing.assert_close(mean + (snapshots - mean) @ basis.T @ basis, snapshots, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(variances.sum(), (snapshots - mean).square().sum() / 12, rtol=1e-4, atol=1e-5)


def test_what_is_less_than_the_tolerance_is_no_axis():
    """Singular values 4, 2, 1 and 0.01: their squares, over the largest, are 1, 1/4, 1/16 and 6e-6."""
    left, right = torch.linalg.qr(vectors(20, 4).double()).Q, torch.linalg.qr(vectors(4).double().T).Q
    x = left @ torch.diag(torch.tensor([4, 2, 1, 0.01]).double()) @ right.T
    for tolerance, rank in ((0.5, 1), (0.1, 2), (1e-2, 3), (1e-6, 4), (1e-10, 4)):
        values, directions = gram_spectrum(x, tolerance)
        assert directions.shape == (20, rank)
        torch.testing.assert_close(values, torch.tensor([16, 4, 1, 1e-4]).double()[:rank], rtol=1e-6, atol=0)


def test_tensors_and_arrays_have_the_same_spectrum():
    x = vectors(9).double()
    values, directions = gram_spectrum(x, 1e-8)
    others, other_directions = gram_spectrum(x.numpy(), 1e-8)
    assert isinstance(others, np.ndarray)
    np.testing.assert_allclose(values.numpy(), others, rtol=1e-10)
    np.testing.assert_allclose(np.abs((directions.numpy() * other_directions).sum(0)), 1, rtol=1e-8)
