"""Diagnoses of memory: where their numbers must be, and that attention is of the images it is said to be of."""

from itertools import pairwise

import pytest
import torch

from stages.vit_memory.diagnose_memory import capacity_rows, energy_rows, noisy_keys, recall, retrieval_rows
from stages.vit_memory.episodes import draw_episode
from stages.vit_memory.features import FeatureSets, Labelled


def test_noise_has_the_length_it_is_said_to_have():
    stored, queries = noisy_keys(1000, 64, 0.25, seed=0)
    torch.testing.assert_close(stored.norm(dim=1), torch.ones(1000))
    assert len(queries) == 256
    assert (queries - stored[:256]).norm(dim=1).mean().item() == pytest.approx(0.25, rel=0.05)
    assert torch.equal(noisy_keys(1000, 64, 0.0, seed=0)[1], stored[:256])


def test_retrieval_fails_where_beta_is_small_and_succeeds_where_it_is_large():
    rows = retrieval_rows([10, 1000], [0.125, 64.0], dim=64, noise=0.25, seeds=[0, 1])
    by_key = {(row["patterns"], row["beta"]): row for row in rows}
    assert len(by_key) == 4
    for patterns in (10, 1000):
        assert by_key[patterns, 0.125]["error"] > 0.9
        assert by_key[patterns, 64.0]["error"] < 0.05
        assert by_key[patterns, 64.0]["nearest"] == 1
        assert by_key[patterns, 0.125]["std"] >= 0


def test_energy_falls_until_nothing_moves():
    rows = energy_rows(*noisy_keys(100, 64, 0.25, seed=0), betas=[4.0, 16.0], updates=8)
    for beta in (4.0, 16.0):
        curve = [row for row in rows if row["beta"] == beta]
        assert [row["step"] for row in curve] == list(range(9))
        energies = [row["energy"] for row in curve]
        assert all(later <= earlier + 1e-6 for earlier, later in pairwise(energies))
        assert curve[0]["movement"] == 0
        assert curve[-1]["movement"] < curve[1]["movement"]
    _, first = energy_rows(torch.eye(64), torch.eye(64), betas=[64.0], updates=1)
    assert first["movement"] == pytest.approx(1 - 0.5**0.5, rel=1e-4)  # halfway between two patterns both are retrieved


def test_a_modern_memory_holds_what_a_classical_one_loses():
    few, many = capacity_rows([3, 64], dim=64, seeds=[0, 1])
    assert few == {"patterns": 3, "dim": 64, "modern": 1.0, "classical": 1.0}
    assert many["modern"] > 0.99
    assert many["classical"] < 0.1


def test_images_attend_to_their_own_class_and_are_named_by_their_indices():
    labels, glyphs = torch.arange(90) % 3, torch.arange(200) % 10
    centres = 4 * torch.randn(3, 6)
    x, test_x = (centres[labels] + 0.5 * torch.randn(90, 6) for _ in range(2))
    drawn = torch.randn(200, 6)

    def twice(features, labels):
        return Labelled(torch.stack([features, torch.zeros_like(features)], 1), labels)

    train, test = twice(x, labels), twice(test_x, labels)
    features = FeatureSets(
        train, test, train, test, twice(drawn, glyphs), torch.zeros(200, 1, 2, 2), True, ["a", "b", "c"], True
    )
    episode = draw_episode(labels, labels.clone(), 3, 5, 30, seed=0)
    found = recall(features, episode, [0.125, 16.0])
    assert list(found.attention) == ["beta 0.125", "beta 16"]
    assert torch.equal(found.labels, found.labels.sort().values)
    assert torch.equal(labels[found.images], found.labels)  # all three classes are in it, under their own names
    assert torch.equal(labels[found.stored], found.stored_labels)
    for weights in found.attention.values():
        torch.testing.assert_close(weights.sum(1), torch.ones(30))
    by_class = found.on_class(3)
    torch.testing.assert_close(
        by_class["beta 16"][:, 1], found.attention["beta 16"][:, found.stored_labels == 1].sum(1)
    )
    own = by_class["beta 16"][torch.arange(30), found.labels].mean()
    assert own > 0.9
    assert by_class["beta 0.125"][torch.arange(30), found.labels].mean() < 0.45
