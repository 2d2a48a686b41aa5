"""Learn classes task by task in many ways, and see what is forgotten: one run answers both kinds of question.

Class-incremental: which of all classes seen so far? Task-incremental: which of this task's? Strengths of the penalties and of the
memory are chosen on a stream of training images alone, with classes in an order of its own.

Reads   data/<dataset>.safetensors, models/extract_features/<dataset>/
Writes  reports/train_continual/<dataset>/accuracy.csv   the whole R matrix: accuracy on every task after every task, of each run
        reports/train_continual/<dataset>/summary.json   accuracy, forgetting, backward and forward transfer over seeds
        reports/train_continual/<dataset>/{accuracy, matrices}.png
"""

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from jaxtyping import Float, Int, UInt8
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from torch.nn.utils import clip_grad_norm_

from stages.common.backbone import Backbone, load_backbone
from stages.common.files import save_csv, save_json
from stages.common.metrics import accuracy, over_seeds
from stages.common.randomness import generator, seeded_init
from stages.common.runtime import parallel_map, pick_device, pin_threads
from stages.common.stage import InputError, StageParams, parse_arguments, run
from stages.common.work import fingerprint, remembered, work_folder
from stages.vit_memory import pictures
from stages.vit_memory.classifiers import RanPAC, Whitening
from stages.vit_memory.continual import EWC, LwF, ReplayBuffer, herd, iCaRL
from stages.vit_memory.features import FEATURES, input_files, load_featured_images
from stages.vit_memory.hopfield import ClassMemory, SlotMemory, unit
from stages.vit_memory.models import HeadedViT

REPORTS = Path("reports/train_continual")

NETWORKS = ("icarl", "lwf", "ewc", "replay", "joint", "finetune")  # longest first
FROZEN = ("memory", "nearest_mean", "slda", "ranpac")

Strengths = Annotated[list[PositiveFloat], Field(min_length=1)]


class Params(StageParams):
    """Parameters of one data set's streams."""

    seeds: Annotated[list[NonNegativeInt], Field(min_length=3)]
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


@dataclass(frozen=True)
class Stream:
    """Tasks one after the other. Labels are renamed so that task t has the classes from t * width to (t + 1) * width - 1."""

    train: Int[Tensor, " n"]  # indices
    labels: Int[Tensor, " n"]
    test: Int[Tensor, " m"]
    test_labels: Int[Tensor, " m"]
    tasks: int
    width: int  # classes a task
    seed: int

    def task(self, t: int) -> tuple[Int[Tensor, " k"], Int[Tensor, " k"]]:
        """Return indices and labels of a task's training images."""
        own = self.labels // self.width == t
        return self.train[own], self.labels[own]

    def up_to(self, t: int) -> tuple[Int[Tensor, " k"], Int[Tensor, " k"]]:
        """Return indices and labels of the training images of all tasks until t."""
        own = self.labels // self.width <= t
        return self.train[own], self.labels[own]


def make_stream(
    labels: Int[Tensor, " n"], train: Tensor, test_labels: Int[Tensor, " m"], test: Tensor, seed: int, params: Params
) -> Stream:
    """Return a stream over the images at `train` and `test`, classes in the order of `seed`; InputError if there are too few."""
    classes = int(labels.max()) + 1
    width = classes // params.tasks
    if width < 2:
        raise InputError(
            f"train_continual.tasks: {params.tasks} tasks of {classes} classes are less than 2 classes each"
        )
    random = generator(seed, "order of classes")
    rank = torch.empty(classes, dtype=torch.long)
    rank[torch.randperm(classes, generator=random)] = torch.arange(classes)
    rank = rank.to(labels.device)

    def first_of_each_class(y: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
        index = index[torch.randperm(len(index), generator=random).to(index.device)]
        parts = [index[rank[y[index]] == c][:count] for c in range(params.tasks * width)]
        index = torch.cat(parts)
        return index, rank[y[index]]

    chosen = first_of_each_class(labels, train, params.train_images)
    tested = first_of_each_class(test_labels, test, params.test_images)
    return Stream(*chosen, *tested, params.tasks, width, seed)


def learn_network(
    method: str,
    strength: float,
    backbone: Backbone,
    images: UInt8[Tensor, "n c h w"],
    tests: UInt8[Tensor, "m c h w"],
    stream: Stream,
    params: Params,
) -> Float[Tensor, "t m c"]:
    """Train the whole ViT task by task, all methods for as many steps; return its scores of the test images after each task."""
    classes, device = stream.tasks * stream.width, images.device
    with seeded_init(stream.seed):
        model = HeadedViT(copy.deepcopy(backbone.vit), classes, freeze_backbone=False).to(device)
    random = generator(stream.seed, "batches of a stream")
    ewc = lwf = None
    icarl, buffer = iCaRL(model, classes, params.buffer), ReplayBuffer(params.buffer, stream.seed)
    scores = []
    for t in range(stream.tasks):
        seen = (t + 1) * stream.width
        index, labels = stream.up_to(t) if method == "joint" else stream.task(t)
        icarl.begin()
        exemplars = icarl.replayed() if method == "icarl" and t else None
        mixed = t > 0 and method in ("icarl", "replay")  # half of each batch is old
        optimizer = torch.optim.AdamW(model.parameters(), params.learning_rate, weight_decay=0.01, fused=True)
        model.train()
        for _ in range(params.steps):
            count = params.batch_size // 2 if mixed else params.batch_size
            batch = torch.randint(len(index), (count,), generator=random).to(device)
            x, y = backbone.prepare(images[index[batch]]), labels[batch]
            if exemplars:
                old = torch.randint(len(exemplars[1]), (count,), generator=random).to(device)
                x, y = torch.cat([x, exemplars[0][old]]), torch.cat([y, exemplars[1][old]])
            elif mixed:
                old_images, old_labels = buffer.sample(count)
                x, y = torch.cat([x, backbone.prepare(old_images)]), torch.cat([y, old_labels])
            logits = model(x)
            loss = icarl.loss(x, y, logits) if method == "icarl" else cross_entropy(logits[:, :seen], y)
            if ewc is not None:
                loss = loss + ewc.penalty()
            if lwf is not None:
                loss = loss + lwf.penalty(x, logits)
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
        model.eval()
        order = torch.randperm(len(index), generator=random).to(device)
        if method == "ewc":
            some = index[order[: params.fisher_images]]
            batches = ((backbone.prepare(images[part]), None) for part in some.split(50))
            ewc = EWC(model, batches, strength, ewc, seen, stream.seed + t)
        if method == "lwf":
            lwf = LwF(model, copy.deepcopy(model), strength, num_classes=seen)
        if method == "replay":
            buffer.add(images[index[order]], labels[order])
        if method == "icarl":
            new = range(t * stream.width, seen)
            icarl.keep({c: backbone.prepare(images[index[labels == c]]) for c in new})
        with torch.no_grad():
            predict = icarl.classify if method == "icarl" else model
            parts = [predict(backbone.prepare(tests[part])) for part in stream.test.split(250)]
            scores.append(torch.cat(parts))
    return torch.stack(scores)


def learn_frozen(
    method: str,
    strength: float,
    x: Float[Tensor, "n d"],
    tests: Float[Tensor, "m d"],
    stream: Stream,
    params: Params,
) -> Float[Tensor, "t m c"]:
    """Learn from frozen features task by task, each image seen once; return the scores of the test images after each task."""
    classes, d = stream.tasks * stream.width, x.shape[1]
    queries = tests[stream.test]
    slots = SlotMemory(d, params.buffer, beta=strength).to(x.device)
    mode = "metric" if method == "slda" else "class_prototype"
    memory = ClassMemory(d, classes, mode, shrinkage=params.shrinkage).to(x.device)
    ranpac = RanPAC(d, params.random_features, classes, generator(stream.seed, "RanPAC"), x.device)
    scores = []
    for t in range(stream.tasks):
        index, labels = stream.task(t)
        if method == "memory":
            for c in range(t * stream.width, (t + 1) * stream.width):
                own = index[labels == c]
                kept = own[herd(unit(x[own]), params.buffer // classes)]
                slots.write(x[kept], torch.full((len(kept),), c))
            member = one_hot(slots.labels.clamp(min=0), classes).to(x)  # nothing is retrieved from empty slots
            scores.append(slots.attend(queries) @ member)
        elif method == "ranpac":
            ranpac.write(x[index], labels)
            scores.append(ranpac.scores(queries, strength))
        else:
            memory.write(x[index], labels)
            scores.append(memory.logits(queries))
    return torch.stack(scores)


def accuracy_matrices(scores: Float[Tensor, "t m c"], stream: Stream) -> dict[str, Float[Tensor, "t t"]]:
    """Return R[after task, on task], class-incremental (among the classes seen so far) and task-incremental (the task's own)."""
    kinds = {"class": torch.zeros(stream.tasks, stream.tasks), "task": torch.zeros(stream.tasks, stream.tasks)}
    for on in range(stream.tasks):
        own = stream.test_labels // stream.width == on
        labels, first = stream.test_labels[own], on * stream.width
        for after in range(stream.tasks):
            seen = scores[after, own, : (after + 1) * stream.width]
            kinds["class"][after, on] = accuracy(seen, labels)
            kinds["task"][after, on] = accuracy(scores[after, own, first : first + stream.width], labels - first)
    return kinds


def measures(r: Float[Tensor, "t t"], chance: float) -> dict[str, float]:
    """Return what Lopez-Paz & Ranzato (2017, arXiv:1706.08840) and Chaudhry et al. (2018, arXiv:1801.10112) read off R.

    Accuracy at the end, mean over tasks; mean over time of that so far; forgetting: what the best earlier accuracy was above the
    last; backward transfer: last minus first; forward transfer: before a task was learnt, minus `chance`.
    """
    tasks = len(r)
    earlier = range(tasks - 1)
    return {
        "final": r[-1].mean().item(),
        "average": sum(r[t, : t + 1].mean().item() for t in range(tasks)) / tasks,
        "forgetting": sum((r[i:-1, i].max() - r[-1, i]).item() for i in earlier) / len(earlier),
        "backward_transfer": sum((r[-1, i] - r[i, i]).item() for i in earlier) / len(earlier),
        "forward_transfer": sum(r[i, i + 1].item() - chance for i in earlier) / len(earlier),
    }


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of extract_features.datasets").dataset
    params = Params.load("train_continual", dataset)
    pin_threads()
    device = pick_device()
    backbone = load_backbone(FEATURES / dataset / "backbone.safetensors", device)
    features, train, test = load_featured_images(dataset, device)
    whiten = Whitening(features.glyphs.x.flatten(1), features.glyphs.labels)
    x, x_test = whiten(features.train.x.flatten(1)), whiten(features.test.x.flatten(1))

    order = torch.randperm(len(train), generator=generator(params.validation_seed, "validation stream")).to(device)
    held_out = order[: round(params.validation_fraction * len(train))]
    kept = order[len(held_out) :]
    trial = make_stream(train.labels, kept, train.labels, held_out, params.validation_seed, params)
    everything = torch.arange(len(train), device=device), torch.arange(len(test), device=device)
    streams = {
        seed: make_stream(train.labels, everything[0], test.labels, everything[1], seed, params)
        for seed in params.seeds
    }
    recipe = params.model_dump() | {"weights": backbone.sha256, "inputs": fingerprint(*input_files(dataset))}
    work = work_folder(f"train_continual/{dataset}", recipe)

    def matrices(job: tuple[str, float, int | None]) -> dict[str, list[list[float]]]:
        """Return R of one run, a nested list; seed None is the trial stream, whose tests are training images."""
        method, strength, seed = job
        stream = trial if seed is None else streams[seed]

        def compute() -> dict[str, list[list[float]]]:
            if method in FROZEN:
                scores = learn_frozen(method, strength, x, x if seed is None else x_test, stream, params)
            else:
                tests = train.images if seed is None else test.images
                scores = learn_network(method, strength, backbone, train.images, tests, stream, params)
            return {kind: r.tolist() for kind, r in accuracy_matrices(scores, stream).items()}

        return remembered(work / f"{method}-{strength:g}-{seed}.json", compute)

    trials = [(m, s, None) for m in (*NETWORKS, *FROZEN) if m in params.strengths for s in params.strengths[m]]
    tried = parallel_map(matrices, trials, device, f"strengths for {dataset}")
    # EWC and LwF are made for the task-incremental question: theirs are chosen on it.
    kind = {"ewc": "task", "lwf": "task"}
    quality = {job: sum(r[kind.get(job[0], "class")][-1]) for job, r in zip(trials, tried, strict=True)}
    chosen = {m: max((job for job in trials if job[0] == m), key=quality.__getitem__)[1] for m in params.strengths}
    jobs = [(m, chosen.get(m, 1.0), seed) for m in (*NETWORKS, *FROZEN) for seed in params.seeds]
    results = dict(zip(jobs, parallel_map(matrices, jobs, device, f"tasks of {dataset}"), strict=True))

    width = streams[params.seeds[0]].width
    chance = {"class": 0.0, "task": 1 / width}
    rows = [
        {"method": m, "seed": seed, "kind": kind, "after": after, "on": on, "acc": acc}
        for (m, _, seed), by_kind in results.items()
        for kind, r in by_kind.items()
        for after, row in enumerate(r)
        for on, acc in enumerate(row)
    ]
    table = {
        m: over_seeds(
            [
                {kind: measures(torch.tensor(r), chance[kind]) for kind, r in by_kind.items()}
                for (name, _, _), by_kind in results.items()
                if name == m
            ]
        )
        for m in (*NETWORKS, *FROZEN)
    }
    summary = {
        "methods": table,
        "strengths": chosen,
        "chance": {"class": 1 / (width * params.tasks), "task": 1 / width},
    }
    folder = REPORTS / dataset
    save_csv(folder / "accuracy.csv", rows)
    save_json(folder / "summary.json", summary)
    pictures.draw_accuracy(folder / "accuracy.png", rows, table)
    pictures.draw_matrices(folder / "matrices.png", rows)
    shutil.rmtree(work, ignore_errors=True)
    shown = ", ".join(
        f"{m} {table[m]['class']['final']['mean']:.1%}" for m in ("finetune", "replay", "memory", "joint")
    )
    print(f"{dataset}, {params.tasks} tasks, class-incremental: {shown}")


if __name__ == "__main__":
    run(main)
