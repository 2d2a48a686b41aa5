"""Batches cover the data; augmentation moves and adds exactly what it says."""

import itertools

import pytest
import torch

from stages.common.images import Batches, ImageSet, NoiseBank, split_validation
from stages.common.randomness import generator
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


def test_each_number_of_a_bank_has_mean_0_and_variance_1_exactly_over_its_places_and_signs():
    bank = NoiseBank(count=50, batches=8, random=generator(0, "test"))
    slices = bank.ring.unfold(0, 50, 1)  # at all places; all are equally probable, and their signs 1 and -1
    assert slices.shape == (400, 50)
    assert slices.square().mean(0) == pytest.approx(torch.ones(50), abs=1e-5)
    drawn = [bank.draw() for _ in range(4000)]
    places = torch.tensor([noise.storage_offset() for noise, _ in drawn])
    signs = torch.tensor([sign for _, sign in drawn]).float()
    assert signs.abs().unique().tolist() == [1.0]
    assert signs.mean().abs() < 4 / 4000**0.5
    expected = 4000 / 400  # draws of each place
    assert (places.bincount(minlength=400) - expected).square().sum() / expected < 400 + 4 * (
        2 * 400
    ) ** 0.5  # chi square
    assert (signs * (places - 199.5)).mean().abs() < 4 * 400 / (12 * 4000) ** 0.5  # place and sign are independent


def test_a_banks_noise_is_gaussian_and_as_uncorrelated_as_drawn_noise():
    bank = NoiseBank(count=256, batches=64, random=generator(1, "test"))
    ring = bank.ring[: 256 * 64].double()
    bound = 4 / len(ring) ** 0.5  # standard errors
    assert ring.pow(4).mean() == pytest.approx(3, abs=bound * 96**0.5)  # the variance of x^4 is 96
    for lag in (1, 2, 28, 100, 255):  # two numbers of one slice, over all places
        assert (ring * ring.roll(lag)).mean().abs() < bound
    first, second = (
        torch.stack([sign * noise for noise, sign in (bank.draw() for _ in range(3000))]) for _ in range(2)
    )
    assert (first * second).mean(0).abs().max() < 5 / 3000**0.5  # of one slice and the next


def test_noise_of_a_bank_is_added_with_its_standard_deviation_and_changes_nothing_else():
    data = images(n=512, size=16)
    plain = Batches(data, 128, seed=0, shift=1)
    noisy = Batches(data, 128, seed=0, shift=1, noise=0.3, noise_bank=16)
    seen = []
    for _ in range(2):
        for (x, y), (noised, same) in zip(plain, noisy, strict=True):
            assert torch.equal(y, same)
            seen.append(noised - x)
    assert torch.stack(seen).std() == pytest.approx(0.3, rel=0.02)
    assert all(abs((a * b).mean()) < 0.3**2 * 5 / a.numel() ** 0.5 for a, b in itertools.pairwise(seen))


def test_mirrored_images_are_mirrored_and_are_half():
    data = images(n=400)
    mirrored = 0
    for pixels, labels in Batches(data, 100, seed=0, mirror=True):
        original = data.images[labels].float() / 255
        same = (pixels == original).flatten(1).all(1)
        turned = (pixels == original.flip(-1)).flatten(1).all(1)
        assert (same | turned).all()
        mirrored += int(turned.sum())
    assert 160 < mirrored < 240


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
