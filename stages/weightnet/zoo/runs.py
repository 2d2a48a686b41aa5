"""How one network of a zoo is trained: hyper-parameters that are drawn from a recipe, and random numbers of its own."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from stages.common.randomness import generator, log_uniform
from stages.common.stage import StageParams
from stages.weightnet.tracing.program import Program

Range = tuple[float, float]
T = TypeVar("T")
Choices = Annotated[list[T], Field(min_length=1)]
Init = Literal["he", "torch", "xavier", "orthogonal"]
Schedule = Literal["constant", "cosine", "step"]

ROUNDING = 1e-9  # of thirds
SNAPSHOTS = ("initial", "middle", "final")


class Recipe(StageParams):
    """From what the hyper-parameters of a run are drawn; pairs are the ends of ranges, of lists each entry is as likely."""

    activations: Choices[Literal["tanh", "relu"]]
    optimizers: Choices[Literal["sgd", "adam", "adamw"]]
    momenta: Choices[Annotated[float, Field(ge=0, lt=1)]]  # of SGD
    schedules: Choices[Schedule]  # of the learning rate
    inits: Choices[Init]
    shifts: Choices[Annotated[int, Field(ge=0)]]  # pixels by which images are moved at random, at most
    least_epochs: Choices[Annotated[int, Field(ge=0)]]  # passes over its images, whatever `steps` says
    learning_rate: Range  # log-uniform, of Adam
    sgd_factor: float  # SGD's learning rate is so much larger
    weight_decay: Range  # log-uniform, added to the gradient, or of AdamW to the step
    init_scale: Range  # log-uniform, times the weights that are drawn
    train_fraction: Range  # log-uniform, of the training images
    label_noise: Range  # share of random labels: of half of the runs; 0 of the others
    dropout: Range  # before the last layer: of half of the runs
    steps: Range  # log-uniform
    batch_size: int

    @property
    def varied(self) -> list[str]:
        """The hyper-parameters of `OPTIONS` that differ between runs; Adam and SGD alone differ in `sgd`."""
        lists = {name: getattr(self, key) for name, (_, key) in OPTIONS.items()}
        lists["adamw"] = {False} | {name == "adamw" for name in self.optimizers}
        return [name for name, choices in lists.items() if len(choices) > 1]


OPTIONS = {  # what a run does unless its recipe says otherwise, and the recipe's list of choices
    "adamw": (False, "optimizers"),
    "momentum": (0.9, "momenta"),
    "schedule": ("constant", "schedules"),
    "init": ("he", "inits"),
    "shift": (0, "shifts"),
    "epochs": (0, "least_epochs"),
}


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
    adamw: bool
    momentum: float  # of SGD
    schedule: Schedule
    init: Init
    shift: int
    epochs: int  # at least

    @property
    def config(self) -> str:
        """A hash of the hyper-parameters, those of `OPTIONS` where they are not plain: 12 hexadecimal digits."""
        own = {key: value for key, value in vars(self).items() if key not in ("name", "seed")}
        values = {key: value for key, value in own.items() if key not in OPTIONS or value != OPTIONS[key][0]}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def draw_run(name: str, seed: int, recipe: Recipe) -> Run:
    """Return the run called `name`, its hyper-parameters drawn from the recipe."""
    u = torch.rand(12, generator=generator(seed, f"hyper-parameters of {name}"), dtype=torch.float64).tolist()
    v = torch.rand(5, generator=generator(seed, f"choices of {name}"), dtype=torch.float64).tolist()

    def half(ends: Range, x: float, y: float) -> float:
        return 0.0 if x < 0.5 else ends[0] + y * (ends[1] - ends[0])

    optimizer = pick(recipe.optimizers, u[1])
    return Run(
        name=name,
        seed=seed,
        tanh=pick(recipe.activations, u[0]) == "tanh",
        sgd=optimizer == "sgd",
        learning_rate=log_uniform(recipe.learning_rate, u[2]) * (recipe.sgd_factor if optimizer == "sgd" else 1.0),
        weight_decay=log_uniform(recipe.weight_decay, u[3]),
        init_scale=log_uniform(recipe.init_scale, u[4]),
        train_fraction=log_uniform(recipe.train_fraction, u[5]),
        label_noise=half(recipe.label_noise, u[6], u[7]),
        dropout=half(recipe.dropout, u[8], u[9]),
        steps=round(log_uniform(recipe.steps, u[10])),
        batch_size=recipe.batch_size,
        adamw=optimizer == "adamw",
        momentum=pick(recipe.momenta, v[0]),
        schedule=pick(recipe.schedules, v[1]),
        init=pick(recipe.inits, v[2]),
        shift=pick(recipe.shifts, v[3]),
        epochs=pick(recipe.least_epochs, v[4]),
    )


def pick(choices: Sequence[T], u: float) -> T:
    """Return the choice that lies at `u`, from 0 up to 1, of the way through the list."""
    return choices[int(u * len(choices))]


def fit_to(run: Run, program: Program, images: int) -> Run:
    """Return the run as it is for its network and so many training images.

    Without what the network has no place for (tanh where no ReLU is, dropout where no dropout step is), and with as many steps as its
    least epochs take.
    """
    kinds = {step.kind for step in program.steps}
    steps = max(run.steps, math.ceil(run.epochs * count_images(run, images) / run.batch_size))
    dropout = run.dropout if "dropout" in kinds else 0.0
    return replace(run, tanh=run.tanh and "relu" in kinds, dropout=dropout, steps=steps)


def count_images(run: Run, images: int) -> int:
    """Return how many of so many training images a run sees."""
    return max(run.batch_size, round(run.train_fraction * images))


def learning_rates(run: Run) -> Float[Tensor, " t"]:
    """Return a run's learning rate at each step, in float64: as torch's CosineAnnealingLR, or a tenth at each third as StepLR."""
    done = torch.arange(run.steps, dtype=torch.float64) / run.steps
    match run.schedule:
        case "constant":
            factor = torch.ones_like(done)
        case "cosine":
            factor = (1 + (math.pi * done).cos()) / 2
        case "step":
            factor = 0.1 ** (3 * done + ROUNDING).floor()
    return run.learning_rate * factor


@dataclass(frozen=True)
class Draws:
    """Everything random about one run: its first weights, its images and labels, its batches and dropout."""

    weights: Float[Tensor, " p"]
    images: Int[Tensor, " m"]  # which training images it sees
    labels: Int[Tensor, " m"]  # as it sees them
    batches: Int[Tensor, "t b"]  # places in `images`
    kept: list[Bool[Tensor, "t b f"]]  # what each dropout step keeps
    moves: Int[Tensor, "t b 2"]  # pixels that each image is moved down and right


def draw_all(run: Run, program: Program, labels: Int[Tensor, " n"]) -> Draws:
    """Draw what is random about a run on training images with these labels."""
    random = generator(run.seed, run.name)
    weights = torch.cat([draw_tensor(run, name, program.layout.shapes, random) for name in program.layout.shapes])
    n = count_images(run, len(labels))
    images = torch.randperm(len(labels), generator=random)[:n]
    classes = program.steps[-1].shape[0]
    noise = torch.rand(len(images), generator=random) < run.label_noise
    wrong = torch.randint(classes, (len(images),), generator=random)
    seen = torch.where(noise, wrong, labels[images].cpu())
    batches = torch.randint(len(images), (run.steps, run.batch_size), generator=random)
    masks = [(run.steps, run.batch_size, f) for f in program.numbers_of("dropout")]
    if run.dropout:
        kept = [torch.rand(mask, generator=random) >= run.dropout for mask in masks]
    else:
        kept = [torch.ones((), dtype=torch.bool).expand(mask) for mask in masks]
    moves = torch.randint(-run.shift, run.shift + 1, (run.steps, run.batch_size, 2), generator=random)
    return Draws(weights, images, seen, batches, kept, moves)


def draw_tensor(
    run: Run, name: str, shapes: dict[str, tuple[int, ...]], random: torch.Generator
) -> Float[Tensor, " p"]:
    """Return the first values of one of a network's tensors, flat: as the functions of torch.nn.init draw them, times the run's scale.

    A norm's weights and variances start at 1, biases and means at 0; but PyTorch's own layers draw biases, too.
    """
    shape = shapes[name]
    if len(shape) == 1:
        weight = shapes.get(name.removesuffix("bias") + "weight", shape)
        if run.init == "torch" and name.endswith("bias") and len(weight) > 1:
            return (2 * torch.rand(shape, generator=random) - 1) * math.prod(weight[1:]) ** -0.5
        return torch.full(shape, float(name.endswith(("weight", "running_var"))))
    if run.init == "he":
        return run.init_scale * (2 / math.prod(shape[1:])) ** 0.5 * torch.randn(math.prod(shape), generator=random)
    drawn = torch.empty(shape)
    match run.init:
        case "torch":
            nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=random)
        case "xavier":
            nn.init.xavier_uniform_(drawn, generator=random)
        case "orthogonal":
            nn.init.orthogonal_(drawn, generator=random)
    return run.init_scale * drawn.flatten()
