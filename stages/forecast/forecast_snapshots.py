"""Forecast the weights of any network from a folder of its snapshots, and say how well that would have worked so far.

Reads   PATH/*, files of weights (.pt, .pth, .ckpt, .safetensors, ...) or folders checkpoint-<n>/ with one each, of one run
        models/released/forecaster.safetensors, or models/train_forecaster/<dataset>/weights_only/forecaster.pt, which read no
        optimiser's state; models/released/forecaster-state.safetensors where all snapshots carry it, beside the weights (as in
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()}) or in optimizer.pt of their folder
Writes  OUTPUT/forecast-<h>.safetensors   the state_dict h snapshots after the last one, moved no further than the past trusts it
        OUTPUT/errors.csv                 squared error over persistence's, where the future is known: of forecasts as they are,
                                          shrunk by what was known at the time, and of linear extrapolation

Snapshots are ordered by what their names count (epoch, step, ...), and taken to lie at even intervals; what is ambiguous or
uneven is refused. Floating-point tensors are forecast, but for running statistics. These and all others are those of the last
snapshot, and so is each weight that did not move lately; tensors that were equal in all snapshots stay equal.

Of a curve of measurements (--curve), such as test loss at each snapshot, it says where it is expected to go.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from stages.common.checkpoints import READABLE, load_weights
from stages.common.files import Rows, atomic_path, save_csv
from stages.common.released import published
from stages.common.runtime import pin_threads
from stages.common.stage import InputError, run
from stages.common.vectors import Layout
from stages.forecast.baselines import Extrapolation
from stages.forecast.curves import Curve, carry_on, read_curve, worth
from stages.forecast.forecasters import load_forecaster
from stages.forecast.layerwise import LayerForecaster
from stages.forecast.optimizer_states import read_directions, states_beside
from stages.forecast.released import RELEASED, STATE, ByHorizon, load_released, load_with_state
from stages.forecast.shared import SharedForecaster
from stages.forecast.shrinkage import Agreement, Prior, causal_shrinkage, compare_with_past, shrinkage, trust
from stages.forecast.snapshots import Snapshots, find_snapshots
from stages.forecast.trajectory import WINDOW, Forecast, Trajectory, moved_lately

if TYPE_CHECKING:
    import pandas as pd

RUNNING = ("running_mean", "running_var")

State = dict[str, Tensor]
AnyNetwork = SharedForecaster | LayerForecaster | ByHorizon  # forecasters that serve it


@dataclass(frozen=True)
class Recorded:
    """A run read from its snapshots. last: the whole last one; ties: tensors that are always equal to another, and to which; averaged:
    whether the weights are a moving average, which no optimiser steps."""

    trajectory: Trajectory
    last: State
    ties: dict[str, str]
    averaged: bool


def weights_of(state: State) -> State:
    """Return what is forecast of a snapshot, in float32."""
    return {
        name: x.float()
        for name, x in state.items()
        if x.is_floating_point() and x.numel() and not name.endswith(RUNNING)
    }


def read_trajectory(paths: list[Path]) -> Recorded:
    """Return the run; InputError if shapes differ, a weight is not finite, or none moves."""
    layout, rows, last, said = None, torch.empty(0), {}, set()
    for t, path in enumerate(tqdm(paths, "read snapshots", disable=None)):
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
        rows = rows if t else torch.empty(len(paths), layout.size)  # at once: a list beside it would double the memory
        for name, where in layout.slices.items():
            rows[t, where] = weights[name].flatten()
    run = Trajectory(layout, rows, None)
    if not moved_lately(run, len(run) - 1).any():
        raise InputError(
            f"{paths[-1]}: no weight differs from those of the {WINDOW} snapshots before: copy each state_dict when it is taken"
        )
    ties = find_ties(run)
    return Recorded(without(run, ties), last, ties, any("moving average" in note for note in said))


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


def forecast(model: AnyNetwork, run: Trajectory, t: int) -> Forecast:
    """Return the weights at t + h for every horizon; those that stand still, as frozen and pruned ones do, stay."""
    ahead, moved = model.predict(run, t), moved_lately(run, t)
    for row in ahead:
        torch.where(moved, row, run.weights[t], out=row)
    return ahead


def shrink(ahead: Forecast, run: Trajectory, factors: Float[Tensor, "h l"]) -> Forecast:
    """Return forecasts from the last snapshot on, moved only as far as their layers' factors say; `ahead` itself is changed."""
    last = run.weights[-1]
    for row, trusted in zip(ahead, factors.float(), strict=True):
        for factor, where in zip(trusted, run.layout.slices.values(), strict=True):
            torch.lerp(last[where], row[where], factor, out=row[where])
    return ahead


def state_ahead(recorded: Recorded, ahead: Float[Tensor, " p"]) -> State:
    """Return the last snapshot with its weights moved to `ahead`, in its own precision; what does not move keeps every bit."""
    run, state = recorded.trajectory, dict(recorded.last)
    for name, movement in run.layout.unflatten(ahead - run.weights[-1]).items():
        state[name] = (state[name].double() + movement.double()).to(state[name].dtype)
    for name, twin in recorded.ties.items():
        state[name] = state[twin].to(state[name].dtype)
    return {name: x.clone(memory_format=torch.contiguous_format) for name, x in state.items()}


def errors_so_far(agreement: Agreement, run: Trajectory, prior: Prior) -> Rows:
    """Return a row for each horizon of which the future is known from some snapshot: errors over persistence's, of forecasts as
    they are and as they would have been shrunk at the time, and of linear extrapolation.

    They are summed over all origins from which the horizon is known.
    """
    ones, line = torch.ones(1), compare_with_past(Extrapolation(agreement.horizons), run)
    errors = {
        "forecast": agreement.errors(ones),
        "shrunk": agreement.errors(causal_shrinkage(agreement, prior)),
        "linear": line.errors(ones),
        "keep": agreement.energy,
    }
    sums = {name: x.nansum((0, 2)).tolist() for name, x in errors.items()}
    rows = []
    for i, h in enumerate(agreement.horizons):
        if (origins := len(run) - WINDOW - h) > 0:
            keep = max(sums["keep"][i], 1e-30)
            rows.append({"h": h, **{name: sums[name][i] / keep for name in ("forecast", "shrunk", "linear")}})
            rows[-1]["origins"] = origins
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="PATH", help=f"folder of snapshots; {READABLE}")
    parser.add_argument(
        "--output", type=Path, default=Path("forecasts"), help="folder to write to (default: forecasts)"
    )
    of_yours = "or one that train_forecaster made, of weights alone"
    best = f"{STATE} where snapshots carry the optimiser's state, else {RELEASED}"
    parser.add_argument("--forecaster", type=Path, help=f"default: {best}; {of_yours}")
    parser.add_argument(
        "--raw", action="store_true", help="write forecasts as they are, however little the past trusts them"
    )
    parser.add_argument("--horizons", type=int, nargs="+", help="snapshots ahead; default: all that it is trained for")
    order = (
        "a regular expression whose groups order the names that it finds, as in 'step_(\\d+)', or mtime: by file time"
    )
    parser.add_argument("--order", help=f"{order}; default: what the names count")
    parser.add_argument("--even", action="store_true", help="of uneven steps, take the most snapshots that are even")
    parser.add_argument(
        "--curve",
        type=Path,
        metavar="CSV",
        help="measurements, a row for each snapshot: are they worth training on for?",
    )
    parser.add_argument("--column", help="of the curve; default: the last one of numbers")
    return parser.parse_args()


def load_any(path: Path, horizons: list[int] | None) -> tuple[AnyNetwork, Prior, list[int]]:
    """Return a forecaster of any network, its prior, and the horizons asked for; InputError if it is another."""
    model: Any
    if path.name == STATE.name:
        model, prior, _ = load_with_state(path)
        fits = True  # `choose` sees to the state
    elif path.suffix == ".safetensors":
        model, prior, card = load_released(path)
        fits = not card["config"]["with_state"]
    else:
        model, config = load_forecaster(path)
        prior = Prior.sceptical(len(config["horizons"]))
        fits = isinstance(model, SharedForecaster) and config["kind"] != "ridge" and not config["with_state"]
    if not fits:
        raise InputError(f"{path}: expected a forecaster that reads weights alone, of any network, or {STATE}")
    if unknown := sorted(set(horizons or []) - set(model.horizons)):
        raise InputError(f"--horizons: {unknown[0]} is not among those trained: {', '.join(map(str, model.horizons))}")
    return model, prior, horizons or list(model.horizons)


def choose(recorded: Recorded, paths: list[Path], forecaster: Path | None) -> tuple[Recorded, Path]:
    """Return the run with the optimiser's directions, if they are to be read, and the forecaster's file.

    forecaster: None for the best one that the snapshots allow; standard error says why an optimiser's state is not read. InputError if
    one is asked for that reads it, and cannot.
    """
    if forecaster is not None and forecaster.name != STATE.name:
        return recorded, forecaster
    run = recorded.trajectory
    try:
        if recorded.averaged and states_beside(paths[-1]):
            raise InputError(f"{paths[-1]}: the weights are a moving average, of which no optimiser keeps a state")
        directions = read_directions(paths, run.layout)
        if directions is None and forecaster is not None:
            raise InputError(
                f"{paths[-1]}: {forecaster} reads the optimiser's state, of which there is none: leave --forecaster out"
            )
    except InputError as error:
        if forecaster is not None:
            raise
        print(f"{error}; weights alone are read", file=sys.stderr)
        directions = None
    if directions is None:
        return recorded, RELEASED
    return replace(recorded, trajectory=replace(run, state=directions)), forecaster or STATE


def print_errors(rows: Rows, snapshots: int) -> None:
    """Print the errors beside those of linear extrapolation, and in words how far forecasts can be trusted."""
    if rows:
        print("squared error over that of keeping the last weights, where the future is known:")
        print(f"{'snapshots ahead':>16} {'forecast':>9} {'shrunk':>9} {'linear':>9} {'origins':>8}")
    for row in rows:
        print(f"{row['h']:>16} {row['forecast']:>9.3f} {row['shrunk']:>9.3f} {row['linear']:>9.3f} {row['origins']:>8}")
    ratios, origins = ({row["h"]: row[key] for row in rows} for key in ("shrunk", "origins"))
    print(trust(ratios, origins, snapshots))


def print_curve(curve: Curve, horizons: list[int]) -> None:
    """Print where a measured curve is expected to go, beside keeping its last value."""
    rows = carry_on(curve, horizons)
    if rows:
        print(
            f"{'snapshots ahead':>16} {'expected':>9} {'90 % of past errors':>22} {'by':>10} {'error':>8} {'keeping':>8} {'origins':>8}"
        )
    for row in rows:
        between = f"{row['low']:.4g} to {row['high']:.4g}"
        print(
            f"{row['h']:>16} {row['expected']:>9.4g} {between:>22} {row['way']:>10} "
            f"{row['error']:>8.2g} {row['error_keep']:>8.2g} {row['origins']:>8}"
        )
    print(worth(rows, curve))


@dataclass(frozen=True)
class Forecasts:
    """What is forecast of one run, and how well that would have worked so far."""

    recorded: Recorded
    forecaster: Path
    horizons: list[int]  # snapshots ahead
    weights: dict[int, Float[Tensor, " p"]]  # by horizon
    errors: Rows  # see errors_so_far

    def state(self, horizon: int) -> dict[str, Tensor]:
        """Return the state_dict so many snapshots after the last one."""
        return state_ahead(self.recorded, self.weights[horizon])

    @property
    def standing(self) -> int:
        """How many weights have stood still lately, and are kept."""
        run = self.recorded.trajectory
        return run.layout.size - int(moved_lately(run, len(run) - 1).sum())


def forecasts_of(snapshots: Snapshots, forecaster: Path | None, horizons: list[int] | None, raw: bool) -> Forecasts:
    """Return the forecasts of a folder's snapshots; raw: as they are, however little the run's own past trusts them.

    forecaster: None for the best one that the snapshots allow.
    """
    load_any(published(forecaster or RELEASED), horizons)  # what is wrong with it is said before all snapshots are read
    recorded, forecaster = choose(read_trajectory(snapshots.paths), snapshots.paths, forecaster)
    model, prior, asked = load_any(published(forecaster), horizons)
    run = recorded.trajectory
    agreement = compare_with_past(model, run)
    ahead = forecast(model, run, len(run) - 1)
    if not raw:
        ahead = shrink(ahead, run, shrinkage(agreement, prior))
    weights = {h: ahead[model.horizons.index(h)] for h in asked}
    return Forecasts(recorded, forecaster, asked, weights, errors_so_far(agreement, run, prior))


def forecast_snapshots(
    path: str | Path,
    *,
    forecaster: str | Path | None = None,
    horizons: list[int] | None = None,
    order: str | None = None,
    even: bool = False,
    raw: bool = False,
) -> tuple["pd.DataFrame", dict[int, dict[str, Tensor]]]:
    """Return a row for each horizon with the errors so far, and the forecast state_dicts by horizon; arguments as the command has them.

    h           snapshots ahead
    forecast    squared error over that of keeping the last weights, of forecasts as they are; shrunk: as they would have been shrunk at
                the time, which is what is returned; linear: of linear extrapolation
    origins     snapshots from which the future is known; horizons of which none is have no row

    InputError if the folder's snapshots cannot be read, or are too few, uneven or in no order.
    """
    import pandas as pd

    chosen = None if forecaster is None else Path(forecaster)
    found = forecasts_of(find_snapshots(Path(path), WINDOW + 1, order, even), chosen, horizons, raw)
    columns = ["h", "forecast", "shrunk", "linear", "origins"]
    return pd.DataFrame(found.errors, columns=columns), {h: found.state(h) for h in found.horizons}


def main() -> None:
    arguments = parse()
    pin_threads()
    snapshots = find_snapshots(arguments.path, WINDOW + 1, arguments.order, arguments.even)
    print(snapshots)
    curve = read_curve(arguments.curve, arguments.column, len(snapshots.paths)) if arguments.curve else None
    found = forecasts_of(snapshots, arguments.forecaster, arguments.horizons, arguments.raw)
    for h in found.horizons:
        with atomic_path(arguments.output / f"forecast-{h}.safetensors") as temporary:
            save_file(found.state(h), temporary)
    run = found.recorded.trajectory
    print(
        f"{run.layout.size:,} weights to forecast by {found.forecaster}, of which {found.standing:,} stand still and are kept"
    )
    if found.errors:
        save_csv(arguments.output / "errors.csv", found.errors)
    print_errors(found.errors, len(run))
    if curve is not None:
        print_curve(curve, found.horizons)
    print(f"forecasts{'' if arguments.raw else ', shrunk as far as the past says,'} are in {arguments.output}")


if __name__ == "__main__":
    run(main)
