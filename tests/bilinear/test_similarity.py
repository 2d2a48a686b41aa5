"""Two networks are as alike as their functions are: exact moments, whatever the weights are written like."""

import itertools

import pytest
import torch

from stages.bilinear.decomposition import decompose_bilinear_model, input_basis, matched_similarity
from stages.bilinear.model import BilinearImageClassifier
from stages.bilinear.similarity import (
    Gaussian,
    chance_cosine,
    functional_similarity,
    gaussian_of,
    logit_functions,
    match_eigenvectors,
)

D_INPUT, D_HIDDEN, CLASSES = 12, 7, 4
KINDS = list(itertools.product([False, True], repeat=2))  # bias, residual
WHITE = Gaussian(torch.zeros(D_INPUT, dtype=torch.float64))


def classifier(seed=0, bias=False, residual=False) -> BilinearImageClassifier:
    model = BilinearImageClassifier(D_INPUT, D_HIDDEN, CLASSES, 1, bias, residual, seed)
    return model.double().requires_grad_(False)


def some_gaussian() -> Gaussian:
    return Gaussian(torch.rand(D_INPUT, dtype=torch.float64), 0.5 * torch.randn(D_INPUT, 9, dtype=torch.float64))


def rewritten(model: BilinearImageClassifier) -> BilinearImageClassifier:
    """The same function: hidden units in another order, scales moved between L and R, L and R exchanged in some units."""
    order, scale = torch.randperm(D_HIDDEN), torch.rand(D_HIDDEN, dtype=torch.float64) + 0.5
    left, right = model.blocks[0].weight.chunk(2)
    swapped = torch.arange(D_HIDDEN)[:, None] % 2 == 0
    left, right = torch.where(swapped, right, left), torch.where(swapped, left, right)
    other = classifier(seed=9)
    other.embed.weight.copy_(model.embed.weight)
    other.blocks[0].weight.copy_(
        torch.cat([left * scale[:, None], right / scale[:, None]])[torch.cat([order, order + D_HIDDEN])]
    )
    other.head.weight.copy_(model.head.weight[:, order])
    return other


@pytest.mark.parametrize(("bias", "residual"), KINDS)
@pytest.mark.parametrize("pixels", [WHITE, None], ids=["white", "any"])
def test_moments_are_those_of_drawn_images(bias, residual, pixels):
    pixels = pixels or some_gaussian()
    a, b = classifier(0, bias, residual), classifier(1, bias, residual)
    n = 400_000
    g = torch.randn(n, D_INPUT if pixels.root is None else 9, dtype=torch.float64)
    x = pixels.mean + (g if pixels.root is None else g @ pixels.root.T)
    f, h = (model(x) - model(x).mean(1, keepdim=True) for model in (a, b))
    got = functional_similarity(a, b, pixels)

    def cosine(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (u.T @ v) / (u.square().sum(0)[:, None] * v.square().sum(0)).sqrt()

    assert got.cosine == pytest.approx(cosine(f, h), abs=0.02)
    assert got.correlation == pytest.approx(cosine(f - f.mean(0), h - h.mean(0)), abs=0.02)
    whole = ((f * h).sum() / (f.square().sum() * h.square().sum()).sqrt()).item()
    assert got.total_cosine == pytest.approx(whole, abs=0.01)


@pytest.mark.parametrize(("bias", "residual"), KINDS)
def test_the_functions_are_the_logits_less_their_mean(bias, residual):
    model, pixels, g = classifier(0, bias, residual), some_gaussian(), torch.randn(9, dtype=torch.float64)
    logits = model((pixels.mean + pixels.root @ g)[None])[0]
    got = [g @ f.form @ g + 2 * f.linear @ g + f.constant for f in logit_functions(model, pixels)]
    torch.testing.assert_close(torch.stack(got), logits - logits.mean())


def test_nothing_depends_on_how_a_network_is_written():
    model, pixels = classifier(), some_gaussian()
    same, other = rewritten(model), classifier(3)
    itself = functional_similarity(model, same, pixels)
    for value in (itself.total_cosine, itself.total_correlation, *itself.cosine.diagonal().tolist()):
        assert value == pytest.approx(1)
    one, two = (functional_similarity(network, other, pixels) for network in (model, same))
    torch.testing.assert_close(one.cosine, two.cosine)
    assert abs(one.total_cosine) < 0.9
    with torch.no_grad():
        same.head.weight.mul_(3).add_(torch.randn(D_HIDDEN, dtype=torch.float64))  # to every class the same
    assert functional_similarity(model, same, pixels).total_cosine == pytest.approx(1)


def test_similarity_is_symmetric():
    a, b, pixels = classifier(0), classifier(1, bias=True), some_gaussian()
    forth, back = functional_similarity(a, b, pixels), functional_similarity(b, a, pixels)
    torch.testing.assert_close(forth.cosine, back.cosine.T)
    assert forth.total_correlation == pytest.approx(back.total_correlation)


def test_the_gaussian_of_images_has_their_moments():
    x = torch.rand(50, 1, 3, 4)
    pixels = gaussian_of(x)
    torch.testing.assert_close(pixels.mean, x.double().flatten(1).mean(0))
    torch.testing.assert_close(pixels.root @ pixels.root.T, torch.cov(x.double().flatten(1).T, correction=0))


def test_matches_are_one_to_one_and_found_whatever_their_order():
    a, b = (decompose_bilinear_model(model, input_basis(model)) for model in (classifier(), rewritten(classifier())))
    own = [match_eigenvectors(a, b, (c, c), 5) for c in range(CLASSES)]
    for matches in own:
        assert matches.of_a == matches.of_b
        assert matches.cosines == pytest.approx([1] * 5)
    other = decompose_bilinear_model(classifier(5), input_basis(classifier(5)))
    matched = [match_eigenvectors(a, other, (c, c), 5) for c in range(CLASSES)]
    assert all(len(set(m.of_b)) == 5 for m in matched)
    mean = sum(sum(m.cosines) for m in matched) / (5 * CLASSES)
    assert mean == pytest.approx(matched_similarity(a, other, 5))
    assert 0 < chance_cosine(a, b, 5) < 1
