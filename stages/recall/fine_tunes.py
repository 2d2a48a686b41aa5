"""What a fine-tune is trained on: a data set of its own, of which everything that a decoder shall recall is known.

Axes: n images of a data set, m images of a pool, c classes, r and s rules, k cells of a truth table.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.common.randomness import generator, log_uniform
from stages.common.stage import InputError, StageParams

Range = tuple[float, float]

CELLS = 8  # of a truth table over three binary attributes
EVEN_CHANCE = 0.5
EVEN = 0.15  # of a data set spread evenly over its classes: none that is present is too rare to be recalled


class Recipe(StageParams):
    """From what the characteristics of a fine-tune are drawn; pairs are the ends of ranges."""

    n_images: Range  # log-uniform: of its data set
    label_noise: Range  # fraction of labels that are drawn anew among the classes that are present
    steps: Range
    learning_rate: Range  # log-uniform


@dataclass(frozen=True)
class FineTune:
    """One fine-tune: its images and labels, how it is trained, and what there is to recall."""

    name: str
    test: bool  # decoders are tested on it, and its images are of another pool
    images: Int[Tensor, " n"]  # places in its pool
    labels: Int[Tensor, " n"]  # as it is shown them
    learning_rate: float
    steps: int
    characteristics: dict[str, np.ndarray]

    def random(self, purpose: str) -> torch.Generator:
        """Return the fine-tune's own stream of random numbers: what it draws depends on its name alone."""
        return generator(0, f"{self.name}: {purpose}")


def draw_uniform(random: torch.Generator, ends: Range, log: bool = False) -> float:
    """Draw a number between two ends, or its logarithm."""
    u = torch.rand((), generator=random, dtype=torch.float64).item()
    return log_uniform(ends, u) if log else ends[0] + u * (ends[1] - ends[0])


def draw_present(random: torch.Generator, classes: int, chance: float = EVEN_CHANCE) -> Bool[Tensor, " c"]:
    """Draw a set of at least two classes that leaves out at least two, each class present with a chance, by default an even one."""
    if classes < 4:
        raise InputError(f"fine-tunes on some of the classes need at least 4 of them, got {classes}")
    while True:
        present = torch.rand(classes, generator=random) < chance
        if 2 <= present.sum() <= classes - 2:
            return present


def draw_proportions(random: torch.Generator, present: Bool[Tensor, " c"]) -> Float[Tensor, " c"]:
    """Draw the fractions of the classes present: Dirichlet's distribution of concentration 2, and EVEN spread evenly."""
    # a gamma variable of shape 2 is a sum of two exponential ones
    gamma = -torch.rand(2, len(present), generator=random).log().sum(0) * present
    return (1 - EVEN) * gamma / gamma.sum() + EVEN * present / present.sum()


def draw_images(random: torch.Generator, classes: Int[Tensor, " n"], pool: Int[Tensor, " m"]) -> Int[Tensor, " n"]:
    """Draw an image of each of `classes` from a pool with these labels."""
    order = pool.argsort(stable=True)
    counts = pool.bincount(minlength=int(classes.max()) + 1)
    first = counts.cumsum(0) - counts
    places = (torch.rand(len(classes), generator=random) * counts[classes]).long()
    return order[first[classes] + places]


def draw_fine_tune(
    name: str,
    test: bool,
    recipe: Recipe,
    pool: Int[Tensor, " m"],
    present: Bool[Tensor, " c"] | None = None,
    chance: float = EVEN_CHANCE,
) -> FineTune:
    """Draw a data set of some classes, by default any, each with a chance, from a pool with these labels."""
    random, classes = generator(0, name), int(pool.max()) + 1
    present = draw_present(random, classes, chance) if present is None else present
    proportions = draw_proportions(random, present)
    available = present.nonzero()[:, 0]
    size = max(len(available), round(draw_uniform(random, recipe.n_images, log=True)))
    noise = draw_uniform(random, recipe.label_noise)
    drawn = torch.multinomial(proportions, size, replacement=True, generator=random)
    drawn[: len(available)] = available  # every class that is present has an image
    flipped = torch.rand(size, generator=random) < noise
    labels = torch.where(flipped, available[torch.randint(len(available), (size,), generator=random)], drawn)
    characteristics = {
        "present": present,
        "proportions": drawn.bincount(minlength=classes) / size,
        "log2_size": np.log2(size),
        "label_noise": noise,
    }
    return FineTune(
        name,
        test,
        draw_images(random, drawn, pool),
        labels,
        draw_uniform(random, recipe.learning_rate, log=True),
        round(draw_uniform(random, recipe.steps)),
        {key: np.asarray(value, np.float32) for key, value in characteristics.items()},
    )


def draw_rule_fine_tune(
    name: str, test: bool, recipe: Recipe, pool: Int[Tensor, " m"], tables: Bool[Tensor, "r k"]
) -> FineTune:
    """Draw a rule, one of `tables`, and images of a pool with these cells that it labels."""
    random = generator(0, name)
    table = tables[torch.randint(len(tables), (), generator=random)]
    size = round(draw_uniform(random, recipe.n_images, log=True))
    images = torch.randint(len(pool), (size,), generator=random)
    return FineTune(
        name,
        test,
        images,
        table[pool[images]].long(),
        draw_uniform(random, recipe.learning_rate, log=True),
        round(draw_uniform(random, recipe.steps)),
        {"table": table.numpy().astype(np.float32)},
    )


def split_rules(seed: int, held_out: int) -> tuple[Bool[Tensor, "r k"], Bool[Tensor, "s k"]]:
    """Return the truth tables that are learned and those held out: all but the two constant ones."""
    order = torch.randperm(2**CELLS - 2, generator=generator(seed, "rules")) + 1
    tables = (order[:, None] >> torch.arange(CELLS) & 1).bool()
    return tables[held_out:], tables[:held_out]
