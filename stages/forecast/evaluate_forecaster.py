"""Compare all forecasters with their baselines on runs that none has seen: errors in weight space, and of the forecast networks.

Reads   data/<dataset>.safetensors, models/train_lenet/<dataset>/, models/train_forecaster/<dataset>-<variant>/forecaster.pt,
        models/tune_jump/<dataset>/forecaster.pt
Writes  reports/evaluate_forecaster/<dataset>/errors.csv        squared error by forecaster, run, origin and horizon
        reports/evaluate_forecaster/<dataset>/networks.csv      test loss and accuracy of the forecast networks, likewise
        reports/evaluate_forecaster/<dataset>/accumulation.csv  squared error of forecasts rolled out, step by step, late half
        reports/evaluate_forecaster/<dataset>/ratios.csv        error over persistence's, 95 % intervals over runs
        reports/evaluate_forecaster/<dataset>/layers.csv        likewise for each parameter tensor, of the flagship
        reports/evaluate_forecaster/<dataset>/losses.csv        loss over persistence's and accuracy gained, likewise
        reports/evaluate_forecaster/<dataset>/summary.json      the main regime's, and the flagship's of all regimes
        reports/evaluate_forecaster/<dataset>/*.png
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from stages.common.files import save_csv, save_json
from stages.common.metrics import accuracy, mean_interval
from stages.common.runtime import parallel_map, pin_threads
from stages.common.stage import InputError, StageParams, parse_arguments, run
from stages.common.vectors import Layout
from stages.forecast import pictures
from stages.forecast.baselines import BASELINES
from stages.forecast.forecasters import load_forecaster, roll_out
from stages.forecast.lenet import LeNet, lenet_logits
from stages.forecast.runs import LeNetData, load_lenet_data, load_runs, regime_of
from stages.forecast.trajectory import Trajectory, origins

FORECASTERS = Path("models/train_forecaster")
JUMP = Path("models/tune_jump")
REPORTS = Path("reports/evaluate_forecaster")

VARIANTS = ("transformer", "weights_only", "mlp", "ridge", "diffusion", "pca_transformer")
FLAGSHIP = "transformer"

Forecaster = Callable[[Trajectory, int], Float[Tensor, "h p"]]
Rows = list[dict[str, Any]]


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


def evaluate_run(
    name: str,
    trajectory: Trajectory,
    forecasters: dict[str, Forecaster],
    horizons: tuple[int, ...],
    flagship: Any,
    data: LeNetData,
    params: Params,
    rolled: bool,
) -> dict[str, Rows]:
    """Return the rows of one run's tables: errors, layers, networks, accumulation (of runs that are to be `rolled` out)."""
    layout, furthest = trajectory.layout, max(horizons)
    x, labels = data.test
    network = LeNet(x.shape[-1], len(data.classes), seed=0).requires_grad_(False)
    tables: dict[str, Rows] = {"errors": [], "layers": [], "networks": [], "accumulation": []}
    of_phase = {"early": 0, "late": 0}
    for t, phase in origins(len(trajectory), furthest, params.origin_every).items():
        truth = torch.stack([trajectory.weights[t + h] for h in horizons])
        place = {"run": name, "regime": regime_of(name), "phase": phase, "t": t}
        with_networks = of_phase[phase] % params.network_every == 0
        for label, forecaster in forecasters.items():
            forecast = forecaster(trajectory, t)
            errors = squared_errors(forecast, truth, layout)
            keys = [{"forecaster": label, **place, "h": h} for h in horizons]
            tables["errors"] += [key | {"error": e} for key, e in zip(keys, errors.sum(1).tolist(), strict=True)]
            if label in (FLAGSHIP, "persistence"):
                tables["layers"] += [
                    key | {"parameter": parameter, "error": errors[j, i].item()}
                    for j, key in enumerate(keys)
                    for i, parameter in enumerate(layout.shapes)
                ]
            if with_networks:
                results = run_networks(forecast, layout, network, x, labels)
                tables["networks"] += [key | result for key, result in zip(keys, results, strict=True)]
        if rolled and phase == "late" and of_phase[phase] == 0:  # rolling out costs a forecast a step
            path = trajectory.weights[t + 1 : t + 1 + furthest]
            methods = {"rolled_out": roll_out(flagship, trajectory, t, furthest)}
            methods["persistence"] = trajectory.weights[t].expand_as(path)
            for method, ahead in methods.items():
                tables["accumulation"] += [
                    {"forecaster": method, **place, "h": h, "error": error}
                    for h, error in enumerate((ahead - path).square().sum(1).tolist(), 1)
                ]
            direct = [row for row in tables["errors"] if row["forecaster"] == FLAGSHIP and row["t"] == t]
            tables["accumulation"] += [row | {"forecaster": "direct"} for row in direct]
        of_phase[phase] += 1
    if not all(of_phase.values()):
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


def nest(values: pd.Series) -> dict[str, Any]:
    """Return a series of several index levels as nested mappings."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        node = tree
        for part in key[:-1]:
            node = node.setdefault(str(part), {})
        node[str(key[-1])] = float(value)
    return tree


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of train_lenet.datasets").dataset
    params = Params.load("evaluate_forecaster", dataset)
    pin_threads()
    cpu = torch.device("cpu")
    runs = load_runs(dataset)
    data = load_lenet_data(dataset, runs.recipe, cpu, params.evaluation_images)

    learnt = {v: load_forecaster(FORECASTERS / f"{dataset}-{v}" / "forecaster.pt")[0] for v in VARIANTS}
    jump, _ = load_forecaster(JUMP / dataset / "forecaster.pt", "jump")
    flagship = learnt[FLAGSHIP]
    horizons = flagship.horizons
    main_regime = regime_of(next(iter(runs.test)))
    forecasters: dict[str, Forecaster] = {name: partial(f, horizons=horizons) for name, f in BASELINES.items()}
    forecasters |= {name: model.predict for name, model in learnt.items()}
    forecasters["jump"] = lambda trajectory, t: jump.propose(trajectory, t).expand(len(horizons), -1)

    parts = parallel_map(
        lambda name: evaluate_run(
            name, runs.test[name], forecasters, horizons, flagship, data, params, regime_of(name) == main_regime
        ),
        list(runs.test),
        cpu,
        f"forecast runs on {dataset}",
    )
    tables = {name: pd.DataFrame([row for part in parts for row in part[name]]) for name in parts[0]}
    cell = ["forecaster", "regime", "phase", "h"]
    ratios, losses = error_ratios(tables["errors"], cell), network_changes(tables["networks"], cell)
    layers = error_ratios(tables["layers"], [*cell, "parameter"]).xs(FLAGSHIP)
    accumulation = error_ratios(tables["accumulation"], cell)

    folder = REPORTS / dataset
    for name in ("errors", "networks", "accumulation"):
        save_csv(folder / f"{name}.csv", tables[name].to_dict("records"))
    for name, table in {"ratios": ratios, "layers": layers, "losses": losses}.items():
        save_csv(folder / f"{name}.csv", table.reset_index().to_dict("records"))
    at_horizons = accumulation["mean"][accumulation.index.isin(horizons, level="h")]
    summary = {
        "weight_error": nest(ratios["mean"].xs(main_regime, level="regime")),
        "loss": nest(losses["loss_ratio"].xs(main_regime, level="regime")),
        "acc_points": nest(losses["acc_points"].xs(main_regime, level="regime")),
        "flagship": nest(ratios["mean"].xs(FLAGSHIP)),
        "rolled_out": nest(at_horizons.xs("rolled_out").xs(main_regime, level="regime")),
        "jump": {
            "loss": nest(losses["loss_ratio"].xs("jump").xs(horizons[0], level="h")),
            "lower_loss": nest(losses["lower_loss"].xs("jump").xs(horizons[0], level="h")),
        },
    }
    save_json(folder / "summary.json", summary)
    pictures.draw_horizons(folder / "horizons.png", ratios)
    pictures.draw_times(folder / "times.png", tables["errors"], main_regime, horizons)
    pictures.draw_accumulation(folder / "accumulation.png", accumulation)
    pictures.draw_horizons(folder / "losses.png", losses, "loss_ratio", "test loss")
    pictures.draw_accuracies(folder / "accuracies.png", losses, main_regime)
    first = next(iter(runs.test))
    pictures.draw_path(folder / "path.png", runs.test[first], forecasters[FLAGSHIP], horizons)
    late = summary["weight_error"][FLAGSHIP]["late"]
    print(
        f"{dataset}: {FLAGSHIP} against keeping the last weights, late: "
        + ", ".join(f"h={h} {ratio:.3f}" for h, ratio in late.items())
        + f"; loss after a jump {summary['jump']['loss'][main_regime]['late']:.3f} of the last weights'"
    )


if __name__ == "__main__":
    run(main)
