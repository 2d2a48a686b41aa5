"""Train predictors of networks' properties, on several splits of the zoo's runs; validation runs choose their best epoch.

Reads   models/build_zoo/<dataset>-<architecture>/
Writes  models/train_weightnet/<dataset>-<variant>/predictions.parquet   a row for each predictor, task, split, part and network:
                                                                         architecture, row of its zoo, how many networks were
                                                                         learned from, each property and its interval's ends
        models/train_weightnet/<dataset>-<variant>/predictors.pt         those that learned from all architectures
        reports/train_weightnet/<dataset>-<variant>/history.csv          loss, and Kendall's tau on validation runs
A variant is a family of predictors. A task says which architectures are learned from and which are tested: the main one, by
itself and with less to learn from; all of them; and each of them, learned from all others. Finished predictors wait in
.work/train_weightnet/, so that a killed or a growing family trains only the rest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Self, TypedDict, cast

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, JsonValue, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from scipy.stats import kendalltau
from torch import Tensor
from torch.nn.functional import huber_loss
from torch.nn.utils import clip_grad_norm_

from stages.common.checkpoints import Checkpoint, remembered_torch, save_torch
from stages.common.files import Row, save_csv, save_table
from stages.common.optim import require_convergence, set_learning_rate, warmup_times_cosine
from stages.common.randomness import generator
from stages.common.runtime import parallel_map, pin_threads
from stages.common.stage import StageParams, lookup, parse_arguments, run
from stages.common.work import fingerprint, work_folder
from stages.weightnet.predictors.data import Data, Member, Statistics, augmented, batches, prepare, statistics_of
from stages.weightnet.predictors.ensemble import Predictor, mean_prediction
from stages.weightnet.predictors.exam import ExamParams
from stages.weightnet.predictors.examiner import Pair, examine
from stages.weightnet.predictors.intervals import conformal_quantile
from stages.weightnet.predictors.simple import boost, nearest, ridge_on_inputs
from stages.weightnet.predictors.splits import ALL, Rows, Task, TaskParams, plan_own, plan_tasks, split_zoos
from stages.weightnet.predictors.statistics import range_of_statistics
from stages.weightnet.predictors.targets import own_units
from stages.weightnet.zoo.properties import PROPERTIES
from stages.weightnet.zoo.reading import OWN, Zoo, load_zoo, own_zoo

MODELS = Path("models/train_weightnet")
REPORTS = Path("reports/train_weightnet")

BLOCK = 64  # networks predicted at a time
WARMUP_FRACTION = 0.15  # of the steps
REMEDY = "lower train_weightnet.member.learning_rate"  # of training that diverges

Values = dict[str, JsonValue]  # of a member, by their names
Fraction = Annotated[float, Field(gt=0, lt=1)]


class Params(StageParams):
    """Parameters of one family."""

    seed: NonNegativeInt
    validation_fraction: Fraction  # of the runs
    test_fraction: Fraction
    snapshots: list[Literal["initial", "middle", "final"]]  # to learn from; tested are final ones
    batch_size: PositiveInt
    weight_decay: NonNegativeFloat
    rescaling: PositiveFloat  # standard deviation of the logarithm of the factors of ReLU neurons
    boosting_rounds: PositiveInt
    trees: PositiveInt  # extremely randomised, beside the exam's kernel ridge
    exam: ExamParams
    tasks: TaskParams
    skipped: list[str]  # members that this data set does without
    member: Values  # of all members
    variant: dict[Literal["members"], dict[str, Values]]  # predictors: changes of `member`


@dataclass(frozen=True)
class Fitting:
    """How predictors of all kinds are fitted: values of Params."""

    batch_size: int
    weight_decay: float
    rescaling: float
    boosting_rounds: int
    trees: int
    exam: ExamParams

    @classmethod
    def of(cls, params: StageParams) -> Self:
        """Return those that a stage's params have."""
        return cls(**{field.name: getattr(params, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class Job:
    """One predictor to train, or several alike."""

    name: str
    member: Member
    task_name: str
    task: Task
    split: int


class Epoch(TypedDict):
    """What there is to say of a predictor after an epoch."""

    predictor: str
    task: str
    split: int
    number: int
    run: str
    epoch: int
    train_loss: float
    val_tau: float


class Table(TypedDict):
    """What a predictor predicts of networks of one architecture in one part. rows: of the zoo; values: lower ends, centers, upper ends."""

    predictor: str
    part: str
    architecture: str
    measured: list[str]
    rows: Rows
    values: Float[Tensor, "3 n k"]


class Result(TypedDict):
    """What a job leaves. kept: what rebuilds its predictors, if they are to be kept; learned: from how many networks."""

    tables: list[Table]
    history: list[Epoch]
    kept: Checkpoint | None
    learned: int


def mean_tau(truth: Float[Tensor, "n k"], predicted: Float[Tensor, "n k"]) -> float:
    """Return Kendall's tau, its mean over the properties; of constant predictions 0. NaN is not known."""
    pairs = zip(truth.unbind(1), predicted.unbind(1), strict=True)
    taus = [kendalltau(a.numpy(), b.numpy(), nan_policy="omit").statistic for a, b in pairs]
    return float(np.mean([0.0 if math.isnan(tau) else tau for tau in taus]))


def loss_on_known(predicted: Float[Tensor, "n k"], target: Float[Tensor, "n k"]) -> Float[Tensor, ""]:
    """Return the Huber loss; targets that are NaN are not known."""
    if not (missing := target.isnan()).any():
        return huber_loss(predicted, target)
    return huber_loss(predicted[~missing], target[~missing])


@torch.no_grad()
def predict(models: Sequence[Predictor], data: Data, rows: dict[str, Rows]) -> Float[Tensor, "n k"]:
    """Return the mean of several predictors' standardised predictions for some networks of every architecture."""
    found = [
        mean_prediction(models, data.zoos[name].networks(part), data.inputs[name][part])
        for name, index in rows.items()
        for part in index.split(data.zoos[name].at_a_time(BLOCK))
    ]
    return torch.cat(found)


def train_predictor(job: Job, number: int, data: Data, fitting: Fitting, seed: int) -> tuple[Predictor, list[Epoch]]:
    """Return one of a job's predictors at its best epoch on validation runs, and a history row for each epoch."""
    member = job.member
    seed = (seed + job.split) * job.task.seeds + number
    random = generator(seed, f"{job.name} {job.task_name}")
    first = next(iter(data.split.train))
    example = data.zoos[first].networks(data.split.train[first][:2])
    config = member.model_dump() | {"properties": len(data.measured)}
    model = Predictor(config, example, data.inputs[first].shape[1], seed)
    steps = member.epochs * len(batches(data, fitting.batch_size, generator(0, "count")))
    optimizer = torch.optim.AdamW(model.parameters(), member.learning_rate, weight_decay=fitting.weight_decay)
    rate = warmup_times_cosine(member.learning_rate, steps, WARMUP_FRACTION)
    truth = data.part(data.split.validation, data.targets)
    step, best, history = 0, dict[str, Tensor](), list[Epoch]()
    for epoch in range(1, member.epochs + 1):
        model.train()
        total = 0.0
        for name, rows in batches(data, fitting.batch_size, random):
            set_learning_rate(optimizer, rate(step))
            optimizer.zero_grad()
            for part in rows.split(data.zoos[name].at_a_time(len(rows))):
                networks = data.zoos[name].networks(part)
                if member.augment:
                    networks = augmented(networks, fitting.rescaling, random)
                loss = loss_on_known(model(networks, data.inputs[name][part]), data.targets[name][part])
                (loss * (len(part) / len(rows))).backward()
                total += loss.item() * len(part)
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
        tau = mean_tau(truth, predict([model], data, data.split.validation))
        if not history or tau > max(row["val_tau"] for row in history):
            best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        n = sum(len(rows) for rows in data.split.train.values())
        run = f"{job.name} {job.task_name} {job.split} {number}"
        history.append(
            {
                "predictor": job.name,
                "task": job.task_name,
                "split": job.split,
                "number": number,
                "run": run,
                "epoch": epoch,
                "train_loss": total / n,
                "val_tau": tau,
            }
        )
        require_convergence(total / n, f"{run}, epoch {epoch}", REMEDY, history[0]["train_loss"])
    model.load_state_dict(best)
    return model, history


def train_and_predict(
    job: Job,
    zoos: dict[str, Zoo],
    statistics: Statistics,
    fitting: Fitting,
    fractions: tuple[float, float],
    snapshots: Sequence[str],
    main: str,
    seed: int,
) -> Result:
    """Return what the predictors of a job predict, their history, and what is kept of them if they learned from all architectures.

    fractions: of the runs, to validate and to test; main: the task of which most is asked.
    """
    task = job.task
    split = split_zoos(zoos, task.train, task.test, fractions, snapshots, task.share, seed + job.split)
    data = prepare(zoos, split, job.member.kind, statistics, task.pooled)
    history: list[Epoch] = []
    kept: Checkpoint | None = None
    certainty: dict[str, tuple[Pair, Float[Tensor, " k"]]] = {}
    keeps = job.task_name == ALL and job.split == 0
    match job.member.kind:
        case "exam":
            is_main, first = job.task_name == main, job.split == 0
            found, deviation, examiner = examine(data, fitting.exam, fitting.trees, is_main, first, keeps=keeps)
            predictions = {job.name + name.removeprefix("exam"): pair for name, pair in found.items()}
            certainty[job.name] = (deviation, examiner.half_width(familiar=split.test.keys() <= split.train.keys()))
            kept = examiner.state()
        case "gbm":
            predictions = {job.name: boost(data, fitting.boosting_rounds)}
        case "hyperparameters":
            predictions = {job.name: ridge_on_inputs(data)}
        case "nearest":
            predictions = {job.name: nearest(data)}
        case _:
            trained = [train_predictor(job, number, data, fitting, seed) for number in range(task.seeds)]
            models, history = [model for model, _ in trained], [row for _, rows in trained for row in rows]
            validation, test = (predict(models, data, rows) for rows in (split.validation, split.test))
            predictions = {job.name: (validation, test)}
            kept = keep(job, models, data, validation)
    for name, pair in predictions.items():
        errors = pair[0] - data.part(split.validation, data.targets)
        certainty.setdefault(name, ((torch.ones_like(pair[0]), torch.ones_like(pair[1])), conformal_quantile(errors)))
    tables = [table for name, pair in predictions.items() for table in tabulate(name, pair, *certainty[name], data)]
    if not keeps:
        kept = None
    elif kept is not None:
        kept |= describe_zoo(data, statistics)
    learned = sum(len(rows) for rows in split.train.values())
    return {"tables": tables, "history": history, "kept": kept, "learned": learned}


def tabulate(name: str, predicted: Pair, deviation: Pair, half: Float[Tensor, " k"], data: Data) -> list[Table]:
    """Return lower ends, predictions and upper ends [3, n, k] of a predictor for each part and architecture, in their own units.

    half: of an interval's width where the deviation is 1.
    """
    tables: list[Table] = []
    for part, center, own in zip(("validation", "test"), predicted, deviation, strict=True):
        rows = getattr(data.split, part)
        three = (center - half * own, center, center + half * own)
        ends = torch.stack([own_units(end, data.scale, data.measured) for end in three])
        for architecture, block in zip(rows, ends.float().split([len(r) for r in rows.values()], 1), strict=True):
            table = Table(
                predictor=name,
                part=part,
                architecture=architecture,
                measured=list(data.measured),
                rows=rows[architecture],
                values=block.contiguous(),
            )
            tables.append(table)
    return tables


def table_rows(job: Job, result: Result) -> list[Row]:
    """Return a row for each network that a job's predictors predict."""
    found: list[Row] = []
    for table in result["tables"]:
        names = [f"{name}{end}" for end in ("", "_low", "_high") for name in table["measured"]]
        values = table["values"][[1, 0, 2]].transpose(0, 1).flatten(1)
        for row, numbers in zip(table["rows"].tolist(), values.tolist(), strict=True):
            who: Row = {"predictor": table["predictor"], "task": job.task_name, "split": job.split}
            who |= {"learned": result["learned"], "part": table["part"], "architecture": table["architecture"]}
            found.append(who | {"row": row} | dict(zip(names, numbers, strict=True)))
    return found


def job_folder(job: Job, recipe: dict[str, object], data: str) -> Path:
    """Return where a finished predictor waits: a folder for everything that it follows from.

    recipe: the params of all jobs; data: a hash of the zoo.
    """
    task = {key: value for key, value in vars(job.task).items() if key != "splits"}
    of_job = vars(job) | {"member": job.member.model_dump(), "task": task, "data": data}
    return work_folder(f"train_weightnet/{job.name}-{job.task_name}-{job.split}", recipe | of_job)


def parse_members(member: Values, changes: dict[str, Values], dataset: str, family: str) -> dict[str, Member]:
    """Return a family's members, of whose values some are their own; InputError names the key of params.yaml of a mistake."""

    def where(label: str, path: list[str]) -> str:
        key = ["variants", family, "members", label, *path]
        if not path or path[0] not in changes[label]:
            key = ["member", *path]
        node: object = lookup(f"train_weightnet.overrides.{dataset}")
        for part in key:
            node = node.get(part) if isinstance(node, dict) else None
        return ".".join(["train_weightnet", *([] if node is None else ["overrides", dataset]), *key])

    return {label: Member.parse(member | of_label, partial(where, label)) for label, of_label in changes.items()}


def plan_jobs(members: dict[str, Member], tasks: dict[str, Task], main: str) -> list[Job]:
    """Return what is to be trained: members on all tasks or on the main one, on each split."""
    return [
        Job(label, member, task_name, task, split)
        for label, member in members.items()
        for task_name, task in tasks.items()
        if member.tasks == "all" or task_name == main
        for split in range(task.splits)
    ]


def main() -> None:
    arguments = parse_arguments(__doc__, dataset="of build_zoo.datasets", variant="of train_weightnet.variants")
    dataset, name = arguments.dataset, f"{arguments.dataset}-{arguments.variant}"
    own = own_zoo(dataset)
    params = Params.load("train_weightnet", OWN if own else dataset, arguments.variant)
    pin_threads()
    tasks = plan_own(own["architectures"], own["held_out"], params.tasks) if own else plan_tasks(params.tasks)
    changes = {label: of for label, of in params.variant["members"].items() if label not in params.skipped}
    members = parse_members(params.member, changes, OWN if own else dataset, arguments.variant)
    if own and not own["hyperparameters"]:
        members = {label: member for label, member in members.items() if member.kind != "hyperparameters"}
    jobs = plan_jobs(members, tasks, params.tasks.main)
    needed = {(name, job.task.pooled) for job in jobs for name in [*job.task.train, *job.task.test]}
    zoos = {architecture: load_zoo(dataset, architecture) for architecture in sorted({name for name, _ in needed})}
    statistics = {(name, pooled): statistics_of(zoos[name], pooled) for name, pooled in sorted(needed)}
    data = fingerprint(*(path for zoo in zoos.values() for path in zoo.files))

    recipe = params.model_dump(exclude={"variant", "tasks", "member", "skipped"})
    # now: threads import modules while they train
    paths = [job_folder(job, recipe, data) / "result.pt" for job in jobs]

    fitting, fractions = Fitting.of(params), (params.validation_fraction, params.test_fraction)
    settings = (fitting, fractions, params.snapshots, params.tasks.main, params.seed)

    def finish(place: int) -> Result:
        def compute() -> Checkpoint:
            return dict(train_and_predict(jobs[place], zoos, statistics, *settings))

        return cast(Result, remembered_torch(paths[place], set(Result.__annotations__), compute))

    results = parallel_map(finish, range(len(jobs)), torch.device("cpu"), f"train {name}")
    both = list(zip(jobs, results, strict=True))
    save_table(MODELS / name / "predictions.parquet", [row for job, result in both for row in table_rows(job, result)])
    kept = {job.name: result["kept"] for job, result in both if result["kept"] is not None}
    save_torch(MODELS / name / "predictors.pt", kept)
    rows = [row for result in results for row in result["history"]]
    save_csv(REPORTS / name / "history.csv", rows or [{"predictor": "none", "run": "none", "epoch": 0, "val_tau": 0}])
    print(f"{name}: {len(jobs)} predictors of {', '.join(dict.fromkeys(job.name for job in jobs))}")


def describe_zoo(data: Data, statistics: Statistics) -> Checkpoint:
    """Return what is kept of the zoo that a predictor learned from: its images' shape, its classes, what its weights are like."""
    program = data.zoos[next(iter(data.split.train))].program
    read = torch.cat([statistics[name, True][rows] for name, rows in data.split.train.items()])
    classes = program.steps[-1].shape[0]
    return {"input_shape": list(program.input_shape), "classes": classes, "ranges": range_of_statistics(read)}


def keep(job: Job, models: list[Predictor], data: Data, validation: Float[Tensor, "v k"]) -> Checkpoint:
    """Return what rebuilds predictors: their weights, their units, and errors on validation runs, for intervals."""
    return {
        "config": job.member.model_dump() | {"properties": len(data.measured)},
        "state_dicts": [model.state_dict() for model in models],
        "scale": data.scale,
        "errors": validation - data.part(data.split.validation, data.targets),
        "inputs": data.part(data.split.train, data.inputs),
        "names": data.names,
        "targets": data.part(data.split.train, data.targets),
    } | ({} if data.measured == PROPERTIES else {"measured": list(data.measured)})


if __name__ == "__main__":
    run(main)
