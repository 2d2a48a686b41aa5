"""How one network of a zoo is trained: hyper-parameters that are drawn from a recipe, and random numbers of its own."""

import hashlib
import json
import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.common.randomness import generator, log_uniform
from stages.common.stage import StageParams
from stages.weightnet.tracing.program import Program

Range = tuple[float, float]


SNAPSHOTS = ("initial", "middle", "final")


class Recipe(StageParams):
    """From what the hyper-parameters of a run are drawn; pairs are the ends of ranges."""

    learning_rate: Range  # log-uniform, of Adam
    sgd_factor: float  # SGD's learning rate is so much larger
    weight_decay: Range  # log-uniform, added to the gradient
    init_scale: Range  # log-uniform, times He's standard deviation
    train_fraction: Range  # log-uniform, of the training images
    label_noise: Range  # share of random labels: of half of the runs; 0 of the others
    dropout: Range  # before the last layer: of half of the runs
    steps: Range  # log-uniform
    batch_size: int


@dataclass(frozen=True)
class Run:
    """One network's training. Everything follows from `name` (<architecture>-<number>), `seed` and the recipe."""

    name: str
    seed: int
    tanh: bool
    sgd: bool
    learning_rate: float
    weight_decay: float
    init_scale: float
    train_fraction: float
    label_noise: float
    dropout: float
    steps: int
    batch_size: int

    @property
    def config(self) -> str:
        """A hash of the hyper-parameters: 12 hexadecimal digits."""
        values = {key: value for key, value in vars(self).items() if key not in ("name", "seed")}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def draw_run(name: str, seed: int, recipe: Recipe) -> Run:
    """Return the run called `name`, its hyper-parameters drawn from the recipe."""
    u = torch.rand(12, generator=generator(seed, f"hyper-parameters of {name}"), dtype=torch.float64).tolist()

    def half(ends: Range, x: float, y: float) -> float:
        return 0.0 if x < 0.5 else ends[0] + y * (ends[1] - ends[0])

    sgd = u[1] < 0.5
    return Run(
        name=name,
        seed=seed,
        tanh=u[0] < 0.5,
        sgd=sgd,
        learning_rate=log_uniform(recipe.learning_rate, u[2]) * (recipe.sgd_factor if sgd else 1.0),
        weight_decay=log_uniform(recipe.weight_decay, u[3]),
        init_scale=log_uniform(recipe.init_scale, u[4]),
        train_fraction=log_uniform(recipe.train_fraction, u[5]),
        label_noise=half(recipe.label_noise, u[6], u[7]),
        dropout=half(recipe.dropout, u[8], u[9]),
        steps=round(log_uniform(recipe.steps, u[10])),
        batch_size=recipe.batch_size,
    )


def fit_to(run: Run, program: Program) -> Run:
    """Return the run without what its network has no place for: tanh where no ReLU is, dropout where no dropout step is."""
    kinds = {step.kind for step in program.steps}
    return replace(run, tanh=run.tanh and "relu" in kinds, dropout=run.dropout if "dropout" in kinds else 0.0)


@dataclass(frozen=True)
class Draws:
    """Everything random about one run: its first weights, its images and labels, its batches and dropout."""

    weights: Float[Tensor, " p"]
    images: Int[Tensor, " m"]  # which training images it sees
    labels: Int[Tensor, " m"]  # as it sees them
    batches: Int[Tensor, "t b"]  # places in `images`
    kept: list[Bool[Tensor, "t b f"]]  # what each dropout step keeps; empty without dropout


def draw_all(run: Run, program: Program, labels: Int[Tensor, " n"]) -> Draws:
    """Draw what is random about a run on training images with these labels."""
    random = generator(run.seed, run.name)
    parts = []
    for name, shape in program.layout.shapes.items():
        size = math.prod(shape)
        if len(shape) > 1:
            scale = run.init_scale * (2 / math.prod(shape[1:])) ** 0.5
            parts.append(scale * torch.randn(size, generator=random))
        else:  # a norm's weights and variances start at 1, biases and means at 0
            parts.append(torch.full((size,), float(name.endswith(("weight", "running_var")))))
    n = max(run.batch_size, round(run.train_fraction * len(labels)))
    images = torch.randperm(len(labels), generator=random)[:n]
    classes = program.steps[-1].shape[0]
    noise = torch.rand(len(images), generator=random) < run.label_noise
    wrong = torch.randint(classes, (len(images),), generator=random)
    seen = torch.where(noise, wrong, labels[images].cpu())
    batches = torch.randint(len(images), (run.steps, run.batch_size), generator=random)
    dropped = program.numbers_of("dropout") if run.dropout else []
    kept = [torch.rand(run.steps, run.batch_size, f, generator=random) >= run.dropout for f in dropped]
    return Draws(torch.cat(parts), images, seen, batches, kept)
