"""Learn from a few images of each class in many ways, in the same episodes, and compare them pair by pair.

The strength of the memory head, and the learning rate of what trains through the backbone, are chosen on episodes of glyphs, whose
classes are none of the data set's.

Reads   data/<dataset>.safetensors, models/extract_features/<dataset>/
Writes  reports/train_few_shot/<dataset>/episodes.csv   accuracy of each method in each episode
        reports/train_few_shot/<dataset>/summary.json   means, and differences to the linear probe with 95 % intervals
        reports/train_few_shot/<dataset>/methods.png
"""

import copy
import itertools
import shutil
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float, Int, UInt8
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stages.common.backbone import Backbone, load_backbone
from stages.common.figures import save_figure
from stages.common.files import save_csv, save_json
from stages.common.metrics import accuracy, mean_interval, mean_std
from stages.common.randomness import generator, seeded_init
from stages.common.runtime import parallel_map, pick_device, pin_threads
from stages.common.stage import StageParams, parse_arguments, run
from stages.common.work import fingerprint, remembered, work_folder
from stages.vit_memory.classifiers import (
    RanPAC,
    Whitening,
    centred_cosines,
    class_means,
    linear_probe,
    memory_log_probabilities,
)
from stages.vit_memory.episodes import Episode, draw_episode
from stages.vit_memory.features import FEATURES, FeatureSets, input_files, load_featured_images
from stages.vit_memory.models import HeadedViT, MemoryAugmentedViT, VPTDeep, VPTShallow

REPORTS = Path("reports/train_few_shot")

REFERENCE = "linear_probe"
TRAINED = ("vpt_deep", "vpt_shallow", "memory_block")  # through the backbone, longest first
FROZEN = (
    REFERENCE,
    "plain_linear_probe",
    "whitened_linear_probe",
    "memory_head",
    "nearest_mean",
    "ranpac",
    "random_vit",
    "pixels",
)


class Params(StageParams):
    """Parameters of one data set's episodes."""

    seed: NonNegativeInt
    n_way: PositiveInt
    n_shot: PositiveInt
    episodes: PositiveInt
    queries: PositiveInt  # test images in an episode, at most
    decay: NonNegativeFloat  # of the linear probe's weights
    shrinkage: NonNegativeFloat  # of the covariance within glyph classes
    betas: list[PositiveFloat]  # of the memory head, to choose from
    weights: list[NonNegativeFloat]  # of the memory beside the linear probe, to choose from
    base_episodes: PositiveInt  # of glyphs, to choose on
    random_features: PositiveInt
    ridge: PositiveFloat
    num_prompts: PositiveInt
    beta: PositiveFloat  # of the memory in a block
    steps: PositiveInt  # of those that train through the backbone
    batch_size: PositiveInt  # of theirs
    learning_rates: Annotated[list[PositiveFloat], Field(min_length=1)]  # of prompts, gates and heads, to choose from
    trial_episodes: PositiveInt  # of glyphs, to choose it on
    plain_learning_rate: PositiveFloat  # of the plain linear probe
    plain_steps: PositiveInt


def memory_head(
    x: Float[Tensor, "s d"],
    queries: Float[Tensor, "q d"],
    episode: Episode,
    whiten: Whitening,
    decay: float,
    strengths: list[tuple[float, float]],
) -> list[Float[Tensor, "q c"]]:
    """Return, for each (beta, weight), the linear probe's log probabilities plus `weight` times those of an associative memory.

    The memory holds the support images in coordinates in which glyph classes have unit covariance.
    """
    classes = len(episode.classes)
    keys, asked = whiten(x), whiten(queries)
    probe = linear_probe(keys, episode.support_labels, asked, classes, decay).log_softmax(1)
    return [
        probe + weight * memory_log_probabilities(keys, episode.support_labels, asked, classes, beta)
        for beta, weight in strengths
    ]


def glyph_episode(labels: Int[Tensor, " g"], params: Params, i: int) -> Episode:
    """Return an episode among glyphs of as many shots as the real ones, or as many as leave a query of each class."""
    n_shot = min(params.n_shot, len(labels) // int(labels.max() + 1) - 1)
    return draw_episode(labels, labels, params.n_way, n_shot, params.queries, params.seed + i)


def choose_strength(features: FeatureSets, whiten: Whitening, params: Params) -> tuple[float, float]:
    """Return the (beta, weight) of the memory head that is best on episodes of glyphs."""
    strengths = list(itertools.product(params.betas, params.weights))
    x, labels = features.glyphs.x[:, 0], features.glyphs.labels
    totals = torch.zeros(len(strengths), dtype=torch.float64)
    for i in range(params.base_episodes):
        episode = glyph_episode(labels, params, i)
        support, queries = x[episode.support], x[episode.queries]
        scores = memory_head(support, queries, episode, whiten, params.decay, strengths)
        totals += torch.stack([accuracy(s, episode.query_labels) for s in scores]).cpu()
    return strengths[int(totals.argmax())]


def train_through(
    kind: str, backbone: Backbone, x: Float[Tensor, "s 3 h w"], episode: Episode, params: Params, rate: float
) -> HeadedViT:
    """Return a ViT of one kind, what trains of it trained on the support images with the learning rate `rate`."""
    classes = len(episode.classes)
    with seeded_init(episode.seed):
        vit = copy.deepcopy(backbone.vit)
        if kind == "memory_block":
            model = MemoryAugmentedViT(vit, num_classes=classes, mem_size=len(x), beta=params.beta)
        else:
            prompted = {"vpt_shallow": VPTShallow, "vpt_deep": VPTDeep}[kind]
            model = prompted(vit, num_classes=classes, num_prompts=params.num_prompts)
    model = model.to(x.device)
    if isinstance(model, MemoryAugmentedViT):
        model.memorise(x, episode.support_labels)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.01)
    random = generator(episode.seed, "few-shot batches")
    for _ in range(params.steps):
        batch = torch.randperm(len(x), generator=random)[: params.batch_size].to(x.device)
        loss = cross_entropy(model(x[batch]), episode.support_labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def plain_linear_probe(
    x: Float[Tensor, "s d"], queries: Float[Tensor, "q d"], episode: Episode, params: Params
) -> Float[Tensor, "q w"]:
    """Return the logits of a head trained as it often is: AdamW on features as they are, for a fixed number of steps."""
    with seeded_init(episode.seed):
        head = nn.Linear(x.shape[1], len(episode.classes)).to(x.device)
    optimizer = torch.optim.AdamW(head.parameters(), params.plain_learning_rate, weight_decay=0.01)
    for _ in range(params.plain_steps):
        loss = cross_entropy(head(x), episode.support_labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head(queries).detach()


@torch.no_grad()
def predict(model: HeadedViT, backbone: Backbone, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n w"]:
    """Return the logits of images, batch by batch."""
    return torch.cat([model(backbone.prepare(batch)) for batch in images.split(250)])


def compare(results: dict[str, list[float]]) -> dict[str, Any]:
    """Return mean and spread over episodes, and each method's difference to the reference in the same episodes.

    The interval is Student's, of 95 %.
    """
    table: dict[str, Any] = {}
    for method, values in results.items():
        difference = torch.tensor(values, dtype=torch.float64) - torch.tensor(results[REFERENCE], dtype=torch.float64)
        table[method] = {"acc": mean_std(values)}
        if method != REFERENCE and len(values) > 1:
            table[method]["difference"] = mean_interval(difference.tolist())
    return table


def draw_methods(path: Path, table: dict[str, Any], title: str) -> None:
    """Draw each method's difference to the reference, with its interval; accuracy beside the name."""
    methods = [m for m in sorted(table, key=lambda m: table[m]["acc"]["mean"]) if "difference" in table[m]]
    figure, ax = plt.subplots(figsize=(6, 0.3 * len(methods) + 1), layout="constrained")
    for i, method in enumerate(methods):
        d = table[method]["difference"]
        ax.plot([100 * d["low"], 100 * d["high"]], [i, i], color="C0")
        ax.plot(100 * d["mean"], i, "o", color="C0", markersize=4)
    ax.axvline(0, color="grey", linewidth=0.8)
    names = [f"{m.replace('_', ' ')}, {table[m]['acc']['mean']:.1%}" for m in methods]
    ax.set(yticks=range(len(methods)), yticklabels=names, title=title)
    ax.set_xlabel(f"accuracy minus that of the linear probe, {table[REFERENCE]['acc']['mean']:.1%}, points")
    save_figure(path, figure)


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of extract_features.datasets").dataset
    params = Params.load("train_few_shot", dataset)
    pin_threads()
    device = pick_device()
    backbone = load_backbone(FEATURES / dataset / "backbone.safetensors", device)
    features, train, test = load_featured_images(dataset, device)
    whiten = Whitening(features.glyphs.x[:, 0], features.glyphs.labels, params.shrinkage)
    drawn = [
        draw_episode(train.labels, test.labels, params.n_way, params.n_shot, params.queries, params.seed + i)
        for i in range(params.episodes)
    ]
    strength = choose_strength(features, whiten, params)

    def trained_scores(
        method: str, supports: Tensor, tests: Tensor, episode: Episode, rate: float
    ) -> Float[Tensor, "q w"]:
        x = backbone.prepare(supports[episode.support])
        return predict(train_through(method, backbone, x, episode, params, rate), backbone, tests[episode.queries])

    def choose_rate(method: str) -> float:
        """Return the learning rate that is best on episodes of glyphs."""
        glyphs, labels = features.glyphs_images, features.glyphs.labels
        quality = dict.fromkeys(params.learning_rates, 0.0)
        for i in range(params.trial_episodes):
            episode = glyph_episode(labels, params, i)
            for rate in quality:
                scores = trained_scores(method, glyphs, glyphs, episode, rate)
                quality[rate] += accuracy(scores, episode.query_labels).item()
        return max(quality, key=quality.__getitem__)

    def scores_of(method: str, episode: Episode, rate: float) -> Float[Tensor, "q w"]:
        classes, labels = len(episode.classes), episode.support_labels
        x, queries = features.train.x[episode.support, 0], features.test.x[episode.queries, 0]
        if method == "whitened_linear_probe":  # the memory head without its memory
            return memory_head(x, queries, episode, whiten, params.decay, [(1.0, 0.0)])[0]
        if method == "memory_head":
            return memory_head(x, queries, episode, whiten, params.decay, [strength])[0]
        if method == "plain_linear_probe":
            return plain_linear_probe(x, queries, episode, params)
        if method == "nearest_mean":
            return centred_cosines(class_means(x, labels, classes), queries)
        if method == "ranpac":
            head = RanPAC(x.shape[1], params.random_features, classes, generator(episode.seed, "RanPAC"), x.device)
            head.write(x, labels)
            return head.scores(queries, params.ridge)
        if method in TRAINED:
            return trained_scores(method, train.images, test.images, episode, rate)
        if method == "random_vit":
            x, queries = features.random_train.x[episode.support, 0], features.random_test.x[episode.queries, 0]
        if method == "pixels":
            x, queries = (
                data.images[i].flatten(1).float() for data, i in ((train, episode.support), (test, episode.queries))
            )
        return linear_probe(x, labels, queries, classes, params.decay)

    recipe = params.model_dump() | {"weights": backbone.sha256, "inputs": fingerprint(*input_files(dataset))}
    work = work_folder(f"train_few_shot/{dataset}", recipe)

    def run_method(method: str) -> dict[str, Any]:
        def compute() -> dict[str, Any]:
            rate = choose_rate(method) if method in TRAINED else params.plain_learning_rate
            return {
                "rate": rate,
                "acc": [accuracy(scores_of(method, e, rate), e.query_labels).item() for e in drawn],
            }

        return remembered(work / f"{method}.json", compute)

    methods = [*TRAINED, *FROZEN]
    done = dict(zip(methods, parallel_map(run_method, methods, device, f"few shots of {dataset}"), strict=True))
    results = {method: result["acc"] for method, result in done.items()}
    table = compare(results)
    folder = REPORTS / dataset
    rows = [{"episode": i, **{m: values[i] for m, values in results.items()}} for i in range(params.episodes)]
    save_csv(folder / "episodes.csv", rows)
    summary = {
        "methods": table,
        "memory_beta": strength[0],
        "memory_weight": strength[1],
        "learning_rate": {m: done[m]["rate"] for m in TRAINED},
        "chance": 1 / params.n_way,
    }
    save_json(folder / "summary.json", summary)
    draw_methods(folder / "methods.png", table, f"{dataset}: {params.n_way} classes, {params.n_shot} images of each")
    shutil.rmtree(work, ignore_errors=True)
    probe, head = (100 * table[method]["acc"]["mean"] for method in (REFERENCE, "memory_head"))
    print(f"{dataset}: linear probe {probe:.1f} %, memory head {head - probe:+.1f} points")


if __name__ == "__main__":
    run(main)
