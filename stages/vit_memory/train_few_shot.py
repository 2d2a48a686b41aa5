"""Learn from a few images of each class in many ways, in the same episodes, and compare them pair by pair.

The strength of the memory head, and the learning rate of what trains through the backbone, are chosen on episodes of base images:
glyphs, whose classes are none of the data set's, or training images that are held out of all episodes told of.

Reads   data/<dataset>.safetensors, models/extract_features/<dataset>/
Writes  reports/train_few_shot/<dataset>/episodes.csv   accuracy of each method in each episode
        reports/train_few_shot/<dataset>/summary.json   means, and differences to the linear probe with 95 % intervals
        reports/train_few_shot/<dataset>/metrics.json   the headlines of it, for `dvc metrics`
        reports/train_few_shot/<dataset>/methods.png, vector/methods.svg
"""

# Axes: g base images.

import itertools
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
from jaxtyping import Int
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from stages.common.backbone import Backbone, load_backbone
from stages.common.files import Summary, save_csv, save_json
from stages.common.metrics import accuracy, headline_metrics, mean_interval, mean_std
from stages.common.runtime import parallel_map, pick_device, pin_threads
from stages.common.stage import StageParams, parse_arguments, run
from stages.common.work import fingerprint, remembered, work_folder
from stages.vit_memory import pictures
from stages.vit_memory.classifiers import Whitening
from stages.vit_memory.episodes import Episode, draw_episode
from stages.vit_memory.features import FEATURES, input_files, load_featured_images
from stages.vit_memory.few_shot import (
    FROZEN,
    METHODS,
    REFERENCE,
    THROUGH,
    Examples,
    Method,
    Settings,
    Training,
    Views,
    memory_heads,
    shots,
)

REPORTS = Path("reports/train_few_shot")

HEADLINES = {  # what `dvc metrics` shows, and where it lies in the summary
    "acc_linear_probe": "methods/linear_probe/acc",
    "acc_memory_head": "methods/memory_head/acc",
    "acc_pixels": "methods/pixels/acc",
    "acc_random_weights": "methods/random_vit/acc",
}


class Params(StageParams):
    """Parameters of one data set's episodes."""

    seed: NonNegativeInt
    n_way: PositiveInt
    n_shot: PositiveInt
    episodes: PositiveInt
    queries: PositiveInt  # test images in an episode, at most
    decay: NonNegativeFloat  # of the linear probe's weights
    shrinkage: NonNegativeFloat  # of the covariance of base images
    betas: Annotated[list[PositiveFloat], Field(min_length=1)]  # of the memory head, to choose from
    weights: Annotated[
        list[NonNegativeFloat], Field(min_length=1)
    ]  # of the memory beside the linear probe, to choose from
    base_episodes: PositiveInt  # to choose on
    random_features: PositiveInt
    ridge: PositiveFloat
    num_prompts: PositiveInt
    beta: PositiveFloat  # of the memory in a block
    steps: PositiveInt  # of those that train through the backbone
    batch_size: PositiveInt  # of theirs
    learning_rates: Annotated[list[PositiveFloat], Field(min_length=1)]  # of prompts, gates and heads, to choose from
    trial_episodes: PositiveInt  # of base images, to choose it on
    plain_learning_rate: PositiveFloat  # of the plain linear probe
    plain_steps: PositiveInt

    def settings(self, backbone: Backbone | None, whiten: Whitening, strength: tuple[float, float]) -> Settings:
        """Return what the methods are told; `strength` is of the memory head."""
        rate = self.learning_rates[0]
        training = None
        if backbone is not None:
            training = Training(backbone, self.num_prompts, self.beta, self.steps, self.batch_size, rate)
        return Settings(
            decay=self.decay,
            whiten=whiten,
            strength=strength,
            random_features=self.random_features,
            ridge=self.ridge,
            plain_learning_rate=self.plain_learning_rate,
            plain_steps=self.plain_steps,
            training=training,
        )


Shots = Iterable[tuple[Examples, Examples]]  # support and queries of episodes


def base_episodes(labels: Int[Tensor, " g"], n_way: int, n_shot: int, queries: int, seeds: range) -> list[Episode]:
    """Return episodes among base images of as many shots as the real ones, or as many as leave a query of each class."""
    n_shot = min(n_shot, len(labels) // int(labels.max() + 1) - 1)
    return [draw_episode(labels, labels, n_way, n_shot, queries, seed) for seed in seeds]


def choose_strength(
    trials: Shots, strengths: list[tuple[float, float]], whiten: Whitening, decay: float
) -> tuple[float, float]:
    """Return the (beta, weight) of the memory head that is best in some episodes."""
    totals = torch.zeros(len(strengths), dtype=torch.float64)
    for support, queries in trials:
        logits = memory_heads(support, queries, whiten, decay, strengths)
        totals += torch.stack([accuracy(each, queries.labels) for each in logits]).cpu()
    return strengths[int(totals.argmax())]


def accuracies(method: Method, episodes: Shots, settings: Settings) -> list[float]:
    """Return the accuracy of a method in each episode."""
    return [accuracy(method(support, queries, settings), queries.labels).item() for support, queries in episodes]


def with_rate(settings: Settings, learning_rate: float) -> Settings:
    """Return the settings with another learning rate for what trains through the backbone, if anything does."""
    return replace(settings, training=settings.training and replace(settings.training, learning_rate=learning_rate))


def choose_rate(method: Method, trials: Shots, rates: list[float], settings: Settings) -> float:
    """Return the learning rate that is best in some episodes."""
    quality = {rate: sum(accuracies(method, trials, with_rate(settings, rate))) for rate in rates}
    return max(quality, key=quality.__getitem__)


def compare(results: dict[str, list[float]]) -> Summary:
    """Return mean and spread over episodes, and each method's difference to the reference in the same episodes.

    The interval is Student's, of 95 %.
    """
    table: Summary = {}
    for method, values in results.items():
        difference = torch.tensor(values, dtype=torch.float64) - torch.tensor(results[REFERENCE], dtype=torch.float64)
        table[method] = {"acc": mean_std(values)}
        if method != REFERENCE and len(values) > 1:
            table[method]["difference"] = mean_interval(difference.tolist())
    return table


def write_report(dataset: str, results: dict[str, list[float]], choices: Summary, n_way: int, n_shot: int) -> None:
    """Write the tables and the picture of the methods' accuracies in each episode."""
    folder, table = REPORTS / dataset, compare(results)
    episodes = range(len(results[REFERENCE]))
    rows = [{"episode": i, **{m: values[i] for m, values in results.items()}} for i in episodes]
    save_csv(folder / "episodes.csv", rows)
    summary = {"methods": table, **choices, "chance": 1 / n_way}
    save_json(folder / "summary.json", summary)
    save_json(folder / "metrics.json", headline_metrics(summary, HEADLINES))
    title = f"{dataset}: {n_way} classes, {n_shot} images of each"
    pictures.draw_methods(folder / "methods.png", table, REFERENCE, title)
    probe, head = (100 * table[method]["acc"]["mean"] for method in (REFERENCE, "memory_head"))
    print(f"{dataset}: linear probe {probe:.1f} %, memory head {head - probe:+.1f} points")


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of extract_features.datasets").dataset
    params = Params.load("train_few_shot", dataset)
    pin_threads()
    device = pick_device()
    features, train_images, test_images = load_featured_images(dataset, device)
    backbone = load_backbone(FEATURES / dataset / "backbone.safetensors", device) if features.is_vit else None
    train = Views(train_images.images, features.train.x[:, 0], features.random_train.x[:, 0])
    test = Views(test_images.images, features.test.x[:, 0], features.random_test.x[:, 0])
    base = Views(features.base_images, features.base.x[:, 0], None)
    whiten = features.whitening(base.x, params.shrinkage)
    way, shot, queries = params.n_way, params.n_shot, params.queries
    seeds = range(params.seed, params.seed + params.episodes)
    episodes = [draw_episode(train_images.labels, test_images.labels, way, shot, queries, seed) for seed in seeds]
    trial_seeds = range(params.seed, params.seed + max(params.base_episodes, params.trial_episodes))
    trials = list(shots(base_episodes(features.base.labels, way, shot, queries, trial_seeds), base, base))

    strengths = list(itertools.product(params.betas, params.weights))
    beta, weight = choose_strength(trials[: params.base_episodes], strengths, whiten, params.decay)
    settings = params.settings(backbone, whiten, (beta, weight))
    recipe = params.model_dump() | {"inputs": fingerprint(*input_files(dataset))}
    work = work_folder(f"train_few_shot/{dataset}", recipe)

    methods = METHODS if backbone else FROZEN

    def compute(name: str) -> Summary:
        method, rate = methods[name], params.learning_rates[0]
        if name in THROUGH:
            rate = choose_rate(method, trials[: params.trial_episodes], params.learning_rates, settings)
        return {"rate": rate, "acc": accuracies(method, shots(episodes, train, test), with_rate(settings, rate))}

    def run_method(name: str) -> Summary:
        return remembered(work / f"{name}.json", lambda: compute(name))

    done = dict(zip(methods, parallel_map(run_method, list(methods), device, f"few shots of {dataset}"), strict=True))
    rates = {name: done[name]["rate"] for name in THROUGH if name in done}
    choices = {"memory_beta": beta, "memory_weight": weight, "learning_rate": rates}
    write_report(dataset, {name: result["acc"] for name, result in done.items()}, choices, way, shot)
    shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    run(main)
