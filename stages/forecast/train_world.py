"""Train runs of several networks, optimisers, learning rates, batch sizes and schedules: what forecasters of any run learn from.

Reads   data/<dataset>.safetensors
Writes  models/train_world/<dataset>/<run>.safetensors   weights float32 [t, p], state float16 [t, p] (the optimiser's direction: m /
                                                         sqrt(v) of Adam and AdamW, which keep a second moment; the momentum m of SGD
                                                         and Muon; 0 before the first step); metadata: layout, recipe, snapshot_every,
                                                         test_acc
        reports/train_world/<dataset>/runs.csv           a row for each run: its recipe and its test accuracy
        reports/train_world/<dataset>/summary.json       test accuracy, by network

Finished runs wait in .work/train_world/, so that a stage that was killed goes on where it was; on a Ray cluster if RAY_ADDRESS
names one.

Axes: t snapshots, p weights.
"""

import math
import shutil
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from stages.common.files import save_arrays, save_csv, save_json
from stages.common.images import load_images
from stages.common.metrics import accuracy, mean_std
from stages.common.optim import require_convergence, set_learning_rate
from stages.common.randomness import generator, log_uniform
from stages.common.runtime import pin_threads
from stages.common.stage import StageParams, parse_arguments, run
from stages.common.vectors import Layout
from stages.common.work import compute_pieces, fingerprint, work_folder
from stages.forecast.world import Recipe, build_network, build_optimizers, directions_of, rate_factor, world_input

MODELS = Path("models/train_world")
REPORTS = Path("reports/train_world")

Range = tuple[PositiveFloat, PositiveFloat]
Images = tuple[Tensor, Tensor]


class Params(StageParams):
    """What the runs of a data set are drawn from: ranges are drawn from by their logarithm, lists with equal chances."""

    seed: NonNegativeInt
    rounds: PositiveInt  # every network is trained with every optimiser so often
    widths: dict[Literal["strided", "pooled", "perceptron", "residual"], Range]
    learning_rates: dict[Literal["adam", "adamw", "sgd", "muon"], Range]
    schedules: Annotated[list[Literal["constant", "cosine"]], Field(min_length=1)]
    image_sizes: Annotated[list[Annotated[int, Field(ge=8)]], Field(min_length=1)]
    batch_sizes: Range
    steps: Range
    snapshot_every: PositiveInt  # steps
    train_images: PositiveInt
    test_images: PositiveInt


def draw_recipes(
    dataset: str,
    *,
    seed: int,
    rounds: int,
    widths: dict[str, Range],
    learning_rates: dict[str, Range],
    schedules: list[str],
    image_sizes: list[int],
    batch_sizes: Range,
    steps: Range,
    snapshot_every: int,
) -> dict[str, Recipe]:
    """Return the recipes of all runs by name, <network>-<optimizer>-<round>."""
    recipes = {}
    for network, optimizer, i in product(widths, learning_rates, range(rounds)):
        name = f"{network}-{optimizer}-{i}"
        random = generator(seed, f"recipe of {dataset} {name}")
        u = torch.rand(4, generator=random).tolist()
        size, schedule = (torch.randint(len(x), (), generator=random) for x in (image_sizes, schedules))
        recipes[name] = Recipe(
            network=network,
            width=round(log_uniform(widths[network], u[0])),
            image_size=image_sizes[size],
            optimizer=optimizer,
            learning_rate=log_uniform(learning_rates[optimizer], u[1]),
            schedule=schedules[schedule],
            batch_size=round(log_uniform(batch_sizes, u[2])),
            steps=snapshot_every * math.ceil(log_uniform(steps, u[3]) / snapshot_every),
            seed=int(torch.randint(2**31, (), generator=random)),
        )
    return recipes


def train_run(recipe: Recipe, train: Images, test: Images, classes: int, snapshot_every: int) -> dict[str, np.ndarray]:
    """Return weights and the optimiser's directions [t, p], every so many steps from the first weights on, and the final test accuracy."""
    (images, labels), (test_images, test_labels) = ((world_input(x, recipe.image_size), y) for x, y in (train, test))
    network = build_network(recipe, images.shape[1], classes)
    optimizers, factor = build_optimizers(network, recipe), rate_factor(recipe)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    random = generator(recipe.seed, "batches of train_world")
    weights, states = [], []

    def record() -> None:
        weights.append(parameters_to_vector(network.parameters()).detach())
        states.append(directions_of(network, optimizers).half())

    record()
    for step in range(1, recipe.steps + 1):
        batch = torch.randint(len(images), (recipe.batch_size,), generator=random)
        network.zero_grad()
        cross_entropy(network(images[batch]), labels[batch]).backward()
        for optimizer, rate in zip(optimizers, rates, strict=True):
            set_learning_rate(optimizer, rate * factor(step - 1))
            optimizer.step()
        if step % snapshot_every == 0:
            record()
    with torch.no_grad():
        logits = network.eval()(test_images)
    where = f"{recipe.optimizer}, learning rate {recipe.learning_rate:.2g}"
    require_convergence(cross_entropy(logits, test_labels).item(), where, "lower train_world.learning_rates")
    acc = accuracy(logits, test_labels)
    return {"weights": torch.stack(weights).numpy(), "state": torch.stack(states).numpy(), "test_acc": acc.numpy()}


def collect(dataset: str, name: str, recipe: Recipe, path: Path, channels: int, classes: int, every: int) -> float:
    """Write a finished run where it belongs, with its layout and recipe; return its test accuracy."""
    from safetensors.numpy import load_file

    arrays = load_file(path)
    acc = float(arrays.pop("test_acc"))
    layout = Layout.of(dict(build_network(recipe, channels, classes).named_parameters()))
    metadata = layout.metadata | {"recipe": recipe.model_dump(), "snapshot_every": every, "test_acc": acc}
    save_arrays(MODELS / dataset / f"{name}.safetensors", arrays, metadata)
    return acc


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of train_world.datasets").dataset
    params = Params.load("train_world", dataset)
    pin_threads()
    cpu = torch.device("cpu")
    train, test = load_images(dataset, cpu)
    kept = train.subset(torch.randperm(len(train), generator=generator(params.seed, "images"))[: params.train_images])
    channels, classes = train.images.shape[1], len(train.classes)
    data = [(part.pixels(), part.labels) for part in (kept, test.subset(slice(params.test_images)))]
    train_piece = partial(train_run, train=data[0], test=data[1], classes=classes, snapshot_every=params.snapshot_every)
    recipes = draw_recipes(dataset, **params.model_dump(exclude={"train_images", "test_images"}))
    images = fingerprint(Path(f"data/{dataset}.safetensors"))
    work = work_folder(f"train_world/{dataset}", params.model_dump() | {"images": images})
    pieces = {work / f"{name}.safetensors": recipe for name, recipe in recipes.items()}
    compute_pieces(train_piece, pieces, cpu, f"train networks on {dataset}")

    rows: list[dict[str, Any]] = []
    for (name, recipe), path in zip(recipes.items(), pieces, strict=True):
        acc = collect(dataset, name, recipe, path, channels, classes, params.snapshot_every)
        rows.append({"run": name, **recipe.model_dump(), "test_acc": acc})
    by_network = {k: mean_std([row["test_acc"] for row in rows if row["network"] == k]) for k in params.widths}
    save_csv(REPORTS / dataset / "runs.csv", rows)
    save_json(REPORTS / dataset / "summary.json", {"test_acc": by_network})
    shutil.rmtree(work)
    print(f"{dataset}: {len(rows)} runs, " + ", ".join(f"{k} {v['mean']:.1%}" for k, v in by_network.items()))


if __name__ == "__main__":
    run(main)
