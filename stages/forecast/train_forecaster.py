"""Train one kind of forecaster on the training runs; validation runs choose its best checkpoint.

Reads   models/train_lenet/<dataset>/
Writes  models/train_forecaster/<dataset>-<variant>/forecaster.pt   {"config", "state_dict"}
        reports/train_forecaster/<dataset>-<variant>/history.csv    training and validation loss
"""

import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from stages.common.checkpoints import save_torch
from stages.common.files import save_csv
from stages.common.optim import set_learning_rate, warmup_cosine
from stages.common.randomness import generator
from stages.common.runtime import pin_threads
from stages.common.stage import StageParams, parse_arguments, run
from stages.common.vectors import principal_components
from stages.forecast.forecasters import (
    DiffusionForecaster,
    RidgeForecaster,
    SharedForecaster,
    build_forecaster,
    movement_target,
    random_coordinates,
)
from stages.forecast.pca import CoefficientForecaster
from stages.forecast.runs import load_runs
from stages.forecast.trajectory import WINDOW, Features, Trajectory, read_features

MODELS = Path("models/train_forecaster")
REPORTS = Path("reports/train_forecaster")

LOSS_CEILING = 50.0  # of a squared error in units of scale² x horizon: a few weights move far and would drown the rest
WARMUP_FRACTION = 0.05  # of the steps
CHECK_EVERY = 50  # steps between validations
HELD_OUT = 16  # batches of a validation

Rows = list[dict[str, Any]]
Batch = tuple[Features, torch.Tensor]


class Variant(StageParams):
    """A kind of forecaster and what it reads."""

    kind: Literal["transformer", "mlp", "ridge", "diffusion", "pca_transformer"]
    with_state: bool  # the optimiser's direction
    with_context: bool  # means over the two neurons that a weight connects
    d_model: PositiveInt
    learning_rate: PositiveFloat
    steps: PositiveInt


class Params(StageParams):
    """Parameters of one data set's forecasters."""

    seed: NonNegativeInt
    horizons: list[PositiveInt]  # snapshots ahead
    pairs: PositiveInt  # runs and origins in a batch
    weights: PositiveInt  # of each of them, drawn at random
    weight_decay: NonNegativeFloat
    ridge: PositiveFloat
    components: PositiveInt  # of the PCA of `pca_transformer`
    variant: Variant


def draw_batch(runs: list[Trajectory], reads: dict[str, bool], params: Params, random: torch.Generator) -> Batch:
    """Return the features and the true movements [n, h] of random weights at random origins of random runs."""
    features, targets = [], []
    for _ in range(params.pairs):
        trajectory = runs[torch.randint(len(runs), (), generator=random)]
        t = int(torch.randint(WINDOW, len(trajectory) - max(params.horizons), (), generator=random))
        index = random_coordinates(trajectory.layout, params.weights, random)
        features.append(read_features(trajectory, t, index, **reads))
        targets.append(movement_target(trajectory, t, index, params.horizons))
    return Features.cat(features), torch.cat(targets)


def prefetch(draw: Callable[[], Batch], n: int) -> Iterator[Batch]:
    """Yield draw() n times; the next is made in another thread while the caller works on this one."""
    with ThreadPoolExecutor(1, initializer=pin_threads) as pool:
        coming = pool.submit(draw)
        for _ in range(n - 1):
            batch, coming = coming.result(), pool.submit(draw)
            yield batch
        yield coming.result()


def movement_loss(
    model: SharedForecaster, features: Features, target: torch.Tensor, random: torch.Generator
) -> torch.Tensor:
    """Mean squared error of movements in units of the scale, each horizon divided by its length, cut at LOSS_CEILING."""
    if isinstance(model, DiffusionForecaster):
        return model.denoising_loss(features, target, random)
    squares = (model(features) - target).square() / torch.tensor(model.horizons)
    return squares.clamp(max=LOSS_CEILING).mean()


def draw_held_out(model: SharedForecaster, validation: list[Trajectory], params: Params) -> list[Batch]:
    """Return the batches of validation runs on which all forecasters are compared."""
    random = generator(params.seed, "held out")
    return [draw_batch(validation, model.reads, params, random) for _ in range(HELD_OUT)]


@torch.no_grad()
def validation_loss(model: SharedForecaster, held_out: list[Batch], params: Params) -> float:
    """Return the mean loss on held-out batches; a diffusion model's noise is the same each time."""
    random = generator(params.seed, "held out noise")
    return statistics.fmean(movement_loss(model, *batch, random).item() for batch in held_out)


def train_shared(
    model: SharedForecaster, train: list[Trajectory], validation: list[Trajectory], params: Params
) -> tuple[dict[str, Any], Rows]:
    """Return the state of the best checkpoint on validation runs, and a history row for each check."""
    random, noise = generator(params.seed, "forecaster batches"), generator(params.seed, "diffusion noise")
    held_out = draw_held_out(model, validation, params)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=params.weight_decay, fused=True)
    steps, history, best = params.variant.steps, [], None
    factor = warmup_cosine(steps, WARMUP_FRACTION)
    batches = prefetch(partial(draw_batch, train, model.reads, params, random), steps)
    for step, batch in enumerate(tqdm(batches, "train forecaster", steps, unit=" steps", disable=None), 1):
        set_learning_rate(optimizer, params.variant.learning_rate * factor(step - 1))
        loss = movement_loss(model, *batch, noise)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % CHECK_EVERY == 0 or step == steps:
            val_loss = validation_loss(model, held_out, params)
            if best is None or val_loss < min(row["val_loss"] for row in history):
                best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            history.append({"step": step, "train_loss": loss.item(), "val_loss": val_loss})
    return best, history


def fit_ridge(
    model: RidgeForecaster, train: list[Trajectory], validation: list[Trajectory], params: Params
) -> tuple[dict[str, Any], Rows]:
    """Fit by the normal equations on `steps` batches; return the state and one history row."""
    random = generator(params.seed, "forecaster batches")
    for _ in tqdm(range(params.variant.steps), desc="observe", unit=" batches", disable=None):
        model.observe(*draw_batch(train, model.reads, params, random))
    model.solve(params.ridge)
    val_loss = validation_loss(model, draw_held_out(model, validation, params), params)
    return model.state_dict(), [{"step": params.variant.steps, "train_loss": "", "val_loss": val_loss}]


def train_coefficients(
    model: CoefficientForecaster, train: list[Trajectory], validation: list[Trajectory], params: Params
) -> tuple[dict[str, Any], Rows]:
    """Return the state after training on the mean squared error of the next snapshot's coefficients, and the history."""

    def sequences(runs: list[Trajectory]) -> tuple[torch.Tensor, torch.Tensor]:
        codes = [model.encode(trajectory.weights) for trajectory in runs]
        windows = [code[: len(code) - 1].unfold(0, model.sequence, 1).mT for code in codes]
        return torch.cat(windows), torch.cat([code[model.sequence :] for code in codes])

    (x, y), held_out = sequences(train), sequences(validation)
    optimizer = torch.optim.Adam(model.parameters(), params.variant.learning_rate, fused=True)
    random = generator(params.seed, "forecaster batches")
    history = []
    for step in tqdm(range(1, params.variant.steps + 1), desc="train forecaster", unit=" steps", disable=None):
        batch = torch.randint(len(x), (32,), generator=random)
        loss = mse_loss(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % CHECK_EVERY == 0 or step == params.variant.steps:
            with torch.no_grad():
                val_loss = mse_loss(model(held_out[0]), held_out[1]).item()
            history.append({"step": step, "train_loss": loss.item(), "val_loss": val_loss})
    return model.state_dict(), history


def main() -> None:
    arguments = parse_arguments(__doc__, dataset="of train_lenet.datasets", variant="of train_forecaster.variants")
    name = f"{arguments.dataset}-{arguments.variant}"
    params = Params.load("train_forecaster", arguments.dataset, arguments.variant)
    pin_threads()
    runs = load_runs(arguments.dataset)
    train, validation = list(runs.train.values()), list(runs.validation.values())
    config = params.variant.model_dump(include={"kind", "with_state", "with_context", "d_model"})
    config |= {"horizons": params.horizons, "n_layers": len(train[0].layout.shapes), "seed": params.seed}
    if params.variant.kind == "pca_transformer":
        mean, basis, _ = principal_components(torch.cat([t.weights for t in train]), params.components)
        model = build_forecaster(config, {"mean": mean, "basis": basis})
        state, history = train_coefficients(model, train, validation, params)
    else:
        model = build_forecaster(config)
        fit = fit_ridge if params.variant.kind == "ridge" else train_shared
        state, history = fit(model, train, validation, params)
    save_torch(MODELS / name / "forecaster.pt", {"config": config, "state_dict": state})
    save_csv(REPORTS / name / "history.csv", history)
    print(f"{name}: validation loss {history[-1]['val_loss']:.4g}")


if __name__ == "__main__":
    run(main)
