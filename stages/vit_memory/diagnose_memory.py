"""Measure what associative memory can hold, and look at what it retrieves for images of a data set.

Reads   data/<dataset>.safetensors, models/extract_features/<dataset>/
Writes  reports/diagnose_memory/<dataset>/retrieval.csv   error of retrieval by number of patterns and beta
        reports/diagnose_memory/<dataset>/energy.csv      energy and movement at each update
        reports/diagnose_memory/<dataset>/capacity.csv    fraction of patterns that modern and classical networks retrieve
        reports/diagnose_memory/<dataset>/summary.json
        reports/diagnose_memory/<dataset>/{retrieval, energy}.png, vector/*.svg, {attention, slots}.png
"""

# Axes: m stored patterns or slots, q queries, d features, c classes.

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from stages.common.files import save_csv, save_json
from stages.common.images import ImageSet
from stages.common.metrics import accuracy, majority_accuracy, mean_std
from stages.common.randomness import generator
from stages.common.runtime import pin_threads
from stages.common.stage import StageParams, parse_arguments, run
from stages.vit_memory import pictures
from stages.vit_memory.episodes import Episode, draw_episode
from stages.vit_memory.features import FeatureSets, load_featured_images
from stages.vit_memory.hopfield import associate, energy, hebbian_retrieve, retrieve

REPORTS = Path("reports/diagnose_memory")

PROBES = 256  # noisy keys, at most: enough for a mean, and memory for 10,000 patterns
CAPACITY_FLIPS = 0.1  # of the bits
MODERN_UPDATES = 3  # the first retrieves, and nothing moves after it
CLASSICAL_UPDATES = 20  # nothing moves after 5
SHOWN = 8  # images in the picture of attention


class Params(StageParams):
    """Parameters of the measurements."""

    seeds: Annotated[list[NonNegativeInt], Field(min_length=2)]
    dim: PositiveInt
    noise: NonNegativeFloat  # length of what is added to a stored pattern of length 1
    betas: list[PositiveFloat]
    patterns: list[PositiveInt]
    energy_betas: list[PositiveFloat]
    updates: PositiveInt
    capacity_patterns: list[PositiveInt]
    slots: PositiveInt  # stored images of each class
    queries: PositiveInt  # test images
    attention_betas: Annotated[list[PositiveFloat], Field(min_length=1)]


def noisy_keys(patterns: int, dim: int, noise: float, seed: int) -> tuple[Float[Tensor, "m d"], Float[Tensor, "q d"]]:
    """Return random patterns of length 1, and the first of them with something of length `noise` added."""
    random = generator(seed, f"{patterns} patterns")
    stored = normalize(torch.randn(patterns, dim, generator=random), dim=1)
    queries = stored[:PROBES]
    return stored, queries + noise * (torch.randn(queries.shape, generator=random) / dim**0.5)


def retrieval_rows(
    patterns: list[int], betas: list[float], dim: int, noise: float, seeds: list[int]
) -> list[dict[str, float]]:
    """Return the distance between what one update retrieves and the pattern that was meant, by number of patterns and beta."""
    rows = []
    for count in patterns:
        keys = [noisy_keys(count, dim, noise, seed) for seed in seeds]
        for beta in betas:
            back = [(retrieve(x, q, beta), x, torch.arange(len(q))) for x, q in keys]
            errors = mean_std([(y - x[meant]).norm(dim=1).mean().item() for y, x, meant in back])
            nearest = [accuracy(y @ x.T, meant).item() for y, x, meant in back]
            row = {"patterns": count, "beta": beta, "error": errors["mean"], "std": errors["std"]}
            rows.append(row | {"nearest": sum(nearest) / len(nearest)})
    return rows


def energy_rows(
    stored: Float[Tensor, "m d"], queries: Float[Tensor, "q d"], betas: list[float], updates: int
) -> list[dict[str, float]]:
    """Return the mean energy and movement of states that start between two queries, after each update."""
    rows = []
    for beta in betas:
        state = normalize(queries + queries.roll(1, 0), dim=1)
        moved = torch.zeros(len(state))
        for step in range(updates + 1):
            value = energy(stored, state, beta).mean().item()
            rows.append({"beta": beta, "step": step, "energy": value, "movement": moved.mean().item()})
            updated = retrieve(stored, state, beta)
            state, moved = updated, (updated - state).norm(dim=1)
    return rows


def capacity_rows(patterns: list[int], dim: int, seeds: list[int]) -> list[dict[str, float]]:
    """Return the fraction of bipolar patterns that come back without an error from copies with flipped bits."""
    rows = []
    for count in patterns:
        retrieved: dict[str, list[float]] = {"modern": [], "classical": []}
        for seed in seeds:
            random = generator(seed, f"capacity {count}")
            stored = torch.where(torch.rand(count, dim, generator=random) < 0.5, -1.0, 1.0)
            flips = torch.rand(stored.shape, generator=random) < CAPACITY_FLIPS
            queries = torch.where(flips, -stored, stored)
            back = {
                "modern": retrieve(stored, queries, 1.0, MODERN_UPDATES).sign(),
                "classical": hebbian_retrieve(stored, queries, CLASSICAL_UPDATES),
            }
            for kind, values in back.items():
                retrieved[kind].append((values == stored).all(1).double().mean().item())
        means = {kind: sum(fractions) / len(fractions) for kind, fractions in retrieved.items()}
        rows.append({"patterns": count, "dim": dim, **means})
    return rows


@dataclass(frozen=True)
class Recall:
    """What test images attend to among stored training images, by beta; images and slots are in the order of their classes."""

    attention: dict[str, Float[Tensor, "q m"]]
    images: Int[Tensor, " q"]  # indices of test images
    labels: Int[Tensor, " q"]
    stored: Int[Tensor, " m"]  # indices of training images
    stored_labels: Int[Tensor, " m"]

    def on_class(self, classes: int) -> dict[str, Float[Tensor, "q c"]]:
        """Return the attention on each class's slots."""
        members = one_hot(self.stored_labels, classes).float()
        return {name: weights @ members for name, weights in self.attention.items()}


def recall(features: FeatureSets, episode: Episode, betas: list[float]) -> Recall:
    """Return what an episode's queries retrieve from its support, both whitened, centred and of length 1."""
    whiten = features.whitening(features.base.x[:, 0])
    keys, queries = whiten(features.train.x[episode.support, 0]), whiten(features.test.x[episode.queries, 0])
    centre = keys.mean(0)
    keys, queries = normalize(keys - centre, dim=1), normalize(queries - centre, dim=1)
    order = episode.query_labels.argsort(stable=True)
    attention = {f"beta {beta:g}": associate(keys, queries[order], beta) for beta in betas}
    labels = episode.query_labels[order]
    return Recall(attention, episode.queries[order], labels, episode.support, episode.support_labels)


def draw_examples(folder: Path, recalled: Recall, train: ImageSet, test: ImageSet) -> None:
    """Draw the attention of all test images, and what one of each class retrieves."""
    labels = recalled.labels
    picked = [int((labels == c).nonzero()[0]) for c in range(min(SHOWN, len(train.classes)))]
    images, stored = test.subset(recalled.images[picked]).pixels(), train.subset(recalled.stored).pixels()
    names = [train.classes[int(labels[i])] for i in picked]
    attention = {name: weights[picked] for name, weights in recalled.attention.items()}
    pictures.draw_attention(folder / "attention.png", images, stored, attention, names)
    pictures.draw_slots(folder / "slots.png", recalled.attention, recalled.stored_labels.tolist())


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of extract_features.datasets").dataset
    params = Params.load("diagnose_memory", dataset)
    pin_threads()
    features, train, test = load_featured_images(dataset, torch.device("cpu"))
    dim, noise, seeds = params.dim, params.noise, params.seeds
    errors = retrieval_rows(params.patterns, params.betas, dim, noise, seeds)
    keys = noisy_keys(max(params.patterns), dim, noise, seeds[0])
    energies = energy_rows(*keys, params.energy_betas, params.updates)
    capacity = capacity_rows(params.capacity_patterns, dim, seeds)
    classes, labels = len(features.classes), features.train.labels
    episode = draw_episode(labels, features.test.labels, classes, params.slots, params.queries, seeds[0])
    recalled = recall(features, episode, params.attention_betas)
    by_class = recalled.on_class(classes)
    each = torch.arange(len(recalled.labels))
    on_own_class = {name: weights[each, recalled.labels].mean().item() for name, weights in by_class.items()}

    folder = REPORTS / dataset
    save_csv(folder / "retrieval.csv", errors)
    save_csv(folder / "energy.csv", energies)
    save_csv(folder / "capacity.csv", capacity)
    by_patterns: dict[str, dict[str, float]] = {}
    for row in errors:
        by_patterns.setdefault(str(row["patterns"]), {})[f"{row['beta']:g}"] = row["error"]
    summary = {
        "retrieval_error": by_patterns,
        "capacity": {k: {str(row["patterns"]): row[k] for row in capacity} for k in ("modern", "classical")},
        "attention_on_own_class": on_own_class,
        "retrieved_class_acc": {name: accuracy(weights, recalled.labels).item() for name, weights in by_class.items()},
        "chance": 1 / classes,
        "majority_acc": majority_accuracy(labels, features.test.labels),
    }
    save_json(folder / "summary.json", summary)
    pictures.draw_retrieval(folder / "retrieval.png", errors, capacity)
    pictures.draw_energy(folder / "energy.png", energies)
    draw_examples(folder, recalled, train, test)
    print(f"{dataset}: attention on the own class " + ", ".join(f"{k} {v:.1%}" for k, v in on_own_class.items()))


if __name__ == "__main__":
    run(main)
