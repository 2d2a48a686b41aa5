"""Forecast the weights of any network from a folder of its snapshots, and say how well that would have worked so far.

Reads   PATH/*.pt or *.safetensors   state_dicts of one run at even intervals, ordered by the last number in their names
        models/train_forecaster/<dataset>-weights_only/forecaster.pt, which reads no optimiser's state
Writes  OUTPUT/forecast-<h>.safetensors   the state_dict h snapshots after the last one
        OUTPUT/errors.csv                 squared error over persistence's and linear extrapolation's, where the future is known

Floating-point tensors are forecast, but for running statistics; these and all others are those of the last snapshot.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from stages.common.checkpoints import READABLE, load_weights
from stages.common.files import atomic_path, save_csv
from stages.common.runtime import pin_threads
from stages.common.stage import InputError, run
from stages.common.vectors import Layout
from stages.forecast.baselines import linear
from stages.forecast.forecasters import load_forecaster
from stages.forecast.shared import SharedForecaster
from stages.forecast.trajectory import WINDOW, Trajectory

SUFFIXES = (".pt", ".pth", ".safetensors")
RUNNING = ("running_mean", "running_var")

State = dict[str, torch.Tensor]


def find_snapshots(folder: Path) -> list[Path]:
    """Return the folder's snapshots in the order of the last number in their names; InputError if there is no such order."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder")
    paths = [path for path in folder.iterdir() if path.suffix in SUFFIXES]
    numbers = {path: re.findall(r"\d+", path.stem) for path in paths}
    if unnumbered := sorted(path.name for path, found in numbers.items() if not found):
        raise InputError(f"{folder}: no number in the name of {unnumbered[0]}, so its place is not known")
    if len(paths) <= WINDOW:
        raise InputError(f"{folder}: expected {WINDOW + 1} snapshots or more ({', '.join(SUFFIXES)}), got {len(paths)}")
    order = sorted(paths, key=lambda path: int(numbers[path][-1]))
    places = [int(numbers[path][-1]) for path in order]
    for first, second, a, b in zip(places, places[1:], order, order[1:], strict=False):
        if first == second:
            raise InputError(f"{folder}: {a.name} and {b.name} have the same number")
    return order


def read_trajectory(paths: list[Path]) -> tuple[Trajectory, State]:
    """Return the trajectory of what is forecast, and the last snapshot; InputError if shapes differ or a weight is not finite."""
    layout, weights, last, said = None, [], {}, set()
    for path in tqdm(paths, "read snapshots", disable=None):
        last, notes = load_weights(path)
        for note in set(notes) - said:
            print(f"{path}: {note}", file=sys.stderr)
        said.update(notes)
        state = {name: x.float() for name, x in last.items() if x.is_floating_point() and not name.endswith(RUNNING)}
        if not state:
            raise InputError(f"{path} has no floating-point tensor")
        shapes = Layout.of(state).shapes
        layout = layout or Layout(shapes)
        for name in layout.shapes | shapes:
            if layout.shapes.get(name) != shapes.get(name):
                there, here = layout.shapes.get(name, "missing"), shapes.get(name, "missing")
                raise InputError(f"{path}: {name} is {here}, but {there} in {paths[0].name}")
        weights.append(layout.flatten(state))
        if not weights[-1].isfinite().all():
            raise InputError(f"{path} has weights too large for float32: leave out what diverged")
    return Trajectory(layout, torch.stack(weights), None), last


def errors_so_far(model: SharedForecaster, run: Trajectory) -> list[dict[str, Any]]:
    """Return a row for each horizon of which the future is known from some snapshot: errors over persistence's.

    They are summed over all origins from which the horizon is known.
    """
    sums: dict[int, list[float]] = {}
    for t in tqdm(range(WINDOW, len(run) - 1), "check on the past", disable=None):
        known = [h for h in model.horizons if t + h < len(run)]
        if not known:
            break
        truth = run.weights[[t + h for h in known]]
        forecasts = model.predict(run, t)[: len(known)], linear(run, t, known), run.weights[t]
        errors = torch.stack([(forecast - truth).square().sum(1) for forecast in forecasts], 1)
        for h, row in zip(known, errors.tolist(), strict=True):
            sums[h] = [a + b for a, b in zip(sums.get(h, [0.0, 0.0, 0.0]), row, strict=True)]
    return [
        {"h": h, "forecast": f / max(keep, 1e-30), "linear": line / max(keep, 1e-30), "origins": len(run) - WINDOW - h}
        for h, (f, line, keep) in sums.items()
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="PATH", help=f"folder of snapshots; {READABLE}")
    parser.add_argument(
        "--output", type=Path, default=Path("forecasts"), help="folder to write to (default: forecasts)"
    )
    default = Path("models/train_forecaster/digits-weights_only/forecaster.pt")
    parser.add_argument("--forecaster", type=Path, default=default, help=f"default: {default}")
    parser.add_argument("--horizons", type=int, nargs="+", help="snapshots ahead; default: all that it is trained for")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    pin_threads()
    paths = find_snapshots(arguments.path)
    model, config = load_forecaster(arguments.forecaster)
    if not isinstance(model, SharedForecaster) or config["kind"] == "ridge" or config["with_state"]:
        raise InputError(f"{arguments.forecaster}: expected a forecaster that reads weights alone, of any network")
    horizons = arguments.horizons or list(model.horizons)
    if unknown := sorted(set(horizons) - set(model.horizons)):
        raise InputError(f"--horizons: {unknown[0]} is not among those trained: {', '.join(map(str, model.horizons))}")
    trajectory, last = read_trajectory(paths)

    rows = errors_so_far(model, trajectory)
    forecast = model.predict(trajectory, len(trajectory) - 1)
    for h in horizons:
        ahead = trajectory.layout.unflatten(forecast[model.horizons.index(h)])
        state = last | {name: x.to(last[name].dtype) for name, x in ahead.items()}
        with atomic_path(arguments.output / f"forecast-{h}.safetensors") as temporary:
            save_file({name: x.contiguous() for name, x in state.items()}, temporary)
    print(
        f"{len(paths)} snapshots, {paths[0].name} to {paths[-1].name}, {trajectory.layout.size:,} weights to forecast"
    )
    if rows:
        save_csv(arguments.output / "errors.csv", rows)
        print("squared error over that of keeping the last weights, where the future is known:")
        print(f"{'snapshots ahead':>16} {'forecast':>9} {'linear':>9} {'origins':>8}")
        for row in rows:
            print(f"{row['h']:>16} {row['forecast']:>9.3f} {row['linear']:>9.3f} {row['origins']:>8}")
    print(f"forecasts are in {arguments.output}")


if __name__ == "__main__":
    run(main)
