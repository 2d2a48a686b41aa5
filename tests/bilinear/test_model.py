"""The bilinear classifier: what it computes, written out, and sizes that make none."""

import pytest
import torch

from stages.bilinear.model import BilinearImageClassifier, build_image_classifier


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("n_layer", [0, 1, 2])
def test_logits_are_products_of_two_linear_maps(n_layer, bias, residual):
    model = BilinearImageClassifier(6, 5, 3, n_layer, bias, residual, seed=0)
    x = torch.rand(7, 1, 2, 3)
    h = x.flatten(1) @ model.embedding_weight.T
    torch.testing.assert_close(model.read_hidden(h), model(x))
    if n_layer:
        for (left, right), (b, c) in zip(model.bilinear_weights, model.bilinear_biases, strict=True):
            block = (h @ left.T + b) * (h @ right.T + c)
            h = h + block if residual else block
            assert (b.abs().max() > 0) == bias
    torch.testing.assert_close(h @ model.output_weight.T, model(x))


def test_a_seed_draws_the_weights_whatever_was_drawn_before():
    def weights(seed):
        torch.rand(3)
        return BilinearImageClassifier(6, 5, 3, 1, True, False, seed).state_dict()

    one, same, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert all(tensor.abs().max() <= 5**-0.5 for tensor in one.values())  # as nn.Linear draws them


@pytest.mark.parametrize(
    "changed",
    [{"d_input": 0}, {"d_hidden": 0}, {"d_output": 0}, {"n_layer": -1}],
    ids=lambda changed: next(iter(changed)),
)
def test_sizes_that_make_no_network_are_refused(changed):
    sizes = {"d_input": 6, "d_hidden": 5, "d_output": 3, "n_layer": 1, "bias": False, "residual": False}
    with pytest.raises(
        ValueError, match="expected d_input, d_hidden and d_output of 1 or more and 0 or more layers, got"
    ):
        build_image_classifier(sizes | changed, seed=0)
