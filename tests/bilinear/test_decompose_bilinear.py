"""What the decomposition is measured by: selection on validation images alone, and baselines that are what they say."""

import pytest
import torch

from stages.bilinear.decompose_bilinear import (
    candidate_masks,
    choose_masks,
    clip_ranks,
    deletion_agreement,
    load_networks,
    mask_accuracy,
    truncation_accuracy,
    truncation_rows,
)
from stages.bilinear.decomposition import adversarial_masks, decompose_bilinear_model
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


def test_masks_of_both_signs_are_tried():
    artifacts = decompose_bilinear_model(classifier())
    masks = candidate_masks(artifacts, 2.5, 5)
    assert masks.shape == (3, 6, 16)
    assert torch.equal(masks[:, :3], -masks[:, 3:])
    torch.testing.assert_close(masks[:, :3], 2.5 * adversarial_masks(artifacts, 5)[:, :3])


def test_permuted_masks_have_the_same_values_in_other_places():
    model = classifier()
    validation, test = images(model), images(model)
    masks = candidate_masks(decompose_bilinear_model(model), 0.5, 4)
    accuracies, chosen, permuted = mask_accuracy(model, masks, validation, test, seed=0)
    expected, left = choose_masks(model, masks, validation, test)
    assert torch.equal(chosen, expected)
    assert accuracies["mask"] == left
    candidates = masks.flatten(0, 1).sort(1).values
    for mask in permuted:
        assert (candidates - mask.sort().values).abs().amax(1).min() == 0
        assert (masks.flatten(0, 1) - mask).abs().amax(1).min() > 0
    assert not torch.equal(permuted, mask_accuracy(model, masks, validation, test, seed=1)[2])


def test_random_deletions_are_of_lit_pixels():
    model = classifier()
    pixels = torch.zeros(40, 1, 4, 4, dtype=torch.uint8)
    pixels.view(40, 16)[torch.arange(40), torch.arange(40) % 16] = 255
    test = ImageSet(pixels, model(pixels.float() / 255).argmax(1), CLASSES)
    at_zero = model(torch.zeros(1, 16)).argmax().item()
    expected = (test.labels == at_zero).double().mean().item()
    kept = deletion_agreement(model, test, [1], seed=0)
    assert expected < 1
    assert kept["random"][1] == kept["brightest"][1] == expected


def test_rows_say_how_many_eigenvectors_a_rank_stands_for():
    curve = {str(k): {"mean": 0.5, "std": 0.0} for k in (1, 5, 8)}
    of_variant = {"truncated_acc": {"hidden": {"magnitude": curve, "sign": curve, "random": curve}}}
    rows = truncation_rows({"regularised": of_variant, "unregularised": of_variant})
    counts = {
        ranking: [row["eigenvectors"] for row in rows if (row["variant"], row["ranking"]) == ("regularised", ranking)]
        for ranking in ("magnitude", "sign", "random")
    }
    assert counts["magnitude"] == [1, 5, 8]
    assert counts["sign"] == counts["random"] == [2, 8, 8]  # of either sign, but no more than there are


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

    with pytest.raises(InputError, match="dvc repro train_bilinear@digits"):
        load_networks("digits", "regularised", 1)
    folder = project / "models/train_bilinear/digits/regularised/seed0"
    folder.mkdir(parents=True)
    (folder / "best.pt").write_bytes(b"")
    monkeypatch.setattr(decompose_bilinear, "load_model", lambda _: (classifier(), {"seed": 0}))
    with pytest.raises(
        InputError, match=r"train_bilinear.variants.regularised.n_layer: expected 2 to decompose, got 1"
    ):
        load_networks("digits", "regularised", 2)


def test_networks_come_in_the_order_of_their_seeds(project, monkeypatch):
    from stages.bilinear import decompose_bilinear

    for seed in (10, 9, 2, 11):
        folder = project / f"models/train_bilinear/digits/regularised/seed{seed}"
        folder.mkdir(parents=True)
        (folder / "best.pt").write_bytes(b"")
    seeds = iter([10, 2, 11, 9])  # whatever order a folder is listed in
    monkeypatch.setattr(decompose_bilinear, "load_model", lambda _: (classifier(), {"seed": next(seeds)}))
    assert [network.seed for network in load_networks("digits", "regularised", 1)] == [2, 9, 10, 11]


def test_ranks_are_those_that_a_network_has():
    assert clip_ranks([1, 5, 50], 12) == [1, 5, 12]
    assert clip_ranks([12], 12) == [12]


def test_means_over_seeds_keep_the_structure_and_say_how_many():
    result = over_seeds([{"a": {1: 0.2}, "b": 1.0}, {"a": {1: 0.4}, "b": 1.0}])
    assert result["a"]["1"] == pytest.approx({"mean": 0.3, "std": 0.02**0.5, "n": 2})
    assert result["b"]["std"] == 0
    assert mean_std([0.5]) == {"mean": 0.5, "n": 1}  # one value has no spread
