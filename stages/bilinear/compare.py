"""Compare two bilinear classifiers of the same images: how alike they are as functions, and which eigenvectors they share.

Reads   A, B: classifiers of one bilinear layer, of train_bilinear or of others; with --dataset data/<dataset>.safetensors
Writes  OUTPUT, a table of a row for each eigenvector of A (.csv), and PICTURE (.png), if they are asked for; prints a row a class

    python -m stages.bilinear.compare models/train_bilinear/digits/regularised/seed{0,1}/best.pt --picture alike.png
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from stages.bilinear.decomposition import DecompositionArtifacts, decompose_bilinear_model, input_basis
from stages.bilinear.layouts import load_classifier
from stages.bilinear.model import BilinearImageClassifier
from stages.bilinear.pictures import draw_matches
from stages.bilinear.similarity import Gaussian, chance_cosine, functional_similarity, gaussian_of, match_eigenvectors
from stages.common.files import atomic_path
from stages.common.images import load_images
from stages.common.runtime import pin_threads
from stages.common.stage import InputError, run

RANK = 10  # eigenvectors of a class that are matched


def compare_functions(a: BilinearImageClassifier, b: BilinearImageClassifier, pixels: Gaussian) -> pd.DataFrame:
    """Return a row for each class, and one of all logits together (label "all").

    cosine, correlation    of the logit in both networks, for Gaussian pixels, exactly; the second of what varies alone
    other_classes          the largest |correlation| with another class of the other network: the baseline (none of "all")
    """
    alike = functional_similarity(a, b, pixels)
    correlation = alike.correlation.cpu().numpy()
    others = abs(correlation - np.diag(np.diag(correlation))).max(1)
    rows = [
        {"label": str(c), "cosine": cosine, "correlation": correlation[c, c], "other_classes": others[c]}
        for c, cosine in enumerate(alike.cosine.diagonal().tolist())
    ]
    total = {"label": "all", "cosine": alike.total_cosine, "correlation": alike.total_correlation}
    return pd.DataFrame([*rows, total | {"other_classes": math.nan}])


def compare_eigenvectors(a: DecompositionArtifacts, b: DecompositionArtifacts, rank: int = RANK) -> pd.DataFrame:
    """Return a row for each of the `rank` strongest eigenvectors of each class of `a`, with its partner in `b`.

    eigenvalue, partner_eigenvalue    in either network
    index_a, partner                  their places among a class's eigenvectors, whose eigenvalues ascend
    cosine                            absolute, of the two as images
    chance                            what 95 % of the partners of different classes stay below
    shared                            whether the cosine is above that
    """
    chance = chance_cosine(a, b, rank)
    rows = []
    for c in range(len(a.eigenvalues)):
        matches = match_eigenvectors(a, b, (c, c), rank)
        for i, j, cosine in zip(matches.of_a, matches.of_b, matches.cosines, strict=True):
            values = {"eigenvalue": a.eigenvalues[c, i].item(), "partner_eigenvalue": b.eigenvalues[c, j].item()}
            places = {"index_a": i, "partner": j}
            rows.append({"label": c, **values, **places, "cosine": cosine, "chance": chance, "shared": cosine > chance})
    return pd.DataFrame(rows)


def load_pair(sources: tuple[Path, Path], residual: bool | None = None) -> list[BilinearImageClassifier]:
    """Return two classifiers, in double precision; InputError unless they are of the same pixels and classes, with one layer each."""
    pair = []
    for source in sources:
        model, notes = load_classifier(source, residual)
        for note in notes:
            print(f"{source}: {note}", file=sys.stderr)
        if len(model.blocks) != 1:
            raise InputError(
                f"{source}: expected a network of 1 bilinear layer, got {len(model.blocks)}: its logits are not quadratic"
            )
        pair.append(model.double())
    (a, b), (first, second) = pair, sources
    for what, sizes in {
        "pixels": (a.embed.in_features, b.embed.in_features),
        "classes": (a.head.out_features, b.head.out_features),
    }.items():
        if sizes[0] != sizes[1]:
            raise InputError(
                f"{first} has {sizes[0]} {what}, {second} {sizes[1]}: expected two classifiers of the same images"
            )
    return pair


def pixels_of(dataset: str | None, model: BilinearImageClassifier) -> Gaussian:
    """Return the Gaussian of a data set's training images, or without one white noise; InputError if they are of another size."""
    weight = model.embed.weight
    if dataset is None:
        return Gaussian(weight.new_zeros(weight.shape[1]))
    x = load_images(dataset, weight.device)[0].pixels()
    if x[0].numel() != weight.shape[1]:
        raise InputError(
            f"{dataset} has {x[0].numel()} pixels an image, the networks read {weight.shape[1]}: name the data set of theirs"
        )
    return gaussian_of(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, help="a classifier")
    parser.add_argument("b", type=Path, help="another classifier of the same images")
    parser.add_argument("--dataset", help="whose mean and covariance the pixels have (default: white noise)")
    parser.add_argument("--rank", type=int, default=RANK, help=f"eigenvectors matched of each class (default: {RANK})")
    parser.add_argument(
        "--residual", action="store_true", default=None, help="blocks are h + B(h); only if the files do not say it"
    )
    parser.add_argument("--output", type=Path, help="a file for the matched eigenvectors (.csv)")
    parser.add_argument("--picture", type=Path, help="a file for their picture (.png)")
    arguments = parser.parse_args()
    if arguments.rank < 1:
        raise InputError(f"--rank: expected 1 or more eigenvectors, got {arguments.rank}")
    pin_threads()
    a, b = load_pair((arguments.a, arguments.b), arguments.residual)
    functions = compare_functions(a, b, pixels_of(arguments.dataset, a))
    artifacts = [decompose_bilinear_model(model, input_basis(model)) for model in (a, b)]
    eigenvectors = compare_eigenvectors(artifacts[0], artifacts[1], arguments.rank)
    shared = eigenvectors.groupby("label")["shared"].sum().tolist()
    functions["shared"] = [*shared, sum(shared)]
    print(functions.to_string(index=False, float_format="{:.3f}".format))
    print(
        f"shared: of {arguments.rank} a class, those above {eigenvectors['chance'][0]:.2f}, as 5 % of different classes' are"
    )
    if arguments.output:
        with atomic_path(arguments.output) as temporary:
            eigenvectors.to_csv(temporary, index=False, float_format="%.6g")
    if arguments.picture:
        draw_matches(arguments.picture, artifacts[0], artifacts[1], eigenvectors)


if __name__ == "__main__":
    run(main)
