"""Train unseen networks with and without nowcasting, against a tuned learning rate and a cosine schedule.

Reads   data/<dataset>.safetensors, models/train_lenet/<dataset>/, models/tune_jump/<dataset>/forecaster.pt
Writes  reports/nowcast_training/<dataset>/history.csv    test loss by method, seed and step
        reports/nowcast_training/<dataset>/grid.csv       validation loss of every learning rate
        reports/nowcast_training/<dataset>/summary.json   loss over training and cost to a target beside bare Adam's, seed by seed
        reports/nowcast_training/<dataset>/metrics.json   the headlines of it, for `dvc metrics`
        reports/nowcast_training/<dataset>/losses.png, vector/losses.svg
"""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from stages.common.files import Rows, Summary, save_csv, save_json
from stages.common.metrics import accuracy, headline_metrics, mean_interval
from stages.common.optim import require_convergence, set_learning_rate
from stages.common.randomness import generator
from stages.common.runtime import parallel_map, pin_threads
from stages.common.stage import InputError, StageParams, parse_arguments, run
from stages.forecast import pictures
from stages.forecast.forecasters import load_forecaster
from stages.forecast.jump import JumpForecaster
from stages.forecast.lenet import LeNet, lenet_logits
from stages.forecast.nowcast import PROPOSALS, NowcastOptimizer
from stages.forecast.regimes import Regime, build_optimizer
from stages.forecast.runs import load_lenet_data, load_runs
from stages.forecast.trajectory import WINDOW, Trajectory

JUMP = Path("models/tune_jump")
REPORTS = Path("reports/nowcast_training")

HEADLINES = {  # what `dvc metrics` shows, and where it lies in the summary; ratios are to bare Adam at equal cost
    "loss_ratio_nowcast": "methods/adam_nowcast/mean_loss_ratio",
    "loss_ratio_tuned": "methods/tuned/mean_loss_ratio",
    "loss_ratio_cosine": "methods/cosine/mean_loss_ratio",
    "loss_ratio_cosine_nowcast": "methods/cosine_nowcast/mean_loss_ratio",
}

Images = tuple[Tensor, Tensor]


class Params(StageParams):
    """Parameters of one data set's comparison."""

    steps: PositiveInt  # of a run
    seeds: Annotated[list[NonNegativeInt], Field(min_length=2)]  # of networks that no forecaster has seen
    tuning_seeds: Annotated[list[NonNegativeInt], Field(min_length=1)]  # of networks on which learning rates are chosen
    learning_rate: PositiveFloat  # of the untuned runs
    grid: Annotated[list[PositiveFloat], Field(min_length=3)]  # learning rates to choose from
    choice_images: PositiveInt  # held-out images on which a move is chosen
    tuning_images: PositiveInt  # further held-out images on which a learning rate is chosen
    evaluation_images: PositiveInt  # test images
    patience: PositiveInt  # proposals in a row that stay, before nowcasting is switched off


@dataclass(frozen=True)
class Method:
    """How to train: a regime, and what is proposed besides staying. proposals: "", "average" or "average and jump"."""

    regime: Regime
    proposals: str = ""


Job = tuple[Method, int]  # and the network's seed


def adam(learning_rate: float, schedule: str = "constant") -> Regime:
    """Return Adam's regime."""
    return Regime(optimizer="adam", learning_rate=learning_rate, schedule=schedule)


def flops(function: Callable[..., object], *arguments: object) -> int:
    """Return the floating-point operations of matrix products and convolutions in a call."""
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


def costs(jump: JumpForecaster, example: Trajectory, network: LeNet, x: Tensor, batch_size: int) -> dict[str, float]:
    """Return what an evaluation of `x` and a forecast cost, in training steps, by their floating-point operations."""
    step = flops(lambda: network(x[:1]).sum().backward()) * batch_size
    return {
        "evaluation_cost": flops(lenet_logits, network, x) / step,
        "forecast_cost": flops(jump.propose, example, WINDOW) / step,
    }


@dataclass(frozen=True)
class Setting:
    """What all methods share. choice: held-out images on which a move is chosen; cost: of `costs`."""

    recipe: dict[str, Any]
    train: Images
    choice: Images
    classes: int
    jump: JumpForecaster
    cost: dict[str, float]
    patience: int


def train(method: Method, seed: int, evaluation: Images, setting: Setting) -> tuple[Rows, list[str]]:
    """Return a history row for each snapshot, with the loss on the evaluation images, and what was chosen."""
    recipe, (images, labels), (x, y) = setting.recipe, setting.train, setting.choice
    steps, every = recipe["steps"], recipe["snapshot_every"]
    model = LeNet(recipe["image_size"], setting.classes, seed).to(memory_format=torch.channels_last)
    bare, schedule = build_optimizer(model.parameters(), method.regime, steps)
    optimizer: NowcastOptimizer | torch.optim.Optimizer = bare
    if method.proposals:
        forecaster = setting.jump if method.proposals == "average and jump" else None
        optimizer = NowcastOptimizer(
            bare,
            forecaster,
            lambda: cross_entropy(lenet_logits(model, x), y).item(),
            every,
            setting.patience,
            **setting.cost,
        )
    random, history = generator(seed, "batches of nowcast_training"), []
    for step in range(1, steps + 1):
        set_learning_rate(bare, method.regime.learning_rate * schedule(step - 1))
        batch = torch.randint(len(images), (recipe["batch_size"],), generator=random)
        loss = cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % every == 0:
            logits = lenet_logits(model, evaluation[0])
            spent = optimizer.charged_steps if optimizer is not bare else 0.0
            row = {"seed": seed, "step": step, "cost": step + spent}
            row |= {"loss": cross_entropy(logits, evaluation[1]).item(), "acc": accuracy(logits, evaluation[1]).item()}
            history.append(row)
    return history, optimizer.chosen if optimizer is not bare else []


def loss_at_costs(history: Rows, budgets: np.ndarray) -> np.ndarray:
    """Return the latest loss that was reached for each of the increasing `budgets`, in steps: charged ones count."""
    spent = np.array([row["cost"] for row in history])
    return np.array([row["loss"] for row in history])[(np.searchsorted(spent, budgets, "right") - 1).clip(min=0)]


def cost_to(history: Rows, target: float) -> float | None:
    """Return the steps, charged ones included, until the loss was at most `target`; None if it never was."""
    return next((row["cost"] for row in history if row["loss"] <= target), None)


def choose_learning_rate(losses: dict[float, list[float]]) -> tuple[float, bool]:
    """Return the learning rate of the lowest mean loss, and whether it is inside its grid, not at an edge; never one that diverges."""
    means = {rate: statistics.fmean(values) for rate, values in losses.items()}
    best = min(means, key=lambda rate: means[rate] if math.isfinite(means[rate]) else math.inf)
    return best, min(means) < best < max(means)


def compare(histories: dict[str, list[Rows]], steps: int) -> Summary:
    """Return by method, beside the first one (bare Adam), seed by seed: loss over training and steps to a target.

    Losses are means over the same cost in steps. The target is the first method's mean loss over its last tenth.
    """
    for name, row in ((name, row) for name, runs in histories.items() for rows in runs for row in rows):
        where = f"{name}, seed {row['seed']}, step {row['step']}"
        require_convergence(row["loss"], where, "lower nowcast_training.grid")
    baseline = next(iter(histories.values()))
    budgets = np.arange(1, steps + 1)
    target = statistics.fmean(row["loss"] for rows in baseline for row in rows[-max(1, len(rows) // 10) :])
    means = {name: [loss_at_costs(rows, budgets).mean() for rows in runs] for name, runs in histories.items()}
    reached = {name: [cost_to(rows, target) for rows in runs] for name, runs in histories.items()}
    base_mean, base_reached = next(iter(means.values())), next(iter(reached.values()))

    def ratios(values: Iterable[float], bases: Iterable[float]) -> list[float]:
        return [float(v / b) for v, b in zip(values, bases, strict=True)]

    return {
        name: {
            "mean_loss": mean_interval([float(v) for v in means[name]]),
            "mean_loss_ratio": mean_interval(ratios(means[name], base_mean)),
            "last_loss_ratio": mean_interval(
                ratios([rows[-1]["loss"] for rows in runs], [rows[-1]["loss"] for rows in baseline])
            ),
            "reached_target": sum(cost is not None for cost in reached[name]) / len(runs),
            # a run that never reaches the target counts as if it did at the end: an underestimate, so the share stands beside
            "cost_to_target_ratio": mean_interval(
                ratios([cost or steps for cost in reached[name]], [cost or steps for cost in base_reached])
            ),
            "charged_steps": statistics.fmean(rows[-1]["cost"] - rows[-1]["step"] for rows in runs),
        }
        for name, runs in histories.items()
    }


def split_held_out(held_out: Images, choice_images: int, tuning_images: int) -> tuple[Images, Images]:
    """Return the images on which moves are chosen, and those on which learning rates are. InputError if none are left."""
    images, labels = held_out
    choice = images[:choice_images], labels[:choice_images]
    rest = slice(choice_images, choice_images + tuning_images)
    if not len(labels[rest]):
        raise InputError(f"params.yaml: nowcast_training.choice_images: none of {len(labels)} is left for tuning")
    return choice, (images[rest], labels[rest])


def train_all(jobs: list[Job], evaluation: Images, setting: Setting, label: str) -> list[tuple[Rows, list[str]]]:
    """Return of each job what `train` does."""
    return parallel_map(lambda job: train(*job, evaluation, setting), jobs, torch.device("cpu"), label)


def tune(grid: list[float], seeds: list[int], evaluation: Images, setting: Setting) -> Rows:
    """Return a row for every schedule, learning rate and seed, with the mean loss over training."""
    jobs = [
        (Method(adam(rate, schedule)), seed)
        for schedule, rate in product(("constant", "cosine"), grid)
        for seed in seeds
    ]
    results = train_all(jobs, evaluation, setting, "tune learning rates")
    return [
        {
            "schedule": method.regime.schedule,
            "learning_rate": method.regime.learning_rate,
            "seed": seed,
            "mean_val_loss": statistics.fmean(row["loss"] for row in history),
        }
        for (method, seed), (history, _) in zip(jobs, results, strict=True)
    ]


def choose_for(schedule: str, grid: Rows) -> tuple[float, bool]:
    """Return the learning rate that `choose_learning_rate` takes of a schedule's rows."""
    losses: dict[float, list[float]] = {}
    for row in grid:
        if row["schedule"] == schedule:
            losses.setdefault(row["learning_rate"], []).append(row["mean_val_loss"])
    return choose_learning_rate(losses)


def compared_methods(untuned: float, tuned: float, peak: float) -> dict[str, Method]:
    """Return the methods by name, bare Adam first. Learning rates: untuned, tuned without a schedule, tuned for cosine."""
    base = adam(untuned)
    return {
        "adam": Method(base),
        "adam_average": Method(base, "average"),
        "adam_nowcast": Method(base, "average and jump"),
        "tuned": Method(adam(tuned)),
        "cosine": Method(adam(peak, "cosine")),
        "cosine_nowcast": Method(adam(peak, "cosine"), "average and jump"),
    }


def count_choices(choices: list[list[str]]) -> dict[str, int]:
    """Return how often each proposal was taken."""
    counts = Counter(choice for run_choices in choices for choice in run_choices)
    return {proposal: counts[proposal] for proposal in PROPOSALS}


def summarise(
    methods: dict[str, Method],
    results: dict[str, list[tuple[Rows, list[str]]]],
    grid: Rows,
    steps: int,
    cost: dict[str, float],
) -> Summary:
    """Return how the methods compare, what was chosen, the tuned learning rates, and what nowcasting is charged."""
    (rate, rate_inside), (peak, peak_inside) = choose_for("constant", grid), choose_for("cosine", grid)
    return {
        "methods": compare({name: [history for history, _ in runs] for name, runs in results.items()}, steps),
        "chosen": {
            name: count_choices([choices for _, choices in results[name]])
            for name, method in methods.items()
            if method.proposals
        },
        "tuned_learning_rate": rate,
        "tuned_inside_grid": rate_inside,
        "cosine_peak": peak,
        "cosine_inside_grid": peak_inside,
        **cost,
    }


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of train_lenet.datasets").dataset
    params = Params.load("nowcast_training", dataset)
    pin_threads()
    runs = load_runs(dataset)
    recipe, example = runs.recipe | {"steps": params.steps}, next(iter(runs.train.values()))
    data = load_lenet_data(dataset, recipe, torch.device("cpu"), params.evaluation_images)
    jump, _ = load_forecaster(JUMP / dataset / "forecaster.pt", "jump")
    choice, tuning = split_held_out(data.held_out, params.choice_images, params.tuning_images)
    network = LeNet(recipe["image_size"], len(data.classes), seed=0)
    cost = costs(jump, example, network, choice[0], recipe["batch_size"])
    setting = Setting(recipe, data.train, choice, len(data.classes), jump, cost, params.patience)

    grid = tune(params.grid, params.tuning_seeds, tuning, setting)
    (rate, _), (peak, _) = choose_for("constant", grid), choose_for("cosine", grid)
    methods = compared_methods(params.learning_rate, rate, peak)
    jobs = [(method, seed) for method in methods.values() for seed in params.seeds]
    in_order = iter(train_all(jobs, data.test, setting, "train with and without nowcasting"))
    results = {name: [next(in_order) for _ in params.seeds] for name in methods}
    rows = [{"method": name, **row} for name, runs in results.items() for history, _ in runs for row in history]
    summary = summarise(methods, results, grid, recipe["steps"], cost)

    folder = REPORTS / dataset
    save_csv(folder / "history.csv", rows)
    save_csv(folder / "grid.csv", grid)
    save_json(folder / "summary.json", summary)
    save_json(folder / "metrics.json", headline_metrics(summary, HEADLINES))
    pictures.draw_nowcasts(folder / "losses.png", pd.DataFrame(rows))
    print(
        f"{dataset}: mean loss over training, over bare Adam's: "
        + ", ".join(f"{name} {result['mean_loss_ratio']['mean']:.3f}" for name, result in summary["methods"].items())
    )


if __name__ == "__main__":
    run(main)
