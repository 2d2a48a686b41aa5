"""The stage of few shots: paired differences, and choices made on base images alone."""

import pytest
import torch

from stages.common.backbone import Backbone, BackboneConfig
from stages.vit_memory.classifiers import Whitening
from stages.vit_memory.episodes import draw_episode
from stages.vit_memory.few_shot import Examples, Views, shots
from stages.vit_memory.train_few_shot import (
    Params,
    accuracies,
    base_episodes,
    choose_rate,
    choose_strength,
    compare,
    with_rate,
)


def test_differences_are_paired():
    base = [0.5, 0.7, 0.9, 0.6]
    table = compare({"linear_probe": base, "better": [v + 0.1 for v in base], "worse": [0.1, 0.3, 0.2, 0.0]})
    better = table["better"]["difference"]
    assert better["mean"] == pytest.approx(0.1)
    assert better["high"] - better["low"] == pytest.approx(0, abs=1e-9)
    assert table["worse"]["difference"]["high"] < 0
    assert "difference" not in table["linear_probe"]


def test_of_one_episode_there_is_no_interval():
    table = compare({"linear_probe": [0.5], "better": [0.6]})
    assert table == {"linear_probe": {"acc": {"mean": 0.5, "n": 1}}, "better": {"acc": {"mean": 0.6, "n": 1}}}


def test_base_episodes_leave_a_query_of_each_class():
    labels = torch.arange(60) % 20  # three drawings of each class
    episodes = base_episodes(labels, n_way=4, n_shot=5, queries=50, seeds=range(3, 6))
    assert [episode.seed for episode in episodes] == [3, 4, 5]
    for episode in episodes:
        assert episode.support_labels.bincount().tolist() == [2] * 4
        assert episode.query_labels.bincount().tolist() == [1] * 4


def test_the_strength_is_the_one_with_the_best_accuracy_over_all_trials():
    labels = torch.arange(200) % 5
    x = torch.randn(5, 6)[labels] + 0.4 * torch.randn(200, 6)
    views = Views(torch.zeros(200, 1, 2, 2, dtype=torch.uint8), x, None)
    whiten = Whitening(x, labels)
    trials = list(shots(base_episodes(labels, 5, 1, 100, range(4)), views, views))
    strengths = [(16.0, -50.0), (16.0, 1.0), (16.0, -5.0)]  # against the memory is worst
    assert choose_strength(trials, strengths, whiten, 0.01) == (16.0, 1.0)


@pytest.fixture
def settings(project):  # noqa: ARG001 (whose params.yaml it reads)
    params = Params.load("train_few_shot", "digits")
    backbone = Backbone(None, BackboneConfig("none", False, 8, None), "", {})  # of which nothing is read
    return params.settings(backbone, whiten=None, strength=(1.0, 0.0))


def test_the_rate_is_the_one_with_the_best_accuracy_over_all_trials(settings):
    labels = torch.arange(40) % 2
    views = Views(torch.zeros(40, 1, 2, 2, dtype=torch.uint8), torch.zeros(40, 3), None)
    trials = list(shots([draw_episode(labels, labels, 2, 3, 10, seed) for seed in range(3)], views, views))

    def method(support, queries, told):
        """Right if the rate is 0.1, in all episodes but the first at 0.2, and never else."""
        rate = told.training.learning_rate
        right = rate == 0.1 or (rate == 0.2 and support.seed > 0)
        return torch.eye(2)[queries.labels if right else 1 - queries.labels]

    assert choose_rate(method, trials, [0.01, 0.2, 0.1, 0.3], settings) == 0.1
    assert accuracies(method, trials, with_rate(settings, 0.2)) == [0.0, 1.0, 1.0]


def test_settings_are_what_params_say(settings):
    params, made = Params.load("train_few_shot", "digits"), settings
    for name in ("decay", "random_features", "ridge", "plain_learning_rate", "plain_steps"):
        assert getattr(made, name) == getattr(params, name)
    for name in ("num_prompts", "beta", "steps", "batch_size"):
        assert getattr(made.training, name) == getattr(params, name)
    assert with_rate(made, 0.7).training.learning_rate == 0.7
    assert made.training.learning_rate == params.learning_rates[0]


def test_examples_of_an_episode_are_those_of_its_images():
    labels = torch.arange(30) % 3
    views = Views(torch.arange(30, dtype=torch.uint8)[:, None, None, None], torch.randn(30, 4), torch.randn(30, 4))
    episode = draw_episode(labels, labels, 2, 4, 6, seed=5)
    ((support, queries),) = shots([episode], views, views)
    assert isinstance(support, Examples)
    for examples, index, renamed in (
        (support, episode.support, episode.support_labels),
        (queries, episode.queries, episode.query_labels),
    ):
        assert torch.equal(examples.images.flatten().long(), index)
        assert torch.equal(examples.x, views.x[index])
        assert torch.equal(examples.random_x, views.random_x[index])
        assert torch.equal(examples.labels, renamed)
        assert (examples.classes, examples.seed) == (2, 5)


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("key", ["betas", "weights", "learning_rates"])
def test_there_is_something_to_choose_from(key):
    values = Params.load("train_few_shot", "digits").model_dump()
    with pytest.raises(ValueError, match=key):
        Params(**values | {key: []})
