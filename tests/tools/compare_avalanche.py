"""EWC, LwF, iCaRL, replay and SLDA beside Avalanche's own: the same streams of digits, network, batches a task and strengths.

python -m venv .work/avalanche
python -c "import site; print(site.getsitepackages()[0])" > .work/avalanche/lib/python3.11/site-packages/project.pth
.work/avalanche/bin/pip install avalanche-lib==0.6.0                        # into an environment of its own: the project needs none of it
.work/avalanche/bin/python tests/tools/compare_avalanche.py [SEEDS]        # default: 5; after `dvc repro train_continual@digits`

Where the two define a strength differently, it is converted: Avalanche's EWC has no factor 1/2, its LwF no factor T^2. Its iCaRL takes
its epochs through new images and exemplars together, ours as many batches as fine-tuning: `icarl_steps` gives ours as many; and it
teaches outputs of classes that nobody has seen, which the paper does not: `icarl_alike` does that, too. Prints mean +- standard error
over seeds, and their paired difference.
"""

import logging
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot, relu
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project need not be installed
from stages.common.randomness import generator
from stages.vit_memory.classifiers import RanPAC
from stages.vit_memory.streams import Stream, accuracy_matrices, make_stream
from stages.vit_memory.train_continual import load_examples
from stages.vit_memory.ways import (
    FROZEN,
    LARGEST_GRADIENT,
    NETWORKS,
    WEIGHT_DECAY,
    Budget,
    Exemplars,
    Space,
    learn_frozen,
    learn_network,
)

CPU = torch.device("cpu")
EPOCHS, BATCH, RATE, BUFFER, WIDTH, TASKS, SHRINKAGE = 10, 16, 1e-3, 200, 100, 5, 0.1
STRENGTHS = {"finetune": 1.0, "ewc": 1000.0, "lwf": 4.0, "replay": 1.0, "icarl": 1.0}
TEMPERATURE = 2.0  # of LwF, in both
RIDGE, RANDOM_FEATURES = 100.0, 1000


class Small(nn.Module):
    """A multilayer perceptron with the two parts that iCaRL and SLDA ask for: features and a head."""

    def __init__(self, pixels: int, classes: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(pixels, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.head = nn.Linear(WIDTH, classes)

    def features(self, x: Tensor) -> Tensor:
        """Return what the head reads."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class SeenClasses:
    """The cross-entropy among the classes seen so far, as all ways here have it."""

    seen = 0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits[:, : self.seen], labels)


class WithUnseen(Exemplars):
    """iCaRL whose outputs of classes that nobody has seen are taught, too: to be 0."""

    def loss(self, x: Tensor, y: Tensor, logits: Tensor) -> Tensor:
        targets = one_hot(y, logits.shape[1]).to(logits)
        if self.icarl.old_model is not None:
            known = sorted(self.icarl.exemplars)
            with torch.no_grad():
                targets[:, known] = self.icarl.old_model(x)[:, known].sigmoid()
        return binary_cross_entropy_with_logits(logits, targets)


def ours(method: str, stream: Stream, images: Tensor, tests: Tensor) -> Tensor:
    """Return our scores [t, m, c] of the test images after each task."""
    each = len(stream.labels) / stream.tasks
    gone_through = each + BUFFER if method in ("icarl_steps", "icarl_alike") else each
    budget = Budget(EPOCHS * math.ceil(gone_through / BATCH), BATCH, RATE, BUFFER, fisher_images=round(each))
    model = Small(images.shape[1], stream.classes, stream.seed)
    name = method.partition("_")[0]
    kind = WithUnseen if method == "icarl_alike" else NETWORKS[name]
    way = kind(model, lambda x: x, budget, STRENGTHS[name], stream.seed)  # type: ignore[arg-type]
    return learn_network(way, stream.over(images), tests)


def avalanche(method: str, stream: Stream, images: Tensor, tests: Tensor) -> Tensor:
    """Return Avalanche's scores [t, m, c] of the test images after each task."""
    from avalanche.benchmarks import nc_benchmark
    from avalanche.training.supervised import ICaRL, Naive

    model, criterion = Small(images.shape[1], stream.classes, stream.seed), SeenClasses()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=WEIGHT_DECAY)
    plugins = [clipping(), *plugin(method)]
    options: dict[str, Any] = {"train_mb_size": BATCH, "eval_mb_size": 250, "evaluator": None, "plugins": plugins}
    if method.startswith("icarl"):
        parts = {"feature_extractor": model.body, "classifier": model.head, "buffer_transform": None}
        strategy = ICaRL(**parts, optimizer=optimizer, memory_size=BUFFER, fixed_memory=True, **options)
    else:
        strategy = Naive(model=model, optimizer=optimizer, criterion=criterion, **options)
    data = [dataset(images[stream.train], stream.labels), dataset(tests, stream.test_labels)]
    order = list(range(stream.classes))
    scores = []
    benchmark = nc_benchmark(*data, stream.tasks, task_labels=False, shuffle=False, fixed_class_order=order)
    for task, experience in enumerate(benchmark.train_stream):
        criterion.seen = (task + 1) * stream.width
        halved = method == "replay" and task > 0  # half of a batch is old: an epoch has twice as many
        strategy.train_epochs = EPOCHS // 2 if halved else EPOCHS
        # Avalanche would keep AdamW's moments from task to task; ours begin anew.
        strategy.optimizer = torch.optim.AdamW(strategy.model.parameters(), RATE, weight_decay=WEIGHT_DECAY)
        strategy.train(experience)
        strategy.model.eval()
        with torch.no_grad():
            scores.append(strategy.model(tests))
    return torch.stack(scores)


def dataset(x: Tensor, labels: Tensor) -> TensorDataset:
    """Return what Avalanche takes: pairs, and all labels as `targets`."""
    pairs = TensorDataset(x, labels)
    pairs.targets = labels.tolist()
    return pairs


def clipping() -> Any:
    """Return the plugin that clips gradients as ours are."""
    from avalanche.training.plugins import SupervisedPlugin

    class Clip(SupervisedPlugin):
        def before_update(self, strategy: Any, **_: object) -> None:
            nn.utils.clip_grad_norm_(strategy.model.parameters(), LARGEST_GRADIENT)

    return Clip()


def plugin(method: str) -> list[Any]:
    """Return the plugin of a method, its strength converted; `ewc_single`: EWC whose Fisher information is of single images."""
    from avalanche.training.plugins import EWCPlugin, LwFPlugin, ReplayPlugin

    class OfSingleImages(EWCPlugin):
        def compute_importances(self, *arguments: object, **options: object) -> object:
            *first, _batch = arguments
            return super().compute_importances(*first, 1, **options)

    if method == "lwf":
        return [LwFPlugin(STRENGTHS["lwf"] * TEMPERATURE**2, TEMPERATURE)]
    if method == "replay":
        return [ReplayPlugin(BUFFER, BATCH // 2, BATCH // 2)]
    if method in ("ewc", "ewc_single"):
        return [(EWCPlugin if method == "ewc" else OfSingleImages)(STRENGTHS["ewc"] / 2)]
    return []


def slda(stream: Stream, x: Tensor, tests: Tensor) -> tuple[Tensor, Tensor]:
    """Return our and Avalanche's last scores [1, m, c]; features are scaled so that both shrink alike: mean variance 1."""
    from avalanche.training.supervised import StreamingLDA

    means = torch.stack([x[stream.train][stream.labels == c].mean(0) for c in range(stream.classes)])
    scale = (x[stream.train] - means[stream.labels]).square().mean().sqrt()
    space = Space(x.shape[1], stream.classes, BUFFER, RANDOM_FEATURES, SHRINKAGE)
    learner = FROZEN["slda"](space, 1.0, stream.seed, CPU)
    mine = learn_frozen(learner, stream.over(x / scale), tests / scale)[-1:]
    sizes = {"input_size": x.shape[1], "num_classes": stream.classes, "shrinkage_param": SHRINKAGE}
    theirs = StreamingLDA(slda_model=nn.Identity(), criterion=cross_entropy, evaluator=None, **sizes)
    for task in stream.over(x / scale):
        for f, y in zip(task.x, task.labels, strict=True):
            theirs.fit(f[None], y[None])
    return mine, theirs.predict(tests / scale)[None]


def ranpac_as_published(stream: Stream, x: Tensor, tests: Tensor) -> float:
    """Return the largest difference of our scores to those of RanPAC's equations (arXiv:2307.02251, section 4), written out.

    Their projection has variance 1, ours 1 / d: the same regression with the ridge times d.
    """
    learner = RanPAC(x.shape[1], RANDOM_FEATURES, stream.classes, generator(stream.seed, "RanPAC"))
    for task in stream.over(x):
        learner.write(task.x, task.labels)
    d = x.shape[1]
    projection = learner.projection.double() * d**0.5
    h = relu(x[stream.train].double() @ projection)
    targets = one_hot(stream.labels, stream.classes).double()
    weights = torch.linalg.solve(h.T @ h + RIDGE * d * torch.eye(RANDOM_FEATURES).double(), h.T @ targets)
    published = relu(tests.double() @ projection) @ weights
    return (learner.scores(tests, RIDGE).double() - published).abs().max().item()


def final(scores: Tensor, stream: Stream, kind: str) -> float:
    """Return the accuracy in percent after the last task, mean over tasks."""
    repeated = scores.expand(stream.tasks, -1, -1)  # of SLDA the last alone is known
    return 100 * accuracy_matrices(repeated, stream)[kind][-1].mean().item()


def row(name: str, mine: list[float], theirs: list[float]) -> str:
    """Return a line of the table: means and standard errors, and the paired difference in standard errors."""
    n = math.sqrt(len(mine))
    parts = [f"{statistics.fmean(v):6.2f} ± {statistics.stdev(v) / n:4.2f}" for v in (mine, theirs)]
    change = [a - b for a, b in zip(mine, theirs, strict=True)]
    off = statistics.fmean(change), statistics.stdev(change) / n
    verdict = "within two" if abs(off[0]) <= 2 * off[1] or off[0] == 0 else "MORE than two"
    return f"{name:26} {parts[0]:>15} {parts[1]:>15}   {off[0]:+6.2f} ± {off[1]:4.2f}  {verdict}"


def main() -> None:
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    train, test, _ = load_examples("digits", CPU)
    images, tests = train.images.flatten(1) / 255, test.images.flatten(1) / 255
    streams = [make_stream(train.pool(200), test.pool(150), TASKS, seed) for seed in seeds]
    print(f"{'accuracy, % at the end':26} {'ours':>15} {'Avalanche':>15}   difference ± standard error", flush=True)
    scores_of: dict[str, list[Tensor]] = {}  # ours, which EWC's two peers are held against
    for peer in ("finetune", "ewc", "ewc_single", "lwf", "replay", "icarl", "icarl_steps", "icarl_alike"):
        name = peer.removesuffix("_single")
        if name not in scores_of:
            scores_of[name] = [ours(name, s, images, tests[s.test]) for s in streams]
        mine = scores_of[name]
        theirs = [avalanche(peer, s, images, tests[s.test]) for s in streams]
        for kind in ("class", "task"):
            values = [[final(x, s, kind) for x, s in zip(scores, streams, strict=True)] for scores in (mine, theirs)]
            print(row(f"{peer}, {kind}-incremental", *values), flush=True)
    pairs = [slda(s, train.x, test.x[s.test]) for s in streams]
    values = [[final(pair[i], s, "class") for pair, s in zip(pairs, streams, strict=True)] for i in (0, 1)]
    print(row("slda, class-incremental", *values))
    print(
        f"RanPAC's equations: largest difference {max(ranpac_as_published(s, train.x, test.x[s.test]) for s in streams):.1e}"
    )


if __name__ == "__main__":
    main()
