"""The report's section on the eigenvectors of bilinear networks."""

from typing import Any

from stages.common.files import load_csv, load_json
from stages.report.elements import REPORTS, Picture, Section, Table, decimal, percent

DECOMPOSED = REPORTS / "decompose_bilinear"

SINGLE_LAYER = ("regularised", "unregularised")


def bilinear_section(dataset: str) -> Section:
    """Return the section of the bilinear classifiers of one data set."""
    summary = load_json(DECOMPOSED / dataset / "summary.json")
    rows = [
        *accuracy_rows(summary),
        *truncation_rows(summary),
        *mask_rows(summary),
        *attribution_rows(summary),
        *similarity_rows(summary),
    ]
    captions = {
        "eigenvectors": "The most positive and most negative eigenvectors of each class, in pixel space; eigenvalue above.",
        "truncation": "Accuracy from the first eigenvectors of each class: by sign (as many of either), by magnitude, and at random.",
        "spectra": "Eigenvalues of each class.",
        "masks": "The mask of each class: computed from the weights, the most harmful of a few on validation images. Predictions above.",
        "attributions": "What each pixel adds to the predicted logit: exact, the pixels of an image sum to it.",
    }
    return Section(
        title=f"Bilinear: {dataset}",
        question="What features did the network learn? The eigenvectors of its weights, and how much they explain.",
        tables=[Table(["measure", "value", "baseline"], rows), *two_layer_tables(dataset, summary)],
        pictures=[Picture(DECOMPOSED / dataset / f"{name}.png", caption) for name, caption in captions.items()],
    )


def accuracy_rows(summary: dict[str, Any]) -> list[list[str]]:
    """Test accuracy of every variant, beside a linear classifier's, trained alike, and the largest class's."""
    against = f"linear classifier {percent(summary['linear']['full_acc'])}, largest class {summary['majority_acc']:.1%}"
    return [
        [f"{variant}: test accuracy", percent(summary[variant]["full_acc"]), against]
        for variant in (*SINGLE_LAYER, "two_layer")
    ]


def truncation_rows(summary: dict[str, Any]) -> list[list[str]]:
    """Accuracy from a few eigenvectors, beside the whole network's and that of as many random eigenvectors."""
    return [
        [
            f"{variant}: from {k} positive and {k} negative eigenvectors a class, {basis} basis",
            percent(acc),
            f"whole network {percent(summary[variant]['full_acc'])}, any {2 * int(k)} {percent(curves['random'][k])}",
        ]
        for variant in SINGLE_LAYER
        for basis, curves in summary[variant]["truncated_acc"].items()
        for k, acc in curves["sign"].items()
    ]


def mask_rows(summary: dict[str, Any]) -> list[list[str]]:
    """Accuracy under masks made from the weights, beside the same masks with their pixels permuted and chosen alike."""
    labels = {"best": "the most harmful mask", "mean": "a class's mask, mean over classes"}
    return [
        [
            f"{variant}: under {label}, norm {summary['mask_norm']:g}",
            percent(masks["mask"][kind]),
            f"pixels permuted {percent(masks['permuted'][kind])}, no mask {percent(summary[variant]['full_acc'])}",
        ]
        for variant, masks in ((variant, summary[variant]["mask_acc"]) for variant in SINGLE_LAYER)
        for kind, label in labels.items()
    ]


def attribution_rows(summary: dict[str, Any]) -> list[list[str]]:
    """Predictions kept without the pixels that add most to them, beside those kept without the brightest or random ones."""
    kept = summary["regularised"]["kept_prediction"]
    return [
        [
            f"regularised: predictions kept when the top {count} of the pixels by attribution are deleted",
            percent(fraction),
            f"the brightest {percent(kept['brightest'][count])}, random lit ones {percent(kept['random'][count])}",
        ]
        for count, fraction in kept["attributed"].items()
    ]


def similarity_rows(summary: dict[str, Any]) -> list[list[str]]:
    """How alike the eigenvectors of two seeds are, beside those of untrained networks."""
    labels = {"eigenvectors": "matched eigenvectors", "subspace": "span of the top eigenvectors"}
    return [
        [
            f"{variant}: {label} alike between seeds, absolute cosine",
            decimal(summary[variant]["similarity"][kind]),
            f"untrained {decimal(summary['untrained']['similarity'][kind])}",
        ]
        for kind, label in labels.items()
        for variant in SINGLE_LAYER
    ]


def two_layer_tables(dataset: str, summary: dict[str, Any]) -> list[Table]:
    """Accuracy of the two-layer network from a few outer (rows) and inner (columns) eigenvectors: the largest, and any."""
    cells = load_csv(DECOMPOSED / dataset / "two_layer.csv")
    whole = percent(summary["two_layer"]["full_acc"])
    captions = {
        "magnitude": f"two_layer: accuracy from the largest outer (rows) and inner (columns) eigenvectors a class; whole network {whole}.",
        "random": "two_layer: the same from random eigenvectors, the baseline.",
    }
    tables = []
    for ranking, caption in captions.items():
        rows: dict[str, dict[str, str]] = {}
        for cell in (cell for cell in cells if cell["ranking"] == ranking):
            number = percent({"mean": float(cell["acc"]), "std": float(cell["std"])})
            rows.setdefault(cell["outer"], {})[cell["inner"]] = number
        inner = list(next(iter(rows.values())))
        tables.append(Table(["outer", *inner], [[outer, *row.values()] for outer, row in rows.items()], caption))
    return tables
