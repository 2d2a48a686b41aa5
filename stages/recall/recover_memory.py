"""Recall from fine-tunes never seen what they were trained on.

Penalties and representations are chosen on training fine-tunes, each left out in turn; test fine-tunes, whose images are of another
pool and whose rules no other has, are read once. Intervals of 95 % are over test fine-tunes (bootstrap).

Reads   models/condense_changes/<fleet>.safetensors of all fleets
Writes  reports/recover_memory/summary.json          every characteristic from every representation, and controls
        reports/recover_memory/metrics.json          the headlines of it, for `dvc metrics`
        reports/recover_memory/growth.csv            over the number of fine-tunes learned from
        reports/recover_memory/{representations, growth}.png, vector/*.svg, mean_images.png
"""

import math
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from pydantic import NonNegativeInt, PositiveInt
from threadpoolctl import threadpool_limits

from stages.common.files import Summary, save_csv, save_json
from stages.common.metrics import bootstrap_interval, headline_metrics, mean_std
from stages.common.runtime import parallel_map, pin_threads
from stages.common.stage import StageParams, parse_arguments, run
from stages.recall import pictures
from stages.recall.decoders import (
    REPRESENTATIONS,
    Arrays,
    Decoder,
    fit_decoder,
    mean_of_items,
    r_squared,
    r_squared_interval,
    read,
    retrieved,
    right_bits,
)
from stages.recall.fleet_files import CondensedFleet

MODELS = Path("models/recover_memory")
REPORTS = Path("reports/recover_memory")

HEADLINES = {  # what `dvc metrics` shows, and where it lies in the summary
    "bits_present": "decoded/classes/present/change/bits",
    "bits_present_baseline": "decoded/classes/present/baseline/bits",
    "bits_present_responses": "decoded/classes/present/responses/bits",
    "r2_log2_size": "decoded/classes/log2_size/statistics_and_spectrum/r2",
}

CHARACTERISTICS = {  # of each fleet, what is decoded
    "classes": ("present", "proportions", "log2_size", "label_noise", "mean_image"),
    "unlabelled": ("present", "proportions", "log2_size", "mean_image"),
    "rules": ("table",),
    "independent": ("present", "proportions"),
}
BITS = ("present", "table")  # characteristics that are binary
PERMUTATIONS = 5  # of each control
GROWING = ("change", "responses", "both")
GROWN = {"classes": "present", "unlabelled": "proportions", "rules": "table", "independent": "present"}


class Params(StageParams):
    """Parameters of the decoders."""

    seed: NonNegativeInt
    growth: list[PositiveInt]  # numbers of fine-tunes learned from
    repeats: PositiveInt  # random choices of so many


def targets(fleet: CondensedFleet, names: tuple[str, ...]) -> Float[np.ndarray, "n t"]:
    """Return characteristics side by side."""
    return np.concatenate([fleet.truth[name] for name in names], 1).astype(np.float64)


def by_name(values: Float[np.ndarray, "n t"], fleet: CondensedFleet, names: tuple[str, ...]) -> Arrays:
    """Return the columns of each characteristic."""
    ends = np.cumsum([fleet.truth[name].shape[1] for name in names])
    return dict(zip(names, np.split(values, ends[:-1], axis=1), strict=True))


def score(name: str, predicted: np.ndarray, true: np.ndarray, learned: np.ndarray) -> dict[str, dict[str, float]]:
    """Return the measures of one characteristic: bits right and whole sets right, or R²; of mean images retrieval, too."""
    if name in BITS:
        right = right_bits(predicted, true)
        return {
            key: bootstrap_interval(mean_of_items, x) for key, x in (("bits", right.mean(1)), ("whole", right.all(1)))
        }
    mean = learned.mean(0)
    measures = {"r2": r_squared_interval(predicted, true, mean)}
    if name == "mean_image":
        measures["retrieved"] = bootstrap_interval(mean_of_items, retrieved(predicted, true, mean))
    return measures


def baseline(name: str, true: np.ndarray, learned: np.ndarray) -> dict[str, float]:
    """Return the measures of a decoder that ignores its input."""
    if name in BITS:
        right = right_bits(np.broadcast_to(learned.mean(0), true.shape), true)
        return {"bits": float(right.mean()), "whole": float(right.all(1).mean())}
    return {"r2": 0.0} | ({"retrieved": 1 / len(true)} if name == "mean_image" else {})


def decode_fleet(name: str, fleet: CondensedFleet) -> tuple[Summary, dict[str, Decoder]]:
    """Return what is decoded of unseen fine-tunes from every representation, beside what ignores it; and the decoders."""
    names = CHARACTERISTICS[name]
    y = targets(fleet, names)
    learned, true = (by_name(y[rows], fleet, names) for rows in (fleet.learned, fleet.held_out))
    summary: Summary = {key: {} for key in names}
    decoders = {}
    for representation in REPRESENTATIONS:
        x = read(fleet.descriptions, representation)
        decoders[representation] = fit_decoder(x[fleet.learned], y[fleet.learned])
        predicted = by_name(decoders[representation].predict(x[fleet.held_out]), fleet, names)
        for key in names:
            summary[key][representation] = score(key, predicted[key], true[key], learned[key])
    for key in names:
        summary[key]["baseline"] = baseline(key, true[key], learned[key])
    return summary, decoders


def permuted(name: str, fleet: CondensedFleet, seed: int) -> dict[str, dict[str, float]]:
    """Return the bits decoded from changes that are permuted between the test networks, or between the training networks."""
    key = next(key for key in CHARACTERISTICS[name] if key in BITS)
    x, y = read(fleet.descriptions, "change"), fleet.truth[key].astype(np.float64)
    learned, held_out = fleet.learned, fleet.held_out
    bits: dict[str, list[float]] = {"test": [], "training": []}
    decoder = fit_decoder(x[learned], y[learned])
    for repeat in range(PERMUTATIONS):
        random = np.random.default_rng([seed, repeat])
        misled = fit_decoder(x[random.permutation(learned)], y[learned]).predict(x[held_out])
        misread = decoder.predict(x[random.permutation(held_out)])
        bits["training"].append(float(right_bits(misled, y[held_out]).mean()))
        bits["test"].append(float(right_bits(misread, y[held_out]).mean()))
    return {kind: mean_std(values) for kind, values in bits.items()}


def growth(name: str, fleet: CondensedFleet, counts: list[int], repeats: int, seed: int) -> list[pictures.Growth]:
    """Return rows: how well one characteristic is decoded after learning from so many of the training fine-tunes, and all."""
    key, learned, held_out = GROWN[name], fleet.learned, fleet.held_out
    y, rows = fleet.truth[key].astype(np.float64), list[pictures.Growth]()
    for representation in GROWING:
        x = read(fleet.descriptions, representation)
        for count in [n for n in counts if n < len(learned)] + [len(learned)]:
            for repeat in range(repeats if count < len(learned) else 1):
                few = np.random.default_rng([seed, repeat]).permutation(learned)[:count]
                predicted = fit_decoder(x[few], y[few]).predict(x[held_out])
                right, true = right_bits(predicted, y[held_out]), y[held_out]
                value = right.mean() if key in BITS else r_squared(predicted, true, y[few].mean(0))
                row = pictures.Growth(
                    fleet=name,
                    characteristic=key,
                    reads=representation,
                    fine_tunes=count,
                    repeat=repeat,
                    score=float(value),
                )
                rows.append(row)
    return rows


def mean_image_rows(name: str, fleet: CondensedFleet, decoder: Decoder) -> dict[str, np.ndarray]:
    """Return mean images of data sets never seen, minus the fleet's, and what a decoder of all characteristics tells of them."""
    predicted = decoder.predict(read(fleet.descriptions, "change")[fleet.held_out])
    images, center = fleet.truth["mean_image"], fleet.truth["mean_image"][fleet.learned].mean(0)
    rows = {
        f"{name}: mean image": images[fleet.held_out] - center,
        f"{name}: from its weights": by_name(predicted, fleet, CHARACTERISTICS[name])["mean_image"] - center,
    }
    size = math.isqrt(images.shape[1] // 3)
    return {caption: pixels.reshape(-1, 3, size, size) for caption, pixels in rows.items()}


def main() -> None:
    parse_arguments(__doc__)
    params = Params.load("recover_memory")
    pin_threads()
    threadpool_limits(1)  # NumPy's, too: they change sums
    fleets = {name: CondensedFleet.load(name) for name in CHARACTERISTICS}
    results = parallel_map(lambda name: decode_fleet(name, fleets[name]), list(fleets), torch.device("cpu"))
    decoded = {name: summary for name, (summary, _) in zip(fleets, results, strict=True)}
    controls = {name: permuted(name, fleet, params.seed) for name, fleet in fleets.items()}
    rows = []
    for name, fleet in fleets.items():
        rows += growth(name, fleet, params.growth, params.repeats, params.seed)

    save_csv(REPORTS / "growth.csv", rows)
    summary = {"decoded": decoded, "permuted": controls}
    save_json(REPORTS / "summary.json", summary)
    save_json(REPORTS / "metrics.json", headline_metrics(summary, HEADLINES))
    pictures.draw_representations(REPORTS / "representations.png", decoded)
    pictures.draw_growth(REPORTS / "growth.png", rows)
    shown: dict[str, np.ndarray] = {}
    for (name, fleet), (_, by_representation) in zip(fleets.items(), results, strict=True):
        if name in ("classes", "unlabelled"):
            shown |= mean_image_rows(name, fleet, by_representation["change"])
    pictures.draw_rows(REPORTS / "mean_images.png", shown, signed=True)
    bits = decoded["classes"]["present"]["both"]["bits"]["mean"]
    print(f"classes present: {bits:.1%} of bits from weights and responses")


if __name__ == "__main__":
    run(main)
