"""Learn classes task by task in many ways, and see what is forgotten: one run answers both kinds of question.

Class-incremental: which of all classes seen so far? Task-incremental: which of this task's? Strengths of the penalties and of the
memory are chosen on a stream of training images alone, with classes in an order of its own.

Reads   data/<dataset>.safetensors, models/extract_features/<dataset>/
Writes  reports/train_continual/<dataset>/accuracy.csv   the whole R matrix: accuracy on every task after every task, of each run
        reports/train_continual/<dataset>/summary.json   accuracy, forgetting, backward and forward transfer over seeds
        reports/train_continual/<dataset>/metrics.json   the headlines of it, for `dvc metrics`
        reports/train_continual/<dataset>/accuracy.png, vector/accuracy.svg, matrices.png
"""

# Axes: n images, d features.

import copy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator
from torch import Tensor

from stages.common.backbone import Backbone, load_backbone
from stages.common.checkpoints import Checkpoint, remembered_torch
from stages.common.files import Rows, Summary, save_csv, save_json
from stages.common.metrics import headline_metrics, over_seeds
from stages.common.randomness import seeded_init
from stages.common.runtime import parallel_map, pick_device, pin_threads
from stages.common.stage import InputError, StageParams, parse_arguments, run
from stages.common.work import fingerprint, remembered, work_folder
from stages.vit_memory import pictures
from stages.vit_memory.features import FEATURES, input_files, load_featured_images
from stages.vit_memory.models import HeadedViT
from stages.vit_memory.streams import Pool, Stream, accuracy_matrices, hold_out, make_stream, measures
from stages.vit_memory.ways import (
    FROZEN,
    NETWORKS,
    Budget,
    Finetune,
    First,
    Space,
    learn_first,
    learn_frozen,
    learn_network,
)

REPORTS = Path("reports/train_continual")

METHODS = (*NETWORKS, *FROZEN)
SHOWN = ("finetune", "replay", "nearest_mean", "memory", "ranpac", "joint")  # on the command line
# Which question a method's strength is chosen for: EWC and LwF are made for the task-incremental one, all others for the other.
HEADLINES = {  # what `dvc metrics` shows, and where it lies in the summary
    "final_acc_finetune": "methods/finetune/class/final",
    "final_acc_joint": "methods/joint/class/final",
    "final_acc_memory": "methods/memory/class/final",
    "final_acc_ranpac": "methods/ranpac/class/final",
}
CHOSEN_FOR = {"ewc": "task", "lwf": "task"}

Strengths = Annotated[list[PositiveFloat], Field(min_length=1)]


class Params(StageParams):
    """Parameters of one data set's streams."""

    seeds: Annotated[list[NonNegativeInt], Field(min_length=3)]
    networks: bool  # whether whole networks train, too, where the backbone is a ViT
    tasks: Annotated[int, Field(ge=2)]
    train_images: PositiveInt  # of each class, at most
    test_images: PositiveInt  # of each class, at most
    validation_fraction: Annotated[float, Field(gt=0, lt=1)]  # of the training images, to choose strengths on
    validation_seed: NonNegativeInt  # none of the seeds
    steps: PositiveInt  # of a task
    batch_size: Annotated[int, Field(ge=2)]
    learning_rate: PositiveFloat
    buffer: PositiveInt  # images that replay and iCaRL may keep, patterns that the memory may
    fisher_images: PositiveInt  # of a task
    random_features: PositiveInt  # of RanPAC
    shrinkage: Annotated[float, Field(ge=0, le=1)]  # of covariances
    strengths: dict[str, Strengths]  # to choose from: lambda of ewc, alpha of lwf, beta of memory, ridge of ranpac

    @field_validator("strengths")
    @classmethod
    def of_methods(cls, strengths: dict[str, Strengths]) -> dict[str, Strengths]:
        if unknown := sorted(strengths.keys() - set(METHODS)):
            raise ValueError(f"expected some of {', '.join(METHODS)}, got {', '.join(unknown)}")
        return strengths


Matrices = dict[str, list[list[float]]]  # R[after task][on task], for either kind of question


class Job(NamedTuple):
    """One run: a method, its strength, and the seed of its stream; None: the stream of training images alone."""

    method: str
    strength: float
    seed: int | None


@dataclass(frozen=True)
class Examples:
    """Images, and their whitened features."""

    images: UInt8[Tensor, "n _ h w"]
    labels: Int[Tensor, " n"]
    x: Float[Tensor, "n d"]

    def pool(self, images_per_class: int) -> Pool:
        """Return all of them, for streams that take so many of each class."""
        return Pool(self.labels, torch.arange(len(self.labels), device=self.labels.device), images_per_class)


def load_examples(dataset: str, device: torch.device) -> tuple[Examples, Examples, Backbone | None]:
    """Return the training and the test images of one data set, and the ViT that their features are of, if it is one."""
    features, train, test = load_featured_images(dataset, device)
    whiten = features.whitening(features.base.x.flatten(1))
    return (
        Examples(train.images, train.labels, whiten(features.train.x.flatten(1))),
        Examples(test.images, test.labels, whiten(features.test.x.flatten(1))),
        load_backbone(FEATURES / dataset / "backbone.safetensors", device) if features.is_vit else None,
    )


@dataclass(frozen=True)
class Shared:
    """What all runs on one data set share."""

    backbone: Backbone | None  # None: it is no ViT, and only what learns from frozen features runs
    train: Examples
    test: Examples
    streams: dict[int | None, Stream]  # by seed
    budget: Budget
    space: Space

    def tested(self, seed: int | None) -> Examples:
        """Return the examples that a stream's test images are of."""
        return self.train if seed is None else self.test


def new_way(kind: type[Finetune], strength: float, backbone: Backbone, stream: Stream, budget: Budget) -> Finetune:
    """Return a way to train a copy of the backbone on a stream; those of one stream start from the same weights."""
    with seeded_init(stream.seed):
        model = HeadedViT(copy.deepcopy(backbone.vit), stream.classes, freeze_backbone=False)
    return kind(model.to(stream.labels.device), backbone.prepare, budget, strength, stream.seed)


def begin(backbone: Backbone, seed: int | None, shared: Shared, work: Path) -> First:
    """Learn the first task of a stream, as most ways to train a whole network begin; it is kept in `work`."""
    stream, tests = shared.streams[seed], shared.tested(seed).images

    def learn() -> Checkpoint:
        way = new_way(Finetune, 1.0, backbone, stream, shared.budget)
        return vars(learn_first(way, stream.over(shared.train.images), tests[stream.test]))

    return First(**remembered_torch(work / f"first-{seed}.pt", set(First.__annotations__), learn))


def compute(job: Job, shared: Shared, first: First | None = None) -> Matrices:
    """Learn one stream by one method, and return its R matrices. first: of the stream, from `begin`, to be taken over."""
    stream, train, tested = shared.streams[job.seed], shared.train, shared.tested(job.seed)
    if job.method in NETWORKS and shared.backbone is not None:
        way = new_way(NETWORKS[job.method], job.strength, shared.backbone, stream, shared.budget)
        scores = learn_network(way, stream.over(train.images), tested.images[stream.test], first)
    else:
        learner = FROZEN[job.method](shared.space, job.strength, stream.seed, train.labels.device)
        scores = learn_frozen(learner, stream.over(train.x), tested.x[stream.test])
    return {kind: r.tolist() for kind, r in accuracy_matrices(scores, stream).items()}


def choose_strengths(trials: Mapping[Job, Matrices], candidates: Mapping[str, list[float]]) -> dict[str, float]:
    """Return each method's strength that is best after the last task, by the trials' accuracy."""
    quality = {job: sum(r[CHOSEN_FOR.get(job.method, "class")][-1]) for job, r in trials.items()}
    return {m: max((job for job in trials if job.method == m), key=quality.__getitem__).strength for m in candidates}


def accuracy_rows(results: Mapping[Job, Matrices]) -> Rows:
    """Return the whole R matrices as rows."""
    return [
        {"method": job.method, "seed": job.seed, "kind": kind, "after": after, "on": on, "acc": acc}
        for job, matrices in results.items()
        for kind, r in matrices.items()
        for after, row in enumerate(r)
        for on, acc in enumerate(row)
    ]


def summarise(results: Mapping[Job, Matrices], width: int) -> Summary:
    """Return the measures of each method over seeds; before a task of `width` classes is learned, its own are told by chance."""
    chance = {"class": 0.0, "task": 1 / width}

    def of_run(matrices: Matrices) -> dict[str, dict[str, float]]:
        return {kind: measures(torch.tensor(r), chance[kind]) for kind, r in matrices.items()}

    methods = dict.fromkeys(job.method for job in results)
    return {m: over_seeds([of_run(r) for job, r in results.items() if job.method == m]) for m in methods}


def write_report(dataset: str, results: Mapping[Job, Matrices], strengths: dict[str, float], stream: Stream) -> None:
    """Write the tables and pictures of all runs; `stream` is like theirs."""
    folder, rows, methods = REPORTS / dataset, accuracy_rows(results), summarise(results, stream.width)
    chance = {"class": 1 / stream.classes, "task": 1 / stream.width}
    save_csv(folder / "accuracy.csv", rows)
    summary = {"methods": methods, "strengths": strengths, "chance": chance}
    save_json(folder / "summary.json", summary)
    save_json(folder / "metrics.json", headline_metrics(summary, HEADLINES))
    pictures.draw_accuracy(folder / "accuracy.png", rows, methods)
    pictures.draw_matrices(folder / "matrices.png", rows)
    shown = ", ".join(f"{m} {methods[m]['class']['final']['mean']:.1%}" for m in SHOWN if m in methods)
    print(f"{dataset}, {stream.tasks} tasks, class-incremental: {shown}")


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of extract_features.datasets").dataset
    params = Params.load("train_continual", dataset)
    pin_threads()
    device = pick_device()
    train, test, backbone = load_examples(dataset, device)
    methods = METHODS if backbone and params.networks else tuple(FROZEN)
    pools = train.pool(params.train_images), test.pool(params.test_images)
    trial = hold_out(pools[0], params.validation_fraction, params.validation_seed, params.test_images)
    streams: dict[int | None, Stream] = {seed: make_stream(*pools, params.tasks, seed) for seed in params.seeds}
    streams[None] = make_stream(*trial, params.tasks, params.validation_seed)
    classes = streams[None].classes
    if params.buffer < classes:
        raise InputError(f"train_continual.buffer: {params.buffer} is less than one image of each of {classes} classes")
    budget = Budget(params.steps, params.batch_size, params.learning_rate, params.buffer, params.fisher_images)
    space = Space(train.x.shape[1], classes, params.buffer, params.random_features, params.shrinkage)
    shared = Shared(backbone, train, test, streams, budget, space)
    recipe = params.model_dump() | {"inputs": fingerprint(*input_files(dataset))}
    work = work_folder(f"train_continual/{dataset}", recipe)

    def run_job(job: Job) -> Matrices:
        path = work / f"{job.method}-{job.strength:g}-{job.seed}.json"
        return remembered(path, lambda: compute(job, shared, firsts.get(job.seed)))

    def run_all(jobs: list[Job], progress: str) -> dict[Job, Matrices]:
        return dict(zip(jobs, parallel_map(run_job, jobs, device, f"{progress} {dataset}"), strict=True))

    firsts: dict[int | None, First] = {}
    if backbone and params.networks:
        seeds = list(streams)
        firsts |= zip(seeds, parallel_map(lambda seed: begin(backbone, seed, shared, work), seeds, device), strict=True)
    candidates = {m: strengths for m, strengths in params.strengths.items() if m in methods}
    trials = [Job(m, strength, None) for m in methods if m in candidates for strength in candidates[m]]
    strengths = choose_strengths(run_all(trials, "strengths for"), candidates)
    jobs = [Job(m, strengths.get(m, 1.0), seed) for m in methods for seed in params.seeds]
    results = run_all(jobs, "tasks of")
    write_report(dataset, results, strengths, streams[None])
    shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    run(main)
