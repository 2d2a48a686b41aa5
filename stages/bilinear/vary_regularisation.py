"""What makes eigenvectors legible, few and alike? Weight decay, input noise and augmentation, each with and without the others.

Reads   data/<dataset>.safetensors
Writes  reports/vary_regularisation/<dataset>/summary.json    baselines, every measure of each combination, and each factor's effects
        reports/vary_regularisation/<dataset>/conditions.csv  a row for each combination and measure: mean and spread over seeds
        reports/vary_regularisation/<dataset>/factors.png     all of it in one picture, with eigenvectors of the first seed

Finished runs wait in .work/vary_regularisation/ until all are, so that a stage that was killed goes on where it was.

Axes: c classes, k eigenvectors, d pixels times channels.
"""

import itertools
import shutil
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from safetensors.torch import load_file

from stages.bilinear.decomposition import (
    DecompositionArtifacts,
    decompose_bilinear_model,
    eigen_terms,
    embed,
    input_basis,
    matched_similarity,
    order_by_magnitude,
    truncated_logits,
)
from stages.bilinear.legibility import effective_rank, smoothness
from stages.bilinear.model import BilinearImageClassifier, Config, build_image_classifier
from stages.bilinear.pictures import draw_factors
from stages.bilinear.training import train_run
from stages.common.files import Rows, save_csv, save_json
from stages.common.images import ImageSet, load_images
from stages.common.metrics import accuracy, majority_accuracy, mean_std
from stages.common.runtime import pick_device, pin_threads
from stages.common.stage import StageParams, parse_arguments, run
from stages.common.work import compute_pieces, fingerprint, work_folder

REPORTS = Path("reports/vary_regularisation")
IMAGES_AT_ONCE = 1000
SHOWN = 3  # classes, of which the picture has the strongest eigenvector
FACTORS = ("weight_decay", "input_noise", "shift")
MEASURES = ("test_acc", "truncated_acc", "effective_rank", "smoothness")  # of one network; similarity is of two

Fraction = Annotated[float, Field(gt=0, lt=1)]


class Params(StageParams):
    """Parameters of one data set's factorial; the first value of a factor is the one without it."""

    seeds: Annotated[list[NonNegativeInt], Field(min_length=3)]  # the spread of similarity over pairs needs three
    validation_fraction: Fraction  # of the training images
    split_seed: NonNegativeInt
    d_hidden: PositiveInt
    epochs: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    warmup_fraction: Fraction  # of all steps
    gradient_clip: PositiveFloat
    noise_bank: PositiveInt
    weight_decay: tuple[NonNegativeFloat, NonNegativeFloat]
    input_noise: tuple[NonNegativeFloat, NonNegativeFloat]  # standard deviation, where the pixel range is 1
    shift: tuple[NonNegativeInt, NonNegativeInt]  # pixels
    rank: PositiveInt  # eigenvectors a class that are kept in truncation, matched between seeds, and looked at

    @property
    def conditions(self) -> list[dict[str, float]]:
        """All combinations of the factors."""
        values = itertools.product(self.weight_decay, self.input_noise, self.shift)
        return [dict(zip(FACTORS, one, strict=True)) for one in values]

    def config(self, dataset: str, condition: dict[str, float], seed: int) -> Config:
        """Return the config (see stages.bilinear.training) of one seed's run under a condition."""
        shared = self.model_dump()
        recipe = ("epochs", "batch_size", "learning_rate", "warmup_fraction", "gradient_clip", "noise_bank")
        return {
            "dataset": {"name": dataset, **{key: shared[key] for key in ("validation_fraction", "split_seed")}},
            "model": {"n_layer": 1, "d_hidden": self.d_hidden, "bias": False, "residual": False},
            "train": {key: shared[key] for key in recipe} | condition,
            "seed": seed,
            "run_dir": " ".join(f"{factor}={value}" for factor, value in condition.items()),
        }


@torch.no_grad()
def measure(model: BilinearImageClassifier, test: ImageSet, rank: int) -> dict[str, np.ndarray]:
    """Return MEASURES of a network, and of each class the `rank` strongest eigenvectors with their eigenvalues."""
    model = model.double().to(test.labels.device)
    found = decompose_bilinear_model(model, input_basis(model))
    order = order_by_magnitude(found.eigenvalues)
    rank = min(rank, order.shape[1])
    right = kept = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(len(test)).split(IMAGES_AT_ONCE):
        chunk = test.subset(rows)
        x = chunk.pixels().double()
        terms = eigen_terms(embed(model, x), found.eigenvalues, found.eigenvectors_hidden)
        right = right + accuracy(model(x), chunk.labels).cpu() * len(rows)
        kept = kept + accuracy(truncated_logits(terms, order, [rank])[0], chunk.labels).cpu() * len(rows)
    places = order[:, :rank, None].expand(-1, -1, found.eigenvectors_input.shape[2])
    vectors = found.eigenvectors_input.gather(1, places)
    values = {
        "test_acc": right / len(test),
        "truncated_acc": kept / len(test),
        "effective_rank": effective_rank(found.eigenvalues).mean(),
        "smoothness": smoothness(vectors.unflatten(2, test.images.shape[1:])).mean(),
        "eigenvalues": found.eigenvalues.gather(1, order[:, :rank]),
        "vectors": vectors.float(),
    }
    return {name: value.cpu().numpy() for name, value in values.items()}


def train_and_measure(config: Config, test: ImageSet, rank: int) -> dict[str, np.ndarray]:
    """Return `measure` of a network trained by `config`, at its best epoch on validation images."""
    trained = train_run(config).best
    model = build_image_classifier(trained["config"]["model"], config["seed"])
    model.load_state_dict(trained["model_state_dict"])
    return measure(model, test, rank)


def similarities(runs: list[dict[str, torch.Tensor]]) -> list[float]:
    """Return how alike the strongest eigenvectors of each pair of seeds are (see `matched_similarity`)."""
    nothing = torch.zeros(0, 0, 0)
    parts = [
        DecompositionArtifacts(nothing, nothing, run["eigenvalues"].float(), nothing, run["vectors"]) for run in runs
    ]
    return [matched_similarity(a, b, a.eigenvalues.shape[1]) for a, b in itertools.combinations(parts, 2)]


def summary_of(runs: list[dict[str, torch.Tensor]]) -> dict[str, dict[str, float]]:
    """Return mean and spread over seeds of every measure, and over their pairs of the similarity."""
    values = {name: mean_std([run[name].item() for run in runs]) for name in MEASURES}
    return values | {"similarity": mean_std(similarities(runs))}


def effects(
    found: list[tuple[dict[str, float], dict[str, dict[str, float]]]],
) -> dict[str, dict[str, dict[str, float]]]:
    """Return, by factor and measure, the mean over the others' combinations of what the factor changes, and their spread."""
    changed: dict[str, dict[str, dict[str, float]]] = {}
    for factor in FACTORS:
        low = min(condition[factor] for condition, _ in found)
        with_it, without = (
            [values for condition, values in found if (condition[factor] == low) == is_low] for is_low in (False, True)
        )
        changed[factor] = {
            name: mean_std([a[name]["mean"] - b[name]["mean"] for a, b in zip(with_it, without, strict=True)])
            for name in (*MEASURES, "similarity")
        }
    return changed


def table(found: list[tuple[dict[str, float], dict[str, dict[str, float]]]]) -> Rows:
    """Return a row for each combination and measure."""
    return [
        {**condition, "measure": name, "mean": value["mean"], "std": value["std"]}
        for condition, values in found
        for name, value in values.items()
    ]


def short_name(condition: dict[str, float], without: dict[str, float]) -> str:
    """Return which factors a combination has, as in `weight_decay+shift`, or `none`."""
    return "+".join(factor for factor in FACTORS if condition[factor] != without[factor]) or "none"


def baselines(model: Config, seeds: list[int], rank: int, train: ImageSet, test: ImageSet) -> dict[str, Any]:
    """Return the measures of untrained networks, and the smoothness of the training images' own principal components.

    model: a config's.
    """
    sizes, untrained = {"d_input": test.images[0].numel(), "d_output": len(test.classes)}, []
    for seed in seeds:
        measured = measure(build_image_classifier(model | sizes, seed), test, rank)
        untrained.append({name: torch.from_numpy(np.asarray(v)) for name, v in measured.items()})
    x = train.pixels().flatten(1)
    components = torch.linalg.eigh(torch.cov(x.T)).eigenvectors[:, -rank:].T
    return {
        "untrained": summary_of(untrained),
        "principal_components": {
            "smoothness": smoothness(components.unflatten(1, test.images.shape[1:])).mean().item()
        },
        "majority_acc": majority_accuracy(train.labels, test.labels),
    }


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of vary_regularisation.datasets").dataset
    params = Params.load("vary_regularisation", dataset)
    pin_threads()
    device = pick_device()
    train, test = load_images(dataset, device)
    recipe = params.model_dump() | {"images": fingerprint(Path(f"data/{dataset}.safetensors"))}
    work = work_folder(f"vary_regularisation/{dataset}", recipe)
    configs = {
        (i, seed): params.config(dataset, condition, seed)
        for i, condition in enumerate(params.conditions)
        for seed in params.seeds
    }
    pieces = {work / f"{i}-{seed}.safetensors": config for (i, seed), config in configs.items()}
    compute_pieces(partial(train_and_measure, test=test, rank=params.rank), pieces, device, f"vary {dataset}")

    runs = [
        [load_file(work / f"{i}-{seed}.safetensors") for seed in params.seeds] for i in range(len(params.conditions))
    ]
    found = [(condition, summary_of(of_seeds)) for condition, of_seeds in zip(params.conditions, runs, strict=True)]
    named = {short_name(condition, params.conditions[0]): values for condition, values in found}
    model = params.config(dataset, {}, 0)["model"]
    summary = baselines(model, params.seeds, params.rank, train, test) | {
        "conditions": named,
        "effects": effects(found),
    }
    save_csv(REPORTS / dataset / "conditions.csv", table(found))
    save_json(REPORTS / dataset / "summary.json", summary)
    shown = [first["vectors"][:SHOWN, 0].unflatten(1, test.images.shape[1:]).numpy() for first, *_ in runs]
    draw_factors(REPORTS / dataset / "factors.png", found, summary, shown)
    shutil.rmtree(work)
    for factor, changes in summary["effects"].items():
        print(f"{dataset}: {factor} changes " + ", ".join(f"{k} by {v['mean']:+.3g}" for k, v in changes.items()))


if __name__ == "__main__":
    run(main)
