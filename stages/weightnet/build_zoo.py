"""Train a zoo of networks of one architecture, each with random hyper-parameters, and measure every one of them.

Reads   data/<dataset>.safetensors
Writes  models/build_zoo/<dataset>-<variant>/shard-<n>.safetensors   weights [m, p]; metadata: layout, input
        models/build_zoo/<dataset>-<variant>/index.parquet           a row for each snapshot: run, seed, hash and values of its
                                                                     hyper-parameters, what was measured, its shard
        reports/build_zoo/<dataset>-<variant>/summary.json           how many, and how what was measured is spread
        reports/build_zoo/<dataset>-<variant>/zoo.png, vector/zoo.svg
A variant is an architecture: one of ours, or one of torchvision's by its name. Finished stacks wait in .work/build_zoo/ so that
a killed or a growing zoo trains only the rest.
Stacks train side by side on the cores; on a Ray cluster if RAY_ADDRESS names one, to the same bytes on like processors.
"""

import hashlib
import operator
from functools import partial, reduce
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from safetensors.numpy import load_file

from stages.common.files import Rows, save_arrays, save_json, save_table
from stages.common.randomness import generator
from stages.common.runtime import pick_device, pin_threads
from stages.common.stage import InputError, StageParams, parse_arguments, run
from stages.common.work import compute_pieces, fingerprint, has_cluster, work_folder
from stages.weightnet import pictures
from stages.weightnet.tracing.program import Program
from stages.weightnet.zoo.architectures import zoo_program
from stages.weightnet.zoo.properties import PROPERTIES, REFERENCES, measure, measure_references, train_accuracy
from stages.weightnet.zoo.reading import ImageParams, Images, zoo_images
from stages.weightnet.zoo.runs import SNAPSHOTS, Draws, Recipe, Run, draw_all, draw_run, fit_to
from stages.weightnet.zoo.training import train_stack

MODELS = Path("models/build_zoo")
REPORTS = Path("reports/build_zoo")

SHARD_WEIGHTS = 1 << 28  # 1 GiB, unless one run has more: a shard is gathered in memory
MEASURED = ("train_acc", *PROPERTIES)
COLUMNS = (*MEASURED, *REFERENCES)


class Size(StageParams):
    """How many networks of one architecture."""

    runs: PositiveInt
    stack: PositiveInt  # that train together: what fits into the processor's cache


class Params(StageParams):
    """Parameters of one zoo."""

    seed: NonNegativeInt
    images: ImageParams
    recipe: Recipe
    shard_runs: Annotated[int, Field(ge=1)]
    noise: PositiveFloat  # standard deviation, in units of the images'
    fgsm_images: PositiveInt
    fgsm_step: NonNegativeFloat  # in the same units
    variant: Size


def plan_stacks(runs: list[Run], shard: int, stack: int) -> list[list[list[Run]]]:
    """Return the stacks of every shard: runs of one activation and alike numbers of steps together."""
    shards = [runs[start : start + shard] for start in range(0, len(runs), shard)]
    ordered = [sorted(part, key=lambda run: (run.tanh, run.steps, run.name)) for part in shards]
    return [[part[i : i + stack] for i in range(0, len(part), stack)] for part in ordered]


def train_and_measure(
    runs: list[Run], traced: Program, images: Images, seed: int, *, noise: float, fgsm: tuple[int, float], most: int
) -> dict[str, np.ndarray]:
    """Return the weights [r, 3, p] of a stack of runs at their snapshots, and what was measured of them [r, 3].

    noise: its standard deviation in noisy test images; fgsm: attacked images and the step; most: images of a run's own.
    """
    snapshots = train_stack(traced, runs, *images.train)
    tanh = torch.tensor([one.tanh for one in runs], device=snapshots.device)
    random = generator(seed, "noise of test images")
    pixels = images.test[0]
    noisy = pixels + noise * torch.randn(pixels.shape, generator=random).to(pixels)
    own = [own_images(draw_all(one, traced, images.train[1]), images, most) for one in runs]
    results = []
    for flat in snapshots.unbind(1):
        weights = traced.layout.unflatten(flat)
        measured = measure(traced, weights, tanh, images.test, noisy, *fgsm)
        measured["train_acc"] = train_accuracy(traced, weights, tanh, *map(list, zip(*own, strict=True)))
        measured["gap"] = measured["train_acc"] - measured["test_acc"]
        results.append(measured | measure_references(traced, weights, tanh, *images.validation))
    arrays = {name: torch.stack([m[name] for m in results], 1).cpu().numpy() for name in COLUMNS}
    return {"weights": snapshots.cpu().numpy(), **arrays}


def own_images(draws: Draws, images: Images, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images that a run was trained on, at most so many, with the labels that it was shown."""
    where = images.train[0].device
    return images.train[0][draws.images[:most].to(where)], draws.labels[:most].to(where)


def stack_path(work: Path, stack: list[Run]) -> Path:
    """Return where a finished stack waits, by the names of its runs."""
    names = hashlib.sha256(" ".join(one.name for one in stack).encode()).hexdigest()[:16]
    return work / f"{names}.safetensors"


def index_row(one: Run, snapshot: int, values: dict[str, float], shard: str, varied: list[str]) -> dict[str, Any]:
    """Return one network's row; varied: hyper-parameters that are told beside those that every zoo varies."""
    return {
        "run": one.name,
        "snapshot": SNAPSHOTS[snapshot],
        "seed": one.seed,
        "config": one.config,
        "activation": "tanh" if one.tanh else "relu",
        "optimizer": "sgd" if one.sgd else "adam",
        "learning_rate": one.learning_rate,
        "weight_decay": one.weight_decay,
        "init_scale": one.init_scale,
        "train_fraction": one.train_fraction,
        "label_noise": one.label_noise,
        "dropout": one.dropout,
        "steps": one.steps,
        **{name: getattr(one, name) for name in varied},
        **values,
        "shard": shard,
    }


def gather(stacks: dict[Path, list[Run]], shard: str, varied: list[str]) -> tuple[list[Float[np.ndarray, "3 p"]], Rows]:
    """Return the weights and the rows of the finished stacks of one shard, without runs that diverged: they have no final network."""
    weights, rows = [], []
    for path, stack in stacks.items():
        arrays = load_file(path)
        for i, one in enumerate(stack):
            if np.isfinite(arrays["weights"][i]).all() and np.isfinite(arrays["test_loss"][i]).all():
                weights.append(arrays["weights"][i])
                for j in range(len(SNAPSHOTS)):
                    values = {key: float(arrays[key][i, j]) for key in COLUMNS}
                    rows.append(index_row(one, j, values, shard, varied))
    return weights, rows


def spread(values: Float[np.ndarray, " r"]) -> dict[str, float]:
    """Return how what was measured of the networks of a zoo is spread."""
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "min": float(values.min()),
        "max": float(values.max()),
    }


def write_report(name: str, rows: Rows, runs: int, traced: Program) -> None:
    """Write what was measured of a zoo's final networks, as numbers and as a picture; `runs`: with those that diverged."""
    final = {key: np.array([row[key] for row in rows if row["snapshot"] == "final"]) for key in MEASURED}
    count = {"runs": len(final["gap"]), "diverged": runs - len(final["gap"]), "parameters": traced.layout.size}
    spreads = {key: spread(values) for key, values in final.items()}
    save_json(REPORTS / name / "summary.json", count | {"final": spreads})
    pictures.draw_zoo(REPORTS / name / "zoo.png", final)
    test_acc = spreads["test_acc"]
    print(f"{name}: {count['runs']} runs, test accuracy {test_acc['mean']:.1%} ± {test_acc['std']:.1%}")


def main() -> None:
    arguments = parse_arguments(
        __doc__, dataset="of build_zoo.datasets", variant="an architecture of build_zoo.variants"
    )
    dataset, architecture = arguments.dataset, arguments.variant
    name = f"{dataset}-{architecture}"
    params = Params.load("build_zoo", dataset, architecture)
    pin_threads()
    device = torch.device("cpu") if has_cluster() else pick_device()  # nodes of a cluster give cores
    images = zoo_images(dataset, params.images, device)
    shape = (images.channels, images.classes, params.images.image_size)
    traced, _ = zoo_program(architecture, *shape)  # a symmetry that cannot be derived is refused before training
    names = [f"{architecture}-{i}" for i in range(params.variant.runs)]
    runs = [fit_to(draw_run(one, params.seed, params.recipe), traced, len(images.train[1])) for one in names]
    fitting = max(1, SHARD_WEIGHTS // (len(SNAPSHOTS) * traced.layout.size))
    recipe = params.model_dump(exclude={"variant": {"runs"}})  # finished stacks wait by all that they follow from
    work = work_folder(f"build_zoo/{dataset}", recipe | {"images": fingerprint(Path(f"data/{dataset}.safetensors"))})
    shards = [
        {stack_path(work, stack): stack for stack in stacks}
        for stacks in plan_stacks(runs, min(params.shard_runs, fitting), params.variant.stack)
    ]
    finish = partial(train_and_measure, traced=traced, images=images, seed=params.seed, noise=params.noise)
    finish = partial(finish, fgsm=(params.fgsm_images, params.fgsm_step), most=params.images.test_images)
    compute_pieces(finish, reduce(operator.or_, shards), device, f"train {name}")

    rows = []
    for number, stacks in enumerate(shards):
        file = f"shard-{number:03d}.safetensors"
        weights, of_shard = gather(stacks, file, params.recipe.varied)
        if weights:
            metadata = traced.layout.metadata | {"input": list(shape)}
            save_arrays(MODELS / name / file, {"weights": np.concatenate(weights)}, metadata)
        rows += of_shard
    if not rows:
        raise InputError(f"{name}: all {len(runs)} runs diverged: lower build_zoo.recipe.learning_rate")
    save_table(MODELS / name / "index.parquet", rows)
    write_report(name, rows, len(runs), traced)


if __name__ == "__main__":
    run(main)
