"""Train every variant of the bilinear classifier on one data set, with several seeds.

Reads   data/<dataset>.safetensors
Writes  models/train_bilinear/<dataset>/<variant>/seed<seed>/{best.pt, latest.pt, metrics.csv, summary.json}
        reports/train_bilinear/<dataset>/metrics.csv    a row for each run and epoch
        reports/train_bilinear/<dataset>/summary.json   accuracy over seeds of each variant beside the largest class's

Finished runs wait in .work/train_bilinear/ until all are, so that a stage that was killed goes on where it was.
"""

import shutil
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from stages.bilinear.model import Config
from stages.bilinear.training import TrainedRun, train_run
from stages.common.checkpoints import remembered_torch
from stages.common.files import Summary, save_csv, save_json
from stages.common.images import load_images
from stages.common.metrics import majority_accuracy, mean_std
from stages.common.runtime import parallel_map, pick_device, pin_threads
from stages.common.stage import StageParams, parse_arguments, run
from stages.common.work import fingerprint, work_folder

MODELS = Path("models/train_bilinear")
REPORTS = Path("reports/train_bilinear")

Fraction = Annotated[float, Field(gt=0, lt=1)]


class Variant(StageParams):
    """What distinguishes one kind of network from the others."""

    n_layer: NonNegativeInt  # 0: a linear classifier
    input_noise: NonNegativeFloat  # standard deviation, where the pixel range is 1
    shift: NonNegativeInt  # pixels
    mirror: bool  # half of the images, left to right


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
    gradient_clip: PositiveFloat | None  # largest norm of a step's gradient; null: any
    noise_bank: (
        PositiveInt | None
    )  # batches of noise that are drawn once and given out in random slices; null: anew each step
    variants: Annotated[dict[str, Variant], Field(min_length=1)]

    @field_validator("seeds")
    @classmethod
    def unique(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"a seed is named twice: {seeds}")
        return seeds

    def config(self, dataset: str, name: str, seed: int) -> Config:
        """Return the config (see stages.bilinear.training) of one seed's run of the variant called `name`."""
        shared, variant = self.model_dump(), self.variants[name].model_dump()
        recipe = ("epochs", "batch_size", "learning_rate", "weight_decay", "warmup_fraction")
        optional = {key: shared[key] for key in ("gradient_clip", "noise_bank")} | {"mirror": variant["mirror"] or None}
        return {
            "dataset": {"name": dataset, **{key: shared[key] for key in ("validation_fraction", "split_seed")}},
            "model": {"n_layer": variant["n_layer"], **{key: shared[key] for key in ("d_hidden", "bias", "residual")}},
            "train": {
                **{key: shared[key] for key in recipe},
                "shift": variant["shift"],
                "input_noise": variant["input_noise"],
                **{key: value for key, value in optional.items() if value is not None},
            },
            "seed": seed,
            "run_dir": str(MODELS / dataset / name / f"seed{seed}"),
        }


def trained_once(config: Config, work: Path) -> TrainedRun:
    """Return the run that waits in `work`; if there is none, train it by `config` and leave it there."""
    path = work / f"{'-'.join(Path(config['run_dir']).parts[-2:])}.pt"  # variant and seed
    keys = {field.name for field in fields(TrainedRun)}
    return TrainedRun(**remembered_torch(path, keys, lambda: vars(train_run(config))))


def summarise(runs: dict[str, list[TrainedRun]], majority_acc: float) -> Summary:
    """Return each variant's accuracies over seeds, beside that of always answering the largest class."""
    accuracies = {
        name: {
            "test_acc": mean_std([run.summary["test_acc"] for run in of_seeds]),
            "val_acc": mean_std([run.summary["best"]["val_acc"] for run in of_seeds]),
        }
        for name, of_seeds in runs.items()
    }
    return {**accuracies, "majority_acc": majority_acc}


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of train_bilinear.datasets").dataset
    params = Params.load("train_bilinear", dataset)
    pin_threads()
    device = pick_device()
    train, test = load_images(dataset, device)
    configs = [params.config(dataset, name, seed) for name in params.variants for seed in params.seeds]
    recipe = params.model_dump() | {"images": fingerprint(Path(f"data/{dataset}.safetensors"))}
    work = work_folder(f"train_bilinear/{dataset}", recipe)
    trained = parallel_map(partial(trained_once, work=work), configs, device, f"train {dataset}")

    shutil.rmtree(MODELS / dataset, ignore_errors=True)  # only now: an interrupted run loses nothing
    for config, one in zip(configs, trained, strict=True):
        one.write(Path(config["run_dir"]))
    n = len(params.seeds)
    runs = {name: trained[i * n : (i + 1) * n] for i, name in enumerate(params.variants)}
    summary = summarise(runs, majority_accuracy(train.labels, test.labels))
    rows = [
        {"variant": name, "run": f"seed{seed}", **row}
        for name, of_seeds in runs.items()
        for seed, one in zip(params.seeds, of_seeds, strict=True)
        for row in one.history
    ]
    save_csv(REPORTS / dataset / "metrics.csv", rows)
    save_json(REPORTS / dataset / "summary.json", summary)
    shutil.rmtree(work)
    shown = ", ".join(f"{name} {summary[name]['test_acc']['mean']:.2%}" for name in runs)
    print(f"{dataset}: test accuracy {shown}; the largest class alone {summary['majority_acc']:.2%}")


if __name__ == "__main__":
    run(main)
