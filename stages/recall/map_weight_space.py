"""Map rules to weights: write networks for rules that none was trained on, and do arithmetic with changes of weights.

Reads   models/build_fleet/rules/fleet.safetensors, models/build_fleet/classes/fleet.safetensors, and the base and images of each
Writes  reports/map_weight_space/summary.json   accuracy of written networks beside copied ones, geometry, arithmetic
        reports/map_weight_space/{space,written,arithmetic}.png
A network is written as base + scale x map(truth table). What the map reads of a table, its penalty and the scale are chosen on rules
held out of training; then it is fitted again, and the networks for rules never trained are run on test images. The scale of sums
A + B is chosen on other pairs of class sets than those that are reported.
"""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from safetensors.numpy import load_file
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.func import vmap

from stages.common.files import load_metadata, require, save_json
from stages.common.images import load_images
from stages.common.metrics import mean_interval
from stages.common.randomness import generator
from stages.common.runtime import parallel_map, pick_device, pin_threads
from stages.common.stage import InputError, StageParams, parse_arguments, run
from stages.recall import pictures
from stages.recall.condense import split
from stages.recall.decoders import unit
from stages.recall.fleet import Images, show_images, train_tasks
from stages.recall.objective import Objective
from stages.recall.tasks import CELLS, Recipe, Task, draw_task
from stages.recall.vit import load_base

FLEETS = Path("models/build_fleet")
REPORTS = Path("reports/map_weight_space")

STACK = 20  # networks that are run or trained together
ATTRIBUTES = ("cross", "blue", "right")  # of a cell, where its bits are 1
READS = ("cells", "cells and pairs")  # what the map knows of a truth table
PENALTIES = (1.0, 10.0)


class Params(StageParams):
    """Parameters of the maps."""

    seed: NonNegativeInt
    validation_share: PositiveFloat  # of the trained rules
    scales: list[PositiveFloat]
    evaluation_images: PositiveInt
    validation_pairs: PositiveInt  # pairs of disjoint class sets
    test_pairs: PositiveInt
    classes_each: PositiveInt  # of a pair
    batch_size: PositiveInt
    mask_ratio: float
    recipe: Recipe  # of fine-tunes on class sets and on their unions


def table_features(tables: Float[np.ndarray, "n 8"], reads: str) -> Float[np.ndarray, "n f"]:
    """Return the signs of a rule's cells; and, of pairs, the products of its Walsh coefficients."""
    signs = 2.0 * tables - 1
    if reads == "cells":
        return signs
    walsh = np.array([[(-1) ** (i & j).bit_count() for j in range(CELLS)] for i in range(CELLS)]) / CELLS
    coefficients = signs @ walsh
    rows, columns = np.triu_indices(CELLS)
    return np.concatenate([signs, coefficients[:, rows] * coefficients[:, columns]], 1)


def fit_map(
    tables: Float[np.ndarray, "n 8"], changes: Float[np.ndarray, "n p"], reads: str, penalty: float
) -> Callable[[Float[np.ndarray, "m 8"]], Float[np.ndarray, "m p"]]:
    """Return the linear map from what it reads of a truth table to a change of weights, by ridge regression."""
    model = Ridge(alpha=penalty).fit(table_features(tables, reads), changes)
    return lambda asked: model.predict(table_features(asked, reads)).astype(np.float32)


def nearest(tables: Float[np.ndarray, "n 8"], asked: Float[np.ndarray, "m 8"]) -> np.ndarray:
    """Return of each rule asked for the trained rule that differs from it in the fewest cells."""
    return np.abs(asked[:, None] - tables[None]).sum(2).argmin(1)


def average_nearest(
    tables: Float[np.ndarray, "n 8"], changes: Float[np.ndarray, "n p"], asked: Float[np.ndarray, "m 8"]
) -> Float[np.ndarray, "m p"]:
    """Return the mean change of all fine-tunes whose rule differs in the fewest cells: as free of noise as a map that averages."""
    distance = np.abs(asked[:, None] - tables[None]).sum(2)
    return np.stack([changes[row == row.min()].mean(0) for row in distance])


def accuracy(
    objective: Objective,
    changes: Float[np.ndarray, "m p"],
    images: tuple[Tensor, Tensor],
    labels: Tensor,
    counted: Tensor | None = None,
) -> Float[np.ndarray, " m"]:
    """Return of base + change the share of images with these labels [m, n] that it answers right, of those counted [m, n]."""
    x, _ = images
    frozen, noise = objective.frozen, torch.zeros(len(x), objective.base.patches).to(x)
    score = vmap(objective.scores, in_dims=(0, None, None, 0, None))

    def run_some(some: Tensor) -> Tensor:
        with torch.no_grad():  # each thread has its own
            vectors = objective.start + torch.from_numpy(changes[some.numpy()]).to(x)
            return score(vectors, frozen, x, labels[some.to(x.device)], noise)

    right = torch.cat(parallel_map(run_some, torch.arange(len(changes)).split(STACK), x.device))
    counted = torch.ones_like(right) if counted is None else counted.to(right)
    return ((right * counted).sum(1) / counted.sum(1)).double().cpu().numpy()


def write_rules(fleet: dict[str, np.ndarray], objective: Objective, images: Images, params: Params) -> dict[str, Any]:
    """Return how well networks follow rules that were written into their weights, beside networks that were copied or trained."""
    train, test = split(fleet["test"])
    tables, changes = fleet["true.table"].astype(np.float64), fleet["change"]

    def follow(
        written: Float[np.ndarray, "m p"], rules: Float[np.ndarray, "m 8"], on: tuple[Tensor, Tensor]
    ) -> np.ndarray:
        cells = on[1].cpu().numpy()
        return accuracy(objective, written, on, torch.from_numpy(rules[:, cells] > 0.5).to(on[0].device).long())

    rules = np.unique(tables[train], axis=0)
    order = np.random.default_rng(params.seed).permutation(len(rules))
    held = rules[order[: max(1, round(params.validation_share * len(rules)))]]
    rest = train[~(tables[train][:, None] == held[None]).all(2).any(1)]
    pixels, cells = images.pools["base"]
    chosen_on = pixels[: params.evaluation_images], cells[: params.evaluation_images]
    choices = {}
    for reads, penalty in product(READS, PENALTIES):
        written = fit_map(tables[rest], changes[rest], reads, penalty)(held)
        for scale in params.scales:
            choices[reads, penalty, scale] = float(follow(scale * written, held, chosen_on).mean())
    reads, penalty, scale = max(choices, key=lambda choice: choices[choice])
    copied = average_nearest(tables[rest], changes[rest], held)
    copied_scale = max(params.scales, key=lambda s: follow(s * copied, held, chosen_on).mean())

    asked = np.unique(tables[test], axis=0)
    write = fit_map(tables[train], changes[train], reads, penalty)
    wrong = np.random.default_rng(params.seed).permutation(len(asked))
    wrong = np.where(wrong == np.arange(len(asked)), (wrong + 1) % len(asked), wrong)
    on = images.evaluation
    found = {
        "written": follow(scale * write(asked), asked, on),
        "written for another rule": follow(scale * write(asked[wrong]), asked, on),
        "nearest trained rule, copied": follow(changes[train][nearest(tables[train], asked)], asked, on),
        "nearest trained rules, averaged": follow(
            copied_scale * average_nearest(tables[train], changes[train], asked), asked, on
        ),
        "base": follow(np.zeros_like(write(asked)), asked, on),
        "constant answer": np.maximum(asked.mean(1), 1 - asked.mean(1)),
    }
    trained = follow(changes[test], tables[test], on)
    better = {
        "written minus nearest": found["written"] - found["nearest trained rule, copied"],
        "written minus nearest averaged": found["written"] - found["nearest trained rules, averaged"],
    }
    expected = write(tables[test])
    r2 = 1 - ((changes[test] - expected) ** 2).sum() / ((changes[test] - changes[train].mean(0)) ** 2).sum()
    accuracies = {name: mean_interval(values.tolist()) for name, values in found.items()}
    return {
        "accuracy": accuracies | {"trained on the rule": mean_interval(trained.tolist())},
        **{name: mean_interval(values.tolist()) for name, values in better.items()},
        "scale": scale,
        "pairs": float(reads != READS[0]),
        "change_r2": float(r2),
    }


def centred(changes: Float[np.ndarray, "n p"]) -> Float[np.ndarray, "n p"]:
    """Return directions from the mean of changes."""
    return unit(changes - changes.mean(0))


def rule_geometry(fleet: dict[str, np.ndarray]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Return how cosines of centred changes follow the agreement of rules, and pairs of networks with rules never trained.

    Correlations are over these pairs, mean cosines over all.
    """
    train, test = split(fleet["test"])
    directions = unit(fleet["change"] - fleet["change"][train].mean(0))
    signs = 2.0 * fleet["true.table"] - 1
    cosines, agreement = directions @ directions.T, signs @ signs.T / CELLS
    upper = np.triu_indices(len(test), 1)
    pairs = {"agreement": agreement[np.ix_(test, test)][upper], "cosine": cosines[np.ix_(test, test)][upper]}
    everyone = np.triu_indices(len(signs), 1)
    same, opposite = agreement[everyone] == 1, agreement[everyone] == -1
    found = {
        "correlation": float(np.corrcoef(pairs["agreement"], pairs["cosine"])[0, 1]),
        "rank correlation": float(spearmanr(pairs["agreement"], pairs["cosine"])[0]),
        "mean": float(cosines[everyone].mean()),
    }
    for name, which in (("same rule", same), ("opposite rule", opposite)):
        if which.any():
            found[name] = float(cosines[everyone][which].mean())
    return found, pairs


def draw_pairs(params: Params, pool: Tensor) -> list[Task]:
    """Draw fine-tunes on disjoint class sets A and B and on their union, three in a row for each pair."""
    classes, tasks = int(pool.max()) + 1, []
    if 2 * params.classes_each > classes:
        raise InputError(
            f"map_weight_space.classes_each: two sets of {params.classes_each} need more than {classes} classes"
        )
    for i in range(params.validation_pairs + params.test_pairs):
        order = torch.randperm(classes, generator=generator(params.seed, f"pair {i}"))
        a, b = order[: params.classes_each], order[params.classes_each : 2 * params.classes_each]
        for name, members in (("A", a), ("B", b), ("A and B", torch.cat([a, b]))):
            present = torch.isin(torch.arange(classes), members)
            tasks.append(draw_task(f"{params.seed}/pair {i} {name}", True, params.recipe, pool, present))
    return tasks


def add_and_negate(objective: Objective, images: Images, params: Params) -> dict[str, Any]:
    """Return what sums and differences of changes do to accuracy among all classes, and cosines around each kind's mean change.

    The base knows all classes, so what a network has specialised in counts: its accuracy on A and B minus that on the others.
    """
    tasks = draw_pairs(params, images.pools["test"][1].cpu())
    stacks = [tasks[i : i + STACK] for i in range(0, len(tasks), STACK)]

    def train(stack: list[Task]) -> Tensor:
        before, after, _ = train_tasks(stack, objective, images, params.batch_size)
        return after - before

    changes = torch.cat(parallel_map(train, stacks, objective.start.device, "fine-tune pairs")).cpu().numpy()
    a, b, union = changes[0::3], changes[1::3], changes[2::3]
    present = torch.from_numpy(np.stack([t.characteristics["present"] for t in tasks]))
    in_a, in_b, in_union = present[0::3], present[1::3], present[2::3]
    n, (_, y) = params.validation_pairs, images.evaluation

    def on(which: Tensor, pairs: slice, moved: np.ndarray) -> np.ndarray:
        counted = which[pairs].to(y.device)[:, y]
        return accuracy(objective, moved[pairs], images.evaluation, y.expand(len(counted), -1), counted)

    chosen, reported = slice(0, n), slice(n, None)

    def specialised(pairs: slice, moved: np.ndarray) -> np.ndarray:
        return on(in_union, pairs, moved) - on(1 - in_union, pairs, moved)

    scale = max(params.scales, key=lambda s: specialised(chosen, s * (a + b)).mean())
    zero = np.zeros_like(a)
    on_union = {"base": zero, "A": a, "B": b, "sum": scale * (a + b), "trained on the union": union}
    found: dict[str, Any] = {
        "scale": scale,
        "on the union": {
            name: mean_interval(on(in_union, reported, moved).tolist()) for name, moved in on_union.items()
        },
        "negation": {
            f"{name}, on {where}": mean_interval(on(which, reported, moved).tolist())
            for name, moved in (("union", union), ("union - A", union - a))
            for where, which in (("A", in_a), ("B", in_b))
        },
    }
    total, whole = centred(a + b)[reported], centred(union)[reported]
    others = np.roll(whole, 1, axis=0)
    found["on the union minus on the others"] = {
        name: mean_interval(specialised(reported, moved).tolist()) for name, moved in on_union.items()
    }
    found["cosine"] = {
        "sum and union": mean_interval((total * whole).sum(1).tolist()),
        "sum and another union": mean_interval((total * others).sum(1).tolist()),
        "A and B": mean_interval((centred(a) * centred(b))[reported].sum(1).tolist()),
    }
    return found


def open_fleet(name: str, mask_ratio: float, evaluation: int) -> tuple[dict[str, np.ndarray], Objective, Images]:
    """Return a fleet, what its networks learned, and images."""
    path, device = FLEETS / name / "fleet.safetensors", pick_device()
    metadata = load_metadata(require(path))
    base, (train, test) = load_base(Path(metadata["base"]), device), load_images(metadata["dataset"], device)
    objective = Objective(base, "rule" if name == "rules" else "labels", mask_ratio)
    return load_file(path), objective, show_images(base, train, test, metadata["answers"][1], evaluation)


def main() -> None:
    parse_arguments(__doc__)
    params = Params.load("map_weight_space")
    pin_threads()
    threadpool_limits(1)  # NumPy's, too: they change sums
    rules, objective, images = open_fleet("rules", 0.0, params.evaluation_images)
    written = write_rules(rules, objective, images, params)
    geometry, pairs = rule_geometry(rules)
    _, objective, images = open_fleet("classes", params.mask_ratio, params.evaluation_images)
    arithmetic = add_and_negate(objective, images, params)
    save_json(REPORTS / "summary.json", {"rules": written, "geometry": geometry, "arithmetic": arithmetic})
    signs = 2.0 * rules["true.table"] - 1
    high = 2.0 * (np.arange(CELLS)[:, None] >> np.arange(3) & 1) - 1  # each cell's attributes
    effects = dict(zip(ATTRIBUTES, (signs @ high / CELLS).T, strict=True))
    pictures.draw_space(REPORTS / "space.png", rules, pairs, effects)
    pictures.draw_bars(REPORTS / "written.png", written["accuracy"], "accuracy on rules never trained")
    bars = arithmetic["on the union minus on the others"] | arithmetic["negation"]
    pictures.draw_bars(REPORTS / "arithmetic.png", bars, "accuracy on A and B minus on other classes; or accuracy")
    by = written["accuracy"]
    print(", ".join(f"{name} {by[name]['mean']:.1%}" for name in by))


if __name__ == "__main__":
    run(main)
