"""Compare all forecasters with their baselines on runs that none has seen: errors in weight space, and of the forecast networks.

Reads   data/<dataset>.safetensors, models/train_lenet/<dataset>/, models/train_forecaster/<dataset>-<variant>/forecaster.pt
Writes  reports/evaluate_forecaster/<dataset>/errors.csv     a row for each forecaster, test run, origin and horizon
        reports/evaluate_forecaster/<dataset>/layers.csv     errors of the transformer for each parameter tensor
        reports/evaluate_forecaster/<dataset>/summary.json   ratios to persistence, and test loss and accuracy
        reports/evaluate_forecaster/<dataset>/*.png
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from stages.common.artifacts import save_csv, save_json
from stages.common.command import InputError, parse_arguments, run
from stages.common.images import load_images
from stages.common.metrics import accuracy, mean_std
from stages.common.params import StageParams
from stages.common.runtime import pin_threads
from stages.forecast import pictures
from stages.forecast.forecasters import BASELINES, load_forecaster
from stages.forecast.lenet import LeNet, to_lenet_input
from stages.forecast.runs import load_runs
from stages.forecast.trajectory import WINDOW, Layout, Trajectory

FORECASTERS = Path("models/train_forecaster")
REPORTS = Path("reports/evaluate_forecaster")

VARIANTS = ("transformer", "weights_only", "mlp", "ridge", "pca_transformer")
FLAGSHIP = "transformer"

Forecaster = Callable[[Trajectory, int], Float[Tensor, "h p"]]
Rows = list[dict[str, Any]]


class Params(StageParams):
    """Parameters of one data set's comparison."""

    horizons: list[PositiveInt]  # snapshots ahead, as the forecasters were trained for
    origin_every: PositiveInt  # snapshots between origins
    task_origin_every: PositiveInt  # origins between those whose networks are run on test images
    image_size: PositiveInt  # pixels, as the runs were trained on
    evaluation_images: PositiveInt  # test images


def origins(length: int, horizons: list[int], every: int) -> dict[int, str]:
    """Return the origins of a run of `length` snapshots, all horizons known, and their phase: early or late half."""
    return {t: "early" if t < length // 2 else "late" for t in range(WINDOW + 1, length - max(horizons), every)}


def squared_errors(
    forecast: Float[Tensor, "h p"], truth: Float[Tensor, "h p"], layout: Layout
) -> Float[Tensor, "h layers"]:
    """Return the sum of squared errors of each horizon and parameter tensor."""
    squares = (forecast - truth).square()
    return torch.stack([squares[:, where].sum(1) for where in layout.slices.values()], 1)


def run_network(
    model: LeNet, layout: Layout, weights: Float[Tensor, " p"], x: Tensor, labels: Tensor
) -> tuple[float, float]:
    """Return (loss, accuracy) of the network with these weights."""
    logits = functional_call(model, layout.unflatten(weights), (x,))
    return cross_entropy(logits, labels).item(), accuracy(logits, labels).item()


def ratios(rows: Rows) -> dict[str, Any]:
    """Return mean and spread over runs of each run's error over persistence's, by forecaster, regime, phase and horizon.

    A run's errors are summed over its origins.
    """
    sums: dict[tuple[str, ...], float] = {}
    for row in rows:
        at = (row["forecaster"], row["regime"], row["phase"], str(row["h"]), row["run"])
        sums[at] = sums.get(at, 0.0) + row["error"]
    table: dict[str, Any] = {}
    for (forecaster, regime, phase, h, name), total in sums.items():
        ratio = total / sums["persistence", regime, phase, h, name]
        table.setdefault(forecaster, {}).setdefault(regime, {}).setdefault(phase, {}).setdefault(h, []).append(ratio)
    return map_leaves(mean_std, table)


def task_summary(rows: Rows) -> dict[str, Any]:
    """Return the test loss and accuracy of the forecast networks: means over test runs and origins, by phase and horizon."""
    table: dict[str, Any] = {}
    for row in (row for row in rows if row["test_loss"] != ""):
        cell = table.setdefault(row["forecaster"], {}).setdefault(row["phase"], {}).setdefault(str(row["h"]), {})
        for name in ("test_loss", "test_acc"):
            cell.setdefault(name, []).append(row[name])
    return map_leaves(lambda values: sum(values) / len(values), table)


def map_leaves(function: Callable[[list[float]], Any], table: Any) -> Any:
    """Return nested mappings with function(leaf) in place of every list."""
    if isinstance(table, dict):
        return {key: map_leaves(function, value) for key, value in table.items()}
    return function(table)


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of train_lenet.datasets").dataset
    params = Params.load("evaluate_forecaster", dataset)
    pin_threads()
    runs = load_runs(dataset).test
    layout = next(iter(runs.values())).layout
    _, test = load_images(dataset, torch.device("cpu"))
    test = test.subset(slice(params.evaluation_images))
    x = to_lenet_input(test.pixels(), params.image_size)
    network = LeNet(params.image_size, len(test.classes), seed=0).requires_grad_(False)

    forecasters: dict[str, Forecaster] = {
        name: partial(baseline, horizons=params.horizons) for name, baseline in BASELINES.items()
    }
    for variant in VARIANTS:
        forecasters[variant] = load_forecaster(FORECASTERS / f"{dataset}-{variant}" / "forecaster.pt").predict

    rows: Rows = []
    by_layer = torch.zeros(len(params.horizons), len(layout.shapes))
    by_layer_persistence = torch.zeros_like(by_layer)
    for name, trajectory in tqdm(runs.items(), desc="forecast", unit=" runs", disable=None):
        seen: Counter[str] = Counter()
        for t, phase in origins(len(trajectory), params.horizons, params.origin_every).items():
            truth = torch.stack([trajectory.weights[t + h] for h in params.horizons])
            for label, forecaster in forecasters.items():
                forecast = forecaster(trajectory, t)
                errors = squared_errors(forecast, truth, layout)
                by_layer += errors if label == FLAGSHIP else 0
                by_layer_persistence += errors if label == "persistence" else 0
                for j, h in enumerate(params.horizons):
                    row = {
                        "forecaster": label,
                        "run": name,
                        "regime": name.split("-")[0],
                        "phase": phase,
                        "t": t,
                        "h": h,
                    }
                    row |= {"error": errors[j].sum().item(), "test_loss": "", "test_acc": ""}
                    if seen[phase] % params.task_origin_every == 0:
                        loss_acc = run_network(network, layout, forecast[j], x, test.labels)
                        row |= dict(zip(("test_loss", "test_acc"), loss_acc, strict=True))
                    rows.append(row)
            seen[phase] += 1
        if len(seen) < 2:
            raise InputError(f"run {name} is too short for origins in both halves: raise train_lenet.steps")

    summary = {"weight_error": ratios(rows), "task": task_summary(rows)}
    folder = REPORTS / dataset
    layers = (by_layer / by_layer_persistence).tolist()
    save_csv(
        folder / "layers.csv",
        [
            {"parameter": parameter, "h": h, "ratio": layers[j][i]}
            for i, parameter in enumerate(layout.shapes)
            for j, h in enumerate(params.horizons)
        ],
    )
    save_csv(folder / "errors.csv", rows)
    save_json(folder / "summary.json", summary)
    pictures.draw_horizons(folder / "horizons.png", summary["weight_error"])
    first = next(iter(runs))
    pictures.draw_path(folder / "path.png", runs[first], forecasters[FLAGSHIP], params.horizons)
    late = summary["weight_error"][FLAGSHIP][first.split("-")[0]]["late"]
    print(
        f"{dataset}: {FLAGSHIP} against keeping the last weights, late: "
        + ", ".join(f"h={h} {v['mean']:.3f}" for h, v in late.items())
    )


if __name__ == "__main__":
    run(main)
