"""Fleets: many short fine-tunes of one base, each on a data set of its own, trained together."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import grad, vmap

from stages.common.images import ImageSet
from stages.recall.objective import Objective, random_head, random_start
from stages.recall.pools import POOLS, Pool, pool
from stages.recall.tasks import Task
from stages.recall.vit import FIXED, HEAD, Base, Weights

BETAS = (0.9, 0.99)  # of Adam: a fine-tune has some tens of steps
OWN_BASE_RATE = 3.0e-3  # of Adam, while a base of one's own is trained


def train_stack(
    loss: Callable[..., Float[Tensor, ""]],
    first: Float[Tensor, "m p"],
    frozen: Weights,
    batch: Callable[[int], tuple[Tensor, ...]],
    learning_rates: Float[Tensor, " m"],
    steps: Int[Tensor, " m"],
    schedule: Callable[[int], float] = lambda _step: 1.0,
) -> Float[Tensor, "m p"]:
    """Train m networks at once by Adam, each at its own rate for its own number of steps; return their weights.

    `loss` is of one network's weight vector, its frozen weights and its part of a batch; `frozen` has all networks', stacked, and
    `batch` gives theirs at a step; `schedule` gives a factor of all rates.
    """
    w, m, v = first.clone(), torch.zeros_like(first), torch.zeros_like(first)
    gradient = vmap(grad(loss))
    for t in range(int(steps.max())):
        active = steps > t
        g = gradient(w, frozen, *batch(t))
        m.lerp_(g, 1 - BETAS[0])
        v.lerp_(g.square(), 1 - BETAS[1])
        size = -schedule(t) * learning_rates * active / (1 - BETAS[0] ** (t + 1))
        w.addcdiv_(m * size[:, None], (v / (1 - BETAS[1] ** (t + 1))).sqrt_().add_(1e-8))
    return w


def pool_of(test: bool) -> Pool:
    """Return the pool of images of a fine-tune."""
    return "test" if test else "train"


@dataclass(frozen=True)
class Images:
    """What networks see: patches and labels of each pool, of images to evaluate on, and reference inputs."""

    pools: dict[Pool, tuple[Float[Tensor, "n p q"], Int[Tensor, " n"]]]
    evaluation: tuple[Float[Tensor, "e p q"], Int[Tensor, " e"]]
    references: Float[Tensor, "r p q"]


def show_images(base: Base, train: ImageSet, test: ImageSet, references: int, evaluation: int) -> Images:
    """Return all images as a base sees them: of test images so many reference inputs, and others to evaluate on."""
    pools = {name: pool(train, name) for name in POOLS}
    first, rest = split_test(test, references)
    rest = rest.subset(torch.arange(min(evaluation, len(rest))))
    return Images(
        {name: (base.patchify(part.images), part.labels) for name, part in pools.items()},
        (base.patchify(rest.images), rest.labels),
        base.patchify(first.images),
    )


def split_test(test: ImageSet, references: int) -> tuple[ImageSet, ImageSet]:
    """Return so many test images as reference inputs, and the rest: classes in turn."""
    place = torch.arange(len(test))
    of_class = torch.stack([test.labels == c for c in range(len(test.classes))])
    turn = (of_class.cumsum(1) * of_class).sum(0)  # 1 for each class's first image, 2 for its second ...
    order = torch.argsort(turn * len(test) + place.to(turn))
    return test.subset(order[:references]), test.subset(order[references:])


def train_tasks(
    tasks: list[Task], objective: Objective, images: Images, batch_size: int, own_base_steps: int = 0
) -> tuple[Float[Tensor, "m p"], Float[Tensor, "m p"], Weights]:
    """Train a stack of fine-tunes; return their weights before and after, and those that are frozen [m, ...].

    own_base_steps: steps in which each gets a base and a head of its own; 0: all start from the objective's base.
    """
    m, device = len(tasks), objective.start.device
    longest = max(task.steps for task in tasks), batch_size
    randoms = [task.random("batches") for task in tasks]
    places = [torch.randint(len(t.images), longest, generator=r) for t, r in zip(tasks, randoms, strict=True)]
    masks = [task.random("masks") for task in tasks]  # of their own: how many batches are drawn depends on the stack
    noise = torch.stack([torch.rand(*longest, objective.base.patches, generator=r) for r in masks], 1).to(device)
    drawn = torch.stack([task.images[at] for task, at in zip(tasks, places, strict=True)], 1).to(device)
    labels = torch.stack([task.labels[at] for task, at in zip(tasks, places, strict=True)], 1).to(device)
    own = [images.pools[pool_of(task.test)][0] for task in tasks]

    def batch(step: int) -> tuple[Tensor, ...]:
        x = torch.stack([pixels[at] for pixels, at in zip(own, drawn[step], strict=True)])
        return x, labels[step], noise[step]

    first, frozen = objective.start.expand(m, -1), {k: w.expand(m, *w.shape) for k, w in objective.frozen.items()}
    if own_base_steps:
        first, frozen = train_own_bases(tasks, objective, images, batch_size, own_base_steps)
    rates = torch.tensor([task.learning_rate for task in tasks], device=device)
    steps = torch.tensor([task.steps for task in tasks], device=device)
    return first, train_stack(objective.loss, first, frozen, batch, rates, steps), frozen


def train_own_bases(
    tasks: list[Task], objective: Objective, images: Images, batch_size: int, steps: int
) -> tuple[Float[Tensor, "m p"], Weights]:
    """Return for each task a base of its own, trained on all classes from first weights and behind a head of its own."""
    (x, y), m, base = images.pools["base"], len(tasks), objective.base
    randoms = [task.random("base") for task in tasks]
    first = torch.stack([random_start(objective.layout, random) for random in randoms]).to(x)
    heads = [random_head(len(objective.frozen["head.bias"]), base, random) for random in randoms]
    frozen = {FIXED: objective.frozen[FIXED].expand(m, -1, -1, -1)} | {
        k: torch.stack([h[k] for h in heads]) for k in HEAD
    }
    shape = steps, batch_size
    drawn = torch.stack([torch.randint(len(y), shape, generator=r) for r in randoms], 1).to(y)
    noise = torch.stack([torch.rand(*shape, base.patches, generator=r) for r in randoms], 1).to(x)

    def batch(step: int) -> tuple[Tensor, ...]:
        return x[drawn[step]], y[drawn[step]], noise[step]

    rates = torch.full((m,), OWN_BASE_RATE).to(x)
    return train_stack(objective.loss, first, frozen, batch, rates, torch.full((m,), steps).to(y)), frozen
