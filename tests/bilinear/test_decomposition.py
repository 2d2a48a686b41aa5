"""A bilinear network is its eigenvectors: the identities that make reading weights exact."""

import itertools

import pytest
import torch

from stages.bilinear.decomposition import (
    DecompositionArtifacts,
    adversarial_masks,
    build_bilinear_tensor,
    data_basis,
    decompose_bilinear_model,
    decompose_two_layers,
    eigen_terms,
    embed,
    input_basis,
    matched_similarity,
    nested_logits,
    order_by_magnitude,
    order_by_sign,
    pixel_attributions,
    project_eigenvectors_to_input,
    subspace_similarity,
    symmetrize_bilinear_tensor,
    truncated_logits,
)
from stages.bilinear.model import BilinearImageClassifier

CASES = list(itertools.product([False, True], repeat=2))  # bias, residual
PRECISIONS = [(torch.float32, 1e-5), (torch.float64, 1e-12)]
D_INPUT, D_HIDDEN, D_OUTPUT = 30, 12, 4


def classifier(n_layer=1, bias=False, residual=False, dtype=torch.float64, seed=0) -> BilinearImageClassifier:
    model = BilinearImageClassifier(D_INPUT, D_HIDDEN, D_OUTPUT, n_layer, bias, residual, seed)
    return model.to(dtype).requires_grad_(False)


def images(dtype=torch.float64, n=40) -> torch.Tensor:
    return torch.rand(n, 1, 5, 6, dtype=dtype)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(("bias", "residual"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_logits_are_quadratic_forms(bias, residual, dtype, tolerance):
    model, x = classifier(1, bias, residual, dtype), images(dtype)
    z = embed(model, x)
    for forms in (build_bilinear_tensor(model), symmetrize_bilinear_tensor(build_bilinear_tensor(model))):
        assert relative_error(torch.einsum("ni,cij,nj->nc", z, forms, z), model(x)) < tolerance


@pytest.mark.parametrize(("bias", "residual"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("basis", ["hidden", "input", "data"])
def test_all_eigenvectors_rebuild_the_logits(bias, residual, dtype, tolerance, basis):
    model, x = classifier(1, bias, residual, dtype), images(dtype, n=200)
    change = {"hidden": None, "input": input_basis(model), "data": data_basis(model, x)}[basis]
    artifacts = decompose_bilinear_model(model, change)
    rebuilt = eigen_terms(embed(model, x), artifacts.eigenvalues, artifacts.eigenvectors_hidden).sum(2)
    conditioning = 1 if change is None else torch.linalg.cond(change).item()
    assert relative_error(rebuilt, model(x)) < tolerance * max(1, conditioning)


def test_ignoring_the_constant_is_wrong():
    """What the folded coordinate is for: without it, biases and residuals shift logits by a good part of their size."""
    for bias, residual in CASES[1:]:
        model, x = classifier(1, bias, residual), images()
        h = embed(model, x)[:, :D_HIDDEN]
        inner = build_bilinear_tensor(model)[:, :D_HIDDEN, :D_HIDDEN]
        assert relative_error(torch.einsum("ni,cij,nj->nc", h, inner, h), model(x)) > 0.1


def test_artifacts_have_the_promised_shapes_and_order():
    model = classifier()
    artifacts = decompose_bilinear_model(model)
    assert artifacts.bilinear_tensor.shape == artifacts.symmetrized_tensor.shape == (D_OUTPUT, D_HIDDEN, D_HIDDEN)
    assert artifacts.eigenvalues.shape == (D_OUTPUT, D_HIDDEN)
    assert artifacts.eigenvectors_hidden.shape == (D_OUTPUT, D_HIDDEN, D_HIDDEN)
    assert artifacts.eigenvectors_input.shape == (D_OUTPUT, D_HIDDEN, D_INPUT)
    assert (artifacts.eigenvalues.diff(dim=1) >= 0).all()
    assert model.bilinear_weights.shape == (1, 2, D_HIDDEN, D_HIDDEN)
    # column k of the hidden eigenvectors belongs to eigenvalue k, and row k of the input ones is its image E^T v
    forms, v = artifacts.symmetrized_tensor, artifacts.eigenvectors_hidden
    torch.testing.assert_close(forms @ v, v * artifacts.eigenvalues[:, None])
    expected = v[2, :, 5] @ model.embedding_weight
    torch.testing.assert_close(artifacts.eigenvectors_input[2, 5], expected)
    torch.testing.assert_close(project_eigenvectors_to_input(v, model.embedding_weight)[2, 5], expected)


def test_full_rank_reconstructs_the_forms_and_their_invariants():
    artifacts = decompose_bilinear_model(classifier())
    forms, values, v = artifacts.symmetrized_tensor, artifacts.eigenvalues, artifacts.eigenvectors_hidden
    torch.testing.assert_close((v * values[:, None]) @ v.mT, forms)
    torch.testing.assert_close(values.sum(1), forms.diagonal(dim1=1, dim2=2).sum(1))  # sum of eigenvalues = trace
    torch.testing.assert_close(values.square().sum(1), forms.square().sum((1, 2)))  # and of their squares, the norm
    torch.testing.assert_close(v.mT @ v, torch.eye(D_HIDDEN, dtype=v.dtype).expand_as(forms))


def test_without_bias_and_residual_the_network_is_even_and_homogeneous():
    model, x = classifier(), images()
    torch.testing.assert_close(model(-x), model(x))
    torch.testing.assert_close(model(3 * x), 9 * model(x))
    for bias, residual in CASES[1:]:
        assert relative_error(classifier(1, bias, residual)(-x), classifier(1, bias, residual)(x)) > 1e-3


def test_input_basis_is_orthonormal_and_blind_to_recombined_hidden_units():
    model = classifier()
    artifacts = decompose_bilinear_model(model, input_basis(model))
    p = artifacts.eigenvectors_input
    torch.testing.assert_close(p @ p.mT, torch.eye(D_HIDDEN, dtype=p.dtype).expand(D_OUTPUT, -1, -1))

    other, mix = classifier(), torch.randn(D_HIDDEN, D_HIDDEN, dtype=torch.float64)
    other.embed.weight.copy_(mix @ model.embed.weight)
    other.blocks[0].weight.copy_(model.blocks[0].weight @ torch.linalg.inv(mix))
    x = images()
    torch.testing.assert_close(other(x), model(x))  # the same function
    recombined = decompose_bilinear_model(other, input_basis(other))
    torch.testing.assert_close(recombined.eigenvalues, artifacts.eigenvalues)
    assert matched_similarity(artifacts, recombined, D_HIDDEN) == pytest.approx(1)
    hidden = decompose_bilinear_model(other).eigenvalues
    assert relative_error(hidden, decompose_bilinear_model(model).eigenvalues) > 0.1


def test_data_basis_whitens():
    model, x = classifier(bias=True), images(n=500)
    basis = data_basis(model, x)
    g = embed(model, x) @ torch.linalg.pinv(basis).T
    torch.testing.assert_close(g.T @ g / len(g), torch.eye(g.shape[1], dtype=g.dtype))


def test_more_hidden_units_than_pixels():
    model = BilinearImageClassifier(6, 20, 3, 1, True, True, 0).double().requires_grad_(False)
    x = torch.rand(300, 1, 2, 3, dtype=torch.float64)
    for basis in (None, input_basis(model), data_basis(model, x)):
        artifacts = decompose_bilinear_model(model, basis)
        rebuilt = eigen_terms(embed(model, x), artifacts.eigenvalues, artifacts.eigenvectors_hidden).sum(2)
        assert relative_error(rebuilt, model(x)) < 1e-9


def test_order_by_sign_takes_as_many_of_either_sign():
    values = torch.tensor([[-5.0, -1.0, 2.0, 3.0, 4.0]])
    assert values.gather(1, order_by_sign(values)).tolist() == [[4.0, -5.0, 3.0, -1.0, 2.0]]
    assert values.gather(1, order_by_magnitude(values)).tolist() == [[-5.0, 4.0, 3.0, 2.0, -1.0]]


def test_truncation_equals_the_form_rebuilt_from_its_first_eigenvectors():
    model, x = classifier(), images()
    artifacts = decompose_bilinear_model(model)
    values, v = artifacts.eigenvalues, artifacts.eigenvectors_hidden
    order = order_by_magnitude(values)
    z = embed(model, x)
    got = truncated_logits(eigen_terms(z, values, v), order, [1, 3, D_HIDDEN])
    for k, logits in zip([1, 3, D_HIDDEN], got, strict=True):
        for c in range(D_OUTPUT):
            kept = order[c, :k]
            form = (v[c][:, kept] * values[c, kept]) @ v[c][:, kept].T
            torch.testing.assert_close(logits[:, c], torch.einsum("ni,ij,nj->n", z, form, z))


@pytest.mark.parametrize(("bias", "residual"), CASES)
def test_two_layers_are_a_tree_of_eigenvectors(bias, residual):
    model, x = classifier(2, bias, residual), images()
    size = D_HIDDEN + (bias or residual)
    tree = decompose_two_layers(model, size)
    logits = nested_logits(tree, embed(model, x), [1, size], [1, size])
    assert logits.shape == (2, 2, len(x), D_OUTPUT)
    assert relative_error(logits[1, 1], model(x)) < 1e-11
    assert relative_error(logits[0, 0], model(x)) > 1e-3


def test_depth_that_does_not_fold_is_refused():
    with pytest.raises(ValueError, match="1 bilinear layer, got 2"):
        decompose_bilinear_model(classifier(2))
    with pytest.raises(ValueError, match="2 bilinear layers, got 1"):
        decompose_two_layers(classifier(1), 3)


def test_a_network_without_a_bilinear_layer_is_refused():
    linear, x = classifier(0), images()
    for decompose in (decompose_bilinear_model, build_bilinear_tensor):
        with pytest.raises(ValueError, match="expected a network of 1 bilinear layer, got 0"):
            decompose(linear)
    for basis in (input_basis, lambda model: data_basis(model, x), lambda model: embed(model, x)):
        with pytest.raises(ValueError, match="expected a network of 1 or more bilinear layers, got 0"):
            basis(linear)
    with pytest.raises(ValueError, match="2 bilinear layers, got 0"):
        decompose_two_layers(linear, 3)
    for decompose in (decompose_bilinear_model, build_bilinear_tensor, input_basis):
        with pytest.raises(ValueError, match=r"expected a BilinearImageClassifier .*, got an object of Linear"):
            decompose(torch.nn.Linear(3, 3))


def test_a_basis_of_another_networks_coordinates_is_refused():
    with pytest.raises(ValueError, match=f"basis: expected {D_HIDDEN + 1} rows, .* got {D_HIDDEN}"):
        decompose_bilinear_model(classifier(bias=True), input_basis(classifier()))


@pytest.mark.parametrize("rank", [0, -1])
def test_ranks_that_would_count_from_the_end_are_refused(rank):
    model = classifier()
    artifacts = decompose_bilinear_model(model)
    terms = eigen_terms(embed(model, images()), artifacts.eigenvalues, artifacts.eigenvectors_hidden)
    order = order_by_magnitude(artifacts.eigenvalues)
    deep = classifier(2)
    tree = decompose_two_layers(deep, 3)
    z = embed(deep, images())
    for call in (
        lambda: truncated_logits(terms, order, [3, rank]),
        lambda: truncated_logits(terms, order, []),
        lambda: adversarial_masks(artifacts, rank),
        lambda: matched_similarity(artifacts, artifacts, rank),
        lambda: subspace_similarity(artifacts, artifacts, rank),
        lambda: decompose_two_layers(deep, rank),
        lambda: nested_logits(tree, z, [rank], [1]),
        lambda: nested_logits(tree, z, [1], [rank]),
    ):
        with pytest.raises(ValueError, match=r"expected 1 or more .*eigenvectors, got"):
            call()


@pytest.mark.parametrize("wrong", [-1, D_OUTPUT])
def test_attributions_to_a_class_that_is_not_there_are_refused(wrong):
    with pytest.raises(ValueError, match=f"classes: expected 0 to {D_OUTPUT - 1}, got"):
        pixel_attributions(classifier(), images(n=2), torch.tensor([0, wrong]))


def test_artifacts_in_another_precision_are_the_same_but_rounded():
    exact = decompose_bilinear_model(classifier())
    single = exact.to(torch.float32)
    assert isinstance(single, DecompositionArtifacts)
    for name, tensor in vars(single).items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, getattr(exact, name).float())


def test_masks_excite_one_eigenvector_each():
    artifacts = decompose_bilinear_model(classifier())
    masks = adversarial_masks(artifacts, rank=5)
    top = artifacts.eigenvectors_input[:, -5:].flip(1)
    excited = masks @ top.mT  # [c, mask, eigenvector]
    off_diagonal = excited - torch.diag_embed(excited.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(off_diagonal, torch.zeros_like(off_diagonal))
    assert (excited.diagonal(dim1=1, dim2=2) > 1e-3).all()
    torch.testing.assert_close(masks.norm(dim=2), torch.ones(D_OUTPUT, 5, dtype=masks.dtype))


@pytest.mark.parametrize(("bias", "residual"), CASES)
def test_attributions_sum_to_the_logit(bias, residual):
    model, x = classifier(1, bias, residual), images()
    classes = torch.randint(D_OUTPUT, (len(x),))
    pixels, constant = pixel_attributions(model, x, classes)
    torch.testing.assert_close(pixels.sum(1) + constant, model(x)[torch.arange(len(x)), classes])
    if not (bias or residual):  # and are half of gradient times input
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(model(x)[torch.arange(len(x)), classes].sum(), x)
        torch.testing.assert_close(pixels, (gradient * x).flatten(1) / 2)


def test_similarity_is_one_to_itself_and_free_of_order_and_sign():
    a = decompose_bilinear_model(classifier(seed=0))
    b = decompose_bilinear_model(classifier(seed=1))
    assert matched_similarity(a, a, 5) == pytest.approx(1)
    assert subspace_similarity(a, a, 5) == pytest.approx(1)
    assert matched_similarity(a, b, 5) == pytest.approx(matched_similarity(b, a, 5))
    assert matched_similarity(a, b, 5) < 0.6
    flipped = type(a)(**vars(a) | {"eigenvectors_input": -a.eigenvectors_input})
    assert matched_similarity(a, flipped, 5) == pytest.approx(1)
    opposite = type(a)(**vars(a) | {"eigenvalues": -a.eigenvalues})
    assert matched_similarity(a, opposite, 5) < 0.6  # what raises a logit is not what lowers it


def test_the_span_is_that_of_the_most_positive_eigenvectors():
    a = decompose_bilinear_model(classifier())
    others = a.eigenvectors_input.clone()
    others[:, :-5] = torch.randn_like(others[:, :-5])
    assert subspace_similarity(a, type(a)(**vars(a) | {"eigenvectors_input": others}), 5) == pytest.approx(1)
    assert subspace_similarity(a, type(a)(**vars(a) | {"eigenvectors_input": others}), 6) < 1 - 1e-3


def test_wrong_shapes_are_named():
    model = classifier()
    with pytest.raises(Exception, match=r"(?s)embed_w"):
        project_eigenvectors_to_input(torch.zeros(4, 12, 3, dtype=torch.float64), model.embedding_weight[0])
