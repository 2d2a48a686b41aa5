"""Decompose the bilinear classifiers of one data set, and measure what their eigenvectors are good for.

Reads   data/<dataset>.safetensors, models/train_bilinear/<dataset>/
Writes  models/decompose_bilinear/<dataset>/decomposition.pt   DecompositionArtifacts of the first regularised classifier
        reports/decompose_bilinear/<dataset>/summary.json      every number beside its baseline
        reports/decompose_bilinear/<dataset>/metrics.json      the headlines of it, for `dvc metrics`
        reports/decompose_bilinear/<dataset>/truncation.csv    accuracy from k eigenvectors a class
        reports/decompose_bilinear/<dataset>/two_layer.csv     accuracy from k1 outer and k2 inner eigenvectors
        reports/decompose_bilinear/<dataset>/*.png, vector/*.svg
"""

# Axes: n images, c classes, m masks, k eigenvectors, d pixels times channels.

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Annotated, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from stages.bilinear import pictures
from stages.bilinear.decomposition import (
    DecompositionArtifacts,
    NestedDecomposition,
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
from stages.bilinear.model import BilinearImageClassifier, Config, build_image_classifier
from stages.bilinear.training import load_model
from stages.common.checkpoints import save_torch
from stages.common.files import Rows, Summary, remedy, save_csv, save_json
from stages.common.images import ImageSet, load_images, split_validation
from stages.common.metrics import accuracy, headline_metrics, majority_accuracy, mean_std, over_seeds
from stages.common.randomness import generator
from stages.common.runtime import parallel_map, pick_device, pin_threads
from stages.common.stage import InputError, StageParams, parse_arguments, run

RUNS = Path("models/train_bilinear")
MODELS = Path("models/decompose_bilinear")
REPORTS = Path("reports/decompose_bilinear")

DEPTHS = {"linear": 0, "regularised": 1, "unregularised": 1, "two_layer": 2}  # bilinear layers of each variant
SINGLE_LAYER = ("regularised", "unregularised")
IMAGES_AT_ONCE = 1000  # where memory grows with images x classes x eigenvectors
HEADLINES = {  # what `dvc metrics` shows, and where it lies in the summary
    "acc_linear": "linear/full_acc",
    "acc_regularised": "regularised/full_acc",
    "acc_unregularised": "unregularised/full_acc",
    "acc_two_layer": "two_layer/full_acc",
    "similarity": "regularised/similarity/eigenvectors",
    "similarity_unregularised": "unregularised/similarity/eigenvectors",
    "similarity_untrained": "untrained/similarity/eigenvectors",
}
MASK_CANDIDATES = 3  # masks of each class, and their negatives, among which validation chooses

Ranks = Annotated[list[PositiveInt], Field(min_length=1)]
Model = BilinearImageClassifier


class Params(StageParams):
    """Parameters of one data set's decomposition."""

    seed: NonNegativeInt  # of random baselines
    ranks: Ranks  # eigenvectors a class in the truncation tables; cut at the network's size
    headline_ranks: Ranks  # those of `ranks` that summary.json shows
    nested_ranks: Ranks  # outer and inner eigenvectors a class in the two-layer table; cut likewise
    mask_norm: PositiveFloat  # where the pixel range is 1
    mask_rank: PositiveInt  # eigenvectors a class that a mask must not excite, but for one
    validation_images: PositiveInt  # on which masks are chosen
    deletion_pixels: Ranks  # how many pixels of an image to delete
    similarity_rank: PositiveInt  # eigenvectors a class that are matched between seeds
    subspace_rank: PositiveInt  # positive eigenvectors a class whose span is compared

    @model_validator(mode="after")
    def headline_is_measured(self) -> Self:
        if missing := sorted(set(self.headline_ranks) - set(self.ranks)):
            raise ValueError(f"headline_ranks {missing} are not among ranks {self.ranks}")
        return self


@dataclass(frozen=True)
class Network:
    """A trained classifier and the config of its run."""

    model: Model
    config: Config

    @property
    def seed(self) -> int:
        """The seed of its run."""
        return self.config["seed"]


def load_networks(dataset: str, variant: str, depth: int) -> list[Network]:
    """Return the best checkpoint of every seed of a variant; InputError if there is none, or of another depth."""
    folder = RUNS / dataset / variant
    networks = [Network(*load_model(path)) for path in folder.glob("*/best.pt")]
    if not networks:
        raise InputError(f"{folder} holds no checkpoints{remedy(folder / 'seed' / 'best.pt')}")
    if (got := len(networks[0].model.blocks)) != depth:
        raise InputError(
            f"params.yaml: train_bilinear.variants.{variant}.n_layer: expected {depth} to decompose, got {got}"
        )
    return sorted(networks, key=lambda network: network.seed)


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


def mean_over_chunks(measure: Callable[[ImageSet], Float[Tensor, "*n"]], test: ImageSet) -> Float[Tensor, "*n"]:
    """Return the mean over all images of what `measure` gives as the mean of some: intermediate tensors stay small."""
    chunks = [test.subset(rows) for rows in torch.arange(len(test)).split(IMAGES_AT_ONCE)]
    return sum(measure(chunk) * len(chunk) for chunk in chunks) / len(test)


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

    def measure(chunk: ImageSet) -> Float[Tensor, "rankings ranks"]:
        terms = eigen_terms(embed(model, chunk.pixels()), values, artifacts.eigenvectors_hidden)
        return torch.stack([accuracy(truncated_logits(terms, *ranking), chunk.labels) for ranking in rankings.values()])

    curves = mean_over_chunks(measure, test).tolist()
    return {name: dict(zip(ranks, curve, strict=True)) for name, curve in zip(rankings, curves, strict=True)}


def choose_masks(
    model: Model, candidates: Float[Tensor, "c m d"], validation: ImageSet, test: ImageSet
) -> tuple[Float[Tensor, "c d"], dict[str, float]]:
    """Return each class's most harmful mask on validation images, and the test accuracies that the chosen masks leave.

    A mask is added to every image, whose pixels then may leave 0 to 1. `best`: the mask of the class whose mask hurt most
    on validation images; `mean`: the mean over classes.
    """

    def masked_accuracy(data: ImageSet, masks: Float[Tensor, "k d"]) -> list[float]:
        hidden, shifts = model.embed(data.pixels().flatten(1)), model.embed(masks)  # E (x + m) = E x + E m
        return [accuracy(model.read_hidden(hidden + shift), data.labels).item() for shift in shifts]

    left = torch.tensor(masked_accuracy(validation, candidates.flatten(0, 1))).view(candidates.shape[:2])  # [c, m]
    chosen = candidates[torch.arange(len(candidates)), left.argmin(1).to(candidates.device)]
    on_test = masked_accuracy(test, chosen)
    return chosen, {"best": on_test[left.amin(1).argmin().item()], "mean": statistics.fmean(on_test)}


def candidate_masks(artifacts: DecompositionArtifacts, norm: float, rank: int) -> Float[Tensor, "c m d"]:
    """Return a few masks of each class, made of the weights, of both signs."""
    masks = norm * adversarial_masks(artifacts, rank)[:, :MASK_CANDIDATES]
    return torch.cat([masks, -masks], dim=1)


def mask_accuracy(
    model: Model, masks: Float[Tensor, "c m d"], validation: ImageSet, test: ImageSet, seed: int
) -> tuple[dict[str, dict[str, float]], Float[Tensor, "c d"], Float[Tensor, "c d"]]:
    """Return test accuracies under the most harmful of each class's masks, and the masks chosen.

    `mask` are those given; `permuted`, the baseline, are the same with their pixels permuted, chosen alike.
    """
    order = torch.rand(masks.shape, generator=generator(seed, "permuted masks")).argsort(2).to(masks.device)
    chosen, left = choose_masks(model, masks, validation, test)
    permuted, left_permuted = choose_masks(model, masks.gather(2, order), validation, test)
    return {"mask": left, "permuted": left_permuted}, chosen, permuted


def deletion_agreement(model: Model, test: ImageSet, counts: list[int], seed: int) -> dict[str, dict[int, float]]:
    """Return the fraction of images that keep their predicted class when n pixels are set to zero, for every n of `counts`.

    `attributed` deletes the pixels that add most to the predicted logit. The baselines: `random`, any pixels that are lit,
    and `brightest`.
    """
    x = test.pixels()
    flat, predicted = x.flatten(1), model(x).argmax(1)
    random = torch.rand(flat.shape, generator=generator(seed, "deleted pixels")).to(x.device)
    attributed, _ = pixel_attributions(model, x, predicted)
    rankings = {"attributed": attributed, "random": (flat > 0) * random, "brightest": flat}

    def kept(ranking: Float[Tensor, "n d"], count: int) -> float:
        deleted = ranking.topk(min(count, ranking.shape[1]), dim=1).indices
        return accuracy(model(flat.scatter(1, deleted, 0.0)), predicted).item()

    return {name: {count: kept(ranking, count) for count in counts} for name, ranking in rankings.items()}


def seed_similarity(
    decompositions: list[DecompositionArtifacts], matched: int, spanned: int
) -> dict[str, dict[str, float]]:
    """Return the similarity between every two seeds, mean and spread over the pairs: of the `matched` largest eigenvectors of
    each class, and of the span of the `spanned` most positive.
    """
    pairs = list(combinations(decompositions, 2))
    return {
        "eigenvectors": mean_std([matched_similarity(a, b, matched) for a, b in pairs]),
        "subspace": mean_std([subspace_similarity(a, b, spanned) for a, b in pairs]),
    }


def analyse_two_layer(network: Network, test: ImageSet, ranks: list[int], seed: int) -> Summary:
    """Return a two-layer network's accuracy, and `nested`[ranking][k1][k2] from k1 outer and k2 inner eigenvectors a class.

    Rankings: `magnitude` takes the largest, `random`, the baseline, any.
    """
    model = network.model
    ranks = sorted({min(rank, len(model.embedding_weight)) for rank in ranks})
    random = generator(seed + network.seed, "random eigenvectors")

    def any_order(values: Float[Tensor, "c k"]) -> Int[Tensor, "c k"]:
        return torch.rand(values.shape, generator=random).argsort(1).to(values.device)

    nested = {}
    for ranking, order in {"magnitude": order_by_magnitude, "random": any_order}.items():
        tree = decompose_two_layers(model, max(ranks), order)

        def measure(chunk: ImageSet, tree: NestedDecomposition = tree) -> Float[Tensor, "outer inner"]:
            return accuracy(nested_logits(tree, embed(model, chunk.pixels()), ranks, ranks), chunk.labels)

        table = mean_over_chunks(measure, test).tolist()
        nested[ranking] = {k: dict(zip(ranks, row, strict=True)) for k, row in zip(ranks, table, strict=True)}
    return {"full_acc": accuracy(model(test.pixels()), test.labels).item(), "nested": nested}


def decompose_untrained(network: Network) -> DecompositionArtifacts:
    """Decompose the network that training started from: the baseline of what training makes alike."""
    model = build_image_classifier(network.config["model"], network.config["seed"])
    return decompose_bilinear_model(model, input_basis(model)).to(network.model.embed.weight.device)


@dataclass(frozen=True)
class Analysis:
    """What one single-layer classifier's decomposition gives: numbers for the tables, tensors for the pictures."""

    model: Model
    numbers: Summary
    bases: dict[str, DecompositionArtifacts]
    masks: Float[Tensor, "c d"]
    permuted_masks: Float[Tensor, "c d"]


def analyse(
    network: Network,
    train: ImageSet,
    test: ImageSet,
    seed: int,
    *,
    ranks: list[int],
    deletion_pixels: list[int],
    candidates: Callable[[DecompositionArtifacts], Float[Tensor, "c m d"]],
    validation_images: int,
) -> Analysis:
    """Measure one single-layer classifier; its random baselines are drawn by `seed` and its own.

    candidates: the masks to choose from, on so many validation images, by the decomposition (see `candidate_masks`).
    """
    model, split, seed = network.model, network.config["dataset"], seed + network.seed
    rest, validation = split_validation(train, split["validation_fraction"], split["split_seed"])
    chosen = torch.randperm(len(validation), generator=generator(seed, "validation images"))[:validation_images]
    bases, x = decompose_in_bases(model, rest.pixels()), test.pixels()
    mask_acc, masks, permuted = mask_accuracy(model, candidates(bases["input"]), validation.subset(chosen), test, seed)
    ranks_in = {basis: clip_ranks(ranks, artifacts.eigenvalues.shape[1]) for basis, artifacts in bases.items()}
    numbers = {
        "full_acc": accuracy(model(x), test.labels).item(),
        "reconstruction_error": {basis: reconstruction_error(model, a, x) for basis, a in bases.items()},
        "truncated_acc": {
            basis: truncation_accuracy(model, artifacts, test, ranks_in[basis], seed)
            for basis, artifacts in bases.items()
        },
        "mask_acc": mask_acc,
        "kept_prediction": deletion_agreement(model, test, deletion_pixels, seed),
    }
    return Analysis(model, numbers, bases, masks, permuted)


def clip_ranks(ranks: list[int], largest: int) -> list[int]:
    """Return the ranks that a network of `largest` eigenvectors a class has, and `largest` itself: nothing left out."""
    return sorted({min(rank, largest) for rank in [*ranks, largest]})


def headline(result: Summary, ranks: list[int]) -> Summary:
    """Return one variant's result with its truncation curves cut to `ranks` eigenvectors of either sign."""
    curves = {
        basis: {ranking: {k: curve[str(k)] for k in ranks if str(k) in curve} for ranking, curve in rankings.items()}
        for basis, rankings in result["truncated_acc"].items()
    }
    return result | {"truncated_acc": curves}


def truncation_rows(summary: Summary) -> Rows:
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


def two_layer_rows(nested: Summary) -> Rows:
    """Return the table of the two-layer network as rows."""
    return [
        {"ranking": ranking, "outer": int(k1), "inner": int(k2), "acc": acc["mean"], "std": acc["std"]}
        for ranking, table in nested.items()
        for k1, inner in table.items()
        for k2, acc in inner.items()
    ]


def write_report(
    folder: Path, summary: Summary, first: dict[str, Analysis], test: ImageSet, headline_ranks: list[int]
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
    shortened = {variant: headline(summary[variant], headline_ranks) for variant in SINGLE_LAYER}
    two_layer = {"full_acc": summary["two_layer"]["full_acc"]}
    summary = summary | shortened | {"two_layer": two_layer}
    save_json(folder / "summary.json", summary)
    save_json(folder / "metrics.json", headline_metrics(summary, HEADLINES))
    for k, kept in shortened["regularised"]["truncated_acc"]["hidden"]["sign"].items():
        print(
            f"{folder.name}: {k} positive and {k} negative eigenvectors a class classify {kept['mean']:.2%} of test images"
        )


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of train_bilinear.datasets").dataset
    params = Params.load("decompose_bilinear", dataset)
    pin_threads()
    device = pick_device()
    train, test = load_images(dataset, device)
    similarity_ranks = params.similarity_rank, params.subspace_rank
    networks = {variant: load_networks(dataset, variant, depth) for variant, depth in DEPTHS.items()}

    summary: Summary = {"mask_norm": params.mask_norm}
    summary["majority_acc"] = majority_accuracy(train.labels, test.labels)
    linear = [accuracy(network.model(test.pixels()), test.labels).item() for network in networks["linear"]]
    summary["linear"] = {"full_acc": mean_std(linear)}
    candidates = partial(candidate_masks, norm=params.mask_norm, rank=params.mask_rank)
    measure = partial(analyse, train=train, test=test, seed=params.seed, ranks=params.ranks, candidates=candidates)
    measure = partial(measure, deletion_pixels=params.deletion_pixels, validation_images=params.validation_images)
    first: dict[str, Analysis] = {}
    for variant in SINGLE_LAYER:
        analyses = parallel_map(measure, networks[variant], device, variant)
        summary[variant] = over_seeds([analysis.numbers for analysis in analyses])
        summary[variant]["similarity"] = seed_similarity([a.bases["input"] for a in analyses], *similarity_ranks)
        first[variant] = analyses[0]
    untrained = [decompose_untrained(network) for network in networks["regularised"]]
    summary["untrained"] = {"similarity": seed_similarity(untrained, *similarity_ranks)}
    nested = parallel_map(
        lambda n: analyse_two_layer(n, test, params.nested_ranks, params.seed),
        networks["two_layer"],
        device,
        "two_layer",
    )
    summary["two_layer"] = over_seeds(nested)

    save_torch(MODELS / dataset / "decomposition.pt", vars(first["regularised"].bases["hidden"].to("cpu")))
    write_report(REPORTS / dataset, summary, first, test, params.headline_ranks)


if __name__ == "__main__":
    run(main)
