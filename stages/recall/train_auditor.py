"""Make an auditor of one base: it recalls from fine-tunes by many recipes what they were trained on, and refuses what none has made.

Whole networks and adapters have a part each. What it tells is measured on fine-tunes never seen, inside the ranges of recipes and
outside; what it refuses on such fine-tunes and on what people do to weights after training.

Reads   models/vary_recipes/<fleet>.safetensors, models/build_fleet/classes/fleet.safetensors, their base and images
Writes  models/train_auditor/auditor.safetensors   the auditor
        models/train_auditor/auditor.json          its card: base, recipes, calibration, what the examples were trained on, hashes
        models/train_auditor/base.safetensors      the base
        models/train_auditor/examples/             fine-tunes never seen: a whole network, an adapter, one that must be refused
        reports/train_auditor/summary.json         every characteristic, beside what the recipe alone tells; coverage; refusals; of fleets
                                                   that are measured apart, what they tell once the recipe is known
"""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, PositiveInt
from threadpoolctl import threadpool_limits

from stages.common.files import Metadata, Summary, atomic_path, save_arrays, save_json
from stages.common.images import load_images
from stages.common.runtime import pin_threads
from stages.common.stage import InputError, StageParams, parse_arguments, run
from stages.common.work import fingerprint
from stages.recall.adapter_files import FILES, save_adapter
from stages.recall.adapters import forms_of
from stages.recall.auditor import (
    KINDS,
    RANKS,
    RECALLED,
    UNMASKED,
    Auditor,
    Kind,
    Part,
    base_sha256,
    responses_of,
)
from stages.recall.diversity import told_by
from stages.recall.fleet import split_test
from stages.recall.fleet_files import VARY_RECIPES, Fleet
from stages.recall.functional_vit import Base, load_base
from stages.recall.honesty import Respond, alter, folds_of
from stages.recall.measures import from_recipe_alone, measure_of, recalled, refusals, run_networks
from stages.recall.reading import References
from stages.recall.tampering import alterations

MODELS = Path("models/train_auditor")
REPORTS = Path("reports/train_auditor")
NARROW = "classes"  # a fleet of build_fleet, all by one narrow recipe and on masked images
OUTSIDE: dict[Kind, tuple[str, ...]] = {"whole": ("hotter", "colder", "elsewhere"), "adapter": ("hotter_adapters",)}


# of READS, or networks beside their opposites
TellsNegated = Literal["direction", "answers", "direction_and_answers", "magnitudes", "all", "opposites"]


class Params(StageParams):
    """What is learned from, what tells a change that is turned round, and parameters of the measurements."""

    resamples: PositiveInt  # of the bootstrap
    # of each kind, the first by the recipes that it is measured on
    fleets: dict[Kind, Annotated[list[str], Field(min_length=1)]]
    negated: dict[Kind, TellsNegated]  # what tells a change that is turned round
    apart: list[str]  # fleets of whole networks, of which what is told is measured apart from the auditor


def load_fleet(name: str) -> Fleet:
    """Read a fleet that vary_recipes made, or the narrow one; InputError if it is missing."""
    return Fleet.load(name) if name == NARROW else Fleet.load_at(VARY_RECIPES / f"{name}.safetensors")


def trained_unmasked(fleet: Fleet) -> Bool[np.ndarray, " n"]:
    """Return which fine-tunes were trained on whole images."""
    if "recipe" not in fleet.truth:
        return np.zeros(len(fleet.test), bool)
    return fleet.truth["recipe"][:, fleet.metadata["recipe"].index("mask ratio")] == 0


def joined(fleets: list[Fleet]) -> tuple[np.ndarray, np.ndarray, dict[str, Float[np.ndarray, "n t"]]]:
    """Return changes, responses and what there is to recall of the training fine-tunes of fleets; InputError if they do not fit."""
    alike = {(f.metadata["base_fingerprint"], *f.metadata["answers"]) for f in fleets}
    if len(alike) > 1:
        raise InputError(
            "fleets of one auditor need one base and the same reference inputs: set vary_recipes.dataset and references to those of "
            "build_fleet, then run 'dvc repro train_auditor'"
        )
    rows = [(fleet, fleet.learned) for fleet in fleets]
    truth = {key: np.concatenate([f.truth[key][i].reshape(len(i), -1) for f, i in rows]) for key in RECALLED}
    change, responses = (np.concatenate([getattr(f, name)[i] for f, i in rows]) for name in ("change", "responses"))
    unmasked = np.concatenate([trained_unmasked(f)[i] for f, i in rows])
    if unmasked.all() or not unmasked.any():
        return change, responses, truth
    order = by_turns([len(i) for _, i in rows])
    truth |= {UNMASKED: unmasked[:, None].astype(np.float32)}
    return change[order], responses[order], {key: values[order] for key, values in truth.items()}


def by_turns(counts: list[int]) -> Int[np.ndarray, " n"]:
    """Return an order of rows that stand group by group, so that every stretch of it has its share of each group.

    Decoders are calibrated on one stretch after the other, learned from all others.
    """
    return np.argsort(np.concatenate([(np.arange(n) + 0.5) / n for n in counts]), kind="stable")


def save_adapter_example(folder: Path, fleet: Fleet, place: int) -> None:
    """Write the adapter of one fine-tune: what its matrices' changes are the product of."""
    save_adapter(folder, forms_of(fleet.change[place], fleet.layout))


def save_examples(
    folder: Path, auditor: Auditor, base: Base, fleets: dict[Kind, Fleet], respond: Respond
) -> dict[str, Metadata]:
    """Write fine-tunes never seen, the first that pass; return what they were trained on, or why one must be refused."""
    examples = {}
    for kind, fleet in fleets.items():
        rows = fleet.held_out
        far = auditor.parts[kind].judge((fleet.change[rows], fleet.responses[rows]), respond).distance
        place = int(rows[np.argmax(far < 1)])  # the first that is not refused
        truth = {key: fleet.truth[key][place].tolist() for key in RECALLED}
        examples[kind] = {
            "true": truth,
            "recipe": dict(zip(fleet.metadata["recipe"], fleet.truth["recipe"][place].tolist(), strict=True)),
        }
        if kind == "adapter":
            save_adapter_example(folder / kind, fleet, place)
            continue
        for name, factor in ((kind, 1.0), ("negated", -1.0)):
            network = base.layout.unflatten(base.start + factor * torch.from_numpy(fleet.change[place]))
            save_arrays(folder / f"{name}.safetensors", {k: w.numpy() for k, w in network.items()}, {})
    return examples | {"negated": {"refused": "the change of `whole`, taken away from the base instead of added"}}


def main() -> None:
    parse_arguments(__doc__)
    params = Params.load("train_auditor")
    pin_threads()
    threadpool_limits(1)  # the number of threads changes sums
    fleets: dict[Kind, list[Fleet]] = {kind: [load_fleet(name) for name in params.fleets[kind]] for kind in KINDS}
    metadata = fleets["whole"][0].metadata
    base = load_base(Path(metadata["base"]))
    references, images = references_of(base, metadata)
    respond = partial(run_networks, base, images=torch.from_numpy(images))
    parts: dict[Kind, Part] = {}
    summary: Summary = {"recalled": {}, "refusals": {}}
    for kind, of in fleets.items():
        change, responses, truth = joined(of)
        altering, fold = alterations(kind, of[0].layout), folds_of(len(change))
        altered = dict(zip(altering, alter(change, fold, altering.values(), respond), strict=True))
        part = parts[kind] = Part.fit(
            RANKS[kind], (change, responses), truth, altered, fold, of[0].layout, references, params.negated[kind]
        )
        outside = {name: load_fleet(name) for name in OUTSIDE[kind]}
        groups = groups_of(dict(zip(params.fleets[kind], of, strict=True)), outside)
        summary["recalled"][kind] = {
            name: recalled(part, fleet, rows, truth, params.resamples, respond)
            for name, (fleet, rows) in groups.items()
        }
        for key, measured in summary["recalled"][kind]["inside"].items():
            measured[f"{measure_of(key)}_of_the_recipe_alone"] = from_recipe_alone(of[0], truth[key], key)
        summary["refusals"][kind] = refusals(kind, part, of[0], outside, base, respond)
    if params.apart:
        summary["apart"] = {name: told_by(load_fleet(name), references, params.resamples) for name in params.apart}
    auditor = Auditor(parts, images, card_of(base, metadata, fleets, summary))
    examples = save_examples(MODELS / "examples", auditor, base, {kind: of[0] for kind, of in fleets.items()}, respond)
    publish(auditor, examples, Path(metadata["base"]))
    save_json(REPORTS / "summary.json", summary)
    for kind, by in summary["recalled"].items():
        bits, refused = by["inside"]["present"]["bits"]["mean"], summary["refusals"][kind]["honest"]["refused"]
        print(f"{kind}: {bits:.1%} of bits, {refused:.1%} of honest fine-tunes refused")


def groups_of(fleets: dict[str, Fleet], outside: dict[str, Fleet]) -> dict[str, tuple[Fleet, np.ndarray]]:
    """Return by name the fine-tunes never seen that an auditor is measured on: fleets, and which of theirs."""
    first, *rest = fleets
    groups = {"inside": (fleets[first], fleets[first].held_out)} | ranks_apart(fleets[first])
    others = {"narrow" if name == NARROW else name: fleets[name] for name in rest} | outside
    return groups | {name: (fleet, fleet.held_out) for name, fleet in others.items()}


def references_of(base: Base, metadata: Metadata) -> tuple[References, np.ndarray]:
    """Return the reference inputs that fleets answered, with the base's answers, and their pixels."""
    _, test = load_images(metadata["dataset"], torch.device("cpu"))
    chosen, _ = split_test(test, metadata["answers"][1])
    still = torch.zeros(base.layout.size)
    return References(
        chosen.labels.numpy(), responses_of(base, chosen.images, still), len(test.classes)
    ), chosen.images.numpy()


def ranks_apart(fleet: Fleet) -> dict[str, tuple[Fleet, np.ndarray]]:
    """Return of test adapters those of ranks that were learned from and those of others; nothing if there are no ranks."""
    rank = fleet.truth["recipe"][:, fleet.metadata["recipe"].index("log rank")]
    known = np.isin(rank[fleet.held_out], rank[fleet.learned])
    if known.all() or not known.any():
        return {}
    return {"ranks_learned": (fleet, fleet.held_out[known]), "other_ranks": (fleet, fleet.held_out[~known])}


def card_of(base: Base, metadata: Metadata, fleets: dict[Kind, list[Fleet]], summary: Summary) -> Metadata:
    """Return what an auditor is of, and what it was measured to do."""
    ranges = {}
    for kind, of in fleets.items():
        numbers = np.concatenate([f.truth["recipe"][f.learned] for f in of if "recipe" in f.truth])
        ends = zip(numbers.min(0).tolist(), numbers.max(0).tolist(), strict=True)
        ranges[kind] = dict(zip(of[0].metadata["recipe"], ends, strict=True))
    return {
        "made_by": f"train_auditor of params.yaml, with torch {torch.__version__}",
        "classes": metadata["classes"],
        "learned_from": {kind: sum(len(f.learned) for f in of) for kind, of in fleets.items()},
        "base_sha256": base_sha256(base),
        "preprocessing": {"image_size": base.image_size, "mean": base.mean, "std": base.std},
        "recipes": ranges,
        "measured": {
            kind: {name: {key: m[measure_of(key)]["mean"] for key, m in by.items()} for name, by in groups.items()}
            for kind, groups in summary["recalled"].items()
        },
        "refusals": summary["refusals"],
    }


def publish(auditor: Auditor, examples: dict[str, Metadata], base: Path) -> None:
    """Write the auditor, its base, and its card with the hash of every file."""
    auditor.save(MODELS / "auditor.safetensors")
    with atomic_path(MODELS / "base.safetensors") as temporary:
        temporary.write_bytes(base.read_bytes())
    files = [
        "auditor.safetensors",
        "base.safetensors",
        *(f"examples/{name}.safetensors" for name in ("whole", "negated")),
    ]
    files += [f"examples/adapter/{name}" for name in (FILES[0], "adapter_config.json")]
    save_json(
        MODELS / "auditor.json",
        auditor.card | {"examples": examples, "sha256": {name: fingerprint(MODELS / name) for name in files}},
    )


if __name__ == "__main__":
    run(main)
