"""Few-shot episodes and the comparison of methods in them."""

import pytest
import torch

from stages.common.metrics import accuracy
from stages.common.stage import InputError
from stages.vit_memory.classifiers import Whitening, class_means, linear_probe, memory_log_probabilities
from stages.vit_memory.episodes import draw_episode
from stages.vit_memory.features import spread
from stages.vit_memory.train_few_shot import compare


def test_an_episode_has_its_shots_and_no_query_among_them():
    labels = torch.arange(300) % 10
    episode = draw_episode(labels, labels, n_way=4, n_shot=5, queries=50, seed=0)
    assert episode.support_labels.bincount().tolist() == [5, 5, 5, 5]
    assert len(episode.queries) == 50
    assert not set(episode.support.tolist()) & set(episode.queries.tolist())
    for index, renamed in ((episode.support, episode.support_labels), (episode.queries, episode.query_labels)):
        assert torch.equal(episode.classes[renamed], labels[index])
    again, other = (draw_episode(labels, labels, 4, 5, 50, seed) for seed in (0, 1))
    assert torch.equal(episode.support, again.support)
    assert not torch.equal(episode.support, other.support)


def test_images_are_taken_from_all_of_a_data_set_that_is_in_the_order_of_classes():
    labels = torch.arange(10).repeat_interleave(50)
    assert labels[spread(500, 70)].bincount().tolist() == [7] * 10
    assert torch.equal(spread(500, 1000), torch.arange(500))


@pytest.mark.parametrize(("n_way", "n_shot"), [(11, 1), (2, 31)])
def test_too_few_classes_or_images_are_an_error(n_way, n_shot):
    labels = torch.arange(300) % 10
    with pytest.raises(InputError):
        draw_episode(labels, labels, n_way, n_shot, 10, seed=0)


def test_whitened_classes_have_unit_covariance():
    labels = torch.arange(4000) % 4
    mixed = torch.randn(4000, 6) @ torch.randn(6, 6) + 5 * torch.randn(4, 6)[labels]
    x = Whitening(mixed, labels, shrinkage=0.0)(mixed)
    within = x - class_means(x, labels, 4)[labels]
    torch.testing.assert_close(within.T @ within / 4000, torch.eye(6), atol=1e-3, rtol=0)


def test_the_linear_probe_does_not_depend_on_the_scale_of_features():
    labels = torch.arange(60) % 3
    x = torch.randn(60, 5) + 3 * torch.randn(3, 5)[labels]
    queries = torch.randn(20, 5)
    scale = torch.tensor([0.1, 1.0, 10.0, 100.0, 1e3])
    one, other = (
        linear_probe(x, labels, queries, 3, 0.01),
        linear_probe(x * scale + 7, labels, queries * scale + 7, 3, 0.01),
    )
    torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
    assert (linear_probe(x, labels, x, 3, 0.01).argmax(1) == labels).double().mean() > 0.9


def test_differences_are_paired():
    base = [0.5, 0.7, 0.9, 0.6]
    table = compare({"linear_probe": base, "better": [v + 0.1 for v in base], "worse": [0.1, 0.3, 0.2, 0.0]})
    better = table["better"]["difference"]
    assert better["mean"] == pytest.approx(0.1)
    assert better["high"] - better["low"] == pytest.approx(0, abs=1e-9)
    assert table["worse"]["difference"]["high"] < 0
    assert "difference" not in table["linear_probe"]


def test_permuted_labels_give_chance():
    torch.manual_seed(0)
    centres = 3 * torch.randn(4, 8)
    labels = torch.arange(80) % 4
    x, queries = (centres[labels] + torch.randn(80, 8) for _ in range(2))

    def score(y):
        heads = linear_probe(x, y, queries, 4, 0.01), memory_log_probabilities(x, y, queries, 4, 16.0)
        return torch.stack([accuracy(head, labels) for head in heads])

    assert (score(labels) > 0.9).all()
    permuted = torch.stack([score(labels[torch.randperm(80)]) for _ in range(20)]).mean(0)
    assert (permuted - 0.25).abs().max() < 0.06
