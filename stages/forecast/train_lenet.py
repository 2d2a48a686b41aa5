"""Train LeNet-5 runs of several regimes, and keep snapshots of their weights and of the optimiser's state.

Reads   data/<dataset>.safetensors
Writes  models/train_lenet/<dataset>/<run>.safetensors   weights float32 [t, p], state float16 [t, p] (m / sqrt(v) of Adam,
                                                         the momentum of SGD); metadata: layout, run, snapshot_every
        models/train_lenet/<dataset>/split.json          names of the runs to train, validate and test forecasters
        reports/train_lenet/<dataset>/history.csv        a row for each run and snapshot
        reports/train_lenet/<dataset>/summary.json       test accuracy at the end, by regime
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from stages.common.artifacts import save_arrays, save_csv, save_json
from stages.common.command import parse_arguments, run
from stages.common.images import ImageSet, load_images, split_validation
from stages.common.metrics import accuracy, mean_std
from stages.common.params import StageParams
from stages.common.runtime import generator, parallel_map, pick_device, pin_threads
from stages.forecast.lenet import LeNet, to_lenet_input

MODELS = Path("models/train_lenet")
REPORTS = Path("reports/train_lenet")

RunName = Annotated[str, Field(pattern=r"^\w+-\d+$")]  # <regime>-<seed>


class Regime(StageParams):
    """How a run is optimised."""

    optimizer: Literal["adam", "sgd"]  # SGD with momentum 0.9
    learning_rate: PositiveFloat
    schedule: Literal["constant", "cosine"]


class Runs(StageParams):
    """Which runs a forecaster learns from, is chosen on, and is tested on."""

    train: Annotated[list[RunName], Field(min_length=1)]
    validation: Annotated[list[RunName], Field(min_length=1)]
    test: Annotated[list[RunName], Field(min_length=1)]

    @model_validator(mode="after")
    def disjoint(self) -> Self:
        names = [*self.train, *self.validation, *self.test]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"runs named twice: {', '.join(twice)}")
        return self


class Params(StageParams):
    """Parameters of one data set's runs."""

    image_size: Annotated[int, Field(ge=16)]  # pixels, to which images are resized
    validation_fraction: Annotated[float, Field(gt=0, lt=1)]  # of the training images, kept for nowcasting
    split_seed: NonNegativeInt
    steps: PositiveInt
    batch_size: PositiveInt
    snapshot_every: PositiveInt  # steps
    evaluation_images: PositiveInt  # test images at each snapshot
    regimes: dict[str, Regime]
    runs: Runs

    @model_validator(mode="after")
    def known_regimes(self) -> Self:
        names = [*self.runs.train, *self.runs.validation, *self.runs.test]
        if unknown := sorted({name.split("-")[0] for name in names} - set(self.regimes)):
            raise ValueError(f"runs of unknown regimes: {', '.join(unknown)}")
        return self


def build_optimizer(model: LeNet, regime: Regime) -> torch.optim.Optimizer:
    """Return the regime's optimiser."""
    if regime.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=regime.learning_rate, fused=True)
    return torch.optim.SGD(model.parameters(), lr=regime.learning_rate, momentum=0.9, fused=True)


def optimizer_direction(optimizer: torch.optim.Optimizer) -> Float[Tensor, " p"]:
    """Return the direction of the next step before its learning rate: m / sqrt(v) of Adam, the momentum of SGD; 0 at first."""
    directions = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "exp_avg" in state:
                beta1, beta2 = group["betas"]
                mean = state["exp_avg"] / (1 - beta1 ** state["step"])
                square = state["exp_avg_sq"] / (1 - beta2 ** state["step"])
                directions.append((mean / (square.sqrt() + group["eps"])).flatten())
            else:
                momentum = state.get("momentum_buffer")
                directions.append(torch.zeros_like(parameter).flatten() if momentum is None else momentum.flatten())
    return torch.cat(directions).detach()


def train_lenet(
    images: Float[Tensor, "n 1 s s"], data: ImageSet, test: tuple[Tensor, Tensor], name: str, params: Params
) -> tuple[LeNet, Float[Tensor, "t p"], Float[Tensor, "t p"], list[dict[str, Any]]]:
    """Return the trained network, the snapshots of weights and state, and a history row for each; `name` is <regime>-<seed>."""
    regime_name, seed = name.split("-")
    regime = params.regimes[regime_name]
    model = LeNet(params.image_size, len(data.classes), int(seed)).to(images.device, memory_format=torch.channels_last)
    optimizer = build_optimizer(model, regime)
    random = generator(int(seed), f"batches of {regime_name}", images.device)
    weights, states, history = [], [], []
    losses = torch.zeros((), device=images.device)
    for step in range(params.steps + 1):
        if step % params.snapshot_every == 0:
            weights.append(parameters_to_vector(p.contiguous() for p in model.parameters()).detach().cpu())
            states.append(optimizer_direction(optimizer).half().cpu())
            with torch.no_grad():
                logits = model(test[0])
            row = {"run": name, "step": step, "train_loss": losses.item() / params.snapshot_every}
            row |= {"test_loss": cross_entropy(logits, test[1]).item(), "test_acc": accuracy(logits, test[1]).item()}
            history.append(row)
            losses.zero_()
        if step == params.steps:
            break
        if regime.schedule == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * step / params.steps))
            optimizer.param_groups[0]["lr"] = regime.learning_rate * factor
        batch = torch.randint(len(data), (params.batch_size,), generator=random, device=images.device)
        loss = cross_entropy(model(images[batch]), data.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses += loss.detach()
    return model, torch.stack(weights), torch.stack(states), history


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of train_lenet.datasets").dataset
    params = Params.load("train_lenet", dataset)
    pin_threads()
    device = pick_device()
    train, test = load_images(dataset, device)
    train, _ = split_validation(train, params.validation_fraction, params.split_seed)
    test = test.subset(slice(params.evaluation_images))
    images = to_lenet_input(train.pixels(), params.image_size)
    evaluation = to_lenet_input(test.pixels(), params.image_size), test.labels

    def train_run(name: str) -> list[dict[str, Any]]:
        model, weights, states, history = train_lenet(images, train, evaluation, name, params)
        layout = [
            [key, list(parameter.shape)] for key, parameter in model.named_parameters()
        ]  # JSON would sort a mapping
        metadata = {"layout": layout, "run": name, "snapshot_every": params.snapshot_every}
        arrays = {"weights": weights.numpy(), "state": states.numpy()}
        save_arrays(MODELS / dataset / f"{name}.safetensors", arrays, metadata)
        return history

    names = [*params.runs.train, *params.runs.validation, *params.runs.test]
    histories = parallel_map(train_run, names, device, f"train LeNet on {dataset}")
    save_json(MODELS / dataset / "split.json", params.runs.model_dump())
    save_csv(REPORTS / dataset / "history.csv", [row for history in histories for row in history])
    final = {
        regime: mean_std([h[-1]["test_acc"] for h in histories if h[-1]["run"].split("-")[0] == regime])
        for regime in params.regimes
        if any(name.startswith(f"{regime}-") for name in names)
    }
    save_json(REPORTS / dataset / "summary.json", {"final_test_acc": final})
    print(f"{dataset}: {len(names)} runs, " + ", ".join(f"{k} {v['mean']:.1%}" for k, v in final.items()))


if __name__ == "__main__":
    run(main)
