"""Tune the transformer through the networks that it proposes: cross-entropy, differentiated through their weights.

Reads   data/<dataset>.safetensors, models/train_lenet/<dataset>/, models/train_forecaster/<dataset>/transformer/forecaster.pt
Writes  models/tune_jump/<dataset>/forecaster.pt     {"config", "state_dict"} of a JumpForecaster
        reports/tune_jump/<dataset>/history.csv      losses of the proposed networks over those of the last ones

Axes: p weights, d what the jump is linear in.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from stages.common.checkpoints import save_torch
from stages.common.files import save_csv
from stages.common.optim import require_convergence, set_learning_rate, warmup_cosine
from stages.common.randomness import generator
from stages.common.runtime import pin_threads
from stages.common.stage import StageParams, parse_arguments, run
from stages.common.vectors import Layout
from stages.forecast.forecasters import load_forecaster
from stages.forecast.jump import JumpForecaster, recent_mean
from stages.forecast.lenet import LeNet
from stages.forecast.runs import load_lenet_data, load_runs
from stages.forecast.trajectory import WINDOW, Trajectory, read_features

FORECASTERS = Path("models/train_forecaster")
MODELS = Path("models/tune_jump")
REPORTS = Path("reports/tune_jump")

WARMUP_FRACTION = 0.05  # of the steps
LARGEST_GRADIENT = 1.0  # its norm is cut there: the loss of a jump that failed is steep
FLOOR = 0.02  # added to losses of which a ratio is taken: late in a run they are nearly zero


class Params(StageParams):
    """Parameters of one data set's tuning."""

    seed: NonNegativeInt
    steps: PositiveInt
    learning_rate: PositiveFloat
    images: PositiveInt  # training images in a step
    proximal_weight: (
        NonNegativeFloat  # of the squared distance to the mean of the last snapshots, in units of the scale
    )
    origins: PositiveInt  # of each run; the features of all are kept in memory
    reference_images: PositiveInt  # on which the last weights' losses are taken, and jumps validated: then unseen ones
    check_every: PositiveInt  # steps


@dataclass(frozen=True)
class Origin:
    """All weights of one run at one snapshot, and what the jump is made of."""

    layout: Layout
    mean: Float[Tensor, " p"]  # of the last snapshots
    scale: Float[Tensor, " p"]
    inputs: Float[Tensor, "p d"]
    last_loss: float  # of the last weights

    def jump(self, step: nn.Linear) -> Float[Tensor, " p"]:
        """Return the weights that are proposed."""
        return self.mean + self.scale * step(self.inputs)[:, 0]


@torch.no_grad()
def read_origins(
    model: JumpForecaster, runs: list[Trajectory], n: int, network: LeNet, x: Tensor, labels: Tensor
) -> list[Origin]:
    """Return n origins of every run, denser where it is young: there its path bends most. Images: for the last losses."""
    spread = torch.linspace(0, 1, n).square()
    places = [(r, t) for r in runs for t in (WINDOW + spread * (len(r) - 1 - WINDOW)).long().tolist()]
    origins = []
    for r, t in tqdm(places, "read origins", disable=None):
        features = read_features(r, t, torch.arange(r.layout.size), **model.reads)
        mean = r.weights[t] + features.scale * recent_mean(features)[:, 0]
        last_loss = loss_of(network, r.layout, r.weights[t], x, labels).item()
        origins.append(Origin(r.layout, mean, features.scale, model.read(features), last_loss))
    return origins


def loss_of(network: LeNet, layout: Layout, weights: Float[Tensor, " p"], x: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of the network with these weights; gradients reach the weights."""
    return cross_entropy(functional_call(network, layout.unflatten(weights), (x,)), labels)


@torch.no_grad()
def mean_ratio(
    network: LeNet, origins: list[Origin], x: Tensor, labels: Tensor, proposal: Callable[[Origin], Tensor]
) -> float:
    """Return the mean over origins of the loss of what is proposed over that of the last weights."""
    return statistics.fmean(loss_of(network, o.layout, proposal(o), x, labels).item() / o.last_loss for o in origins)


def tune_jump(
    model: JumpForecaster,
    network: LeNet,
    origins: list[Origin],
    images: tuple[Tensor, Tensor],
    validate: Callable[[Callable[[Origin], Tensor]], float],
    *,
    seed: int,
    steps: int,
    learning_rate: float,
    batch_size: int,
    proximal_weight: float,
    check_every: int,
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return the state of the best step on validation runs and images, and a history row for each check.

    validate: a way to propose weights at an origin -> `mean_ratio` on what is held out.
    """
    (x, labels), random = images, generator(seed, "jumps")
    optimizer = torch.optim.Adam(model.step.parameters())
    factor = warmup_cosine(steps, WARMUP_FRACTION)
    history, best = [], None
    average_ratio = validate(lambda o: o.mean)
    for step in tqdm(range(1, steps + 1), "tune the jump", unit=" steps", disable=None):
        set_learning_rate(optimizer, learning_rate * factor(step - 1))
        origin = origins[torch.randint(len(origins), (), generator=random)]
        batch = torch.randint(len(x), (batch_size,), generator=random)
        jump = origin.jump(model.step)
        ratio = loss_of(network, origin.layout, jump, x[batch], labels[batch]) / (origin.last_loss + FLOOR)
        loss = ratio + proximal_weight * ((jump - origin.mean) / origin.scale).square().mean()
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.step.parameters(), LARGEST_GRADIENT)
        optimizer.step()
        if step % check_every == 0 or step == steps:
            jump_ratio = validate(lambda o: o.jump(model.step))
            require_convergence(jump_ratio, math.inf, f"step {step}", "lower tune_jump.learning_rate")
            if best is None or jump_ratio < min(row["val_ratio"] for row in history):
                best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            history.append(
                {"step": step, "train_ratio": ratio.item(), "val_ratio": jump_ratio, "val_ratio_average": average_ratio}
            )
    return best, history


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of train_lenet.datasets").dataset
    params = Params.load("tune_jump", dataset)
    pin_threads()
    runs = load_runs(dataset)
    body, config = load_forecaster(FORECASTERS / dataset / "transformer" / "forecaster.pt", "transformer")
    model = JumpForecaster(body)
    data = load_lenet_data(dataset, runs.recipe, torch.device("cpu"), test_images=0)
    seen, held_out = (
        tuple(part[: params.reference_images] for part in images) for images in (data.train, data.held_out)
    )
    network = LeNet(runs.recipe["image_size"], len(data.classes), seed=0).requires_grad_(False)
    train = read_origins(model, list(runs.train.values()), params.origins, network, *seen)
    validation = read_origins(model, list(runs.validation.values()), params.origins, network, *held_out)
    state, history = tune_jump(
        model,
        network,
        train,
        data.train,
        partial(mean_ratio, network, validation, *held_out),
        seed=params.seed,
        steps=params.steps,
        learning_rate=params.learning_rate,
        batch_size=params.images,
        proximal_weight=params.proximal_weight,
        check_every=params.check_every,
    )
    save_torch(MODELS / dataset / "forecaster.pt", {"config": config | {"kind": "jump"}, "state_dict": state})
    save_csv(REPORTS / dataset / "history.csv", history)
    chosen = min(history, key=lambda row: row["val_ratio"])
    print(
        f"{dataset}: validation loss after a jump {chosen['val_ratio']:.3f} of the last weights', "
        f"of the mean of the last snapshots {chosen['val_ratio_average']:.3f}"
    )


if __name__ == "__main__":
    run(main)
