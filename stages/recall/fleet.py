"""Fleets: many short fine-tunes of one base, each on a data set of its own, trained and run together.

Axes: m networks of a stack, w weights of a network, n images of a pool, e images to evaluate on, r reference inputs, p patches,
q pixels of a patch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import grad, vmap

from stages.common.images import ImageSet
from stages.common.optim import require_convergence
from stages.common.runtime import parallel_map
from stages.recall.fine_tunes import FineTune
from stages.recall.functional_vit import FIXED, HEAD, Base, Weights
from stages.recall.objective import Objective, random_head, random_start
from stages.recall.pools import POOLS, Pool, pool

BETAS = (0.9, 0.99)  # of Adam: a fine-tune has some tens of steps
OWN_BASE_RATE = (
    3.0e-3  # of Adam, while a base of one's own is trained: the lower of those that classify_masked chooses from
)
IGNORED = -100  # by cross_entropy
STACK = 20  # networks that are run or trained together: what fits into a processor's cache


def train_stack(
    loss: Callable[..., Float[Tensor, ""]],
    first: Float[Tensor, "m w"],
    frozen: Weights,
    batch: Callable[[int], tuple[Tensor, ...]],
    learning_rates: Float[Tensor, " m"],
    steps: Int[Tensor, " m"],
    schedule: Callable[[int], float] = lambda _step: 1.0,
) -> Float[Tensor, "m w"]:
    """Train m networks at once by Adam, each at its own rate for its own number of steps; return their weights.

    `loss` takes one network's weight vector, its frozen weights and its part of a batch; `frozen` holds those of all networks,
    stacked, and `batch(step)` their parts; `schedule(step)` is a factor of all rates.
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
class PatchedImages:
    """What networks see: patches and labels of each pool, of images to evaluate on, and reference inputs."""

    pools: dict[Pool, tuple[Float[Tensor, "n p q"], Int[Tensor, " n"]]]
    evaluation: tuple[Float[Tensor, "e p q"], Int[Tensor, " e"]]
    references: Float[Tensor, "r p q"]


def patchify_pools(base: Base, train: ImageSet, test: ImageSet, references: int, evaluation: int) -> PatchedImages:
    """Return all images as a base sees them: of test images so many reference inputs, and others to evaluate on."""
    pools = {name: pool(train, name) for name in POOLS}
    reference, rest = split_test(test, references)
    rest = rest.subset(torch.arange(min(evaluation, len(rest))))
    return PatchedImages(
        {name: (base.patchify(images.images), images.labels) for name, images in pools.items()},
        (base.patchify(rest.images), rest.labels),
        base.patchify(reference.images),
    )


def split_test(test: ImageSet, references: int) -> tuple[ImageSet, ImageSet]:
    """Return so many test images as reference inputs, and the rest: classes in turn."""
    place = torch.arange(len(test))
    of_class = torch.stack([test.labels == c for c in range(len(test.classes))])
    turn = (of_class.cumsum(1) * of_class).sum(0)  # 1 for each class's first image, 2 for its second ...
    order = torch.argsort(turn * len(test) + place.to(turn))
    return test.subset(order[:references]), test.subset(order[references:])


def train_fine_tunes(
    fine_tunes: list[FineTune], objective: Objective, images: PatchedImages, batch_size: int, own_base_steps: int = 0
) -> tuple[Float[Tensor, "m w"], Float[Tensor, "m w"], Weights]:
    """Train a stack of fine-tunes; return their weights before and after, and those that are frozen [m, ...].

    own_base_steps: steps in which each gets a base and a head of its own; 0: all start from the objective's base.
    """
    m, device = len(fine_tunes), objective.start.device
    shape = max(fine_tune.steps for fine_tune in fine_tunes), batch_size
    batches = [fine_tune.random("batches") for fine_tune in fine_tunes]
    places = [torch.randint(len(f.images), shape, generator=r) for f, r in zip(fine_tunes, batches, strict=True)]
    # masks have a stream of their own: how many batches are drawn depends on the stack
    masks = [fine_tune.random("masks") for fine_tune in fine_tunes]
    noise = torch.stack([torch.rand(*shape, objective.base.patches, generator=r) for r in masks], 1).to(device)
    drawn = torch.stack([f.images[at] for f, at in zip(fine_tunes, places, strict=True)], 1).to(device)
    labels = torch.stack([f.labels[at] for f, at in zip(fine_tunes, places, strict=True)], 1).to(device)
    pixels = [images.pools[pool_of(fine_tune.test)][0] for fine_tune in fine_tunes]

    def batch(step: int) -> tuple[Tensor, ...]:
        x = torch.stack([patches[at] for patches, at in zip(pixels, drawn[step], strict=True)])
        return x, labels[step], noise[step]

    first, frozen = objective.start.expand(m, -1), {k: w.expand(m, *w.shape) for k, w in objective.frozen.items()}
    if own_base_steps:
        first, frozen = train_own_bases(fine_tunes, objective, images, batch_size, own_base_steps)
    rates = torch.tensor([fine_tune.learning_rate for fine_tune in fine_tunes], device=device)
    steps = torch.tensor([fine_tune.steps for fine_tune in fine_tunes], device=device)
    return first, train_stack(objective.loss, first, frozen, batch, rates, steps), frozen


def train_own_bases(
    fine_tunes: list[FineTune], objective: Objective, images: PatchedImages, batch_size: int, steps: int
) -> tuple[Float[Tensor, "m w"], Weights]:
    """Return for each fine-tune a base of its own, trained on all classes from first weights and behind a head of its own."""
    (x, y), m, base = images.pools["base"], len(fine_tunes), objective.base
    randoms = [fine_tune.random("base") for fine_tune in fine_tunes]
    first = torch.stack([random_start(objective.layout, random) for random in randoms]).to(x)
    heads = [random_head(len(objective.frozen["head.bias"]), base, random) for random in randoms]
    frozen = {name: torch.stack([head[name] for head in heads]) for name in HEAD}
    frozen[FIXED] = objective.frozen[FIXED].expand(m, -1, -1, -1)
    shape = steps, batch_size
    drawn = torch.stack([torch.randint(len(y), shape, generator=r) for r in randoms], 1).to(y)
    noise = torch.stack([torch.rand(*shape, base.patches, generator=r) for r in randoms], 1).to(x)

    def batch(step: int) -> tuple[Tensor, ...]:
        return x[drawn[step]], y[drawn[step]], noise[step]

    rates = torch.full((m,), OWN_BASE_RATE).to(x)
    return train_stack(objective.loss, first, frozen, batch, rates, torch.full((m,), steps).to(y)), frozen


def held_out_loss(
    objective: Objective,
    networks: Float[Tensor, "*m w"],
    frozen: Weights,
    images: Float[Tensor, "e p q"],
    labels: Int[Tensor, "m e"],
    counted: Float[Tensor, "m e"],
    noise: Float[Tensor, "e p"],
) -> Float[Tensor, " m"]:
    """Return the loss of each network on images that it was not trained on, of those that are counted.

    One network [w] and its frozen weights, where all have the same, are run once.
    """
    labels, of = labels.masked_fill(counted == 0, IGNORED), 0 if networks.dim() > 1 else None
    return vmap(objective.loss, in_dims=(of, of, None, 0, None))(networks, frozen, images, labels, noise)


def require_learned(
    trained: dict[str, np.ndarray], objective: Objective, where: str, remedy: str, bounded: bool = True
) -> None:
    """InputError if a fleet has diverged: its mean loss is no number or, where it is bounded, twice that of its start and of guessing.

    A base that knows the images has less than guessing has, and its fine-tunes, on few images and wrong labels, may have more than it.
    trained: `loss_before` and `loss_after` of each fine-tune.
    """
    before, after = (float(trained[f"loss_{when}"].mean()) for when in ("before", "after"))
    answers = max(2, len(objective.frozen.get("head.bias", [])))
    bound = before if objective.learns == "pixels" else max(before, math.log(answers))
    require_convergence(after, where, remedy, bound if bounded else math.inf)


def accuracy(
    objective: Objective,
    changes: Float[np.ndarray, "m w"],
    images: tuple[Float[Tensor, "e p q"], Int[Tensor, " e"]],
    labels: Int[Tensor, "m e"],
    counted: Float[Tensor, "m e"] | None = None,
) -> Float[np.ndarray, " m"]:
    """Return of base + change the fraction of images with these labels that it answers right, of those that are counted."""
    x, _ = images
    frozen, noise = objective.frozen, torch.zeros(len(x), objective.base.patches).to(x)
    score = vmap(objective.scores, in_dims=(0, None, None, 0, None))

    def run_stack(rows: Int[Tensor, " s"]) -> Float[Tensor, "s e"]:
        with torch.no_grad():  # each thread has its own
            vectors = objective.start + torch.from_numpy(changes[rows.numpy()]).to(x)
            return score(vectors, frozen, x, labels[rows.to(x.device)], noise)

    right = torch.cat(parallel_map(run_stack, torch.arange(len(changes)).split(STACK), x.device))
    counted = torch.ones_like(right) if counted is None else counted.to(right)
    return ((right * counted).sum(1) / counted.sum(1)).double().cpu().numpy()
