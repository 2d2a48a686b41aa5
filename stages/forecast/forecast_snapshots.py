"""Forecast the weights of any network from a folder of its snapshots, and say how well that would have worked so far.

Reads   PATH/*, files of weights (.pt, .pth, .ckpt, .safetensors, ...) or folders checkpoint-<n>/ with one each, of one run
        models/train_forecaster/<dataset>/weights_only/forecaster.pt, which reads no optimiser's state
Writes  OUTPUT/forecast-<h>.safetensors   the state_dict h snapshots after the last one
        OUTPUT/errors.csv                 squared error over persistence's and linear extrapolation's, where the future is known

Snapshots are ordered by what their names count (epoch, step, ...), and taken to lie at even intervals; what is ambiguous or
uneven is refused. Floating-point tensors are forecast, but for running statistics. These and all others are those of the last
snapshot, and so is each weight that did not move lately; tensors that were equal in all snapshots stay equal.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from stages.common.checkpoints import READABLE, load_weights
from stages.common.files import atomic_path, save_csv
from stages.common.runtime import pin_threads
from stages.common.stage import InputError, run
from stages.common.vectors import Layout
from stages.forecast.baselines import linear
from stages.forecast.forecasters import load_forecaster
from stages.forecast.shared import SharedForecaster
from stages.forecast.snapshots import find_snapshots
from stages.forecast.trajectory import WINDOW, Forecast, Trajectory

RUNNING = ("running_mean", "running_var")

State = dict[str, Tensor]


@dataclass(frozen=True)
class Recorded:
    """A run read from its snapshots. last: the whole last one; ties: tensors that are always equal to another, and to which."""

    trajectory: Trajectory
    last: State
    ties: dict[str, str]


def weights_of(state: State) -> State:
    """Return what is forecast of a snapshot, in float32."""
    return {
        name: x.float()
        for name, x in state.items()
        if x.is_floating_point() and x.numel() and not name.endswith(RUNNING)
    }


def read_trajectory(paths: list[Path]) -> Recorded:
    """Return the run; InputError if shapes differ, a weight is not finite, or none moves."""
    layout, rows, last, said = None, [], {}, set()
    for path in tqdm(paths, "read snapshots", disable=None):
        last, notes = load_weights(path)
        for note in notes if not said.issuperset(notes) else ():
            print(f"{path}: {note}", file=sys.stderr)
        said.update(notes)
        weights = weights_of(last)
        shapes = Layout.of(weights).shapes
        if not weights:
            raise InputError(f"{path} has no floating-point tensor: save the network's state_dict")
        layout = layout or Layout(shapes)
        for name in layout.shapes | shapes:
            if layout.shapes.get(name) != shapes.get(name):
                there, here = layout.shapes.get(name, "missing"), shapes.get(name, "missing")
                raise InputError(
                    f"{path}: {name} is {here}, but {there} in {paths[0]}: choose snapshots of one network by --order 'REGEX'"
                )
        if broken := [name for name, x in weights.items() if not x.isfinite().all()]:
            raise InputError(f"{path}: {broken[0]} has weights too large for float32: leave out what diverged")
        rows.append(layout.flatten(weights))
    run = Trajectory(layout, torch.stack(rows), None)
    if not moved_lately(run, len(run) - 1).any():
        raise InputError(
            f"{paths[-1]}: no weight differs from those of the {WINDOW} snapshots before: copy each state_dict when it is taken"
        )
    ties = find_ties(run)
    return Recorded(without(run, ties), last, ties)


def find_ties(run: Trajectory) -> dict[str, str]:
    """Return the tensors that are equal to an earlier one in all snapshots, such as tied weights, and that one."""
    ties: dict[str, str] = {}
    known: dict[tuple[Any, ...], list[str]] = {}  # by shape and a checksum
    for name, shape in run.layout.shapes.items():
        weights = run.weights[:, run.layout.slices[name]]
        alike = known.setdefault((shape, weights.sum().item()), [])
        twin = next((other for other in alike if torch.equal(weights, run.weights[:, run.layout.slices[other]])), None)
        if twin is None:
            alike.append(name)
        else:
            ties[name] = twin
    return ties


def without(run: Trajectory, names: dict[str, str]) -> Trajectory:
    """Return a run without some of its tensors."""
    if not names:
        return run
    kept = {name: shape for name, shape in run.layout.shapes.items() if name not in names}
    weights = torch.cat([run.weights[:, run.layout.slices[name]] for name in kept], 1)
    return Trajectory(Layout(kept), weights, None)


def moved_lately(run: Trajectory, t: int) -> Tensor:
    """Return for each weight whether it moved in the window of deltas before t that a forecaster reads."""
    return (run.weights[t - WINDOW : t] != run.weights[t]).any(0)


def forecast(model: SharedForecaster, run: Trajectory, t: int) -> Forecast:
    """Return the weights at t + h for every horizon; those that stand still, as frozen and pruned ones do, stay."""
    return torch.where(moved_lately(run, t), model.predict(run, t), run.weights[t])


def state_ahead(recorded: Recorded, ahead: Float[Tensor, " p"]) -> State:
    """Return the last snapshot with its weights moved to `ahead`, in its own precision; what does not move keeps every bit."""
    run, state = recorded.trajectory, dict(recorded.last)
    for name, movement in run.layout.unflatten(ahead - run.weights[-1]).items():
        state[name] = (state[name].double() + movement.double()).to(state[name].dtype)
    for name, twin in recorded.ties.items():
        state[name] = state[twin].to(state[name].dtype)
    return {name: x.clone(memory_format=torch.contiguous_format) for name, x in state.items()}


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
        forecasts = forecast(model, run, t)[: len(known)], linear(run, t, known), run.weights[t]
        errors = torch.stack([(predicted - truth).square().sum(1) for predicted in forecasts], 1)
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
    default = Path("models/train_forecaster/digits/weights_only/forecaster.pt")
    parser.add_argument("--forecaster", type=Path, default=default, help=f"default: {default}")
    parser.add_argument("--horizons", type=int, nargs="+", help="snapshots ahead; default: all that it is trained for")
    order = (
        "a regular expression whose groups order the names that it finds, as in 'step_(\\d+)', or mtime: by file time"
    )
    parser.add_argument("--order", help=f"{order}; default: what the names count")
    parser.add_argument("--even", action="store_true", help="of uneven steps, take the most snapshots that are even")
    return parser.parse_args()


def load_weights_forecaster(path: Path, horizons: list[int] | None) -> tuple[SharedForecaster, list[int]]:
    """Return a forecaster that reads weights alone, of any network, and the horizons asked for; InputError if it is another."""
    model, config = load_forecaster(path)
    if not isinstance(model, SharedForecaster) or config["kind"] == "ridge" or config["with_state"]:
        raise InputError(f"{path}: expected a forecaster that reads weights alone, of any network")
    if unknown := sorted(set(horizons or []) - set(model.horizons)):
        raise InputError(f"--horizons: {unknown[0]} is not among those trained: {', '.join(map(str, model.horizons))}")
    return model, horizons or list(model.horizons)


def print_errors(rows: list[dict[str, Any]]) -> None:
    """Print the errors beside those of linear extrapolation."""
    print("squared error over that of keeping the last weights, where the future is known:")
    print(f"{'snapshots ahead':>16} {'forecast':>9} {'linear':>9} {'origins':>8}")
    for row in rows:
        print(f"{row['h']:>16} {row['forecast']:>9.3f} {row['linear']:>9.3f} {row['origins']:>8}")


def main() -> None:
    arguments = parse()
    pin_threads()
    snapshots = find_snapshots(arguments.path, WINDOW + 1, arguments.order, arguments.even)
    print(snapshots)
    model, horizons = load_weights_forecaster(arguments.forecaster, arguments.horizons)
    recorded = read_trajectory(snapshots.paths)
    run = recorded.trajectory

    rows = errors_so_far(model, run)
    ahead = forecast(model, run, len(run) - 1)
    for h in horizons:
        with atomic_path(arguments.output / f"forecast-{h}.safetensors") as temporary:
            save_file(state_ahead(recorded, ahead[model.horizons.index(h)]), temporary)
    standing = run.layout.size - int(moved_lately(run, len(run) - 1).sum())
    print(f"{run.layout.size:,} weights to forecast, of which {standing:,} stand still and are kept")
    if rows:
        save_csv(arguments.output / "errors.csv", rows)
        print_errors(rows)
    print(f"forecasts are in {arguments.output}")


if __name__ == "__main__":
    run(main)
