"""Map rules to weights: write networks for rules that none was trained on, and do arithmetic with changes of weights.

A network is written as base + scale x map(truth table). What the map reads of a table, its penalty and the scale are chosen on rules
held out of training; then it is fitted again, and the networks for rules never trained are run on test images. The scale of sums
A + B is chosen on other pairs of class sets than those that are reported.

Reads   models/build_fleet/rules/fleet.safetensors, models/build_fleet/classes/fleet.safetensors, and the base and images of each
Writes  reports/map_weight_space/summary.json   accuracy of written networks beside copied ones, geometry, arithmetic
        reports/map_weight_space/metrics.json   the headlines of it, for `dvc metrics`
        reports/map_weight_space/{space, written, arithmetic}.png, vector/*.svg
"""

from pathlib import Path

import numpy as np
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from threadpoolctl import threadpool_limits

from stages.common.files import save_json
from stages.common.images import load_images
from stages.common.metrics import headline_metrics
from stages.common.runtime import pick_device, pin_threads
from stages.common.stage import StageParams, parse_arguments, run
from stages.recall import pictures
from stages.recall.arithmetic import add_and_negate, draw_pairs, train_pairs
from stages.recall.captions import caption
from stages.recall.fine_tunes import CELLS, Recipe
from stages.recall.fleet import PatchedImages, patchify_pools
from stages.recall.fleet_files import Fleet
from stages.recall.functional_vit import load_base
from stages.recall.objective import Learns, Objective
from stages.recall.rules import rule_geometry, write_rules

REPORTS = Path("reports/map_weight_space")

HEADLINES = {  # what `dvc metrics` shows, and where it lies in the summary
    "acc_written": "rules/accuracy/written",
    "acc_nearest_copied": "rules/accuracy/nearest_copied",
    "acc_nearest_averaged": "rules/accuracy/nearest_averaged",
    "acc_trained": "rules/accuracy/trained",
}

ATTRIBUTES = ("cross", "blue", "right")  # of a cell, where its bits are 1


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


def open_fleet(name: str, learns: Learns, mask_ratio: float, evaluation: int) -> tuple[Fleet, Objective, PatchedImages]:
    """Return a fleet, what its networks learn, and images."""
    fleet, device = Fleet.load(name), pick_device()
    base = load_base(Path(fleet.metadata["base"]), device)
    train, test = load_images(fleet.metadata["dataset"], device)
    images = patchify_pools(base, train, test, fleet.metadata["answers"][1], evaluation)
    return fleet, Objective(base, learns, mask_ratio), images


def attribute_effects(tables: np.ndarray) -> dict[str, np.ndarray]:
    """Return how far each attribute of an image moves a rule's answer towards yes: -1 to 1."""
    signs = 2.0 * tables - 1
    attributes = 2.0 * (np.arange(CELLS)[:, None] >> np.arange(len(ATTRIBUTES)) & 1) - 1  # of each cell
    return dict(zip(ATTRIBUTES, (signs @ attributes / CELLS).T, strict=True))


def main() -> None:
    parse_arguments(__doc__)
    params = Params.load("map_weight_space")
    pin_threads()
    threadpool_limits(1)  # NumPy's, too: they change sums
    fleet, objective, images = open_fleet("rules", "rule", 0.0, params.evaluation_images)
    validation = params.validation_share, params.evaluation_images
    written = write_rules(fleet, objective, images, params.scales, *validation, params.seed)
    geometry, pairs = rule_geometry(fleet)

    _, objective, images = open_fleet("classes", "labels", params.mask_ratio, params.evaluation_images)
    count, pool = params.validation_pairs + params.test_pairs, images.pools["test"][1].cpu()
    fine_tunes = draw_pairs(count, params.classes_each, params.recipe, pool, params.seed)
    changes = train_pairs(fine_tunes, objective, images, params.batch_size)
    arithmetic = add_and_negate(fine_tunes, changes, objective, images, params.scales, params.validation_pairs)

    summary = {"rules": written, "geometry": geometry, "arithmetic": arithmetic}
    save_json(REPORTS / "summary.json", summary)
    save_json(REPORTS / "metrics.json", headline_metrics(summary, HEADLINES))
    effects = attribute_effects(fleet.truth["table"])
    pictures.draw_space(REPORTS / "space.png", fleet.change, fleet.test, pairs, effects)
    pictures.draw_bars(REPORTS / "written.png", {"accuracy on rules never trained": written["accuracy"]})
    difference, forgotten = arithmetic["on_union_minus_on_others"], arithmetic["negation"]
    panels = {"accuracy on A and B minus on other classes": difference, "accuracy among all classes": forgotten}
    pictures.draw_bars(REPORTS / "arithmetic.png", panels)
    accuracies = written["accuracy"].items()
    print(", ".join(f"{caption(name)} {found['mean']:.1%}" for name, found in accuracies))


if __name__ == "__main__":
    run(main)
