"""Decompose the bilinear classifiers of one data set, and measure what their eigenvectors are good for.

Reads   data/<dataset>.safetensors, models/train_bilinear/<dataset>/
Writes  models/decompose_bilinear/<dataset>/decomposition.pt   DecompositionArtifacts of the first regularised classifier
        reports/decompose_bilinear/<dataset>/summary.json      every number beside its baseline
        reports/decompose_bilinear/<dataset>/truncation.csv    accuracy from k eigenvectors a class
        reports/decompose_bilinear/<dataset>/two_layer.csv     accuracy from k1 outer and k2 inner eigenvectors
        reports/decompose_bilinear/<dataset>/*.png
"""

import copy
import statistics
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from stages.bilinear import pictures
from stages.bilinear.decomposition import (
    DecompositionArtifacts,
    adversarial_masks,
    data_basis,
    decompose_bilinear_model,
    decompose_two_layers,
    eigen_terms,
    embed,
    input_basis,
    matched_similarity,
    nested_logits,
    order_by_magnitude,
    order_by_sign,
    pixel_attributions,
    subspace_similarity,
    truncated_logits,
)
from stages.bilinear.model import BilinearImageClassifier, build_image_classifier
from stages.bilinear.training import load_model, save_checkpoint
from stages.common.artifacts import save_csv, save_json
from stages.common.command import InputError, parse_arguments, run
from stages.common.images import ImageSet, load_images, split_validation
from stages.common.metrics import accuracy, mean_std, over_seeds
from stages.common.params import StageParams
from stages.common.runtime import generator, parallel_map, pick_device, pin_threads

RUNS = Path("models/train_bilinear")
MODELS = Path("models/decompose_bilinear")
REPORTS = Path("reports/decompose_bilinear")

SINGLE_LAYER = ("regularised", "unregularised")
CHUNK = 1000  # images at a time, where memory grows with images x classes x eigenvectors
MASK_CANDIDATES = 3  # masks of each class among which validation chooses
PERMUTATIONS = 3  # of each mask, as its baseline

Ranks = Annotated[list[PositiveInt], Field(min_length=1)]
Model = BilinearImageClassifier
Rows = list[dict[str, Any]]


class Params(StageParams):
    """Parameters of one data set's decomposition."""

    seed: NonNegativeInt  # of random baselines
    ranks: Ranks  # eigenvectors a class in the truncation tables; cut at the network's size
    headline_ranks: Ranks  # those that summary.json shows
    nested_ranks: Ranks  # outer and inner eigenvectors a class in the two-layer table; cut likewise
    mask_norm: PositiveFloat  # where the pixel range is 1
    mask_rank: PositiveInt  # eigenvectors a class that a mask must not excite, but for one
    validation_images: PositiveInt  # on which masks are chosen
    deletion_pixels: Ranks  # how many pixels of an image to delete
    similarity_rank: PositiveInt  # eigenvectors a class that are matched between seeds
    subspace_rank: PositiveInt  # positive eigenvectors a class whose span is compared


@dataclass(frozen=True)
class Network:
    """A trained classifier and the config of its run."""

    model: Model
    config: dict[str, Any]


def load_networks(dataset: str, variant: str) -> list[Network]:
    """Return the best checkpoint of every seed of a variant."""
    folder = RUNS / f"{dataset}-{variant}"
    networks = [Network(*load_model(path)) for path in sorted(folder.glob("*/best.pt"))]
    if not networks:
        raise InputError(f"{folder} holds no checkpoints: run 'dvc repro train_bilinear@{folder.name}'")
    return networks


def decompose_in_bases(model: Model, x: Float[Tensor, "n c h w"]) -> dict[str, DecompositionArtifacts]:
    """Decompose in the hidden, the input and the data basis of `x`; in float64, since whitening is ill-conditioned."""
    model = copy.deepcopy(model).double()
    bases = {"hidden": None, "input": input_basis(model), "data": data_basis(model, x.double())}
    return {name: decompose_bilinear_model(model, basis).to(x.dtype) for name, basis in bases.items()}


def reconstruction_error(model: Model, artifacts: DecompositionArtifacts, x: Float[Tensor, "n c h w"]) -> float:
    """Return the largest difference between the network's logits and its eigenvectors', over the largest logit."""
    logits = model(x)
    rebuilt = eigen_terms(embed(model, x), artifacts.eigenvalues, artifacts.eigenvectors_hidden).sum(2)
    return ((rebuilt - logits).abs().max() / logits.abs().max()).item()


def truncation_accuracy(
    model: Model, artifacts: DecompositionArtifacts, test: ImageSet, ranks: list[int], seed: int
) -> dict[str, dict[int, float]]:
    """Return the accuracy from k eigenvectors a class, by ranking and k.

    Rankings: `magnitude` takes the k largest |lambda|, `sign` the k most positive and the k most negative, and
    `random`, the baseline, any 2 k.
    """
    values = artifacts.eigenvalues
    n = values.shape[1]
    shuffled = torch.rand(values.shape, generator=generator(seed, "random eigenvectors")).argsort(1).to(values.device)
    rankings = {
        "magnitude": (order_by_magnitude(values), ranks),
        "sign": (order_by_sign(values), [min(2 * k, n) for k in ranks]),
        "random": (shuffled, [min(2 * k, n) for k in ranks]),
    }
    correct = {name: torch.zeros(len(ranks), dtype=torch.double, device=values.device) for name in rankings}
    for rows in torch.arange(len(test)).split(CHUNK):
        chunk = test.subset(rows)
        terms = eigen_terms(embed(model, chunk.pixels()), values, artifacts.eigenvectors_hidden)
        for name, (order, counts) in rankings.items():
            correct[name] += accuracy(truncated_logits(terms, order, counts), chunk.labels) * len(chunk)
    return {name: dict(zip(ranks, (hits / len(test)).tolist(), strict=True)) for name, hits in correct.items()}


def mask_accuracy(
    model: Model, artifacts: DecompositionArtifacts, validation: ImageSet, test: ImageSet, params: Params, seed: int
) -> tuple[dict[str, float], Float[Tensor, "c d"], Float[Tensor, "c d"]]:
    """Return test accuracies under masks of `mask_norm`, the mask of each class, and the same with its pixels permuted.

    Added to every image, a class's mask is the candidate and sign that hurt most on validation images. `best_mask` is the
    class whose mask hurt most there, `mean_mask` the mean over classes; `permuted` is the mean over permutations of
    every mask, the baseline.
    """
    candidates = params.mask_norm * adversarial_masks(artifacts, params.mask_rank)[:, :MASK_CANDIDATES]
    candidates = torch.cat([candidates, -candidates], dim=1)  # [c, m, d]
    on_validation, on_test = ((model.embed(data.pixels().flatten(1)), data.labels) for data in (validation, test))

    def masked_accuracy(data: tuple[Tensor, Tensor], mask: Float[Tensor, " d"]) -> float:
        hidden, labels = data
        return accuracy(model.read_hidden(hidden + model.embed(mask)), labels).item()  # E (x + m) = E x + E m

    harm = torch.tensor([[masked_accuracy(on_validation, mask) for mask in masks] for masks in candidates])
    chosen = candidates[torch.arange(len(candidates)), harm.argmin(1).to(candidates.device)]
    masked = [masked_accuracy(on_test, mask) for mask in chosen]
    random = generator(seed, "permuted masks")
    orders = [torch.randperm(chosen.shape[1], generator=random).to(chosen.device) for _ in range(PERMUTATIONS)]
    permuted = [masked_accuracy(on_test, mask[order]) for order in orders for mask in chosen]
    result = {
        "clean": masked_accuracy(on_test, torch.zeros_like(chosen[0])),
        "best_mask": masked[harm.amin(1).argmin().item()],
        "mean_mask": statistics.fmean(masked),
        "permuted": statistics.fmean(permuted),
    }
    return result, chosen, chosen[:, orders[0]]


def deletion_agreement(model: Model, test: ImageSet, counts: list[int], seed: int) -> dict[str, dict[int, float]]:
    """Return the share of images that keep their predicted class when n pixels are set to zero, for every n of `counts`.

    `attributed` deletes the pixels that add most to the predicted logit, `random`, the baseline, any pixels that are lit.
    """
    x = test.pixels()
    predicted = model(x).argmax(1)
    lit = x.flatten(1) > 0
    random = torch.rand(lit.shape, generator=generator(seed, "deleted pixels")).to(x.device)
    rankings = {"attributed": pixel_attributions(model, x, predicted)[0], "random": lit * random}

    def kept(ranking: Float[Tensor, "n d"], count: int) -> float:
        deleted = ranking.topk(min(count, ranking.shape[1]), dim=1).indices
        return accuracy(model(x.flatten(1).scatter(1, deleted, 0.0).view_as(x)), predicted).item()

    return {name: {count: kept(ranking, count) for count in counts} for name, ranking in rankings.items()}


def seed_similarity(decompositions: list[DecompositionArtifacts], params: Params) -> dict[str, dict[str, float]]:
    """Return the similarity between every two seeds' eigenvectors and spans, mean and spread over the pairs."""
    pairs = list(combinations(decompositions, 2))
    return {
        "eigenvectors": mean_std([matched_similarity(a, b, params.similarity_rank) for a, b in pairs]),
        "subspace": mean_std([subspace_similarity(a, b, params.subspace_rank) for a, b in pairs]),
    }


def analyse_two_layer(network: Network, test: ImageSet, ranks: list[int]) -> dict[str, Any]:
    """Return a two-layer network's accuracy, and that from k1 outer and k2 inner eigenvectors as `nested`[k1][k2]."""
    model = network.model
    ranks = [rank for rank in ranks if rank <= len(model.embedding_weight)]
    tree = decompose_two_layers(model, max(ranks))
    correct = torch.zeros(len(ranks), len(ranks), dtype=torch.double, device=test.labels.device)
    for rows in torch.arange(len(test)).split(CHUNK):
        chunk = test.subset(rows)
        logits = nested_logits(tree, embed(model, chunk.pixels()), ranks, ranks)
        correct += accuracy(logits, chunk.labels) * len(chunk)
    nested = {
        k1: dict(zip(ranks, row, strict=True)) for k1, row in zip(ranks, (correct / len(test)).tolist(), strict=True)
    }
    return {"full_acc": accuracy(model(test.pixels()), test.labels).item(), "nested": nested}


def decompose_untrained(network: Network) -> DecompositionArtifacts:
    """Decompose the network that training started from: the baseline of what training makes alike."""
    model = build_image_classifier(network.config["model"], network.config["seed"])
    return decompose_bilinear_model(model, input_basis(model)).to(network.model.embed.weight.device)


@dataclass(frozen=True)
class Analysis:
    """What one single-layer classifier's decomposition gives: numbers for the tables, tensors for the pictures."""

    model: Model
    numbers: dict[str, Any]
    bases: dict[str, DecompositionArtifacts]
    masks: Float[Tensor, "c d"]
    permuted_masks: Float[Tensor, "c d"]


def analyse(network: Network, train: ImageSet, test: ImageSet, params: Params) -> Analysis:
    """Measure one single-layer classifier; its random baselines are drawn by `params.seed` and its own seed."""
    model, split, seed = network.model, network.config["dataset"], params.seed + network.config["seed"]
    rest, validation = split_validation(train, split["validation_fraction"], split["split_seed"])
    bases = decompose_in_bases(model, rest.pixels())
    mask_acc, masks, permuted_masks = mask_accuracy(
        model, bases["input"], validation.subset(slice(params.validation_images)), test, params, seed
    )
    numbers = {
        "full_acc": accuracy(model(test.pixels()), test.labels).item(),
        "reconstruction_error": reconstruction_error(model, bases["hidden"], test.pixels()),
        "truncated_acc": {
            basis: truncation_accuracy(model, artifacts, test, clip_ranks(params.ranks, artifacts.eigenvalues), seed)
            for basis, artifacts in bases.items()
        },
        "mask_acc": mask_acc,
        "kept_prediction": deletion_agreement(model, test, params.deletion_pixels, seed),
    }
    return Analysis(model, numbers, bases, masks, permuted_masks)


def clip_ranks(ranks: list[int], eigenvalues: Float[Tensor, "c k"]) -> list[int]:
    """Return the ranks that a network of k eigenvectors a class has, and k itself: nothing left out."""
    return [rank for rank in ranks if rank < eigenvalues.shape[1]] + [eigenvalues.shape[1]]


def headline(result: dict[str, Any], ranks: list[int]) -> dict[str, Any]:
    """Return one variant's result with its truncation curves cut to `ranks` eigenvectors of either sign."""
    curves = {
        basis: {ranking: {k: curve[str(k)] for k in ranks if str(k) in curve} for ranking, curve in rankings.items()}
        for basis, rankings in result["truncated_acc"].items()
    }
    return result | {"truncated_acc": curves}


def truncation_rows(summary: dict[str, Any]) -> Rows:
    """Return the truncation curves as rows: `k`, the number of eigenvectors it stands for, and the accuracy."""
    return [
        {
            "variant": variant,
            "basis": basis,
            "ranking": ranking,
            "k": int(k),
            "eigenvectors": int(k) if ranking == "magnitude" else min(2 * int(k), max(map(int, curve))),
            "acc": acc["mean"],
            "std": acc["std"],
        }
        for variant in SINGLE_LAYER
        for basis, rankings in summary[variant]["truncated_acc"].items()
        for ranking, curve in rankings.items()
        for k, acc in curve.items()
    ]


def two_layer_rows(nested: dict[str, dict[str, dict[str, float]]]) -> Rows:
    """Return the table of the two-layer network as rows."""
    return [
        {"outer": int(k1), "inner": int(k2), "acc": acc["mean"], "std": acc["std"]}
        for k1, inner in nested.items()
        for k2, acc in inner.items()
    ]


def write_report(
    folder: Path, summary: dict[str, Any], first: dict[str, Analysis], test: ImageSet, params: Params
) -> None:
    """Write the tables, and the pictures of the `first` network of each variant."""
    regularised, unregularised = first["regularised"], first["unregularised"]
    curves = truncation_rows(summary)
    full_acc = {variant: summary[variant]["full_acc"]["mean"] for variant in first}
    input_bases = {variant: analysis.bases["input"] for variant, analysis in first.items()}
    pictures.draw_gallery(folder / "eigenvectors.png", input_bases, test)
    pictures.draw_spectra(folder / "spectra.png", input_bases, test.classes)
    pictures.draw_truncation(folder / "truncation.png", curves, full_acc)
    pictures.draw_masks(
        folder / "masks.png", unregularised.model, test, unregularised.masks, unregularised.permuted_masks
    )
    pictures.draw_attributions(folder / "attributions.png", regularised.model, test)
    save_csv(folder / "truncation.csv", curves)
    save_csv(folder / "two_layer.csv", two_layer_rows(summary["two_layer"]["nested"]))
    shortened = {variant: headline(summary[variant], params.headline_ranks) for variant in SINGLE_LAYER}
    two_layer = {"full_acc": summary["two_layer"]["full_acc"]}
    save_json(folder / "summary.json", summary | shortened | {"two_layer": two_layer})
    k = str(max(params.headline_ranks))
    kept, full = summary["regularised"]["truncated_acc"]["hidden"]["sign"][k], full_acc["regularised"]
    print(f"{folder.name}: {k} + {k} eigenvectors a class classify {kept['mean']:.2%}, the whole network {full:.2%}")


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of train_bilinear.datasets").dataset
    params = Params.load("decompose_bilinear", dataset)
    pin_threads()
    device = pick_device()
    train, test = load_images(dataset, device)
    networks = {variant: load_networks(dataset, variant) for variant in (*SINGLE_LAYER, "two_layer")}

    summary: dict[str, Any] = {"mask_norm": params.mask_norm}
    first: dict[str, Analysis] = {}
    for variant in SINGLE_LAYER:
        analyses = parallel_map(lambda n: analyse(n, train, test, params), networks[variant], device, variant)
        summary[variant] = over_seeds([analysis.numbers for analysis in analyses])
        summary[variant]["similarity"] = seed_similarity([a.bases["input"] for a in analyses], params)
        first[variant] = analyses[0]
    untrained = [decompose_untrained(network) for network in networks["regularised"]]
    summary["untrained"] = {"similarity": seed_similarity(untrained, params)}
    ranks = params.nested_ranks
    trees = parallel_map(lambda n: analyse_two_layer(n, test, ranks), networks["two_layer"], device, "two_layer")
    summary["two_layer"] = over_seeds(trees)

    save_checkpoint(MODELS / dataset / "decomposition.pt", vars(first["regularised"].bases["hidden"].to("cpu")))
    write_report(REPORTS / dataset, summary, first, test, params)


if __name__ == "__main__":
    run(main)
