"""Few-shot episodes."""

import pytest
import torch

from stages.common.stage import InputError
from stages.vit_memory.episodes import draw_episode


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


@pytest.mark.parametrize(
    ("n_way", "n_shot", "message"),
    [(11, 1, "n_way 11: there are 10 classes"), (2, 31, r"n_shot 31: class \d has 30 training images")],
)
def test_too_few_classes_or_images_are_an_error(n_way, n_shot, message):
    labels = torch.arange(300) % 10
    with pytest.raises(InputError, match=message):
        draw_episode(labels, labels, n_way, n_shot, 10, seed=0)


def test_of_two_sets_any_test_image_of_the_classes_may_be_a_query():
    train, test = torch.arange(30) % 3, torch.tensor([2, 0, 1, 5])
    episode = draw_episode(train, test, n_way=2, n_shot=10, queries=50, seed=0)
    allowed = {i for i, label in enumerate(test.tolist()) if label in episode.classes.tolist()}
    assert set(episode.queries.tolist()) == allowed
    assert len(episode.support.unique()) == 20
