"""Few-shot episodes: a few labelled images of a few classes to learn from, and others to be tested on.

Axes: n training images, m test images, w classes of an episode, s support images, q queries.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from stages.common.randomness import generator
from stages.common.stage import InputError


@dataclass(frozen=True)
class Episode:
    """Indices into two sets of images; labels 0 to n_way - 1 stand for `classes`. Every method gets the same episodes."""

    classes: Int[Tensor, " w"]
    support: Int[Tensor, " s"]  # into the training images, n_shot of each class
    support_labels: Int[Tensor, " s"]
    queries: Int[Tensor, " q"]  # into the test images
    query_labels: Int[Tensor, " q"]
    seed: int


def draw_episode(
    train_labels: Int[Tensor, " n"], test_labels: Int[Tensor, " m"], n_way: int, n_shot: int, queries: int, seed: int
) -> Episode:
    """Return an episode of n_way random classes, and at most `queries` test images; InputError if a class has too few images.

    Training and test images may be the same: then no query is a support.
    """
    random = generator(seed, "episode")
    all_classes = train_labels.unique().cpu()
    if n_way > len(all_classes):
        raise InputError(f"n_way {n_way}: there are {len(all_classes)} classes")
    classes = all_classes[torch.randperm(len(all_classes), generator=random)[:n_way]].sort().values
    support = []
    for c in classes.tolist():
        of_class = (train_labels == c).nonzero()[:, 0].cpu()
        if len(of_class) < n_shot:
            raise InputError(f"n_shot {n_shot}: class {c} has {len(of_class)} training images")
        support.append(of_class[torch.randperm(len(of_class), generator=random)[:n_shot]])
    support = torch.cat(support)
    free = torch.isin(test_labels.cpu(), classes)
    if train_labels is test_labels:
        free[support] = False
    free = free.nonzero()[:, 0]
    chosen = free[torch.randperm(len(free), generator=random)[:queries]]
    device = train_labels.device
    labels = torch.full((int(all_classes.max()) + 1,), -1)
    labels[classes] = torch.arange(n_way)
    labels = labels.to(device)
    support, chosen = support.to(device), chosen.to(device)
    return Episode(classes, support, labels[train_labels[support]], chosen, labels[test_labels[chosen]], seed)
