"""Train one variant of the bilinear classifier on one data set, with several seeds.

Reads   data/<dataset>.safetensors
Writes  models/train_bilinear/<dataset>-<variant>/seed<seed>/{best.pt, latest.pt, metrics.csv, summary.json}
        reports/train_bilinear/<dataset>-<variant>/metrics.csv    a row for each run and epoch
        reports/train_bilinear/<dataset>-<variant>/summary.json   accuracy over seeds beside the largest class's
"""

import shutil
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator
from tqdm import tqdm

from stages.bilinear.training import train_image_experiment
from stages.common.files import load_csv, load_json, save_csv, save_json
from stages.common.images import load_images
from stages.common.metrics import majority_accuracy, mean_std
from stages.common.runtime import parallel_map, pick_device, pin_threads
from stages.common.stage import StageParams, parse_arguments, run

MODELS = Path("models/train_bilinear")
REPORTS = Path("reports/train_bilinear")

Fraction = Annotated[float, Field(gt=0, lt=1)]


class Variant(StageParams):
    """What distinguishes one kind of network from the others."""

    n_layer: NonNegativeInt  # 0: a linear classifier
    input_noise: NonNegativeFloat  # standard deviation, where the pixel range is 1
    shift: NonNegativeInt  # pixels


class Params(StageParams):
    """Parameters of one data set's runs."""

    seeds: Annotated[list[NonNegativeInt], Field(min_length=2)]  # similarity between seeds needs two
    validation_fraction: Fraction  # of the training images
    split_seed: NonNegativeInt
    d_hidden: PositiveInt
    bias: bool
    residual: bool
    epochs: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    weight_decay: NonNegativeFloat
    warmup_fraction: Fraction  # of all steps
    variant: Variant

    @field_validator("seeds")
    @classmethod
    def unique(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"a seed is named twice: {seeds}")
        return seeds


def run_config(dataset: str, name: str, seed: int, params: Params) -> dict[str, Any]:
    """Return the config (see stages.bilinear.training) of the run of one seed; `name` is <dataset>-<variant>."""
    shared, variant = params.model_dump(), params.variant.model_dump()
    recipe = ("epochs", "batch_size", "learning_rate", "weight_decay", "warmup_fraction")
    return {
        "dataset": {"name": dataset, **{key: shared[key] for key in ("validation_fraction", "split_seed")}},
        "model": {"n_layer": variant["n_layer"], **{key: shared[key] for key in ("d_hidden", "bias", "residual")}},
        "train": {
            **{key: shared[key] for key in recipe},
            "shift": variant["shift"],
            "input_noise": variant["input_noise"],
        },
        "seed": seed,
        "run_dir": str(MODELS / name / f"seed{seed}"),
    }


def main() -> None:
    arguments = parse_arguments(__doc__, dataset="of train_bilinear.datasets", variant="of train_bilinear.variants")
    dataset, name = arguments.dataset, f"{arguments.dataset}-{arguments.variant}"
    params = Params.load("train_bilinear", dataset, arguments.variant)
    pin_threads()
    device = pick_device()
    train, test = load_images(dataset, device)
    configs = [run_config(dataset, name, seed, params) for seed in params.seeds]
    shutil.rmtree(MODELS / name, ignore_errors=True)  # runs of seeds that are no longer asked for
    with tqdm(total=len(configs) * params.epochs, desc=f"train {name}", unit=" epochs", disable=None) as bar:
        paths = parallel_map(lambda config: train_image_experiment(config, bar.update), configs, device)

    results = [load_json(path["summary_path"]) for path in paths]
    test_acc = mean_std([result["test_acc"] for result in results])
    val_acc = mean_std([result["best"]["val_acc"] for result in results])
    majority = majority_accuracy(train.labels, test.labels)
    rows = [{"run": path["run_dir"].name, **row} for path in paths for row in load_csv(path["metrics_path"])]
    save_csv(REPORTS / name / "metrics.csv", rows)
    save_json(REPORTS / name / "summary.json", {"test_acc": test_acc, "val_acc": val_acc, "majority_acc": majority})
    print(
        f"{name}: test accuracy {test_acc['mean']:.2%} ± {test_acc['std']:.2%}; the largest class alone {majority:.2%}"
    )


if __name__ == "__main__":
    run(main)
