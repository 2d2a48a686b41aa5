"""Measure what associative memory can hold, and look at what it retrieves for images of a data set.

Reads   data/<dataset>.safetensors, models/extract_features/<dataset>/
Writes  reports/diagnose_memory/<dataset>/retrieval.csv   error of retrieval by number of patterns and beta
        reports/diagnose_memory/<dataset>/energy.csv      energy and movement at each update
        reports/diagnose_memory/<dataset>/capacity.csv    share of patterns that modern and classical networks retrieve
        reports/diagnose_memory/<dataset>/summary.json
        reports/diagnose_memory/<dataset>/{retrieval, energy, attention, slots}.png
"""

from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from stages.common.files import save_csv, save_json
from stages.common.metrics import accuracy, majority_accuracy, mean_std
from stages.common.randomness import generator
from stages.common.runtime import pin_threads
from stages.common.stage import StageParams, parse_arguments, run
from stages.vit_memory import pictures
from stages.vit_memory.classifiers import Whitening
from stages.vit_memory.episodes import draw_episode
from stages.vit_memory.features import load_featured_images
from stages.vit_memory.hopfield import associate, energy, hebbian_retrieve, retrieve

REPORTS = Path("reports/diagnose_memory")

PROBES = 256  # noisy keys, at most
CAPACITY_FLIPS = 0.1  # of the bits
SHOWN = 8  # images in the picture of attention

Rows = list[dict[str, Any]]


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


def noisy_keys(patterns: int, params: Params, seed: int) -> tuple[Float[Tensor, "m d"], Float[Tensor, "q d"]]:
    """Return random patterns of length 1, and the first of them with noise added."""
    random = generator(seed, f"{patterns} patterns")
    stored = normalize(torch.randn(patterns, params.dim, generator=random), dim=1)
    queries = stored[:PROBES]
    noise = torch.randn(queries.shape, generator=random) / params.dim**0.5
    return stored, queries + params.noise * noise


def retrieval_rows(params: Params) -> Rows:
    """Return the distance between what one update retrieves and the pattern that was meant, by number of patterns and beta."""
    rows = []
    for patterns in params.patterns:
        keys = [noisy_keys(patterns, params, seed) for seed in params.seeds]
        for beta in params.betas:
            errors = [(retrieve(x, q, beta) - x[: len(q)]).norm(dim=1).mean().item() for x, q in keys]
            nearest = [
                ((retrieve(x, q, beta) @ x.T).argmax(1) == torch.arange(len(q))).double().mean().item() for x, q in keys
            ]
            spread = mean_std(errors)
            row = {"patterns": patterns, "beta": beta, "error": spread["mean"], "std": spread["std"]}
            rows.append(row | {"nearest": sum(nearest) / len(nearest)})
    return rows


def energy_rows(params: Params) -> Rows:
    """Return the mean energy and movement of states that start between patterns, after each update."""
    rows = []
    for beta in params.energy_betas:
        stored, queries = noisy_keys(max(params.patterns), params, params.seeds[0])
        state = normalize(queries + queries.roll(1, 0), dim=1)
        moved = torch.zeros(len(state))
        for step in range(params.updates + 1):
            value = energy(stored, state, beta).mean().item()
            rows.append({"beta": beta, "step": step, "energy": value, "movement": moved.mean().item()})
            updated = retrieve(stored, state, beta)
            state, moved = updated, (updated - state).norm(dim=1)
    return rows


def capacity_rows(params: Params) -> Rows:
    """Return the share of bipolar patterns that come back without an error from copies with flipped bits."""
    rows = []
    for patterns in params.capacity_patterns:
        shares: dict[str, list[float]] = {"modern": [], "classical": []}
        for seed in params.seeds:
            random = generator(seed, f"capacity {patterns}")
            stored = torch.where(torch.rand(patterns, params.dim, generator=random) < 0.5, -1.0, 1.0)
            flips = torch.rand(stored.shape, generator=random) < CAPACITY_FLIPS
            queries = torch.where(flips, -stored, stored)
            back = {
                "modern": retrieve(stored, queries, 1.0, 3).sign(),
                "classical": hebbian_retrieve(stored, queries, 20),
            }
            for kind, values in back.items():
                shares[kind].append((values == stored).all(1).double().mean().item())
        rows.append({"patterns": patterns, "dim": params.dim, **{k: sum(v) / len(v) for k, v in shares.items()}})
    return rows


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of extract_features.datasets").dataset
    params = Params.load("diagnose_memory", dataset)
    pin_threads()
    features, train, test = load_featured_images(dataset, torch.device("cpu"))
    errors, energies, capacity = retrieval_rows(params), energy_rows(params), capacity_rows(params)

    classes = len(features.classes)
    labels, test_labels = features.train.labels, features.test.labels
    episode = draw_episode(labels, test_labels, classes, params.slots, params.queries, params.seeds[0])
    whiten = Whitening(features.glyphs.x[:, 0], features.glyphs.labels)
    keys, queries = whiten(features.train.x[episode.support, 0]), whiten(features.test.x[episode.queries, 0])
    centre = keys.mean(0)
    keys, queries = normalize(keys - centre, dim=1), normalize(queries - centre, dim=1)
    order = episode.query_labels.argsort(stable=True)
    shares = {f"beta {beta:g}": associate(keys, queries[order], beta) for beta in params.attention_betas}
    member = one_hot(episode.support_labels, classes).float()
    asked = episode.query_labels[order]
    own_share = {
        name: (share @ member)[torch.arange(len(asked)), asked].mean().item() for name, share in shares.items()
    }
    read_acc = {name: accuracy(share @ member, asked).item() for name, share in shares.items()}

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
        "attention_on_own_class": own_share,
        "retrieved_class_acc": read_acc,
        "chance": 1 / classes,
        "majority_acc": majority_accuracy(labels, test_labels),
    }
    save_json(folder / "summary.json", summary)
    pictures.draw_retrieval(folder / "retrieval.png", errors, capacity)
    pictures.draw_energy(folder / "energy.png", energies)
    picked = [int((asked == c).nonzero()[0]) for c in range(min(SHOWN, classes))]
    images = test.subset(episode.queries[order][picked]).pixels()
    stored = train.subset(episode.support).pixels()
    names = [features.classes[int(asked[i])] for i in picked]
    pictures.draw_attention(
        folder / "attention.png", images, stored, {n: share[picked] for n, share in shares.items()}, names
    )
    pictures.draw_slots(folder / "slots.png", shares, episode.support_labels.tolist())
    print(f"{dataset}: attention on the own class " + ", ".join(f"{k} {v:.1%}" for k, v in own_share.items()))


if __name__ == "__main__":
    run(main)
