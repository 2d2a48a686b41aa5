"""Race training methods to an accuracy: steps and processor seconds of a forecaster, its rivals and tuned schedules, on NiNo's tasks.

Reads   data/<dataset>.safetensors; models/released/forecaster.safetensors, by which weights are forecast beside training, and
        models/released/forecaster-outputs.safetensors, by which NowcastOptimizer proposes
        --nino PATH, nino_mlp.pt as NiNo's authors publish it; without it NiNo does not take part
Writes  reports/race_to_target/<task>/history.csv    accuracy by run, method, seed and step
        reports/race_to_target/<task>/summary.json   steps and seconds to the target, beside AdamW's of the same seed

Tasks as in Knyazev et al. 2024, arXiv:2409.04434, table 1: three convolutions, AdamW without weight decay, batches of 128, one twelfth
of the training images held out, at most 10,000 steps. Networks and batches are the seed's, whatever the method. Averages and
forecasts that training takes no notice of are read from one run; moves to forecasts change it, and have runs of their own: ours, NiNo's
and those of straight lines, at the task's rate and on every schedule, and NowcastOptimizer's. A method that reaches the target on
validation images is asked once for its test accuracy, and races no more; with `judged_on: [validation, test]` it goes on until test
images agree, as NiNo's authors judge. Finished runs stay in .work/race_to_target/<task>/, some 30 kB each, so that a stage that was
killed goes on where it was, and another seed costs that seed alone. A race that ends removes those of its task that other code, data or
parameters left; `rm -r .work/race_to_target` removes all.

Axes: n images, p weights.
"""

import argparse
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, TypedDict, TypeVar

import torch
from jaxtyping import Int
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from stages.common.files import Summary, save_csv, save_json
from stages.common.images import load_images
from stages.common.metrics import mean_interval
from stages.common.optim import set_learning_rate, warmup_cosine
from stages.common.randomness import generator, seeded_init
from stages.common.runtime import pin_threads
from stages.common.stage import StageParams, run
from stages.common.vectors import Layout
from stages.common.work import fingerprint, remembered, work_folder
from stages.forecast.layerwise import LayerForecaster
from stages.forecast.mover import Forecaster, Mover
from stages.forecast.nowcast import NowcastOptimizer
from stages.forecast.released import OUTPUTS, RELEASED, load_released
from stages.forecast.rivals import NINO_STATES, ExponentialAverage, Forecast, Last, LatestAverage, Line, Nino, Reader
from stages.forecast.trajectory import WINDOW
from stages.forecast.world import strided, world_input

REPORTS = Path("reports/race_to_target")

HELD_OUT = 12  # one in so many training images
WARMUP_FRACTION = 0.05  # of a cosine schedule
NEAR = 0.015  # of accuracy: where test images judge, they are not asked farther below the target on validation images
CHUNK = 500  # images evaluated at a time

Part = Literal["validation", "test"]
T = TypeVar("T")
Images = tuple[Tensor, Tensor]
Readers = Callable[[Layout], dict[str, Reader]]  # of a network that weights of this layout make
Moves = Callable[[int], bool]  # called after each step: whether the network's weights were moved
MakesMoves = Callable[[nn.Module], Moves]  # of the network that is trained
Movers = dict[str, tuple[MakesMoves, str]]  # and the digests of the files that they go by, "" where these are ours


class Point(TypedDict):
    """How good weights are that were read from a run after some steps."""

    step: int
    method: str
    seconds: float
    validation: float
    test: float | None  # where it was not asked for


class Row(Point):
    """A point of a run's history."""

    run: str
    seed: int


class Result(TypedDict):
    """What a run leaves. chosen: NowcastOptimizer's choices."""

    history: list[Point]
    chosen: list[str]


class Task(StageParams):
    """A network, its data, and the accuracy to reach."""

    dataset: str
    width: PositiveInt
    learning_rate: PositiveFloat
    target: PositiveFloat


class Params(StageParams):
    """How methods race."""

    seeds: list[NonNegativeInt]
    steps: PositiveInt  # at most
    batch_size: PositiveInt
    evaluate_every: PositiveInt  # steps
    evaluate_from: NonNegativeInt  # step
    judged_on: Annotated[
        list[Part], Field(min_length=1)
    ]  # images on which a method has to reach the target before it stops
    test_images: PositiveInt
    decay: PositiveFloat  # of the exponential average
    rates: list[PositiveFloat]  # constant ones that race beside the task's own, in times of that
    latest: tuple[PositiveInt, PositiveInt]  # snapshots averaged, and steps between them
    cosine: list[tuple[PositiveInt, PositiveFloat]]  # lengths, and times the task's learning rate
    forecast: tuple[PositiveInt, PositiveInt]  # steps between snapshots, and how many of these ahead
    far_forecast: tuple[PositiveInt, PositiveInt, PositiveFloat]  # the same of a longer average, and its decay
    nowcast_every: PositiveInt  # steps between the snapshots of NowcastOptimizer
    choice_images: PositiveInt  # held-out images by which it chooses
    move_every: PositiveInt  # steps between the states of which forecasts are made that are moved to
    move_horizons: list[PositiveInt]  # of these forecasts, one after the other
    line_horizons: list[PositiveInt]  # the same of straight lines through these states
    nino_every: PositiveInt  # the same of NiNo's
    nino_horizons: list[PositiveInt]
    variant: Task


@dataclass(frozen=True)
class Data:
    """Images as networks see them, and how accuracy is judged."""

    train: Images
    validation: Images
    test: Images
    channels: int
    classes: int


@dataclass(frozen=True)
class Method:
    """What sets a run apart: who reads its weights, and what moves them beside AdamW at a constant rate.

    rate: a constant one, in times the task's. schedule: a cosine's length, and its peak in the same unit. wrap: makes an optimiser of
    the bare one, a network and validation images. checkpoint: the digest of the file by which weights are moved, if it is not ours:
    other runs are the same without it.
    """

    readers: Readers
    rate: float = 1.0
    schedule: tuple[int, float] | None = None
    wrap: Callable[[torch.optim.Optimizer, nn.Module, Images], NowcastOptimizer] | None = None
    mover: MakesMoves = lambda _: lambda _step: False
    checkpoint: str = ""


@dataclass
class Clock:
    """Processor seconds of training, by what they are spent on."""

    spent: dict[str, float] = field(default_factory=dict)

    def charge(self, what: str, function: Callable[[], T]) -> T:
        """Return function(), and charge its processor time to `what`."""
        start = time.process_time()
        value = function()
        self.spent[what] = self.spent.get(what, 0.0) + time.process_time() - start
        return value


def load_data(task: Task, seed: int, test_images: int) -> Data:
    """Return a task's data; which images are held out is the seed's."""
    images, test = load_images(task.dataset, torch.device("cpu"))
    size = images.images.shape[-1]
    x = world_input(images.pixels(), size).contiguous(memory_format=torch.channels_last)
    order = torch.randperm(len(images), generator=generator(seed, "held out of a race"))
    out, kept = order.tensor_split([len(images) // HELD_OUT])
    seen = test.subset(slice(test_images))
    parts = (
        (x[kept], images.labels[kept]),
        (x[out], images.labels[out]),
        (world_input(seen.pixels(), size), seen.labels),
    )
    return Data(*parts, channels=x.shape[1], classes=len(images.classes))


@torch.no_grad()
def accuracy_of(network: nn.Module, images: Images) -> float:
    """Return the share of images that a network classifies rightly."""
    x, labels = images
    right = [(network(a).argmax(1) == b).sum() for a, b in zip(x.split(CHUNK), labels.split(CHUNK), strict=True)]
    return float(torch.stack(right).sum()) / len(labels)


def weights_of(network: nn.Module) -> Tensor:
    """Return all weights of a network as one vector, each tensor in its own order."""
    return parameters_to_vector(p.contiguous() for p in network.parameters()).detach()


def evaluate(
    step: int, network: nn.Module, readers: dict[str, Reader], data: Data, test_from: float, clock: Clock
) -> list[Point]:
    """Return of each reader's weights the accuracy on validation images and, where that is `test_from` or more, on test images.

    What it costs to make these weights is charged to the reader. The network's own weights are as they were.
    """
    last = weights_of(network)
    points: list[Point] = []
    for name, reader in readers.items():
        if (weights := clock.charge(name, reader.weights)) is not None:
            vector_to_parameters(weights, network.parameters())
            validation = accuracy_of(network, data.validation)
            test = accuracy_of(network, data.test) if validation >= test_from else None
            seconds = clock.spent["training"] + clock.spent[name]
            points.append({"step": step, "method": name, "seconds": seconds, "validation": validation, "test": test})
    vector_to_parameters(last, network.parameters())
    return points


def reaches(point: Point, part: Part, target: float) -> bool:
    """Whether a point's accuracy is the target."""
    accuracy = point[part]
    return accuracy is not None and accuracy >= target


def batches(n: int, size: int, random: torch.Generator) -> Iterator[Int[Tensor, " b"]]:
    """Yield the indices of batches without end: each pass is a new order of all images, without what is left of the last batch."""
    while True:
        order = torch.randperm(n, generator=random)
        yield from order[: n // size * size].split(size)


def mover_by(forecaster: Forecaster, states: int, every: int, horizons: list[int]) -> MakesMoves:
    """Return what moves a network to a forecast of `states` states so many steps apart."""

    def mover(network: nn.Module) -> Moves:
        moving = Mover(network, forecaster, every, states, horizons, decay=0.0)

        def moves(_step: int) -> bool:
            if moved := moving.step():  # kernels lie in memory as evaluations leave them, which rounding depends on
                vector_to_parameters(weights_of(network), network.parameters())
            return moved

        return moves

    return mover


def nowcast_method(
    readers: Readers, model: LayerForecaster, decay: float, every: int, steps: int, choice_images: int
) -> Method:
    """Return NowcastOptimizer's method. model: what it forecasts by; choice_images: how many validation images it chooses by."""

    def wrap(bare: torch.optim.Optimizer, network: nn.Module, images: Images) -> NowcastOptimizer:
        x, y = (part[:choice_images] for part in images)

        @torch.no_grad()
        def validation_loss() -> float:
            return cross_entropy(network(x), y).item()

        return NowcastOptimizer(bare, model, validation_loss, every, patience=steps, decay=decay)

    return Method(readers, wrap=wrap, mover=lambda _: lambda step: step % ((WINDOW + 1) * every) == 0)


def train(
    data: Data,
    method: Method,
    seed: int,
    task: Task,
    *,
    steps: int,
    batch_size: int,
    evaluate_every: int,
    evaluate_from: int,
    judged_on: list[Part],
) -> Result:
    """Return the history of one run, until all readers reach the target or the steps are over, and what nowcasting chose."""
    x, y = data.train
    with seeded_init(seed):
        network = strided(data.channels, task.width, data.classes).to(memory_format=torch.channels_last)
    layout = Layout.of(dict(network.named_parameters()))
    readers, moves, clock = method.readers(layout), method.mover(network), Clock()
    history: list[Point] = []
    length, peak = method.schedule or (steps, method.rate)
    bare = torch.optim.AdamW(network.parameters(), task.learning_rate * peak, weight_decay=0.0, fused=True)
    factor = warmup_cosine(length, WARMUP_FRACTION) if method.schedule else lambda _: 1.0
    optimizer = method.wrap(bare, network, data.validation) if method.wrap else bare
    missing = {name: set(judged_on) for name in readers}
    test_from = task.target - (NEAR if "test" in judged_on else 0.0)
    order = batches(len(x), batch_size, generator(seed, "batches of a race"))

    def take_step() -> None:
        batch = next(order)
        loss = cross_entropy(network(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for step in range(1, min(length, steps) + 1):
        set_learning_rate(bare, task.learning_rate * peak * factor(step - 1))
        clock.charge("training", take_step)
        moved = clock.charge("training", partial(moves, step))
        weights = weights_of(network)
        for name, reader in readers.items():
            clock.charge(name, partial(reader.observe, step, weights))
        if step >= evaluate_from and (step % evaluate_every == 0 or moved):
            for point in evaluate(step, network, readers, data, test_from, clock):
                history.append(point)
                missing[point["method"]] -= {part for part in judged_on if reaches(point, part, task.target)}
            readers = {name: reader for name, reader in readers.items() if missing[name]}
            if not readers:
                break
    return {"history": history, "chosen": optimizer.chosen if isinstance(optimizer, NowcastOptimizer) else []}


def readers_of_moved(prefix: str, model: LayerForecaster, decay: float, forecast: tuple[int, int]) -> Readers:
    """Return the readers of a run whose method moves its weights: these, their average, and our forecast of that."""
    every, ahead = forecast
    return lambda layout: {
        prefix: Last(),
        f"{prefix}, average": ExponentialAverage(decay),
        f"{prefix}, forecast of average": Forecast(model, layout, every, ahead, decay),
    }


def readers_beside(
    prefix: str,
    model: LayerForecaster,
    decay: float,
    latest: tuple[int, int],
    forecast: tuple[int, int],
    far_forecast: tuple[int, int, float],
) -> Readers:
    """Return the readers of a run whose training they leave alone: those of one that is moved, another average, other forecasts."""
    every, ahead = forecast
    snapshots, between = latest
    as_moved = readers_of_moved(prefix, model, decay, forecast)
    return lambda layout: (
        as_moved(layout)
        | {
            f"{prefix}, mean of latest": LatestAverage(between, snapshots),
            f"{prefix}, forecast": Forecast(model, layout, every, ahead),
            f"{prefix}, far forecast of average": Forecast(model, layout, *far_forecast),
        }
    )


def reached_at(rows: Sequence[Point], part: Part, target: float) -> Point | None:
    """Return the first row whose accuracy is the target; None if there is none."""
    return next((row for row in rows if reaches(row, part, target)), None)


def summarise(rows: list[Row], part: Part, target: float, steps: int) -> Summary:
    """Return by method the steps and seconds to the target, and their ratios to AdamW's of the same seed.

    A run that does not reach it counts as if it did at the last step: an underestimate, so the share that did stands beside.
    """
    seeds = sorted({row["seed"] for row in rows})
    found: dict[str, list[tuple[bool, int, float]]] = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        found[name] = []
        for seed in seeds:
            of_run = [row for row in rows if row["method"] == name and row["seed"] == seed]
            hit = reached_at(of_run, part, target)
            row = hit or of_run[-1]
            found[name].append((hit is not None, row["step"] if hit else steps, row["seconds"]))
    base = found["adamw"]
    return {
        name: {
            "reached": statistics.fmean(hit for hit, _, _ in runs),
            "steps": mean_interval([float(step) for _, step, _ in runs]),
            "seconds": mean_interval([seconds for _, _, seconds in runs]),
            "steps_ratio": mean_interval([a[1] / b[1] for a, b in zip(runs, base, strict=True)]),
            "seconds_ratio": mean_interval([a[2] / b[2] for a, b in zip(runs, base, strict=True)]),
        }
        for name, runs in found.items()
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", required=True, help="of race_to_target.variants")
    parser.add_argument("--nino", type=Path, help="NiNo's nino_mlp.pt")
    return parser.parse_args()


def movers_of(
    model: LayerForecaster,
    nino: Path | None,
    move_every: int,
    move_horizons: list[int],
    line_horizons: list[int],
    nino_every: int,
    nino_horizons: list[int],
) -> Movers:
    """Return by name what training is moved by. model: our forecaster; nino: its file, if it takes part."""
    states = WINDOW + 1
    line = Line(states, tuple(line_horizons))
    movers = {
        "moved": (mover_by(model, states, move_every, move_horizons), ""),
        "line": (mover_by(line, states, move_every, line_horizons), ""),
    }
    if nino is not None:
        movers["nino"] = mover_by(Nino(nino), NINO_STATES, nino_every, nino_horizons), fingerprint(nino)[:8]
    return movers


def methods_of(
    beside: Callable[[str], Readers],
    of_moved: Callable[[str], Readers],
    rates: list[float],
    cosine: list[tuple[int, float]],
    movers: Movers,
) -> dict[str, Method]:
    """Return methods by name, in the order in which they race: AdamW by rate and schedule, then what `movers` move of it.

    They move training at the task's own rate and on every schedule. beside, of_moved: readers of a run that they leave alone, and of
    one that is moved.
    """
    cosines = {f"cosine {length} x {peak:g}": (length, peak) for length, peak in cosine}
    methods = {"adamw": Method(beside("adamw"))}
    for rate in rates:
        name = f"adamw x {rate:g}"
        methods[name] = Method(beside(name), rate=rate)
    for name, schedule in cosines.items():
        methods[name] = Method(beside(name), schedule=schedule)
    for mover, (moves, checkpoint) in movers.items():
        schedules = {mover: None} | {f"{on}, {mover}": schedule for on, schedule in cosines.items()}
        for name, schedule in schedules.items():
            methods[name] = Method(of_moved(name), schedule=schedule, mover=moves, checkpoint=checkpoint)
    return methods


def remove_others(work: Path) -> None:
    """Remove what other recipes and code left beside a task's folder of finished runs."""
    for folder in work.parent.iterdir():
        if folder != work:
            shutil.rmtree(folder)


def main() -> None:
    arguments = parse()
    params = Params.load("race_to_target", variant=arguments.variant)
    pin_threads()
    model, proposer = (load_released(path)[0] for path in (RELEASED, OUTPUTS))
    steps, decay, target = params.steps, params.decay, params.variant.target
    read_by = params.model_dump(include={"decay", "latest", "forecast", "far_forecast"})
    moved_by = params.model_dump(
        include={"move_every", "move_horizons", "line_horizons", "nino_every", "nino_horizons"}
    )
    beside = partial(readers_beside, model=model, **read_by)
    of_moved = partial(readers_of_moved, model=model, decay=decay, forecast=params.forecast)
    movers = movers_of(model, arguments.nino, **moved_by)
    methods = methods_of(beside, of_moved, params.rates, params.cosine, movers)
    methods["nowcast"] = nowcast_method(
        of_moved("nowcast"), proposer, decay, params.nowcast_every, steps, params.choice_images
    )
    settings = params.model_dump(include={"steps", "batch_size", "evaluate_every", "evaluate_from", "judged_on"})
    inputs = [Path(f"data/{params.variant.dataset}.safetensors"), RELEASED, OUTPUTS]
    work = work_folder(
        f"race_to_target/{arguments.variant}", params.model_dump(exclude={"seeds"}) | {"inputs": fingerprint(*inputs)}
    )
    rows: list[Row] = []
    chosen: dict[str, list[str]] = {}
    for seed in params.seeds:
        data = load_data(params.variant, seed, params.test_images)
        for name, method in methods.items():
            compute = partial(train, data, method, seed, params.variant, **settings)
            result = remembered(work / f"{'-'.join(filter(None, (name, method.checkpoint, str(seed))))}.json", compute)
            rows += [{"run": name, "seed": seed, **point} for point in result["history"]]
            chosen.setdefault(name, []).extend(result["chosen"])
    summary: Summary = {part: summarise(rows, part, target, steps) for part in params.judged_on}
    taken = chosen["nowcast"]
    summary["nowcast_moved"] = sum(choice != "stay" for choice in taken) / max(1, len(taken))
    save_csv(REPORTS / arguments.variant / "history.csv", rows)
    save_json(REPORTS / arguments.variant / "summary.json", summary)
    remove_others(work)
    for name, result in summary[params.judged_on[-1]].items():
        print(f"{name}: {result['steps']['mean']:.0f} steps, {result['steps_ratio']['mean']:.2f} of AdamW's")


if __name__ == "__main__":
    run(main)
