"""Streams: which images come when, and matrices of accuracy whose measures are known."""

import pytest
import torch
from torch.nn.functional import one_hot

from stages.common.stage import InputError
from stages.vit_memory.streams import Pool, Stream, accuracy_matrices, hold_out, make_stream, measures


def stream(labels, test_labels):
    return Stream(torch.arange(len(labels)), labels, torch.arange(len(test_labels)), test_labels, 3, 2, seed=0)


def pool(labels, images_per_class=1000):
    return Pool(labels, torch.arange(len(labels)), images_per_class)


def test_a_stream_renames_classes_in_an_order_of_its_seed_and_takes_so_many_of_each():
    labels, test_labels = torch.arange(140) % 7, torch.arange(70) % 7
    made = make_stream(pool(labels, 12), pool(test_labels, 4), tasks=3, seed=0)
    assert (made.tasks, made.width, made.classes) == (3, 2, 6)  # the seventh class has no task
    assert made.labels.bincount().tolist() == [12] * 6
    assert made.test_labels.bincount().tolist() == [4] * 6
    names = {}
    for index, renamed, original in ((made.train, made.labels, labels), (made.test, made.test_labels, test_labels)):
        assert len(index.unique()) == len(index)
        for old, new in zip(original[index].tolist(), renamed.tolist(), strict=True):
            assert names.setdefault(old, new) == new  # the same in training and test
    assert sorted(names.values()) == list(range(6))
    again, other = (make_stream(pool(labels, 12), pool(test_labels, 4), 3, seed) for seed in (0, 1))
    assert torch.equal(made.train, again.train)
    assert not torch.equal(labels[made.train], labels[other.train])


def test_tasks_are_all_training_images_in_turn_each_with_classes_of_its_own():
    labels = torch.arange(60) % 6
    made = make_stream(pool(labels), pool(labels), tasks=3, seed=4)
    x = torch.randn(60, 5)
    tasks = list(made.over(x))
    assert [task.number for task in tasks] == [0, 1, 2]
    assert [list(task.classes) for task in tasks] == [[0, 1], [2, 3], [4, 5]]
    assert [task.seen for task in tasks] == [2, 4, 6]
    assert all(sorted(task.labels.unique().tolist()) == list(task.classes) for task in tasks)
    assert torch.equal(torch.cat([task.x for task in tasks]), x[made.train])
    assert torch.equal(torch.cat([task.labels for task in tasks]), made.labels)


def test_fewer_than_two_classes_a_task_are_an_error():
    labels = torch.arange(50) % 5
    with pytest.raises(InputError, match=r"train_continual.tasks: 3 tasks of 5 classes are less than 2 classes each"):
        make_stream(pool(labels), pool(labels), tasks=3, seed=0)


def test_what_is_held_out_is_not_learnt_from():
    labels = torch.arange(100) % 10
    kept, held_out = hold_out(pool(labels, 7), 0.3, seed=0, images_per_class=5)
    assert len(held_out.index) == 30
    assert sorted([*kept.index.tolist(), *held_out.index.tolist()]) == list(range(100))
    assert (kept.images_per_class, held_out.images_per_class) == (7, 5)
    assert kept.labels is held_out.labels is labels  # of all, which the indices are into
    made = make_stream(kept, held_out, tasks=5, seed=1)
    assert not set(made.train.tolist()) & set(made.test.tolist())
    assert torch.equal(kept.index, hold_out(pool(labels, 7), 0.3, 0, 5)[0].index)
    assert not torch.equal(kept.index, hold_out(pool(labels, 7), 0.3, 1, 5)[0].index)


def test_measures_of_matrices_that_are_known():
    r = torch.tensor([[1.0, 0.5, 0.5], [0.6, 0.9, 0.4], [0.2, 0.7, 0.8]])
    got = measures(r, chance=0.5)
    expected = {"final": 1.7 / 3, "average": (1.0 + 0.75 + 1.7 / 3) / 3, "forgetting": 0.5}
    expected |= {"backward_transfer": -0.5, "forward_transfer": -0.05}
    assert got == pytest.approx(expected)
    assert measures(torch.eye(3) + (1 - torch.eye(3)) * 0.5, 0.5)["forward_transfer"] == 0
    assert measures(torch.ones(3, 3), 0.5)["forgetting"] == 0


def test_a_perfect_classifier_of_its_task_alone_forgets_class_incrementally():
    labels = torch.arange(60) % 6
    scores = torch.full((3, 60, 6), -1.0)
    for t in range(3):
        scores[t, :, 2 * t : 2 * t + 2] = one_hot(labels % 2, 2).float()  # it answers the newest task's class
    by_kind = accuracy_matrices(scores, stream(labels, labels))
    assert torch.equal(by_kind["class"], torch.eye(3))
    assert by_kind["task"].diagonal().eq(1).all()
