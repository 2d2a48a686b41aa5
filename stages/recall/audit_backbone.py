"""Make an auditor of a base of one's own, in one file: `python -m stages.recall.audit --auditor FILE --adapter FOLDER`.

It has the base's fingerprint and how its images are prepared, decoders and their calibration, what it refuses, and the ranges of the
recipes that it learned from; of the base itself it has no weights but the head.

Reads   models/adapt_backbone/<name>/fleet.safetensors
Writes  models/audit_backbone/<name>/auditor.safetensors
        reports/audit_backbone/<name>/summary.json   every characteristic of fine-tunes never seen, beside what ignores the network;
                                                     coverage; refusals
"""

from pathlib import Path

import numpy as np
from jaxtyping import Bool
from pydantic import PositiveInt
from safetensors.numpy import load_file
from threadpoolctl import threadpool_limits

from stages.common.files import Metadata, Summary, load_metadata, save_json
from stages.common.runtime import pin_threads
from stages.common.stage import InputError, StageParams, parse_arguments, run
from stages.recall.auditor import KINDS, RANKS, RECALLED, Auditor, Kind, Part
from stages.recall.fleet_files import ADAPT_BACKBONE, Arrays, Fleet, without_prefix
from stages.recall.functional_vit import HEAD
from stages.recall.honesty import FOLDS
from stages.recall.measures import auroc, recalled
from stages.recall.own_fleet import ALTERED
from stages.recall.reading import References

MODELS, REPORTS = Path("models/audit_backbone"), Path("reports/audit_backbone")


class Params(StageParams):
    """Parameters of the measurements."""

    resamples: PositiveInt  # of the bootstrap


def fleet_of(arrays: Arrays, metadata: Metadata) -> Fleet:
    """Return the fleet of a kind: of changes it has sketches."""
    return Fleet(
        arrays["test"],
        change=arrays["change"],
        responses=arrays["responses"],
        truth=without_prefix(arrays, "true."),
        mean_image=np.zeros((len(arrays["test"]), 0), np.float32),
        scores=without_prefix(arrays, "score_"),
        metadata=metadata,
    )


def in_company(stack: np.ndarray) -> Bool[np.ndarray, " n"]:
    """Return which fine-tunes are not alone in their stack: an average with itself is no mixture."""
    return np.bincount(stack)[stack] > 1


def learn(kind: Kind, arrays: Arrays, fleet: Fleet, references: References) -> tuple[Part, dict[str, np.ndarray]]:
    """Return what the training fine-tunes of a kind teach, and their truth; InputError if there are too few."""
    rows = np.flatnonzero(~fleet.test & in_company(arrays["stack"]))
    fold = np.unique(arrays["stack"][rows], return_inverse=True)[1] % FOLDS
    if len(np.unique(fold)) < FOLDS:
        raise InputError(
            f"expected fine-tunes ({kind}) of at least {FOLDS} stacks to learn from, got {len(np.unique(fold))}: raise "
            "adapt_backbone.variants.*.train, or lower adapt_backbone.stack"
        )
    truth = {key: fleet.truth[key][rows].reshape(len(rows), -1) for key in RECALLED}
    altered = {name: (arrays[f"{name}.change"][rows], arrays[f"{name}.responses"][rows]) for name in ALTERED}
    networks, rank = (fleet.change[rows], fleet.responses[rows]), RANKS[kind]
    return Part.fit(rank, networks, truth, altered, fold, fleet.layout, references), truth


def refusals(part: Part, arrays: Arrays, fleet: Fleet) -> dict[str, dict[str, float]]:
    """Return how often fine-tunes never seen are refused, as they are and altered."""
    rows = fleet.held_out[in_company(arrays["stack"])[fleet.held_out]]

    def distance(prefix: str) -> np.ndarray:
        networks = arrays[f"{prefix}change"][rows], arrays[f"{prefix}responses"][rows]
        return part.honesty.judge(networks, part.reader).distance

    honest = distance("")
    found = {"honest": honest} | {name: distance(f"{name}.") for name in ALTERED}
    return {name: {"refused": float((far > 1).mean()), "auroc": auroc(far, honest)} for name, far in found.items()}


def main() -> None:
    name = parse_arguments(__doc__, backbone="which of adapt_backbone.variants").backbone
    params, path = Params.load("audit_backbone"), ADAPT_BACKBONE / name / "fleet.safetensors"
    pin_threads()
    threadpool_limits(1)  # the number of threads changes sums
    metadata, arrays = load_metadata(path), load_file(path)
    references = References(arrays["labels"], arrays["base_responses"], len(metadata["classes"]))
    parts: dict[Kind, Part] = {}
    summary: Summary = {"recalled": {}, "refusals": {}}
    learned_from = {}
    for kind in (kind for kind in KINDS if kind in metadata["recipes"]):
        own = without_prefix(arrays, f"{kind}.")
        fleet = fleet_of(own, metadata)
        parts[kind], truth = learn(kind, own, fleet, references)
        measured = recalled(parts[kind], fleet, fleet.held_out, truth, params.resamples)
        summary["recalled"][kind], learned_from[kind] = measured, len(truth[RECALLED[0]])
        summary["refusals"][kind] = refusals(parts[kind], own, fleet)
        bits, ignoring = measured["present"]["bits"]["mean"], measured["present"]["bits_ignoring_the_network"]
        print(
            f"{kind}: {bits:.1%} of bits, {ignoring:.1%} ignoring the network; {len(fleet.held_out)} unseen fine-tunes"
        )
    told = ("classes", "base_sha256", "directions", "sketch", "recipes", "backbone", "preprocessing")
    card = {key: metadata[key] for key in told} | {"learned_from": learned_from, "measured": summary}
    Auditor(parts, arrays["images"], card, {key: arrays[key] for key in HEAD}).save(
        MODELS / name / "auditor.safetensors"
    )
    save_json(REPORTS / name / "summary.json", summary)


if __name__ == "__main__":
    run(main)
