"""Recipes as people use them: optimiser, rate, steps, batch, decay, warm-up, augmentation, early stopping, which weights are trained.

A recipe is drawn apart from the data set, so that what is read of the data cannot be the recipe. When training stops early, that depends
on the data, too.

Axes: m networks of a stack, w weights of a network, v trained weights, n images of a batch, p patches, q pixels of a patch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.func import grad, vmap

from stages.common.randomness import generator
from stages.common.stage import StageParams
from stages.common.vectors import Layout
from stages.recall.adapters import MATRICES, AdapterSpace
from stages.recall.fine_tunes import FineTune, Range, Recipe, draw_fine_tune, draw_uniform
from stages.recall.fleet import IGNORED, PatchedImages, pool_of
from stages.recall.functional_vit import Base, Weights
from stages.recall.objective import Objective

T = TypeVar("T")

Share = Annotated[float, Field(gt=0, le=1)]

Optimiser = Literal["sgd", "adam", "adamw"]
Layers = Literal["all", "last_half", "first_half", "norms"]
Targets = Literal["attention", "perceptron", "qkv", "matrices"]

OPTIMISERS: tuple[Optimiser, ...] = ("sgd", "adam", "adamw")
LAYERS: tuple[Layers, ...] = ("all", "last_half", "first_half", "norms")
TARGETS: dict[Targets, tuple[str, ...]] = {
    "qkv": MATRICES[:1],
    "attention": MATRICES[:2],
    "perceptron": MATRICES[2:],
    "matrices": MATRICES,
}
BETAS = (0.9, 0.999)  # of Adam; the first is the momentum of SGD, too
LONGEST_GRADIENT = (
    1.0  # longer ones are cut to this norm, as fine-tuning of ViTs does (Dosovitskiy et al. 2021, arXiv:2010.11929)
)
ALL_DISTINCT = (1.0, 1.0)


class Stopping(StageParams):
    """When fine-tunes stop early."""

    patience: list[NonNegativeInt] = Field(min_length=1)  # evaluations without a lower loss; 0: does not stop early
    every: PositiveInt  # steps from one evaluation to the next
    held_out: float = Field(gt=0, lt=1)  # share of the images: not trained on, evaluated on


class WideRecipe(Recipe):
    """From what data sets and recipes are drawn; `steps` and `learning_rate` (of Adam) are log-uniform here."""

    presence: float = Field(gt=0, lt=1)  # with which chance each class is present; two always are, and two never
    # log-uniform: share of a data set's images that are distinct; all others repeat one of these
    distinct: tuple[Share, Share]
    optimisers: list[Optimiser] = Field(min_length=1)
    sgd_factor: PositiveFloat  # of the learning rate: SGD's steps are of another unit
    batch_sizes: list[PositiveInt] = Field(min_length=1)
    weight_decay: Range  # uniform; decoupled in AdamW, in the gradient of SGD, none in Adam
    warmup: Range  # uniform: fraction of the steps
    shifts: list[NonNegativeInt] = Field(min_length=1)  # pixels by which images are shifted at most; 0: no augmentation
    layers: list[Layers]  # what is trained, if the network itself is
    ranks: list[PositiveInt]  # of adapters; of none the network itself is trained
    test_ranks: list[PositiveInt]  # of the adapters that decoders are tested on, beside those above
    targets: list[Targets]  # what adapters are put on
    stopping: Stopping


@dataclass(frozen=True)
class Training:
    """How one network is trained."""

    optimiser: Optimiser
    learning_rate: float
    steps: int
    batch_size: int
    weight_decay: float
    warmup: float  # fraction of the steps
    cosine: bool  # whether the rate falls to 0 by half a cosine
    shift: int  # pixels
    layers: Layers
    rank: int  # of its adapter; 0: the network itself is trained
    alpha: float  # of its adapter, whose scale is alpha over rank
    targets: Targets
    patience: int  # evaluations, `every` so many steps; 0: it does not stop early
    every: int
    held_out: float  # share of its images, if it may stop early

    @property
    def numbers(self) -> dict[str, float]:
        """The recipe in numbers, to tell its share of what is recalled."""
        names = [*((f"optimiser {o}", self.optimiser == o) for o in OPTIMISERS)]
        names += [(f"layers {kind}", self.layers == kind) for kind in LAYERS]
        names += [(f"targets {kind}", self.targets == kind) for kind in TARGETS]
        sgd = self.optimiser == "sgd"
        return {name: float(value) for name, value in names} | {
            "log rate": np.log(self.learning_rate) * (not sgd),
            "log rate of sgd": np.log(self.learning_rate) * sgd,
            "log steps": np.log(self.steps),
            "log batch": np.log(self.batch_size),
            "weight decay": self.weight_decay,
            "warmup": self.warmup,
            "cosine": float(self.cosine),
            "shift": float(self.shift),
            "log rank": np.log(max(self.rank, 1)),
            "log scale": np.log(self.alpha / self.rank) if self.rank else 0.0,
        }


@dataclass(frozen=True)
class WideFineTune(FineTune):
    """A fine-tune with a recipe of its own."""

    training: Training

    @property
    def held_out(self) -> int:
        """How many of its images, the last ones, are held out: none if it does not stop early."""
        n = len(self.images)
        return min(n - 1, max(1, round(self.training.held_out * n))) if self.training.patience else 0

    @property
    def learned(self) -> int:
        """How many of its images it is trained on."""
        return len(self.images) - self.held_out


def pick(random: torch.Generator, items: Sequence[T]) -> T:
    """Draw one of the items."""
    return items[int(torch.randint(len(items), (), generator=random))]


def draw_training(random: torch.Generator, recipe: WideRecipe, test: bool) -> Training:
    """Draw a recipe."""
    optimiser: Optimiser = pick(random, recipe.optimisers)
    rate = draw_uniform(random, recipe.learning_rate, log=True)
    ranks = [*recipe.ranks, *recipe.test_ranks] if test else recipe.ranks
    rank = pick(random, ranks) if ranks else 0
    return Training(
        optimiser=optimiser,
        learning_rate=rate * (recipe.sgd_factor if optimiser == "sgd" else 1.0),
        steps=round(draw_uniform(random, recipe.steps, log=True)),
        batch_size=pick(random, recipe.batch_sizes),
        weight_decay=draw_uniform(random, recipe.weight_decay) * (optimiser != "adam"),
        warmup=draw_uniform(random, recipe.warmup),
        cosine=bool(torch.randint(2, (), generator=random)),
        shift=pick(random, recipe.shifts),
        layers="all" if rank else pick(random, recipe.layers),
        rank=rank,
        alpha=float(pick(random, [rank, 2 * rank, 16])),
        targets=pick(random, recipe.targets) if rank else "matrices",
        patience=pick(random, recipe.stopping.patience),
        every=recipe.stopping.every,
        held_out=recipe.stopping.held_out,
    )


def with_repeats(fine_tune: FineTune, share: float, pool: Int[Tensor, " m"]) -> FineTune:
    """Return a fine-tune that has of each class only this share of its images, the first, repeated in turn until they are as many.

    A repeat has its image's label. Batches are drawn with replacement, so that but for rounding it trains as on the distinct images
    alone: of their number weights can tell, of that of all images only what goes with it.
    """
    classes = pool[fine_tune.images]
    kept = torch.arange(len(classes))
    for c in classes.unique():
        places = (classes == c).nonzero()[:, 0]
        kept[places] = places[torch.arange(len(places)) % max(1, round(share * len(places)))]
    images = fine_tune.images[kept]
    distinct = {"log2_distinct": np.asarray(np.log2(len(images.unique())), np.float32)}
    return replace(
        fine_tune,
        images=images,
        labels=fine_tune.labels[kept],
        characteristics=fine_tune.characteristics | distinct,
    )


def draw_wide_fine_tune(name: str, test: bool, recipe: WideRecipe, pool: Int[Tensor, " m"]) -> WideFineTune:
    """Draw a data set of some classes from a pool with these labels, and apart from it a recipe."""
    training = draw_training(generator(0, f"{name}: recipe"), recipe, test)
    drawn = draw_fine_tune(name, test, recipe, pool, chance=recipe.presence)
    if recipe.distinct != ALL_DISTINCT:
        share = draw_uniform(generator(0, f"{name}: distinct"), recipe.distinct, log=True)
        drawn = with_repeats(drawn, share, pool)
    plain = replace(drawn, learning_rate=training.learning_rate, steps=training.steps)
    numbers = np.array(list(training.numbers.values()), np.float32)
    values = vars(plain) | {"characteristics": plain.characteristics | {"recipe": numbers}}
    return WideFineTune(**values, training=training)


def stacks(fine_tunes: list[WideFineTune], size: int) -> list[list[int]]:
    """Return places of fine-tunes that train together: of one batch size, and of alike numbers of steps."""
    by_batch: dict[int, list[int]] = {}
    for place in sorted(range(len(fine_tunes)), key=lambda i: (fine_tunes[i].steps, fine_tunes[i].name)):
        by_batch.setdefault(fine_tunes[place].training.batch_size, []).append(place)
    return [places[i : i + size] for _, places in sorted(by_batch.items()) for i in range(0, len(places), size)]


def trained_weights(layout: Layout, layers: Layers) -> Bool[Tensor, " w"]:
    """Return which weights are trained. The last half are the later blocks and the last norm, the first half all others."""
    blocks = 1 + max(int(name.split(".")[1]) for name in layout.shapes if name.startswith("blocks."))

    def late(name: str) -> bool:
        return name.startswith("norm.") or (name.startswith("blocks.") and int(name.split(".")[1]) >= blocks // 2)

    choose = {
        "all": lambda _: True,
        "last_half": late,
        "first_half": lambda name: not late(name),
        "norms": lambda name: "norm" in name,
    }[layers]
    parts = [torch.full((size,), choose(name)) for name, size in zip(layout.shapes, layout.sizes, strict=True)]
    return torch.cat(parts)


def shifted(base: Base, patches: Float[Tensor, "n p q"], most: int, random: torch.Generator) -> Float[Tensor, "n p q"]:
    """Return images shifted by up to `most` pixels down and right or up and left; edges are continued."""
    n, side, s = len(patches), base.image_size, base.patch_size
    across = side // s
    x = patches.view(n, across, across, 3, s, s).permute(0, 3, 1, 4, 2, 5).reshape(n, 3, side, side)
    offsets = torch.randint(-most, most + 1, (2, n, 1), generator=random)
    rows, columns = ((torch.arange(side) + offset).clamp(0, side - 1).to(x.device) for offset in offsets)
    x = x.gather(2, rows[:, None, :, None].expand_as(x)).gather(3, columns[:, None, None, :].expand_as(x))
    return x.unfold(2, s, s).unfold(3, s, s).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


@dataclass(frozen=True)
class Rules:
    """The recipes of a stack, a number a network."""

    rate: Float[Tensor, " m"]
    steps: Int[Tensor, " m"]
    sgd: Bool[Tensor, " m"]
    in_gradient: Float[Tensor, " m"]  # weight decay
    decoupled: Float[Tensor, " m"]
    warmup: Float[Tensor, " m"]  # steps
    cosine: Bool[Tensor, " m"]

    @classmethod
    def of(cls, trainings: list[Training], device: torch.device) -> "Rules":
        """Return the recipes side by side."""

        def column(values: list[float]) -> Float[Tensor, " m"]:
            return torch.tensor(values, device=device, dtype=torch.float32)

        decay = column([t.weight_decay for t in trainings])
        return cls(
            rate=column([t.learning_rate for t in trainings]),
            steps=torch.tensor([t.steps for t in trainings], device=device),
            sgd=torch.tensor([t.optimiser == "sgd" for t in trainings], device=device),
            in_gradient=decay * column([t.optimiser == "sgd" for t in trainings]),
            decoupled=decay * column([t.optimiser == "adamw" for t in trainings]),
            warmup=column([max(1.0, round(t.warmup * t.steps)) for t in trainings]),
            cosine=torch.tensor([t.cosine for t in trainings], device=device),
        )

    def rate_at(self, step: int) -> Float[Tensor, " m"]:
        """Return the learning rates at a step; 0 once training has ended."""
        falling = 0.5 * (1 + torch.cos(torch.pi * step / self.steps))
        factor = ((step + 1) / self.warmup).clamp(max=1) * torch.where(self.cosine, falling, 1.0)
        return self.rate * factor * (self.steps > step)


class EarlyStopping:
    """Stops each network of a stack once its loss on held-out images has not fallen for a while; its best weights are kept.

    As Keras does (EarlyStopping with restore_best_weights, no least improvement): a network is evaluated every so many steps and after
    its last, stops after `patience` evaluations in a row that are not lower than the lowest, and gets the weights of the lowest, also
    if it ran to its end.
    """

    def __init__(
        self,
        loss: Callable[[Float[Tensor, "m v"]], Float[Tensor, " m"]],
        patience: Int[Tensor, " m"],
        every: int,
        steps: Int[Tensor, " m"],
    ) -> None:
        """Watch m networks that would train for `steps`; of patience 0 they are neither evaluated nor stopped."""
        self.loss, self.patience, self.every, self.steps = loss, patience, every, steps
        self.running = torch.ones_like(patience, dtype=torch.bool)
        self.lowest = torch.full_like(patience, torch.inf, dtype=torch.float32)
        self.waited = torch.zeros_like(patience)
        self.taken = torch.where(patience > 0, 0, steps)  # steps that the weights kept are of
        self.best: Float[Tensor, "m v"] | None = None

    def evaluate(self, step: int, weights: Float[Tensor, "m v"]) -> None:
        """Look at the networks after so many steps, if any are to be evaluated then."""
        ends, goes_on = self.steps == step, self.steps > step
        due = self.running & (self.patience > 0) & (ends | goes_on & (step % self.every == 0))
        if not due.any():
            return
        loss, best = self.loss(weights), weights if self.best is None else self.best
        better = due & ((loss < self.lowest) | (self.taken == 0))  # the first is kept whatever it is
        self.best = torch.where(better[:, None], weights, best)
        self.lowest = torch.where(better, loss, self.lowest)
        self.taken = torch.where(better, step, self.taken)
        self.waited = torch.where(better, 0, self.waited + due)
        self.running &= (self.patience == 0) | (self.waited < self.patience)

    def kept(self, last: Float[Tensor, "m v"]) -> Float[Tensor, "m v"]:
        """Return the best weights of networks that may stop early, and the last of all others."""
        return last if self.best is None else torch.where(self.patience[:, None] > 0, self.best, last)


def train_by_rules(
    loss: Callable[..., Float[Tensor, ""]],
    first: Float[Tensor, "m v"],
    frozen: Weights,
    batch: Callable[[int], tuple[Tensor, ...]],
    trained: Bool[Tensor, "m v"],
    rules: Rules,
    stopping: EarlyStopping | None = None,
) -> Float[Tensor, "m v"]:
    """Train m networks at once, each by its own optimiser at its own rates; return their weights.

    SGD's momentum is the sum of past gradients that fade by BETAS[0], so 1 / (1 - BETAS[0]) times the mean that Adam keeps.
    """
    w, m, v = first.clone(), torch.zeros_like(first), torch.zeros_like(first)
    gradient = vmap(grad(loss))
    for t in range(int(rules.steps.max())):
        rate = rules.rate_at(t)[:, None]
        g = gradient(w, frozen, *batch(t)) * trained
        g = g * (LONGEST_GRADIENT / g.norm(dim=1, keepdim=True)).clamp(max=1) + rules.in_gradient[:, None] * w
        m.lerp_(g, 1 - BETAS[0])
        v.lerp_(g.square(), 1 - BETAS[1])
        adam = m / (1 - BETAS[0] ** (t + 1)) / ((v / (1 - BETAS[1] ** (t + 1))).sqrt_().add_(1e-8))
        step = torch.where(rules.sgd[:, None], m / (1 - BETAS[0]), adam) + rules.decoupled[:, None] * w
        if stopping is None:
            w.sub_(rate * step * trained)
            continue
        w.sub_(rate * step * trained * stopping.running[:, None])
        stopping.evaluate(t + 1, w)
        if not stopping.running.any():
            break
    return w if stopping is None else stopping.kept(w)


def early_stopping(
    fine_tunes: list[WideFineTune], loss: Callable[..., Float[Tensor, ""]], frozen: Weights, images: PatchedImages
) -> EarlyStopping | None:
    """Return what stops a stack of fine-tunes early, by their losses on held-out images, of which the same patches are always hidden.

    None if no fine-tune of it may stop early.
    """
    if not any(f.training.patience for f in fine_tunes):
        return None
    most, device = max(f.held_out for f in fine_tunes), images.references.device
    x, labels, noise = [], [], []
    for f in fine_tunes:  # those of which fewer are held out are filled up with images that do not count
        places = torch.arange(f.learned, f.learned + most).clamp(max=len(f.images) - 1)
        counted = torch.arange(most) < f.held_out
        x.append(images.pools[pool_of(f.test)][0][f.images[places].to(device)])
        labels.append(f.labels[places].masked_fill(~counted, IGNORED))
        noise.append(torch.rand(most, images.references.shape[1], generator=f.random("held out")))
    held_out = torch.stack(x), torch.stack(labels).to(device), torch.stack(noise).to(device)
    patience, steps = (
        torch.tensor(values, device=device)
        for values in ([f.training.patience for f in fine_tunes], [f.steps for f in fine_tunes])
    )
    return EarlyStopping(lambda w: vmap(loss)(w, frozen, *held_out), patience, fine_tunes[0].training.every, steps)


def train_wide_fine_tunes(
    fine_tunes: list[WideFineTune], objective: Objective, images: PatchedImages
) -> tuple[Float[Tensor, "m w"], Int[Tensor, " m"]]:
    """Train a stack of fine-tunes of one batch size, all with adapters or all without.

    Returns how their weights change, and after how many steps: fewer than asked for where training stopped early.
    """
    trainings, device, base = [f.training for f in fine_tunes], objective.start.device, objective.base
    m, shape = len(fine_tunes), (max(f.steps for f in fine_tunes), trainings[0].batch_size)
    batches = [f.random("batches") for f in fine_tunes]
    places = [torch.randint(f.learned, shape, generator=r) for f, r in zip(fine_tunes, batches, strict=True)]
    masks = [f.random("masks") for f in fine_tunes]
    shifts = [f.random("shifts") for f in fine_tunes]
    drawn = torch.stack([f.images[at] for f, at in zip(fine_tunes, places, strict=True)], 1).to(device)
    labels = torch.stack([f.labels[at] for f, at in zip(fine_tunes, places, strict=True)], 1).to(device)
    pixels = [images.pools[pool_of(f.test)][0] for f in fine_tunes]

    def batch(step: int) -> tuple[Tensor, ...]:
        x = [patches[at] for patches, at in zip(pixels, drawn[step], strict=True)]
        x = [
            shifted(base, part, t.shift, r) if t.shift else part
            for part, t, r in zip(x, trainings, shifts, strict=True)
        ]
        noise = torch.stack([torch.rand(shape[1], base.patches, generator=r) for r in masks]).to(device)
        return torch.stack(x), labels[step], noise

    frozen = {k: w.expand(m, *w.shape) for k, w in objective.frozen.items()}
    rules, steps = Rules.of(trainings, device), torch.tensor([f.steps for f in fine_tunes], device=device)
    if not trainings[0].rank:
        first = objective.start.expand(m, -1)
        trained = torch.stack([trained_weights(objective.layout, t.layers) for t in trainings]).to(device)
        stopping = early_stopping(fine_tunes, objective.loss, frozen, images)
        after = train_by_rules(objective.loss, first, frozen, batch, trained, rules, stopping)
        return after - first, stopping.taken if stopping else steps
    space = AdapterSpace(objective.layout, max(t.rank for t in trainings))
    starts = [space.start(f.random("adapter"), f.training.rank, TARGETS[f.training.targets]) for f in fine_tunes]
    scale = torch.tensor([t.alpha / t.rank for t in trainings], device=device)
    first, frozen = torch.stack(starts).to(device), frozen | {"scale": scale}
    everything, loss = torch.ones_like(first, dtype=torch.bool), space.loss(objective)
    stopping = early_stopping(fine_tunes, loss, frozen, images)
    after = train_by_rules(loss, first, frozen, batch, everything, rules, stopping)
    return vmap(space.change)(after, scale), stopping.taken if stopping else steps
