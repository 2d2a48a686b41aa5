"""What the decomposition is measured by: selection on validation images alone, and baselines that are what they say."""

import pytest
import torch

from stages.bilinear.decompose_bilinear import (
    choose_masks,
    clip_ranks,
    deletion_agreement,
    load_networks,
    truncation_accuracy,
)
from stages.bilinear.decomposition import decompose_bilinear_model
from stages.bilinear.model import BilinearImageClassifier
from stages.common.images import ImageSet
from stages.common.metrics import mean_std, over_seeds
from stages.common.stage import InputError

CLASSES = ["a", "b", "c"]


def classifier() -> BilinearImageClassifier:
    return BilinearImageClassifier(16, 12, 3, 1, False, False, seed=0).requires_grad_(False)


def images(model: BilinearImageClassifier, n: int = 60) -> ImageSet:
    """Images with the labels that the model gives them: it is always right."""
    pixels = torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8)
    return ImageSet(pixels, model(pixels.float() / 255).argmax(1), CLASSES)


def test_masks_are_chosen_on_validation_images_alone():
    model = classifier()
    validation, test = images(model), images(model)
    candidates = 0.5 * torch.randn(3, 4, 16)
    chosen, left = choose_masks(model, candidates, validation, test)
    wrong = ImageSet(test.images, (test.labels + 1) % 3, CLASSES)
    chosen_again, left_again = choose_masks(model, candidates, validation, wrong)
    assert torch.equal(chosen, chosen_again)
    assert left != left_again
    # and they are the most harmful there, their accuracies those of the masked test images
    for c in range(3):
        harm = [
            (model(validation.pixels() + mask.view(1, 4, 4)).argmax(1) == validation.labels).float().mean()
            for mask in candidates[c]
        ]
        assert torch.equal(chosen[c], candidates[c][torch.stack(harm).argmin()])
    on_test = [
        (model(test.pixels() + mask.view(1, 4, 4)).argmax(1) == test.labels).double().mean().item() for mask in chosen
    ]
    assert left["mean"] == pytest.approx(sum(on_test) / 3)
    assert left["best"] in on_test


def test_truncation_counts_its_eigenvectors():
    """`sign` and its baseline `random` use 2 k eigenvectors, `magnitude` k; all of them are the network."""
    model = classifier()
    test = images(model, n=200)
    artifacts = decompose_bilinear_model(model)
    curves = truncation_accuracy(model, artifacts, test, [3, 6, 12], seed=0)
    assert curves["sign"][6] == curves["sign"][12] == curves["random"][6] == curves["magnitude"][12] == 1.0
    assert curves["random"][3] < 1.0
    assert curves["magnitude"][6] < 1.0
    assert curves != truncation_accuracy(model, artifacts, test, [3, 6, 12], seed=1)  # random is random


def test_deleting_every_pixel_leaves_no_prediction_but_that_of_zero():
    model = classifier()
    test = images(model)
    at_zero = model(torch.zeros(1, 16)).argmax().item()
    shares = deletion_agreement(model, test, [1, 16, 99], seed=0)
    for ranking in ("attributed", "random", "brightest"):
        assert shares[ranking][16] == shares[ranking][99] == (test.labels == at_zero).double().mean().item()
    assert shares["attributed"][1] <= shares["random"][1]


def test_a_variant_of_the_wrong_depth_is_named(project, monkeypatch):
    from stages.bilinear import decompose_bilinear

    with pytest.raises(InputError, match="dvc repro train_bilinear@digits-regularised"):
        load_networks("digits", "regularised", 1)
    folder = project / "models/train_bilinear/digits-regularised/seed0"
    folder.mkdir(parents=True)
    (folder / "best.pt").write_bytes(b"")
    monkeypatch.setattr(decompose_bilinear, "load_model", lambda _: (classifier(), {"seed": 0}))
    with pytest.raises(
        InputError, match=r"train_bilinear.variants.regularised.n_layer: expected 2 to decompose, got 1"
    ):
        load_networks("digits", "regularised", 2)


def test_ranks_are_those_that_a_network_has():
    assert clip_ranks([1, 5, 50], 12) == [1, 5, 12]
    assert clip_ranks([12], 12) == [12]


def test_means_over_seeds_keep_the_structure_and_say_how_many():
    result = over_seeds([{"a": {1: 0.2}, "b": 1.0}, {"a": {1: 0.4}, "b": 1.0}])
    assert result["a"]["1"] == pytest.approx({"mean": 0.3, "std": 0.02**0.5, "n": 2})
    assert result["b"]["std"] == 0
    assert mean_std([0.5]) == {"mean": 0.5, "n": 1}  # one value has no spread
