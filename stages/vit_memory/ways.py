"""Ways to learn tasks one after the other, and the loops that they learn in.

A way to train a network has four steps: begin(task), batch(), loss(x, y, logits), end(task). `Finetune` is the plainest, and each
other way overrides what it does differently; `NETWORKS` is the table of all. Those of `FROZEN` learn from frozen features instead:
write(x, labels), scores(queries). A new way is a class and its line in a table.

Axes: n images of a batch or a task, c classes, d features, t tasks, m test images.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from torch.nn.utils import clip_grad_norm_

from stages.common.randomness import generator
from stages.vit_memory.classifiers import RanPAC
from stages.vit_memory.continual import EWC, LwF, ReplayBuffer, herd, iCaRL
from stages.vit_memory.hopfield import ClassMemory, ClassMode, SlotMemory, unit
from stages.vit_memory.models import HeadedViT
from stages.vit_memory.streams import Task

Prepare = Callable[[UInt8[Tensor, "n _ h w"]], Float[Tensor, "n 3 s s"]]

WEIGHT_DECAY = 0.01  # AdamW's default
LARGEST_GRADIENT = 5.0  # norm: fine-tuning has 1 to 7, EWC and LwF of large strengths hundreds, and would diverge
FISHER_BATCH = 50  # images whose gradients are held at a time, each as large as the network
IMAGES_AT_ONCE = 250  # where nothing is trained


@dataclass(frozen=True)
class Budget:
    """What every way to train a network has, so that they can be compared."""

    steps: int  # of a task
    batch_size: int
    learning_rate: float
    buffer: int  # examples of old tasks that it may keep
    fisher_images: int  # of a task


class Finetune:
    """Train on each task's images alone: what all others are to beat. `strength` is of what they add."""

    begins_plainly = True  # learns the first task as Finetune does, since nothing is old yet: `learn_first` is enough for all of those

    def __init__(self, model: HeadedViT, prepare: Prepare, budget: Budget, strength: float, seed: int) -> None:
        self.model, self.prepare, self.budget, self.strength, self.seed = model, prepare, budget, strength, seed
        self.random = generator(seed, "batches of a stream")

    def begin(self, task: Task) -> None:
        """Get to know the task's images, before the first batch."""
        self.images, self.labels, self.seen = task.x, task.labels, task.seen

    def draw(self, count: int) -> tuple[Float[Tensor, "n 3 s s"], Int[Tensor, " n"]]:
        """Return so many of the task's images, drawn with replacement, and their labels."""
        batch = torch.randint(len(self.labels), (count,), generator=self.random).to(self.labels.device)
        return self.prepare(self.images[batch]), self.labels[batch]

    def batch(self) -> tuple[Float[Tensor, "n 3 s s"], Int[Tensor, " n"]]:
        """Return what to train on next."""
        return self.draw(self.budget.batch_size)

    def loss(self, _x: Tensor, y: Int[Tensor, " n"], logits: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
        """Return the cross-entropy among the classes seen so far."""
        return cross_entropy(logits[:, : self.seen], y)

    def end(self, _task: Task) -> None:
        """Leave the task, after the last batch. The order in which it may be gone through once more is drawn by all ways: then
        those that draw the same batches of one task draw the same of the next.
        """
        self.order = torch.randperm(len(self.labels), generator=self.random).to(self.labels.device)

    def scores(self, x: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n c"]:
        """Return what classifies images: the largest is the answer."""
        return self.model(x)


class Joint(Finetune):
    """Train on the images of all tasks so far: what forgetting nothing would give."""

    def begin(self, task: Task) -> None:
        images, labels = ([], []) if task.number == 0 else ([self.images], [self.labels])
        self.images, self.labels = torch.cat([*images, task.x]), torch.cat([*labels, task.labels])
        self.seen = task.seen


class ElasticWeights(Finetune):
    """Train with EWC's penalty; strength: lambda."""

    ewc: EWC | None = None

    def loss(self, x: Tensor, y: Int[Tensor, " n"], logits: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
        loss = super().loss(x, y, logits)
        return loss if self.ewc is None else loss + self.ewc.penalty()

    def end(self, task: Task) -> None:
        super().end(task)
        if task.seen == self.model.head.out_features:
            return  # no task follows that it would be for
        images = task.x[self.order[: self.budget.fisher_images]]
        batches = ((self.prepare(part), None) for part in images.split(FISHER_BATCH))
        self.ewc = EWC(self.model, batches, self.strength, self.ewc, self.seen, self.seed + task.number)


class Distillation(Finetune):
    """Train with LwF's penalty; strength: alpha."""

    lwf: LwF | None = None

    def loss(self, x: Tensor, y: Int[Tensor, " n"], logits: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
        loss = super().loss(x, y, logits)
        return loss if self.lwf is None else loss + self.lwf.penalty(x, logits)

    def end(self, task: Task) -> None:
        super().end(task)
        self.lwf = LwF(self.model, copy.deepcopy(self.model), self.strength, num_classes=self.seen)


class Replay(Finetune):
    """Train on batches of which half are old examples, from a buffer."""

    def __init__(self, model: HeadedViT, prepare: Prepare, budget: Budget, strength: float, seed: int) -> None:
        super().__init__(model, prepare, budget, strength, seed)
        self.buffer = ReplayBuffer(budget.buffer, seed)

    def batch(self) -> tuple[Float[Tensor, "n 3 s s"], Int[Tensor, " n"]]:
        if self.buffer.seen == 0:
            return super().batch()
        x, y = self.draw(self.budget.batch_size // 2)
        old, old_labels = self.buffer.sample(len(y))
        return torch.cat([x, self.prepare(old)]), torch.cat([y, old_labels])

    def end(self, task: Task) -> None:
        super().end(task)
        self.buffer.add(task.x[self.order], task.labels[self.order])


class Exemplars(Finetune):
    """Train as iCaRL does, on batches of which half are exemplars, and classify by their means."""

    begins_plainly = False  # its loss is another

    def __init__(self, model: HeadedViT, prepare: Prepare, budget: Budget, strength: float, seed: int) -> None:
        super().__init__(model, prepare, budget, strength, seed)
        self.icarl = iCaRL(model, model.head.out_features, budget.buffer)

    def begin(self, task: Task) -> None:
        super().begin(task)
        self.icarl.begin()
        self.old = self.icarl.replayed() if self.icarl.exemplars else None

    def batch(self) -> tuple[Float[Tensor, "n 3 s s"], Int[Tensor, " n"]]:
        if self.old is None:
            return super().batch()
        x, y = self.draw(self.budget.batch_size // 2)
        images, labels = self.old
        index = torch.randint(len(labels), (len(y),), generator=self.random).to(y.device)
        return torch.cat([x, images[index]]), torch.cat([y, labels[index]])

    def loss(self, x: Tensor, y: Int[Tensor, " n"], logits: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
        return self.icarl.loss(x, y, logits)

    def end(self, task: Task) -> None:
        super().end(task)
        self.icarl.keep({c: self.prepare(task.x[task.labels == c]) for c in task.classes})

    def scores(self, x: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n c"]:
        return self.icarl.classify(x)


NETWORKS: dict[str, type[Finetune]] = {  # longest first
    "icarl": Exemplars,
    "lwf": Distillation,
    "ewc": ElasticWeights,
    "replay": Replay,
    "joint": Joint,
    "finetune": Finetune,
}


@dataclass(frozen=True)
class First:
    """A stream's first task as Finetune learns it: weights, the state of what draws batches, and the scores of the test images."""

    weights: dict[str, Tensor]
    random: UInt8[Tensor, " bytes"]
    scores: Float[Tensor, "m c"]


def train_on_task(way: Finetune) -> None:
    """Train the way's whole model on the task that it has begun."""
    model, budget = way.model, way.budget
    optimizer = torch.optim.AdamW(model.parameters(), budget.learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    model.train()
    for _ in range(budget.steps):
        x, y = way.batch()
        loss = way.loss(x, y, model(x))
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
        optimizer.step()
    model.eval()


@torch.no_grad()
def scores_of(way: Finetune, tests: UInt8[Tensor, "m _ h w"]) -> Float[Tensor, "m c"]:
    """Return the scores of the test images as the way is now."""
    return torch.cat([way.scores(way.prepare(part)) for part in tests.split(IMAGES_AT_ONCE)])


def learn_first(way: Finetune, tasks: Iterable[Task], tests: UInt8[Tensor, "m _ h w"]) -> First:
    """Train the way's whole model on the first task."""
    way.begin(next(iter(tasks)))
    train_on_task(way)
    return First(way.model.state_dict(), way.random.get_state(), scores_of(way, tests))


def learn_network(
    way: Finetune, tasks: Iterable[Task], tests: UInt8[Tensor, "m _ h w"], first: First | None = None
) -> Float[Tensor, "t m c"]:
    """Train the way's whole model task by task; return the scores of the test images after each task.

    first: of `learn_first` by Finetune on the same tasks, from the same weights and seed. It is taken over by ways that begin plainly,
    and saves them the first task.
    """
    scores = []
    for task in tasks:
        way.begin(task)
        taken = first if task.number == 0 and way.begins_plainly else None
        if taken is None:
            train_on_task(way)
        else:
            way.model.load_state_dict(taken.weights)
            way.model.eval()
            way.random.set_state(taken.random)
        way.end(task)
        scores.append(scores_of(way, tests) if taken is None else taken.scores.to(tests.device))
    return torch.stack(scores)


# --- ways to learn from frozen features ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Space:
    """What learners from frozen features share: sizes, and what they may keep."""

    dim: int
    classes: int
    buffer: int  # patterns that a memory may keep
    random_features: int  # of RanPAC
    shrinkage: float  # of covariances


class HerdedSlots:
    """An associative memory whose patterns are chosen by herding; strength: beta."""

    def __init__(self, space: Space, strength: float, _seed: int, device: torch.device) -> None:
        self.classes, self.each = space.classes, space.buffer // space.classes
        self.slots = SlotMemory(space.dim, space.buffer, beta=strength).to(device)

    def write(self, x: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> None:
        """Learn a task's features."""
        for c in labels.unique().tolist():
            of_class = x[labels == c]
            kept = of_class[herd(unit(of_class), self.each)]
            self.slots.write(kept, torch.full((len(kept),), c))

    def scores(self, queries: Float[Tensor, "m d"]) -> Float[Tensor, "m c"]:
        """Return how much of each class is retrieved."""
        classes = one_hot(self.slots.labels.clamp(min=0), self.classes)  # nothing is retrieved from empty slots
        return self.slots.attend(queries) @ classes.to(queries)


class NearestMean:
    """Class means, compared by cosine."""

    mode: ClassMode = "class_prototype"

    def __init__(self, space: Space, _strength: float, _seed: int, device: torch.device) -> None:
        self.memory = ClassMemory(space.dim, space.classes, self.mode, shrinkage=space.shrinkage).to(device)

    def write(self, x: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> None:
        """Learn a task's features."""
        self.memory.write(x, labels)

    def scores(self, queries: Float[Tensor, "m d"]) -> Float[Tensor, "m c"]:
        """Return the cosines, or the log probabilities."""
        return self.memory.logits(queries)


class StreamingLDA(NearestMean):
    """Linear discriminant analysis from running sums (Hayes & Kanan 2020, arXiv:1909.01520)."""

    mode: ClassMode = "metric"


class RandomFeatures:
    """RanPAC; strength: its ridge."""

    def __init__(self, space: Space, strength: float, seed: int, device: torch.device) -> None:
        random = generator(seed, "RanPAC")
        self.ranpac, self.ridge = RanPAC(space.dim, space.random_features, space.classes, random, device), strength

    def write(self, x: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> None:
        """Learn a task's features."""
        self.ranpac.write(x, labels)

    def scores(self, queries: Float[Tensor, "m d"]) -> Float[Tensor, "m c"]:
        """Return the regression's outputs."""
        return self.ranpac.scores(queries, self.ridge)


Learner = HerdedSlots | NearestMean | RandomFeatures

FROZEN: dict[str, type[Learner]] = {
    "memory": HerdedSlots,
    "nearest_mean": NearestMean,
    "slda": StreamingLDA,
    "ranpac": RandomFeatures,
}


def learn_frozen(learner: Learner, tasks: Iterable[Task], tests: Float[Tensor, "m d"]) -> Float[Tensor, "t m c"]:
    """Learn from frozen features task by task, each image seen once; return the scores of the test images after each task."""
    scores = []
    for task in tasks:
        learner.write(task.x, task.labels)
        scores.append(learner.scores(tests))
    return torch.stack(scores)
