"""Train many small networks at once, each with hyper-parameters, images, labels and random numbers of its own.

Networks of one architecture are one stack: a grouped convolution runs them all, and vectors hold their learning rates, weight
decays and so on. What a run draws depends on its name alone, so the result is that of training it alone, up to rounding.
"""

import ctypes
import hashlib
import json
import math
import sys
from dataclasses import dataclass, replace
from functools import cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from stages.common.randomness import generator, log_uniform
from stages.common.stage import StageParams
from stages.weightnet.program import Program, Weights, run_stack

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


@cache
def keep_memory() -> None:
    """Let the process keep what it frees, where its C library is glibc.

    Else large arrays go back to the system and are faulted in again at every step, a tenth of the time of small networks.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def train_stack(
    program: Program,
    runs: list[Run],
    images: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
) -> Float[Tensor, "r 3 p"]:
    """Return the weights of all runs before training, after half of the steps and after all, in the dtype of `images`.

    Adam and SGD are those of torch.optim (Adam: beta 0.9 and 0.999, epsilon 1e-8; SGD: momentum 0.9).
    """
    keep_memory()
    device, dtype = images.device, images.dtype
    order = sorted(range(len(runs)), key=lambda i: -runs[i].steps)  # runs that end early leave at the end of the stack
    runs = [runs[i] for i in order]
    draws = [draw_all(run, program, labels) for run in runs]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)[:, None]

    tanh = torch.tensor([run.tanh for run in runs], device=device)
    sgd = torch.tensor([run.sgd for run in runs], device=device)[:, None]
    rate, decay = column([run.learning_rate for run in runs]), column([run.weight_decay for run in runs])
    weights = torch.stack([draw.weights for draw in draws]).to(device, dtype)
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    keep_rate = 1 - column([run.dropout for run in runs])[..., None]
    dropped = program.numbers_of("dropout") if any(run.dropout for run in runs) else []
    result = weights.new_empty(len(runs), len(SNAPSHOTS), program.layout.size)
    result[:, 0] = weights
    seen_images = [draw.images[draw.batches] for draw in draws]
    seen_labels = [draw.labels[draw.batches] for draw in draws]
    batch = runs[0].batch_size
    alive = len(runs)
    for step in range(1, runs[0].steps + 1):
        while runs[alive - 1].steps < step:
            alive -= 1
        if alive < len(weights):
            weights, first, second = (t[:alive].clone() for t in (weights, first, second))
            tanh, sgd, rate, decay = tanh[:alive], sgd[:alive], rate[:alive], decay[:alive]
        index = torch.stack([batches[step - 1] for batches in seen_images[:alive]]).to(device)
        seen = torch.stack([batches[step - 1] for batches in seen_labels[:alive]]).to(device)
        masks = []
        for place, f in enumerate(dropped):
            ones = torch.ones(batch, f, dtype=torch.bool)
            mask = torch.stack([draw.kept[place][step - 1] if draw.kept else ones for draw in draws[:alive]])
            masks.append(mask.to(device) / keep_rate[:alive])
        weights.requires_grad_()
        running: Weights = {}
        logits = run_stack(program, program.layout.unflatten(weights), images[index], tanh, masks, running)
        loss = cross_entropy(logits.flatten(0, 1), seen.flatten(), reduction="sum") / batch
        (gradient,) = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            gradient += decay * weights
            first.mul_(0.9).add_(gradient)
            second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            adam = first * (0.1 / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            weights = weights.detach() - rate * torch.where(sgd, first, adam)
            own = program.layout.unflatten(weights)
            for name, statistic in running.items():  # these are not learned
                own[name].copy_(statistic)
        for i in range(alive):
            for j, at in enumerate((runs[i].steps // 2, runs[i].steps), 1):
                if step == at:
                    result[i, j] = weights[i]
    back = torch.empty(len(runs), dtype=torch.long)
    back[order] = torch.arange(len(runs))
    return result[back]
