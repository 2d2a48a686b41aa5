"""Batches cover the data; augmentation moves and adds exactly what it says."""

import pytest
import torch

from stages.common.images import Batches, ImageSet, split_validation
from stages.common.stage import InputError


def images(n=50, channels=1, size=6) -> ImageSet:
    pixels = torch.randint(1, 256, (n, channels, size, size), dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(n), [str(i) for i in range(n)])


def test_in_order_batches_are_the_data():
    data = images(channels=3)
    pixels, labels = (torch.cat(parts) for parts in zip(*Batches(data, 16), strict=True))
    torch.testing.assert_close(pixels, data.images.float() / 255)
    assert torch.equal(labels, data.labels)
    assert len(Batches(data, 16)) == 4


def test_training_batches_are_a_new_permutation_each_pass():
    batches = Batches(images(), 16, seed=0)
    first, second = (torch.cat([labels for _, labels in batches]) for _ in range(2))
    assert len(first) == 48  # without the incomplete batch
    assert len(first.unique()) == len(second.unique()) == 48
    assert not torch.equal(first, second)
    again = Batches(images(), 16, seed=0)
    assert torch.equal(first, torch.cat([labels for _, labels in again]))


def test_a_batch_larger_than_the_data_is_the_data():
    assert len(Batches(images(n=5), 64, seed=0)) == 1


def test_shift_moves_whole_images_by_up_to_its_pixels_and_all_ways():
    data, shift = images(n=400), 2
    seen = set()
    for pixels, labels in Batches(data, 100, seed=0, shift=shift):
        for image, label in zip(pixels, labels, strict=True):
            original = torch.nn.functional.pad(data.images[label].float() / 255, [shift] * 4)
            matches = [
                (down, right)
                for down in range(2 * shift + 1)
                for right in range(2 * shift + 1)
                if torch.equal(original[:, down : down + 6, right : right + 6], image)
            ]
            assert len(matches) == 1
            seen.update(matches)
    assert len(seen) == (2 * shift + 1) ** 2


def test_noise_has_its_standard_deviation_and_no_mean():
    data = images(n=512, size=16)
    ((pixels, labels),) = Batches(data, 512, seed=0, noise=0.3)
    added = pixels - data.images[labels].float() / 255
    assert added.mean().abs() < 5e-3
    assert added.std() == pytest.approx(0.3, rel=0.01)


def test_validation_split_is_a_partition_and_depends_on_its_seed_alone():
    data = images(n=100)
    rest, validation = split_validation(data, 0.2, seed=3)
    assert len(validation) == 20
    assert sorted([*rest.labels.tolist(), *validation.labels.tolist()]) == list(range(100))
    assert torch.equal(split_validation(data, 0.2, seed=3)[1].labels, validation.labels)
    assert not torch.equal(split_validation(data, 0.2, seed=4)[1].labels, validation.labels)
    for fraction in (0.001, 0.999):
        with pytest.raises(InputError, match="validation_fraction"):
            split_validation(data, fraction, seed=3)
