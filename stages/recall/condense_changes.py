"""Condense what fine-tuning changed, of every fleet: principal components, low rank, singular values, statistics, responses.

All means, scales and axes are those of training fine-tunes.

Reads   models/build_fleet/<fleet>/fleet.safetensors
Writes  models/condense_changes/<fleet>.safetensors   descriptions [n, f] by name; what there is to recall, `test` [n]
        reports/condense_changes/summary.json         how much of the changes principal components hold, of unseen networks too
        reports/condense_changes/variance.png, vector/variance.svg
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from pydantic import PositiveInt
from threadpoolctl import threadpool_limits

from stages.common.files import save_json
from stages.common.stage import StageParams, parse_arguments, run
from stages.recall import pictures
from stages.recall.condense import Condenser
from stages.recall.fleet_files import Fleet, save_condensed

FLEETS = ("classes", "unlabelled", "rules", "independent")
REPORTS = Path("reports/condense_changes")


class Params(StageParams):
    """Of which numbers of components the explained variance is reported."""

    components: list[PositiveInt]


def explained_variance(
    fleet: Fleet, condenser: Condenser, coordinates: Float[np.ndarray, "n k"], components: list[int]
) -> dict[str, dict[str, float]]:
    """Return the fraction of the squared change in so many components, and in all: of training and of unseen fine-tunes."""
    span = condenser.span
    unseen = (fleet.change[fleet.held_out] - span.mean) * span.scale
    inside = {"training": coordinates[fleet.learned], "unseen": coordinates[fleet.held_out]}
    total = {"training": (inside["training"] ** 2).sum(), "unseen": (unseen**2).sum()}
    return {
        str(k): {kind: float((inside[kind][:, :k] ** 2).sum() / total[kind]) for kind in total}
        for k in [*components, len(fleet.learned)]
    }


def main() -> None:
    parse_arguments(__doc__)
    params = Params.load("condense_changes")
    threadpool_limits(1)  # the number of threads changes sums
    ratios = {}
    for name in FLEETS:
        fleet = Fleet.load(name)
        change, responses = fleet.change[fleet.learned], fleet.responses[fleet.learned]
        condenser = Condenser.fit(change, responses, fleet.layout, tuple(fleet.metadata["answers"]))
        descriptions = condenser.condense(fleet.change, fleet.responses)
        save_condensed(name, fleet, descriptions)
        ratios[name] = explained_variance(fleet, condenser, descriptions["change"], params.components)
    save_json(REPORTS / "summary.json", {"explained_variance_ratio": ratios})
    pictures.draw_explained_variance(REPORTS / "variance.png", ratios)
    first = str(params.components[0])
    print(", ".join(f"{name}: {by[first]['unseen']:.0%} in {first} components" for name, by in ratios.items()))


if __name__ == "__main__":
    run(main)
