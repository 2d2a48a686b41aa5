"""Learn a forecaster of any network's weights from the runs of train_world, and test it on runs that are unlike all it learned from.

Reads   models/train_world/<dataset>/ and data/<dataset>.safetensors of all data sets
Writes  models/learn_world/<variant>/forecaster.safetensors   and forecaster.json, its card: config, prior, what it learned from, scores
        reports/learn_world/<variant>/unseen.csv              error over keeping the last weights: by held out, run, stride and horizon
        reports/learn_world/<variant>/summary.json            means over runs and strides

A forecaster is learned for the squared error of weights, or of outputs on training images as `curvature` has it. Held out are a data
set, a network or an optimiser, where errors are those that it is learned for; or a data set, a network and a third of the strides at
once. In the last case forecasts are also shrunk, as far as what the run's own past says of them, with a prior from the other held-out
runs, and judged as functions: `logits` is the error of outputs on test images, from a few origins. To release what was learned, copy
both files to models/released/ by hand; of one that reads the optimiser's state, write into the card which horizons it `serves`: those
at which it is better than the one of weights alone.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from safetensors.torch import save_file
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from stages.common.files import Summary, atomic_path, load_metadata, save_csv, save_json
from stages.common.images import load_images
from stages.common.optim import require_convergence, set_learning_rate, warmup_cosine
from stages.common.randomness import generator
from stages.common.runtime import pin_threads
from stages.common.stage import InputError, StageParams, parse_arguments, run
from stages.common.work import fingerprint
from stages.forecast.curvature import Factors, output_factors
from stages.forecast.examples import Examples, draw_origins, network_errors, relative_loss, thin
from stages.forecast.function_space import AsFunctions, Reference, averaged, judge_as_functions
from stages.forecast.layerwise import LayerForecaster
from stages.forecast.shrinkage import Agreement, Prior, causal_shrinkage, compare_with_past
from stages.forecast.trajectory import WINDOW, Trajectory
from stages.forecast.world import Recipe, build_network, load_world_run, world_input

RUNS = Path("models/train_world")
MODELS = Path("models/learn_world")
REPORTS = Path("reports/learn_world")

WARMUP_FRACTION = 0.05
LARGEST_GRADIENT = 1.0
FEWEST = 8  # origins to learn from
LONGEST = 60  # snapshots of a run that shrinking is tested on
WORTHS = (0.5, 1.0, 2.0, 4.0, 8.0)  # of a prior, in origins, to choose from
STRIDE_THIRDS = 3
SMALLEST_DEVIATION = 0.01  # of what a prior believes
LIMITS = {  # by what a forecaster is learned for
    "weights": "nearer in weights is not always nearer in outputs, nor better in loss",
    "outputs": "nearer in outputs it may be farther in weights, and shrinking goes by weights",
}

Rows = list[dict[str, Any]]
Gains = dict[str, dict[int, list[float]]]
Learner = Callable[[Examples], LayerForecaster]


class Variant(StageParams):
    """A forecaster to learn."""

    with_state: bool  # whether it reads the optimiser's direction
    learned_for: Literal["weights", "outputs"]
    d_model: PositiveInt
    learning_rate: PositiveFloat
    steps: PositiveInt


class Params(StageParams):
    """What is learned from, and how."""

    datasets: Annotated[list[str], Field(min_length=2)]
    seed: NonNegativeInt
    horizons: list[PositiveInt]  # snapshots ahead
    strides: Annotated[list[PositiveInt], Field(min_length=STRIDE_THIRDS)]  # snapshots of the runs from one to the next
    origins: PositiveInt  # of each run and stride
    batch: PositiveInt  # origins
    weight_decay: NonNegativeFloat
    curvature_images: PositiveInt  # training images on which outputs are learned for
    reference_images: PositiveInt  # test images on which forecasts are compared as functions
    function_origins: PositiveInt  # of each run and stride, from which they are
    decay: Annotated[
        float, Field(ge=0, lt=1)
    ]  # of the exponential average that is forecast, too, from snapshot to snapshot of a run
    variant: Variant


@dataclass(frozen=True)
class Run:
    """A run and what it is called: its data set, its recipe."""

    dataset: str
    name: str
    recipe: Recipe
    trajectory: Trajectory

    @property
    def called(self) -> dict[str, str]:
        """What can be held out of it."""
        return {"dataset": self.dataset, "network": self.recipe.network, "optimizer": self.recipe.optimizer}


@dataclass(frozen=True)
class World:
    """All examples, and of each its run and its stride."""

    examples: Examples
    runs: list[Run]
    strides: list[int]


def load_world(datasets: Sequence[str], with_state: bool) -> list[Run]:
    """Return the runs of all data sets; InputError if one has none."""
    runs = []
    for dataset in datasets:
        paths = sorted((RUNS / dataset).glob("*.safetensors"))
        if not paths:
            raise InputError(f"{RUNS / dataset} has no runs: run 'dvc repro train_world@{dataset}'")
        for path in paths:
            trajectory, recipe = load_world_run(path, with_state)
            runs.append(Run(dataset, path.stem, recipe, trajectory))
    return runs


def draw_world(
    runs: list[Run],
    strides: list[int],
    horizons: list[int],
    origins: int,
    seed: int,
    learned_on: Callable[[Run], Reference] | None,
) -> World:
    """Return examples of all runs at all strides. learned_on: where it is learned for outputs, of what; None of weights."""
    layers = max(len(r.trajectory.layout.shapes) for r in runs)
    parts: list[Examples] = []
    kept_runs, kept_strides = [], []
    for r in tqdm(runs, "examples of runs", disable=None):
        random = generator(seed, f"origins of {r.dataset} {r.name}")
        factors_of = curvature_at(r, learned_on(r), seed) if learned_on else None
        for stride in strides:
            drawn = draw_origins(r.trajectory, stride, horizons, origins, layers, random, factors_of)
            parts += drawn
            kept_runs += [r] * len(drawn)
            kept_strides += [stride] * len(drawn)
    return World(Examples.cat(parts), kept_runs, kept_strides)


def curvature_at(r: Run, reference: Reference, seed: int) -> Callable[[torch.Tensor], list[Factors]]:
    """Return what gives the factors of a run's network with any weights."""
    random = generator(seed, f"outputs of {r.dataset} {r.name}")
    return lambda weights: output_factors(reference.network, r.trajectory.layout, weights, reference.images, random)


def learn(
    examples: Examples, variant: Variant, horizons: list[int], seed: int, *, batch: int, weight_decay: float
) -> LayerForecaster:
    """Return a forecaster that has learned from the examples; InputError if there are hardly any."""
    if len(examples) < FEWEST:
        raise InputError(
            f"expected {FEWEST} origins or more to learn from, got {len(examples)}: raise train_world.steps, or lower learn_world.strides"
        )
    model = LayerForecaster(horizons, variant.d_model, seed, variant.with_state)
    model.standardise(examples.read[examples.share > 0])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=weight_decay, fused=True)
    factor, random = warmup_cosine(variant.steps, WARMUP_FRACTION), generator(seed, "batches of learn_world")
    for step in range(variant.steps):
        set_learning_rate(optimizer, variant.learning_rate * factor(step))
        drawn = examples.take(torch.randint(len(examples), (batch,), generator=random))
        loss = relative_loss(model(drawn.read), drawn)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
        optimizer.step()
    remedy, still = "lower learn_world's learning_rate", 1.0  # the loss where nothing moves
    require_convergence(loss.item(), f"after {variant.steps} steps", remedy, still)
    return model.eval().requires_grad_(False)


def ratios(model: LayerForecaster, world: World, tested: torch.Tensor) -> Iterator[dict[str, Any]]:
    """Yield the error over that of keeping the last weights of each run, stride and horizon among the tested examples."""
    examples = world.examples.take(tested)
    errors, kept = network_errors(model(examples.read), examples)
    cells: dict[tuple[str, str, int], list[int]] = {}
    for i, place in enumerate(tested.tolist()):
        r = world.runs[place]
        cells.setdefault((r.dataset, r.name, world.strides[place]), []).append(i)
    for (dataset, name, stride), rows in cells.items():
        for j, h in enumerate(model.horizons):
            if (keep := kept[rows, j].sum().item()) > 0:
                ratio = errors[rows, j].sum().item() / keep
                yield {"dataset": dataset, "run": name, "stride": stride, "h": h, "raw": ratio}


def leave_one_out(world: World, learn_from: Learner) -> Rows:
    """Return rows of runs of a data set, a network, or an optimiser that was not learned from."""
    rows: Rows = []
    for kind in ("dataset", "network", "optimizer"):
        for value in tqdm(sorted({r.called[kind] for r in world.runs}), f"leave a {kind} out", disable=None):
            held_out = torch.tensor([r.called[kind] == value for r in world.runs])
            model = learn_from(world.examples.take(torch.where(~held_out)[0]))
            tested = ratios(model, world, torch.where(held_out)[0])
            rows += [{"held_out": kind, "value": value, **row, "shrunk": None, "logits": None} for row in tested]
    return rows


@dataclass(frozen=True)
class Unseen:
    """A run at a stride of which neither data set nor network nor stride was learned from, and how it was forecast."""

    fold: int
    run: Run
    stride: int
    agreement: Agreement
    functions: AsFunctions
    of_average: AsFunctions  # forecasts of the run's exponential average


def reference_of(part: Literal["train", "test"], images: int) -> Callable[[Run], Reference]:
    """Return what gives a run's network and the first images of a part."""

    @cache
    def pictures(dataset: str) -> tuple[torch.Tensor, torch.Tensor, int]:
        train, test = load_images(dataset, torch.device("cpu"))
        seen = (train if part == "train" else test).subset(slice(images))
        return seen.pixels(), seen.labels, len(train.classes)

    def build(r: Run) -> Reference:
        pixels, labels, classes = pictures(r.dataset)
        network = build_network(r.recipe, pixels.shape[1], classes)
        return Reference(network, world_input(pixels, r.recipe.image_size), labels)

    return build


def forecast_unseen(
    model: LayerForecaster, fold: int, r: Run, stride: int, reference: Reference, *, origins: int, decay: float
) -> Unseen | None:
    """Return how a run is forecast at a stride, as weights and as functions; None if it is too short."""
    thinned = thin(r.trajectory, 0, stride)
    if len(thinned) < WINDOW + 2:
        return None
    shown, smooth = (x.at(slice(LONGEST)) for x in (thinned, thin(averaged(r.trajectory, decay), 0, stride)))
    places = torch.linspace(WINDOW, len(shown) - 2, origins).long().unique().tolist()
    as_functions = [judge_as_functions(model, path, shown, reference, places) for path in (shown, smooth)]
    return Unseen(fold, r, stride, compare_with_past(model, shown), *as_functions)


def all_at_once(
    world: World,
    datasets: list[str],
    strides: list[int],
    learn_from: Learner,
    forecast: Callable[[LayerForecaster, int, Run, int, Reference], Unseen | None],
    tested_on: Callable[[Run], Reference],
) -> list[Unseen]:
    """Return how runs were forecast by models that learned from no run of their data set or network, nor at strides like theirs."""
    runs = {id(r): r for r in world.runs}.values()
    networks = sorted({r.recipe.network for r in runs})
    unseen = []
    folds = list(product(enumerate(datasets), enumerate(networks)))
    for fold, ((i, dataset), (j, network)) in enumerate(tqdm(folds, "leave one of each out", disable=None)):
        third = set(strides[(i + j) % STRIDE_THIRDS :: STRIDE_THIRDS])
        unlike = [
            r.dataset != dataset and r.recipe.network != network and s not in third
            for r, s in zip(world.runs, world.strides, strict=True)
        ]
        model = learn_from(world.examples.take(torch.where(torch.tensor(unlike))[0]))
        for r in (r for r in runs if (r.dataset, r.recipe.network) == (dataset, network)):
            reference = tested_on(r)
            for stride in sorted(third):
                unseen.append(forecast(model, fold, r, stride, reference))
    return [u for u in unseen if u is not None]


def run_ratios(agreement: Agreement, factors: torch.Tensor) -> list[float]:
    """Return the error over that of keeping the last weights by horizon; nan where no future is known."""
    kept = torch.where(agreement.energy.isfinite(), agreement.energy, torch.nan).nansum((0, 2))
    return (agreement.errors(factors).nansum((0, 2)) / kept).tolist()


def fit_prior(agreements: list[Agreement]) -> Prior:
    """Return the prior of runs: the best factors of all of them, each as if it were one origin, worth what shrinks them best."""
    parts = []
    for agreement in agreements:
        total = agreement.energy.sum(2).clamp(min=1e-30)
        parts.append(torch.stack([(x.sum(2) / total).nanmean(0) for x in (agreement.cross, agreement.square)]))
    cross, square = (
        torch.stack(parts).clamp(-3, 3).nanmean(0).nan_to_num()
    )  # of horizons that no run reaches: not trusted
    factor = (cross / square.clamp(min=1e-6)).clamp(0, 1).float()
    spread, noise = spreads(agreements)

    def mean_error(worth: float) -> float:
        prior = Prior(factor, square.float(), torch.zeros_like(factor), noise, worth)  # without caution
        errors = [torch.tensor(run_ratios(a, causal_shrinkage(a, prior))) for a in agreements]
        return float(torch.stack(errors).clamp(max=3).nanmean())

    return Prior(factor, square.float(), spread, noise, min(WORTHS, key=mean_error))


def spreads(agreements: list[Agreement]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return by horizon the standard deviation of <y, d> over <d, d> between runs, of their means, and within runs, between origins."""
    means, within = [], []
    for agreement in agreements:
        relative = (agreement.cross.sum(2) / agreement.energy.sum(2).clamp(min=1e-30)).clamp(-3, 3)
        known = relative.isfinite().sum(0)
        mean = relative.nanmean(0)
        variance = (relative - mean).square().nansum(0) / (known - 1).clamp(min=1)
        means.append(mean)
        within.append(torch.where(known > 2, variance, torch.nan))
    between = torch.stack(means)
    spread = (between - between.nanmean(0)).square().nanmean(0).sqrt()
    noise = torch.stack(within).nanmean(0).sqrt()
    return tuple(x.nan_to_num().clamp(min=SMALLEST_DEVIATION).float() for x in (spread, noise))


def shrink_unseen(unseen: list[Unseen]) -> Rows:
    """Return rows of unseen runs, raw and shrunk with a prior from the other folds."""
    rows: Rows = []
    for fold in tqdm(sorted({u.fold for u in unseen}), "shrink forecasts", disable=None):
        prior = fit_prior([u.agreement for u in unseen if u.fold != fold])
        for u in (u for u in unseen if u.fold == fold):
            raw = run_ratios(u.agreement, torch.ones(1))
            shrunk = run_ratios(u.agreement, causal_shrinkage(u.agreement, prior))
            place: dict[str, Any] = {"held_out": "all", "value": f"{u.run.dataset} {u.run.recipe.network}"}
            place |= {"dataset": u.run.dataset, "run": u.run.name, "stride": u.stride}
            logits = u.functions.ratios.tolist()
            for h, a, b, c in zip(u.agreement.horizons, raw, shrunk, logits, strict=True):
                if a == a:  # known
                    rows.append(place | {"h": h, "raw": a, "shrunk": b, "logits": c if c == c else None})
    return rows


def summarise(rows: Rows) -> Summary:
    """Return mean, worst and share above 1 of the errors, by what was held out and horizon."""
    summary: Summary = {}
    columns = [("all", "raw"), ("all", "shrunk"), ("all", "logits")]
    for kind, column in [*((k, "raw") for k in ("dataset", "network", "optimizer")), *columns]:
        by_horizon = {}
        for h in sorted({row["h"] for row in rows}):
            values = [
                row[column] for row in rows if row["held_out"] == kind and row["h"] == h and row[column] is not None
            ]
            if not values:
                continue
            above = sum(v > 1.005 for v in values) / len(values)
            by_horizon[str(h)] = {
                "mean": statistics.fmean(values),
                "median": statistics.median(values),
                "worst": max(values),
                "above_1": above,
            }
        summary[kind if column == "raw" else f"{kind}_{column}"] = by_horizon
    return summary


def mean_gains(unseen: list[Unseen], snapshot_every: int) -> Gains:
    """Return the mean gain in loss of forecasts of weights, and of their average, by steps between snapshots and horizon."""
    gains: Gains = {"weights": {}, "average": {}}
    for stride in sorted({u.stride for u in unseen}):
        alike = [u for u in unseen if u.stride == stride]
        for of, parts in (("weights", [u.functions for u in alike]), ("average", [u.of_average for u in alike])):
            gains[of][stride * snapshot_every] = torch.stack([x.gain.mean(0) for x in parts]).mean(0).tolist()
    return gains


def describe(runs: list[Run], strides: list[int]) -> dict[str, Any]:
    """Return what is said of the runs that a forecaster learned from."""
    return {
        "runs": len(runs),
        "data_sets": list(dict.fromkeys(r.dataset for r in runs)),
        "networks": sorted({r.recipe.network for r in runs}),
        "optimizers": sorted({r.recipe.optimizer for r in runs}),
        "weights": [f(r.trajectory.layout.size for r in runs) for f in (min, max)],
        "steps": [f(r.recipe.steps for r in runs) for f in (min, max)],
        "strides_in_snapshots_of_5_steps": strides,
    }


def card_of(
    path: Path,
    model: dict[str, Any],
    learned_for: str,
    learned_from: dict[str, Any],
    prior: Prior,
    summary: Summary,
    gains: Gains,
) -> dict[str, Any]:
    """Return the card of a forecaster: what rebuilds it, what it learned from, how it was tested, and its limits."""
    return {
        "file": path.name,
        "sha256": fingerprint(path),
        "made_by": f"learn_world of params.yaml at the scale world, with torch {torch.__version__}",
        "config": {"kind": "layerwise", **model, "with_context": False},
        "prior": {
            **{name: getattr(prior, name).tolist() for name in ("factor", "strength", "spread", "noise")},
            "worth": prior.worth,
        },
        "gains": gains,
        "learned_for": f"squared error of {learned_for}",
        "learned_from": learned_from,
        "scores": {k: {h: v["mean"] for h, v in summary[k].items()} for k in ("all", "all_shrunk", "all_logits")},
        "scored_on": "runs of which neither data set nor network nor stride was learned from, by models learned alike: squared error "
        "over that of keeping the last weights, by snapshots ahead",
        "limits": f"small image classifiers at constant or cosine rates; {LIMITS[learned_for]}",
    }


def main() -> None:
    name = parse_arguments(__doc__, variant="of learn_world.variants").variant
    params = Params.load("learn_world", variant=name)
    variant, horizons, strides, seed = params.variant, params.horizons, params.strides, params.seed
    pin_threads()
    runs = load_world(params.datasets, variant.with_state)
    every = load_metadata(next((RUNS / params.datasets[0]).glob("*.safetensors")))["snapshot_every"]
    learned_on = reference_of("train", params.curvature_images) if variant.learned_for == "outputs" else None
    tested_on = reference_of("test", params.reference_images)
    world = draw_world(runs, strides, horizons, params.origins, seed, learned_on)
    batch, decay = params.batch, params.weight_decay
    learn_from = partial(learn, variant=variant, horizons=horizons, seed=seed, batch=batch, weight_decay=decay)
    forecast = partial(forecast_unseen, origins=params.function_origins, decay=params.decay)
    unseen = all_at_once(world, params.datasets, strides, learn_from, forecast, tested_on)
    rows = leave_one_out(world, learn_from) + shrink_unseen(unseen)
    summary = summarise(rows)
    model, prior = learn_from(world.examples), fit_prior([u.agreement for u in unseen])

    path = MODELS / name / "forecaster.safetensors"
    with atomic_path(path) as temporary:
        save_file(model.state_dict(), temporary)
    config = {"horizons": horizons, "d_model": variant.d_model, "seed": seed, "with_state": variant.with_state}
    learned_from, gains = describe(runs, strides), mean_gains(unseen, every)
    card = card_of(path, config, variant.learned_for, learned_from, prior, summary, gains)
    save_json(path.with_suffix(".json"), card)
    save_csv(REPORTS / name / "unseen.csv", rows)
    save_json(REPORTS / name / "summary.json", summary)
    means = ", ".join(f"{v['mean']:.3f} at {h}" for h, v in summary["all_shrunk"].items())
    print(f"{name}: on unseen data sets, networks and strides, over keeping the last weights: {means}")


if __name__ == "__main__":
    run(main)
