"""Recall from fine-tunes never seen what they were trained on; and draw the images to which a classifier answered.

Reads   models/condense_changes/<fleet>.safetensors of all fleets; of `classes`, its base and its images
Writes  models/recover_memory/decoders.safetensors   decoders of `classes`, calibrated: what `audit` uses
        reports/recover_memory/summary.json          every characteristic from every representation, controls, calibration, images
        reports/recover_memory/growth.csv            over the number of fine-tunes learned from
        reports/recover_memory/{representations,growth,mean_images,images}.png
Penalties and representations are chosen on training fine-tunes, each left out in turn; test fine-tunes, whose images are of another
pool and whose rules no other has, are read once. Intervals of 95 % are over test fine-tunes (bootstrap).
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from safetensors.numpy import load_file
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from stages.common.files import load_metadata, require, save_arrays, save_csv, save_json
from stages.common.images import load_images
from stages.common.metrics import binary_calibration_error, bootstrap_interval, mean_std
from stages.common.randomness import generator, seeded_init
from stages.common.runtime import parallel_map, pick_device, pin_threads
from stages.common.stage import StageParams, parse_arguments, run
from stages.common.work import fingerprint
from stages.recall import pictures
from stages.recall.condense import split
from stages.recall.decoders import REPRESENTATIONS, Arrays, Decoder, fit_decoder, r_squared, read, retrieved, right_bits
from stages.recall.objective import Objective
from stages.recall.pools import pool
from stages.recall.vit import Base, load_base

FLEETS = Path("models/condense_changes")
MODELS = Path("models/recover_memory")
REPORTS = Path("reports/recover_memory")

CHARACTERISTICS = {  # of each fleet, what is decoded; bits are binary
    "classes": ("present", "proportions", "log2_size", "label_noise", "mean_image"),
    "unlabelled": ("present", "proportions", "log2_size", "mean_image"),
    "rules": ("table",),
    "independent": ("present", "proportions"),
}
BITS = ("present", "table")
RESAMPLES = 200  # of the bootstrap
AUDITED = ("present", "proportions", "log2_size", "label_noise")
# of which the audit takes the one that leave-one-out errors prefer
SOURCES = ("change", "responses", "both", "statistics and spectrum", "all")
GROWING = ("change", "responses", "both")
GROWN = {"classes": "present", "unlabelled": "proportions", "rules": "table", "independent": "present"}


class Params(StageParams):
    """Parameters of the decoders."""

    seed: NonNegativeInt
    growth: list[PositiveInt]  # numbers of fine-tunes learned from
    repeats: PositiveInt  # random choices of so many
    image_steps: PositiveInt  # of the decoder from responses to images
    judge_steps: PositiveInt
    batch_size: PositiveInt
    pixel_weights: Annotated[list[NonNegativeFloat], Field(min_length=1)]  # of the pixels' error beside the alignment's


def load_fleet(name: str) -> Arrays:
    """Return a fleet's descriptions, and what there is to recall as [n, t]; InputError if it is missing."""
    found = load_file(require(FLEETS / f"{name}.safetensors"))
    n = len(found["test"])
    true = {key.removeprefix("true."): value.reshape(n, -1) for key, value in found.items() if key.startswith("true.")}
    return found | true | {"mean_image": found["mean_image"].reshape(n, -1)}


def targets(fleet: Arrays, names: tuple[str, ...]) -> Float[np.ndarray, "n t"]:
    """Return characteristics side by side."""
    return np.concatenate([fleet[name] for name in names], 1).astype(np.float64)


def by_name(values: Float[np.ndarray, "n t"], fleet: Arrays, names: tuple[str, ...]) -> Arrays:
    """Return the columns of each characteristic."""
    ends = np.cumsum([fleet[name].shape[1] for name in names])
    return dict(zip(names, np.split(values, ends[:-1], axis=1), strict=True))


def score(name: str, predicted: np.ndarray, true: np.ndarray, learned: np.ndarray) -> dict[str, dict[str, float]]:
    """Return the measures of one characteristic: bits right and whole sets right, or R²; of mean images retrieval, too."""
    interval = partial(bootstrap_interval, n=len(true), resamples=RESAMPLES)
    if name in BITS:
        right = right_bits(predicted, true)
        whole = interval(lambda at: float(right[at].all(1).mean()))
        return {"bits": interval(lambda at: float(right[at].mean())), "whole": whole}
    mean = learned.mean(0)
    found = {"r2": interval(lambda at: r_squared(predicted[at], true[at], mean))}
    if name == "mean_image":
        hits = retrieved(predicted, true, mean)
        found["retrieved"] = interval(lambda at: float(hits[at].mean()))
    return found


def baseline(name: str, true: np.ndarray, learned: np.ndarray) -> dict[str, float]:
    """Return the measures of a decoder that ignores its input."""
    if name in BITS:
        right = right_bits(np.broadcast_to(learned.mean(0), true.shape), true)
        return {"bits": float(right.mean()), "whole": float(right.all(1).mean())}
    return {"r2": 0.0} | ({"retrieved": 1 / len(true)} if name == "mean_image" else {})


def decode_fleet(name: str, fleet: Arrays) -> tuple[dict[str, Any], dict[str, Decoder]]:
    """Return what is decoded of unseen fine-tunes from every representation, beside what ignores it; and the decoders."""
    names = CHARACTERISTICS[name]
    train, test = split(fleet["test"])
    y = targets(fleet, names)
    learned, true = by_name(y[train], fleet, names), by_name(y[test], fleet, names)
    summary: dict[str, Any] = {key: {} for key in names}
    decoders = {}
    for representation in REPRESENTATIONS:
        x = read(fleet, representation)
        decoders[representation] = fit_decoder(x[train], y[train])
        predicted = by_name(decoders[representation].predict(x[test]), fleet, names)
        for key in names:
            summary[key][representation] = score(key, predicted[key], true[key], learned[key])
    for key in names:
        summary[key]["baseline"] = baseline(key, true[key], learned[key])
    return summary, decoders


def permuted(name: str, fleet: Arrays, seed: int) -> dict[str, dict[str, float]]:
    """Return the bits decoded from changes that are permuted between the test networks, or between the training networks."""
    key = next(key for key in CHARACTERISTICS[name] if key in BITS)
    (train, test), x, y = split(fleet["test"]), read(fleet, "change"), fleet[key].astype(np.float64)
    found: dict[str, list[float]] = {"test": [], "training": []}
    decoder = fit_decoder(x[train], y[train])
    for repeat in range(5):
        random = np.random.default_rng([seed, repeat])
        wrong = fit_decoder(x[random.permutation(train)], y[train]).predict(x[test])
        right = decoder.predict(x[random.permutation(test)])
        found["training"].append(float(right_bits(wrong, y[test]).mean()))
        found["test"].append(float(right_bits(right, y[test]).mean()))
    return {who: mean_std(values) for who, values in found.items()}


def growth(name: str, fleet: Arrays, params: Params) -> list[dict[str, Any]]:
    """Return rows: how well one characteristic is decoded after learning from some of the training fine-tunes."""
    key = GROWN[name]
    train, test = split(fleet["test"])
    y, rows = fleet[key].astype(np.float64), []
    for representation in GROWING:
        x = read(fleet, representation)
        for count in [n for n in params.growth if n < len(train)] + [len(train)]:
            repeats = params.repeats if count < len(train) else 1
            for repeat in range(repeats):
                some = np.random.default_rng([params.seed, repeat]).permutation(train)[:count]
                predicted = fit_decoder(x[some], y[some]).predict(x[test])
                value = (
                    right_bits(predicted, y[test]).mean()
                    if key in BITS
                    else r_squared(predicted, y[test], y[some].mean(0))
                )
                row = {"fleet": name, "characteristic": key, "reads": representation, "fine_tunes": count}
                rows.append(row | {"repeat": repeat, "score": float(value)})
    return rows


def calibrate(fleet: Arrays) -> tuple[Arrays, dict[str, str], dict[str, dict[str, float]]]:
    """Return the audit's decoders as arrays, what each reads, and how true their intervals and probabilities are of unseen networks."""
    train, test = split(fleet["test"])
    arrays, sources, quality = {}, {}, {}
    for key in AUDITED:
        y = fleet[key].astype(np.float64)
        fitted = {name: fit_decoder(read(fleet, name)[train], y[train]) for name in SOURCES}
        source = min(SOURCES, key=lambda name: fitted[name].errors.mean())
        x = read(fleet, source)
        decoder = fitted[source].calibrate(x[train], y[train], key in BITS)
        predicted = decoder.predict(x[test])
        inside = np.abs(predicted - y[test]) <= decoder.half_width(predicted)
        quality[key] = {"coverage": float(inside.mean()), "half_width": float(decoder.half_width(predicted).mean())}
        if key == "proportions":  # of classes that are absent an interval is easy
            for who, which in (("present", y[test] > 0), ("absent", y[test] == 0)):
                quality[key][f"coverage_{who}"] = float(inside[which].mean())
        names = ("weights", "offset", "edges", "half_widths")
        arrays |= {f"{key}.{name}": getattr(decoder, name) for name in names}
        if key in BITS:
            p, truth = decoder.probabilities(predicted), y[test] > 0.5
            quality[key] = {"calibration_error": binary_calibration_error(p.ravel(), truth.ravel())}
            quality[key]["uncalibrated"] = binary_calibration_error(predicted.clip(0, 1).ravel(), truth.ravel())
            arrays[f"{key}.slope_and_offset"] = decoder.slope_and_offset
        sources[key] = source
    return arrays, sources, quality


def train_judge(patches: Float[Tensor, "n p q"], labels: Int[Tensor, " n"], classes: int, params: Params) -> nn.Module:
    """Return a classifier that shares nothing with the networks it judges: another architecture, other images."""
    with seeded_init(params.seed):
        judge = nn.Sequential(nn.Flatten(), nn.Linear(patches[0].numel(), 128), nn.ReLU(), nn.Linear(128, classes))
    judge = judge.to(patches.device)
    optimizer, random = torch.optim.Adam(judge.parameters(), 2e-3, fused=True), generator(params.seed, "judge")
    for _ in range(params.judge_steps):
        some = torch.randint(len(labels), (128,), generator=random).to(labels.device)
        loss = cross_entropy(judge(patches[some]), labels[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return judge.eval()


def train_image_decoder(
    answer: Callable[[Tensor], Tensor], patches: Float[Tensor, "n p q"], pixel_weight: float, params: Params
) -> nn.Module:
    """Return a decoder from a classifier's answers to images that it answers alike, and that are like the originals.

    Its loss is |f(g(c)) - c|² + pixel_weight |g(c) - x|², of answers c = f(x): alignment, and pixels.
    """
    with torch.no_grad():
        answers = torch.cat([answer(part) for part in patches.split(500)])
    with seeded_init(params.seed):
        sizes = [answers.shape[1], 128, 256, patches[0].numel()]
        layers = [part for i, o in pairwise(sizes) for part in (nn.Linear(i, o), nn.GELU())][:-1]
        decoder = nn.Sequential(*layers, nn.Unflatten(1, patches.shape[1:])).to(patches.device)
    optimizer, random = (
        torch.optim.Adam(decoder.parameters(), 2e-3, fused=True),
        generator(params.seed, "image decoder"),
    )
    for _ in range(params.image_steps):
        some = torch.randint(len(patches), (params.batch_size,), generator=random).to(patches.device)
        images = decoder(answers[some])
        loss = mse_loss(answer(images), answers[some]) + pixel_weight * mse_loss(images, patches[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return decoder.eval()


def recover_images(
    base: Base, dataset: str, params: Params
) -> tuple[dict[str, Any], dict[str, Float[Tensor, "n p q"]]]:
    """Return how well images are recovered from answers, by alignment alone and with pixels; and some of them."""
    train, test = load_images(dataset, base.encoder["cls_token"].device)
    shown, judged = pool(train, "base"), pool(train, "test")
    x, y = base.patchify(shown.images), shown.labels
    truth = base.patchify(test.images[:2000])
    objective = Objective(base, "labels", 0.0)
    weights = {**base.encoder, **objective.frozen}

    def answer(patches: Float[Tensor, "n p q"]) -> Float[Tensor, "n c"]:
        return objective.answer(weights, patches)[0]

    judge = train_judge(base.patchify(judged.images), judged.labels, len(train.classes), params)
    with torch.no_grad():
        asked = answer(truth)
        means = torch.stack([x[y == c].mean(0) for c in range(len(train.classes))])
    decoders = parallel_map(
        lambda weight: train_image_decoder(answer, x, weight, params), params.pixel_weights, x.device
    )
    with torch.no_grad():
        images = {f"pixel weight {w:g}": g(asked) for w, g in zip(params.pixel_weights, decoders, strict=True)}
        images["mean of the class answered"] = means[asked.argmax(1)]
        found: dict[str, Any] = {}
        for name, made in images.items():
            again = answer(made)
            found[name] = {
                "cycle_r2": r_squared(*(a.double().cpu().numpy() for a in (again, asked, asked.mean(0)))),
                "judge": (judge(made).argmax(1) == asked.argmax(1)).double().mean().item(),
                "pixel_r2": r_squared(
                    *(a.double().flatten(1).cpu().numpy() for a in (made, truth)), x.mean(0).flatten().cpu().numpy()
                ),
            }
        judge_acc = (judge(truth).argmax(1) == test.labels[:2000]).double().mean().item()
    return {"decoders": found, "judge_acc": judge_acc}, {"original": truth, **images}


def main() -> None:
    parse_arguments(__doc__)
    params = Params.load("recover_memory")
    pin_threads()
    threadpool_limits(1)  # NumPy's, too: they change sums
    device = pick_device()
    fleets = {name: load_fleet(name) for name in CHARACTERISTICS}
    found = dict(
        zip(
            fleets,
            parallel_map(lambda name: decode_fleet(name, fleets[name]), list(fleets), torch.device("cpu")),
            strict=True,
        )
    )
    control = {name: permuted(name, fleet, params.seed) for name, fleet in fleets.items()}
    rows = [row for name, fleet in fleets.items() for row in growth(name, fleet, params)]
    arrays, sources, quality = calibrate(fleets["classes"])
    condensed = FLEETS / "classes.safetensors"
    metadata = load_metadata(condensed)
    base = load_base(Path(metadata["base"]), device)
    recovered, images = recover_images(base, metadata["dataset"], params)

    save_arrays(MODELS / "decoders.safetensors", arrays, {"reads": sources, "condensed": fingerprint(condensed)})
    save_csv(REPORTS / "growth.csv", rows)
    decoded = {name: summary for name, (summary, _) in found.items()}
    save_json(
        REPORTS / "summary.json",
        {"decoded": decoded, "permuted": control, "calibration": quality, "images": recovered},
    )
    pictures.draw_representations(REPORTS / "representations.png", decoded)
    pictures.draw_growth(REPORTS / "growth.png", rows)
    shown = {}
    for name in ("classes", "unlabelled"):
        (train, test), fleet = split(fleets[name]["test"]), fleets[name]
        predicted = by_name(found[name][1]["change"].predict(read(fleet, "change")[test]), fleet, CHARACTERISTICS[name])
        center = fleet["mean_image"][train].mean(0)
        shown[f"{name}: mean image"] = fleet["mean_image"][test] - center
        shown[f"{name}: from its weights"] = predicted["mean_image"] - center
    size = base.image_size
    pictures.draw_rows(REPORTS / "mean_images.png", {k: v.reshape(-1, 3, size, size) for k, v in shown.items()}, True)
    pixels = {name: base.unpatchify(part[: pictures.SHOWN]).cpu().numpy() for name, part in images.items()}
    pictures.draw_rows(REPORTS / "images.png", pixels)
    bits = decoded["classes"]["present"]["both"]["bits"]["mean"]
    print(f"classes present {bits:.1%} of bits; what was read: " + ", ".join(f"{k} {v}" for k, v in sources.items()))


if __name__ == "__main__":
    run(main)
