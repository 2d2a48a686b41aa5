"""Condense what fine-tuning changed, of every fleet: principal components, low rank, singular values, statistics, responses.

Reads   models/build_fleet/<fleet>/fleet.safetensors
Writes  models/condense_changes/<fleet>.safetensors   descriptions [n, f] by name, and under `fitted.` all that describes a further
                                                      network likewise; what there is to recall, `test` [n]
        reports/condense_changes/summary.json         how many principal components hold the changes, of unseen networks too
        reports/condense_changes/variance.png
All means, scales and axes are those of training fine-tunes.
"""

from pathlib import Path
from typing import Any

from pydantic import PositiveInt
from safetensors.numpy import load_file
from threadpoolctl import threadpool_limits

from stages.common.files import load_metadata, save_arrays, save_json
from stages.common.stage import StageParams, parse_arguments, run
from stages.common.vectors import Layout
from stages.recall import pictures
from stages.recall.condense import condense, fit_condenser, split

FLEETS = ("classes", "unlabelled", "rules", "independent")
INPUTS = Path("models/build_fleet")
MODELS = Path("models/condense_changes")
REPORTS = Path("reports/condense_changes")


class Params(StageParams):
    """Of which components the share is reported."""

    components: list[PositiveInt]


def main() -> None:
    parse_arguments(__doc__)
    params = Params.load("condense_changes")
    threadpool_limits(1)  # the number of threads changes sums
    shares: dict[str, dict[str, Any]] = {}
    for name in FLEETS:
        path = INPUTS / name / "fleet.safetensors"
        metadata, fleet = load_metadata(path), load_file(path)
        layout = Layout.from_metadata(metadata)
        train, test = split(fleet["test"])
        change, responses = fleet["change"], fleet["responses"]
        fitted = fit_condenser(change[train], responses[train], layout, metadata["answers"])
        found = condense(change, responses, layout, fitted)
        known = {key: value for key, value in fleet.items() if key.startswith("true.")}
        arrays = found | known | {"test": fleet["test"], "mean_image": fleet["mean_image"]}
        arrays |= {f"fitted.{key}": value for key, value in fitted.items()}
        save_arrays(MODELS / f"{name}.safetensors", arrays, metadata)
        x = (change[test] - fitted["mean"]) * fitted["scale"]
        total = {"training": (found["change"][train] ** 2).sum(), "unseen": (x**2).sum()}
        held = {"training": found["change"][train], "unseen": found["change"][test]}
        shares[name] = {
            str(k): {who: float((held[who][:, :k] ** 2).sum() / total[who]) for who in total}
            for k in [*params.components, len(train)]
        }
    save_json(REPORTS / "summary.json", {"share": shares})
    pictures.draw_shares(REPORTS / "variance.png", shares)
    first = str(params.components[0])
    print(", ".join(f"{name}: {by[first]['unseen']:.0%} in {first} components" for name, by in shares.items()))


if __name__ == "__main__":
    run(main)
