"""Streams of tasks, each with classes that are new, and what a learner's accuracy on them says about forgetting.

Axes: n training images, m test images, k images of one task, c classes, t tasks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from stages.common.metrics import accuracy
from stages.common.randomness import generator
from stages.common.stage import InputError


@dataclass(frozen=True)
class Task:
    """What arrives at once: examples of `width` new classes, from number * width to (number + 1) * width - 1."""

    number: int  # from 0
    width: int
    x: Shaped[Tensor, "k ..."]  # images or features
    labels: Int[Tensor, " k"]

    @property
    def classes(self) -> range:
        """The classes that are new."""
        return range(self.number * self.width, self.seen)

    @property
    def seen(self) -> int:
        """How many classes have arrived so far, the new ones among them."""
        return (self.number + 1) * self.width


@dataclass(frozen=True)
class Stream:
    """Tasks one after the other. Labels are renamed so that task t has the classes from t * width to (t + 1) * width - 1."""

    train: Int[Tensor, " n"]  # indices
    labels: Int[Tensor, " n"]
    test: Int[Tensor, " m"]
    test_labels: Int[Tensor, " m"]
    tasks: int
    width: int  # classes a task
    seed: int

    @property
    def classes(self) -> int:
        """How many classes there are in all."""
        return self.tasks * self.width

    def over(self, x: Shaped[Tensor, "images ..."]) -> Iterator[Task]:
        """Yield task after task, with the rows of `x` (images, or their features) that are its training images'."""
        for t in range(self.tasks):
            of_task = self.labels // self.width == t
            yield Task(t, self.width, x[self.train[of_task]], self.labels[of_task])


@dataclass(frozen=True)
class Pool:
    """Images that a stream may take: the labels of all, the indices of those, and how many of each class it takes at most."""

    labels: Int[Tensor, " all"]
    index: Int[Tensor, " n"]
    images_per_class: int


def hold_out(pool: Pool, fraction: float, seed: int, images_per_class: int) -> tuple[Pool, Pool]:
    """Return the pool without a random `fraction` of its images, and those, of which so many of each class may be taken."""
    order = torch.randperm(len(pool.index), generator=generator(seed, "validation stream")).to(pool.index.device)
    held_out = round(fraction * len(order))
    kept, tested = pool.index[order[held_out:]], pool.index[order[:held_out]]
    return Pool(pool.labels, kept, pool.images_per_class), Pool(pool.labels, tested, images_per_class)


def make_stream(train: Pool, test: Pool, tasks: int, seed: int) -> Stream:
    """Return a stream of images of two pools, classes in the order of `seed`; InputError if there are too few of them."""
    classes = int(train.labels.max()) + 1
    width = classes // tasks
    if width < 2:
        raise InputError(f"train_continual.tasks: {tasks} tasks of {classes} classes are less than 2 classes each")
    random = generator(seed, "order of classes")
    rank = torch.empty(classes, dtype=torch.long)
    rank[torch.randperm(classes, generator=random)] = torch.arange(classes)
    rank = rank.to(train.labels.device)

    def first_of_each_class(pool: Pool) -> tuple[Tensor, Tensor]:
        index = pool.index[torch.randperm(len(pool.index), generator=random).to(pool.index.device)]
        labels = rank[pool.labels[index]]
        index = torch.cat([index[labels == c][: pool.images_per_class] for c in range(tasks * width)])
        return index, rank[pool.labels[index]]

    return Stream(*first_of_each_class(train), *first_of_each_class(test), tasks, width, seed)


def accuracy_matrices(scores: Float[Tensor, "t m c"], stream: Stream) -> dict[str, Float[Tensor, "t t"]]:
    """Return R[after task, on task], class-incremental (among the classes seen so far) and task-incremental (the task's own)."""
    kinds = {"class": torch.zeros(stream.tasks, stream.tasks), "task": torch.zeros(stream.tasks, stream.tasks)}
    for on in range(stream.tasks):
        of_task = stream.test_labels // stream.width == on
        labels, first = stream.test_labels[of_task], on * stream.width
        for after in range(stream.tasks):
            so_far = scores[after, of_task, : (after + 1) * stream.width]
            kinds["class"][after, on] = accuracy(so_far, labels)
            kinds["task"][after, on] = accuracy(scores[after, of_task, first : first + stream.width], labels - first)
    return kinds


def measures(r: Float[Tensor, "t t"], chance: float) -> dict[str, float]:
    """Return what Lopez-Paz & Ranzato (2017, arXiv:1706.08840) and Chaudhry et al. (2018, arXiv:1801.10112) read off R.

    Accuracy at the end, mean over tasks; mean over time of that so far; forgetting: what the best earlier accuracy was above the
    last; backward transfer: last minus first; forward transfer: before a task was learned, minus `chance`.
    """
    tasks = len(r)
    earlier = range(tasks - 1)
    return {
        "final": r[-1].mean().item(),
        "average": sum(r[t, : t + 1].mean().item() for t in range(tasks)) / tasks,
        "forgetting": sum((r[i:-1, i].max() - r[-1, i]).item() for i in earlier) / len(earlier),
        "backward_transfer": sum((r[-1, i] - r[i, i]).item() for i in earlier) / len(earlier),
        "forward_transfer": sum(r[i, i + 1].item() - chance for i in earlier) / len(earlier),
    }
