"""Compare all forecasters with their baselines on runs that none has seen: errors in weight space, and of the forecast networks.

Reads   data/<dataset>.safetensors, models/train_lenet/<dataset>/, models/train_forecaster/<dataset>/<variant>/forecaster.pt,
        models/tune_jump/<dataset>/forecaster.pt
Writes  reports/evaluate_forecaster/<dataset>/errors.csv        squared error by forecaster, run, origin and horizon
        reports/evaluate_forecaster/<dataset>/networks.csv      test loss and accuracy of the forecast networks, likewise
        reports/evaluate_forecaster/<dataset>/accumulation.csv  squared error of forecasts rolled out, step by step, late half
        reports/evaluate_forecaster/<dataset>/ratios.csv        error over persistence's, 95 % intervals over runs
        reports/evaluate_forecaster/<dataset>/layers.csv        likewise for each parameter tensor, of the transformer
        reports/evaluate_forecaster/<dataset>/losses.csv        loss over persistence's and accuracy gained, likewise
        reports/evaluate_forecaster/<dataset>/summary.json      the main regime's, and the transformer's of all regimes
        reports/evaluate_forecaster/<dataset>/metrics.json      the headlines of it, for `dvc metrics`
        reports/evaluate_forecaster/<dataset>/*.png, vector/*.svg

Axes: h horizons, p weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from stages.common.files import Row, Rows, Summary, save_csv, save_json
from stages.common.metrics import accuracy, headline_metrics, mean_interval
from stages.common.runtime import parallel_map, pin_threads
from stages.common.stage import InputError, StageParams, parse_arguments, run
from stages.common.vectors import Layout
from stages.forecast import pictures
from stages.forecast.baselines import BASELINES
from stages.forecast.forecasters import load_forecaster
from stages.forecast.lenet import LeNet, lenet_logits
from stages.forecast.runs import load_lenet_data, load_runs, regime_of
from stages.forecast.shared import SharedForecaster, roll_out
from stages.forecast.trajectory import Trajectory, origins

FORECASTERS = Path("models/train_forecaster")
JUMP = Path("models/tune_jump")
REPORTS = Path("reports/evaluate_forecaster")

HEADLINES = {  # what `dvc metrics` shows, and where it lies in the summary; errors are relative to keeping the last weights
    "error_transformer": "weight_error/transformer/late/1",
    "error_weights_only": "weight_error/weights_only/late/1",
    "error_mean_of_3": "weight_error/average_3/late/1",
    "loss_jump": "jump/loss/adam/late",
}

VARIANTS = ("transformer", "weights_only", "mlp", "ridge", "diffusion", "pca_transformer")
TRANSFORMER = "transformer"

Forecaster = Callable[[Trajectory, int], Float[Tensor, "h p"]]
Tables = dict[str, pd.DataFrame]

CELL = ["forecaster", "regime", "phase", "h"]


class Params(StageParams):
    """Parameters of one data set's comparison."""

    origin_every: PositiveInt  # snapshots between origins
    network_every: PositiveInt  # origins between those whose networks are run on test images
    evaluation_images: PositiveInt  # test images


def squared_errors(
    forecast: Float[Tensor, "h p"], truth: Float[Tensor, "h p"], layout: Layout
) -> Float[Tensor, "h layers"]:
    """Return the sum of squared errors of each horizon and parameter tensor."""
    squares = (forecast - truth).square()
    return torch.stack([squares[:, where].sum(1) for where in layout.slices.values()], 1)


def run_networks(
    forecast: Float[Tensor, "h p"], layout: Layout, network: LeNet, x: Tensor, labels: Tensor
) -> list[dict[str, float]]:
    """Return loss and accuracy of every horizon's network; those that are the same for all horizons are run once."""
    same = bool((forecast == forecast[0]).all())
    results = []
    for weights in forecast[:1] if same else forecast:
        logits = lenet_logits(partial(functional_call, network, layout.unflatten(weights)), x)
        loss, acc = cross_entropy(logits, labels).item(), accuracy(logits, labels).item()
        results.append({"test_loss": loss, "test_acc": acc})
    return results * len(forecast) if same else results


@dataclass(frozen=True)
class Comparison:
    """What all runs are evaluated by. test: images and labels on which every `network_every`th origin's networks are run."""

    forecasters: dict[str, Forecaster]
    transformer: SharedForecaster  # which is rolled out, too
    new_network: Callable[
        [], LeNet
    ]  # each run its own: `functional_call` lays weights into it, and runs go side by side
    test: tuple[Tensor, Tensor]
    origin_every: int
    network_every: int


def error_rows(place: Row, errors: Float[Tensor, "h layers"], horizons: Sequence[int]) -> Rows:
    """Return a forecast's error at every horizon."""
    return [place | {"h": h, "error": error} for h, error in zip(horizons, errors.sum(1).tolist(), strict=True)]


def layer_rows(place: Row, errors: Float[Tensor, "h layers"], horizons: Sequence[int], layout: Layout) -> Rows:
    """Return a forecast's error at every horizon and parameter tensor."""
    return [
        place | {"h": h, "parameter": parameter, "error": error}
        for h, row in zip(horizons, errors.tolist(), strict=True)
        for parameter, error in zip(layout.shapes, row, strict=True)
    ]


def accumulation_rows(place: Row, trajectory: Trajectory, transformer: SharedForecaster) -> Rows:
    """Return the errors of forecasts that are made from forecasts, step by step, beside persistence's."""
    t, furthest = place["t"], max(transformer.horizons)
    path = trajectory.weights[t + 1 : t + 1 + furthest]
    forecasts = {
        "rolled_out": roll_out(transformer, trajectory, t, furthest),
        "persistence": trajectory.weights[t].expand_as(path),
    }
    return [
        {"forecaster": method, **place, "h": h, "error": error}
        for method, ahead in forecasts.items()
        for h, error in enumerate((ahead - path).square().sum(1).tolist(), 1)
    ]


def evaluate_run(name: str, trajectory: Trajectory, comparison: Comparison, with_roll_out: bool) -> dict[str, Rows]:
    """Return the rows of one run's tables: errors, layers, networks, and, if it is to be rolled out, accumulation."""
    layout, horizons = trajectory.layout, comparison.transformer.horizons
    network = comparison.new_network().requires_grad_(False)
    tables: dict[str, Rows] = {"errors": [], "layers": [], "networks": [], "accumulation": []}
    evaluated = {"early": 0, "late": 0}  # origins so far
    for t, phase in origins(len(trajectory), max(horizons), comparison.origin_every).items():
        truth = torch.stack([trajectory.weights[t + h] for h in horizons])
        place = {"run": name, "regime": regime_of(name), "phase": phase, "t": t}
        with_networks = evaluated[phase] % comparison.network_every == 0
        for label, forecaster in comparison.forecasters.items():
            forecast = forecaster(trajectory, t)
            errors, key = squared_errors(forecast, truth, layout), {"forecaster": label, **place}
            tables["errors"] += error_rows(key, errors, horizons)
            if label in (TRANSFORMER, "persistence"):
                tables["layers"] += layer_rows(key, errors, horizons, layout)
            if with_networks:
                results = run_networks(forecast, layout, network, *comparison.test)
                tables["networks"] += [key | {"h": h} | row for h, row in zip(horizons, results, strict=True)]
        if with_roll_out and phase == "late" and evaluated[phase] == 0:  # once: rolling out costs a forecast a step
            tables["accumulation"] += accumulation_rows(place, trajectory, comparison.transformer)
            direct = [row for row in tables["errors"] if row["forecaster"] == TRANSFORMER and row["t"] == t]
            tables["accumulation"] += [row | {"forecaster": "direct"} for row in direct]
        evaluated[phase] += 1
    if not all(evaluated.values()):
        raise InputError(f"run {name} is too short for origins in both halves: raise train_lenet.steps")
    return tables


def beside_persistence(values: pd.Series) -> np.ndarray:
    """Return for each value that of persistence in its place; the index has a level `forecaster`."""
    return values.xs("persistence", level="forecaster").reindex(values.index.droplevel("forecaster")).to_numpy()


def intervals(values: pd.Series, cell: list[str]) -> pd.DataFrame:
    """Return mean, n, low and high over what distinguishes the values of a cell: the runs."""
    return pd.DataFrame(
        {key: mean_interval(group.tolist()) for key, group in values.groupby(cell, sort=False)}
    ).T.rename_axis(cell)


def error_ratios(errors: pd.DataFrame, cell: list[str]) -> pd.DataFrame:
    """Return error over persistence's by cell: each run's errors are summed over its origins, the interval is over runs."""
    by_run = errors.groupby([*cell, "run"], sort=False)["error"].sum()
    return intervals(by_run / beside_persistence(by_run), cell)


def network_changes(networks: pd.DataFrame, cell: list[str]) -> pd.DataFrame:
    """Return by cell, of the forecast network beside the last one: loss (ratio), accuracy (points), how often the loss is lower."""
    by_run = networks.groupby([*cell, "run"], sort=False)[["test_loss", "test_acc"]].mean()
    loss, acc = by_run["test_loss"], by_run["test_acc"]
    ratio = intervals(loss / beside_persistence(loss), cell)
    points = intervals(100 * (acc - beside_persistence(acc)), cell)
    single = networks.set_index([*cell, "run", "t"])["test_loss"]
    return pd.DataFrame(
        {
            "test_loss": loss.groupby(cell, sort=False).mean(),
            "loss_ratio": ratio["mean"],
            "loss_ratio_low": ratio["low"],
            "loss_ratio_high": ratio["high"],
            "test_acc": acc.groupby(cell, sort=False).mean(),
            "acc_points": points["mean"],
            "acc_points_low": points["low"],
            "acc_points_high": points["high"],
            "lower_loss": (single < beside_persistence(single)).groupby(cell, sort=False).mean(),
            "n": ratio["n"],
        }
    )


def nest(values: pd.Series) -> Summary:
    """Return a series of several index levels as nested mappings."""
    tree: Summary = {}
    for key, value in values.items():
        node = tree
        for part in key[:-1]:
            node = node.setdefault(str(part), {})
        node[str(key[-1])] = float(value)
    return tree


def compare(tables: Tables) -> Tables:
    """Return the tables of means and intervals over runs: ratios, layers, losses and accumulation."""
    return {
        "ratios": error_ratios(tables["errors"], CELL),
        "layers": error_ratios(tables["layers"], [*CELL, "parameter"]).xs(TRANSFORMER),
        "losses": network_changes(tables["networks"], CELL),
        "accumulation": error_ratios(tables["accumulation"], CELL),
    }


def summarise(compared: Tables, main_regime: str, horizons: Sequence[int]) -> Summary:
    """Return the main regime's numbers, the transformer's and the jump's of all regimes."""
    ratios, losses, accumulation = compared["ratios"], compared["losses"], compared["accumulation"]
    at_horizons = accumulation["mean"][accumulation.index.isin(horizons, level="h")]
    return {
        "weight_error": nest(ratios["mean"].xs(main_regime, level="regime")),
        "loss": nest(losses["loss_ratio"].xs(main_regime, level="regime")),
        "acc_points": nest(losses["acc_points"].xs(main_regime, level="regime")),
        "flagship": nest(ratios["mean"].xs(TRANSFORMER)),
        "rolled_out": nest(at_horizons.xs("rolled_out").xs(main_regime, level="regime")),
        "jump": {
            "loss": nest(losses["loss_ratio"].xs("jump").xs(horizons[0], level="h")),
            "lower_loss": nest(losses["lower_loss"].xs("jump").xs(horizons[0], level="h")),
        },
    }


def draw(folder: Path, errors: pd.DataFrame, compared: Tables, main_regime: str, horizons: tuple[int, ...]) -> None:
    """Draw the pictures of what was compared."""
    pictures.draw_horizons(folder / "horizons.png", compared["ratios"])
    pictures.draw_times(folder / "times.png", errors, main_regime, horizons)
    pictures.draw_accumulation(folder / "accumulation.png", compared["accumulation"])
    pictures.draw_horizons(folder / "losses.png", compared["losses"], "loss_ratio", "test loss")
    pictures.draw_accuracies(folder / "accuracies.png", compared["losses"], main_regime)


def load_forecasters(dataset: str) -> tuple[dict[str, Forecaster], SharedForecaster]:
    """Return every forecaster and baseline as a function of a run and an origin, and the transformer itself."""
    learned = {v: load_forecaster(FORECASTERS / dataset / v / "forecaster.pt")[0] for v in VARIANTS}
    jump, _ = load_forecaster(JUMP / dataset / "forecaster.pt", "jump")
    horizons = learned[TRANSFORMER].horizons
    forecasters: dict[str, Forecaster] = {name: partial(f, horizons=horizons) for name, f in BASELINES.items()}
    forecasters |= {name: model.predict for name, model in learned.items()}
    forecasters["jump"] = lambda trajectory, t: jump.propose(trajectory, t).expand(len(horizons), -1)
    return forecasters, learned[TRANSFORMER]


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of train_lenet.datasets").dataset
    params = Params.load("evaluate_forecaster", dataset)
    pin_threads()
    cpu = torch.device("cpu")
    runs = load_runs(dataset)
    data = load_lenet_data(dataset, runs.recipe, cpu, params.evaluation_images)
    forecasters, transformer = load_forecasters(dataset)
    new_network = partial(LeNet, runs.recipe["image_size"], len(data.classes), seed=0)
    comparison = Comparison(forecasters, transformer, new_network, data.test, params.origin_every, params.network_every)
    first = next(iter(runs.test))
    main_regime, horizons = regime_of(first), transformer.horizons

    tables_by_run = parallel_map(
        lambda name: evaluate_run(name, runs.test[name], comparison, with_roll_out=regime_of(name) == main_regime),
        list(runs.test),
        cpu,
        f"forecast runs on {dataset}",
    )
    tables = {name: pd.DataFrame([row for t in tables_by_run for row in t[name]]) for name in tables_by_run[0]}
    compared = compare(tables)
    summary = summarise(compared, main_regime, horizons)

    folder = REPORTS / dataset
    for name in ("errors", "networks", "accumulation"):
        save_csv(folder / f"{name}.csv", tables[name].to_dict("records"))
    for name in ("ratios", "layers", "losses"):
        save_csv(folder / f"{name}.csv", compared[name].reset_index().to_dict("records"))
    save_json(folder / "summary.json", summary)
    save_json(folder / "metrics.json", headline_metrics(summary, HEADLINES))
    draw(folder, tables["errors"], compared, main_regime, horizons)
    pictures.draw_path(folder / "path.png", runs.test[first], transformer.predict, horizons)
    late = ", ".join(f"h={h} {ratio:.3f}" for h, ratio in summary["weight_error"][TRANSFORMER]["late"].items())
    jump_loss = summary["jump"]["loss"][main_regime]["late"]
    print(
        f"{dataset}: {TRANSFORMER} against keeping the last weights, late: {late}; "
        f"loss after a jump {jump_loss:.3f} of the last weights'"
    )


if __name__ == "__main__":
    run(main)
