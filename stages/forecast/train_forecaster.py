"""Train every kind of forecaster on the training runs; validation runs choose each one's best checkpoint.

Reads   models/train_lenet/<dataset>/
Writes  models/train_forecaster/<dataset>/<variant>/forecaster.pt   {"config", "state_dict"}
        reports/train_forecaster/<dataset>/history.csv              training and validation loss of each
"""

import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from stages.common.checkpoints import Checkpoint, save_torch
from stages.common.files import Rows, save_csv
from stages.common.optim import require_convergence, set_learning_rate, warmup_cosine
from stages.common.randomness import generator
from stages.common.runtime import parallel_map, pin_threads
from stages.common.stage import StageParams, parse_arguments, run
from stages.common.vectors import principal_components
from stages.forecast.diffusion import DiffusionForecaster
from stages.forecast.forecasters import build_forecaster
from stages.forecast.pca import CoefficientForecaster
from stages.forecast.runs import load_runs
from stages.forecast.shared import RidgeForecaster, SharedForecaster, movement_target, random_coordinates
from stages.forecast.trajectory import WINDOW, Features, Trajectory, read_features

MODELS = Path("models/train_forecaster")
REPORTS = Path("reports/train_forecaster")

LOSS_CEILING = 50.0  # of a squared error in units of scale² x horizon: a few weights move far and would drown the rest
WARMUP_FRACTION = 0.05  # of the steps
CHECK_EVERY = 50  # steps between validations
HELD_OUT = 16  # batches of a validation
LARGEST_GRADIENT = 1.0  # its norm is cut there: a few weights that moved far make it jump
COEFFICIENT_BATCH = 32  # sequences; as in the design that `pca_transformer` repeats
REMEDY = "lower train_forecaster.variants.*.learning_rate"  # of training that diverges

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
    variants: Annotated[dict[str, Variant], Field(min_length=1)]


def draw_batch(
    model: SharedForecaster, runs: list[Trajectory], pairs: int, weights: int, random: torch.Generator
) -> Batch:
    """Return what the model reads and the true movements [n, h] of random weights at random origins of random runs."""
    features, targets = [], []
    for _ in range(pairs):
        trajectory = runs[torch.randint(len(runs), (), generator=random)]
        t = int(torch.randint(WINDOW, len(trajectory) - max(model.horizons), (), generator=random))
        index = random_coordinates(trajectory.layout, weights, random)
        features.append(read_features(trajectory, t, index, **model.reads))
        targets.append(movement_target(trajectory, t, index, model.horizons))
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


@torch.no_grad()
def validation_loss(model: SharedForecaster, held_out: list[Batch], seed: int) -> float:
    """Return the mean loss on held-out batches; a diffusion model's noise is the same each time."""
    random = generator(seed, "held out noise")
    return statistics.fmean(movement_loss(model, *batch, random).item() for batch in held_out)


def train_shared(
    model: SharedForecaster,
    draw: Callable[[], Batch],
    held_out: list[Batch],
    *,
    seed: int,
    steps: int,
    learning_rate: float,
    weight_decay: float,
) -> tuple[Checkpoint, Rows]:
    """Return the state of the best checkpoint on held-out batches, and a history row for each check."""
    noise = generator(seed, "diffusion noise")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=weight_decay, fused=True)
    factor = warmup_cosine(steps, WARMUP_FRACTION)
    history, best = [], None
    for step, batch in enumerate(
        tqdm(prefetch(draw, steps), "train forecaster", steps, unit=" steps", disable=None), 1
    ):
        set_learning_rate(optimizer, learning_rate * factor(step - 1))
        loss = movement_loss(model, *batch, noise)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
        optimizer.step()
        if step % CHECK_EVERY == 0 or step == steps:
            val_loss = validation_loss(model, held_out, seed)
            if best is None or val_loss < min(row["val_loss"] for row in history):
                best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            history.append({"step": step, "train_loss": loss.item(), "val_loss": val_loss})
            require_convergence(val_loss, f"step {step}", REMEDY, history[0]["val_loss"])
    return best, history


def fit_ridge(
    model: RidgeForecaster, draw: Callable[[], Batch], held_out: list[Batch], *, seed: int, steps: int, ridge: float
) -> tuple[Checkpoint, Rows]:
    """Fit by the normal equations on `steps` batches; return the state and one history row."""
    for _ in tqdm(range(steps), desc="observe", unit=" batches", disable=None):
        model.observe(*draw())
    model.solve(ridge)
    val_loss = validation_loss(model, held_out, seed)
    return model.state_dict(), [{"step": steps, "train_loss": "", "val_loss": val_loss}]


def train_coefficients(
    model: CoefficientForecaster,
    train: list[Trajectory],
    validation: list[Trajectory],
    *,
    seed: int,
    steps: int,
    learning_rate: float,
) -> tuple[Checkpoint, Rows]:
    """Return the state after training on the mean squared error of the next snapshot's coefficients, and the history."""

    def sequences(runs: list[Trajectory]) -> tuple[torch.Tensor, torch.Tensor]:
        codes = [model.encode(trajectory.weights) for trajectory in runs]
        windows = [code[: len(code) - 1].unfold(0, model.sequence, 1).mT for code in codes]
        return torch.cat(windows), torch.cat([code[model.sequence :] for code in codes])

    (x, y), held_out = sequences(train), sequences(validation)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate, fused=True)
    random = generator(seed, "forecaster batches")
    history = []
    for step in tqdm(range(1, steps + 1), desc="train forecaster", unit=" steps", disable=None):
        batch = torch.randint(len(x), (COEFFICIENT_BATCH,), generator=random)
        loss = mse_loss(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % CHECK_EVERY == 0 or step == steps:
            with torch.no_grad():
                val_loss = mse_loss(model(held_out[0]), held_out[1]).item()
            history.append({"step": step, "train_loss": loss.item(), "val_loss": val_loss})
            require_convergence(val_loss, f"step {step}", REMEDY, history[0]["val_loss"])
    return model.state_dict(), history


def train_variant(
    variant: Variant,
    train: list[Trajectory],
    validation: list[Trajectory],
    seed: int,
    *,
    horizons: list[int],
    components: int,
    pairs: int,
    weights: int,
    ridge: float,
    weight_decay: float,
) -> tuple[Checkpoint, Rows]:
    """Return the checkpoint ("config", "state_dict") of one variant, and its history."""
    config = variant.model_dump(include={"kind", "with_state", "with_context", "d_model"})
    config |= {"horizons": horizons, "n_layers": len(train[0].layout.shapes), "seed": seed}
    schedule = {"seed": seed, "steps": variant.steps, "learning_rate": variant.learning_rate}
    if variant.kind == "pca_transformer":
        mean, basis, _ = principal_components(torch.cat([t.weights for t in train]), components)
        model = build_forecaster(config, {"mean": mean, "basis": basis})
        state, history = train_coefficients(model, train, validation, **schedule)
    else:
        model = build_forecaster(config)
        draw = partial(draw_batch, model, pairs=pairs, weights=weights)
        random = generator(seed, "held out")
        held_out = [draw(validation, random=random) for _ in range(HELD_OUT)]  # the same for all forecasters
        draw_training = partial(draw, train, random=generator(seed, "forecaster batches"))
        if variant.kind == "ridge":
            state, history = fit_ridge(model, draw_training, held_out, seed=seed, steps=variant.steps, ridge=ridge)
        else:
            state, history = train_shared(model, draw_training, held_out, **schedule, weight_decay=weight_decay)
    return {"config": config, "state_dict": state}, history


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of train_lenet.datasets").dataset
    params = Params.load("train_forecaster", dataset)
    pin_threads()
    runs = load_runs(dataset)
    train, validation = list(runs.train.values()), list(runs.validation.values())
    settings = params.model_dump(include={"horizons", "components", "pairs", "weights", "ridge", "weight_decay"})
    train_one = partial(train_variant, train=train, validation=validation, seed=params.seed, **settings)
    trained = parallel_map(train_one, list(params.variants.values()), torch.device("cpu"), f"forecasters of {dataset}")
    for name, (checkpoint, _) in zip(params.variants, trained, strict=True):
        save_torch(MODELS / dataset / name / "forecaster.pt", checkpoint)
    rows = [
        {"variant": name, **row} for name, (_, history) in zip(params.variants, trained, strict=True) for row in history
    ]
    save_csv(REPORTS / dataset / "history.csv", rows)
    losses = ", ".join(
        f"{name} {history[-1]['val_loss']:.4g}" for name, (_, history) in zip(params.variants, trained, strict=True)
    )
    print(f"{dataset}: validation losses {losses}")


if __name__ == "__main__":
    run(main)
