"""Tune the flagship forecaster through the networks that it proposes: cross-entropy, differentiated through their weights.

Reads   data/<dataset>.safetensors, models/train_lenet/<dataset>/, models/train_forecaster/<dataset>-transformer/forecaster.pt
Writes  models/tune_jump/<dataset>/forecaster.pt     {"config", "state_dict"} of a JumpForecaster
        reports/tune_jump/<dataset>/history.csv      losses of the proposed networks over others'
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
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

from stages.common.artifacts import save_csv
from stages.common.checkpoints import save_torch
from stages.common.command import parse_arguments, run
from stages.common.params import StageParams
from stages.common.runtime import generator, pin_threads
from stages.common.schedules import warmup_cosine
from stages.forecast.forecasters import JumpForecaster, load_forecaster, recent_mean
from stages.forecast.lenet import LeNet
from stages.forecast.optimizers import set_learning_rate
from stages.forecast.runs import load_lenet_data, load_runs
from stages.forecast.trajectory import WINDOW, Layout, Trajectory, read_features

FORECASTERS = Path("models/train_forecaster")
MODELS = Path("models/tune_jump")
REPORTS = Path("reports/tune_jump")

WARMUP_FRACTION = 0.05  # of the steps
FLOOR = 0.02  # added to losses of which a ratio is taken: late in a run they are nearly zero


class Params(StageParams):
    """Parameters of one data set's tuning."""

    seed: NonNegativeInt
    steps: PositiveInt
    learning_rate: PositiveFloat
    images: PositiveInt  # training images in a step
    pull: NonNegativeFloat  # towards the mean of the last snapshots, in units of the scale²
    origins: PositiveInt  # of each run; the features of all are kept in memory
    validation_images: PositiveInt  # of those that the runs did not see
    check_every: PositiveInt  # steps


@dataclass(frozen=True)
class Origin:
    """All weights of one run at one snapshot, and what the jump is made of."""

    layout: Layout
    weights: Float[Tensor, " p"]
    mean: Float[Tensor, " p"]  # of the last snapshots
    scale: Float[Tensor, " p"]
    inputs: Float[Tensor, "p d"]

    def jump(self, step: nn.Linear) -> Float[Tensor, " p"]:
        """Return the weights that are proposed."""
        return self.mean + self.scale * step(self.inputs)[:, 0]


def read_origins(model: JumpForecaster, runs: list[Trajectory], n: int) -> list[Origin]:
    """Return n origins of every run, denser where it is young: there its path bends most."""
    spread = torch.linspace(0, 1, n).square()
    places = [(r, t) for r in runs for t in (WINDOW + spread * (len(r) - 1 - WINDOW)).long().tolist()]
    origins = []
    for r, t in tqdm(places, "read origins", disable=None):
        features = read_features(r, t, torch.arange(r.layout.size), **model.reads)
        mean = r.weights[t] + features.scale * recent_mean(features)[:, 0]
        origins.append(Origin(r.layout, r.weights[t], mean, features.scale, model.read(features)))
    return origins


def loss_of(network: LeNet, layout: Layout, weights: Float[Tensor, " p"], x: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of the network with these weights; gradients reach the weights."""
    return cross_entropy(functional_call(network, layout.unflatten(weights), (x,)), labels)


@torch.no_grad()
def losses_of(
    proposal: Callable[[Origin], Tensor], network: LeNet, origins: list[Origin], x: Tensor, labels: Tensor
) -> Float[Tensor, " n"]:
    """Return the loss of what is proposed at every origin."""
    return torch.stack([loss_of(network, o.layout, proposal(o), x, labels) for o in origins])


def mean_ratio(losses: Float[Tensor, " n"], last_losses: Float[Tensor, " n"]) -> float:
    """Return the mean over origins of the loss over that of the last weights."""
    return statistics.fmean((losses / last_losses).tolist())


def tune_jump(
    model: JumpForecaster,
    network: LeNet,
    train: list[Origin],
    validation: list[Origin],
    data: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    params: Params,
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return the state of the best step on validation runs and images, and a history row for each check."""
    (x, labels), random = data, generator(params.seed, "jumps")
    optimizer = torch.optim.Adam(model.step.parameters())
    factor = warmup_cosine(params.steps, WARMUP_FRACTION)
    history, best = [], None
    last_losses = losses_of(lambda o: o.weights, network, validation, *held_out)
    average_ratio = mean_ratio(losses_of(lambda o: o.mean, network, validation, *held_out), last_losses)
    for step in tqdm(range(1, params.steps + 1), "tune the jump", unit=" steps", disable=None):
        set_learning_rate(optimizer, params.learning_rate * factor(step - 1))
        origin = train[torch.randint(len(train), (), generator=random)]
        batch = torch.randint(len(x), (params.images,), generator=random)
        jump = origin.jump(model.step)
        with torch.no_grad():
            average_loss = loss_of(network, origin.layout, origin.mean, x[batch], labels[batch])
        ratio = loss_of(network, origin.layout, jump, x[batch], labels[batch]) / (average_loss + FLOOR)
        loss = ratio + params.pull * ((jump - origin.mean) / origin.scale).square().mean()
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.step.parameters(), 1.0)
        optimizer.step()
        if step % params.check_every == 0 or step == params.steps:
            jump_losses = losses_of(lambda o: o.jump(model.step), network, validation, *held_out)
            row = {"step": step, "train_ratio_to_average": ratio.item()}
            row |= {"val_ratio": mean_ratio(jump_losses, last_losses), "val_ratio_average": average_ratio}
            if best is None or row["val_ratio"] < min(earlier["val_ratio"] for earlier in history):
                best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            history.append(row)
    return best, history


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of train_lenet.datasets").dataset
    params = Params.load("tune_jump", dataset)
    pin_threads()
    runs = load_runs(dataset)
    body, config = load_forecaster(FORECASTERS / f"{dataset}-transformer" / "forecaster.pt", "transformer")
    model = JumpForecaster(body)
    data = load_lenet_data(dataset, runs.recipe, torch.device("cpu"), test_images=0)
    held_out = tuple(part[: params.validation_images] for part in data.held_out)
    network = LeNet(runs.recipe["image_size"], len(data.classes), seed=0).requires_grad_(False)
    train = read_origins(model, list(runs.train.values()), params.origins)
    validation = read_origins(model, list(runs.validation.values()), params.origins)
    state, history = tune_jump(model, network, train, validation, data.train, held_out, params)
    save_torch(MODELS / dataset / "forecaster.pt", {"config": config | {"kind": "jump"}, "state_dict": state})
    save_csv(REPORTS / dataset / "history.csv", history)
    chosen = min(history, key=lambda row: row["val_ratio"])
    print(
        f"{dataset}: validation loss after a jump {chosen['val_ratio']:.3f} of the last weights', "
        f"of the mean of the last snapshots {chosen['val_ratio_average']:.3f}"
    )


if __name__ == "__main__":
    run(main)
