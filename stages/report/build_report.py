"""Build the report: one table for each system, every number beside its baseline, then more tables and the pictures.

Reads   reports/<stage>/<item>/ of every member that params.yaml names
Writes  reports/report.md, reports/index.html (self-contained: pictures are inside, nothing is loaded from elsewhere)
"""

import base64
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from stages.common.artifacts import load_csv, load_json, require, save_text
from stages.common.command import parse_arguments, run
from stages.common.params import StageParams

REPORTS = Path("reports")
TRAINED = REPORTS / "train_bilinear"
DECOMPOSED = REPORTS / "decompose_bilinear"

VARIANTS = ("regularised", "unregularised", "two_layer")
SINGLE_LAYER = VARIANTS[:2]
NOTE = "Means ± standard deviations over seeds."


class Params(StageParams):
    """What the report shows."""

    bilinear: list[str]  # data sets


@dataclass(frozen=True)
class Table:
    """A table of text; every row has as many cells as `header`."""

    header: list[str]
    rows: list[list[str]]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture file and what it shows."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Section:
    """One system's part of the report for one data set; its first table is the one that counts."""

    title: str
    question: str
    tables: list[Table]
    pictures: list[Picture]


def percent(number: dict[str, float]) -> str:
    """Format a share with its standard deviation over seeds."""
    return f"{number['mean']:.1%} ± {number['std']:.1%}"


def decimal(number: dict[str, float]) -> str:
    """Format a number in 0 to 1 with its standard deviation over seeds."""
    return f"{number['mean']:.2f} ± {number['std']:.2f}"


def bilinear_section(dataset: str) -> Section:
    """Return the section of the bilinear classifiers of one data set."""
    decomposed = load_json(DECOMPOSED / dataset / "summary.json")
    rows = [
        *accuracy_rows({variant: load_json(TRAINED / f"{dataset}-{variant}" / "summary.json") for variant in VARIANTS}),
        *truncation_rows(decomposed),
        *mask_rows(decomposed),
        *attribution_rows(decomposed),
        *similarity_rows(decomposed),
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
        tables=[Table(["measure", "value", "baseline"], rows), two_layer_table(dataset, decomposed)],
        pictures=[Picture(DECOMPOSED / dataset / f"{name}.png", caption) for name, caption in captions.items()],
    )


def accuracy_rows(trained: dict[str, Any]) -> list[list[str]]:
    """Test accuracy of every variant, beside a linear classifier's and the most frequent class's."""
    return [
        [
            f"{variant}: test accuracy",
            percent(summary["test_acc"]),
            "linear classifier {linear:.1%}, majority {majority:.1%}".format(**summary["baseline_test_acc"]),
        ]
        for variant, summary in trained.items()
    ]


def truncation_rows(decomposed: dict[str, Any]) -> list[list[str]]:
    """Accuracy from a few eigenvectors, beside the whole network's and that of as many random eigenvectors."""
    return [
        [
            f"{variant}: from {k} positive and {k} negative eigenvectors a class, {basis} basis",
            percent(acc),
            f"whole network {percent(decomposed[variant]['full_acc'])}, any {2 * int(k)} {percent(curves['random'][k])}",
        ]
        for variant in SINGLE_LAYER
        for basis, curves in decomposed[variant]["truncated_acc"].items()
        for k, acc in curves["sign"].items()
    ]


def mask_rows(decomposed: dict[str, Any]) -> list[list[str]]:
    """Accuracy under masks made from the weights, beside the same masks with their pixels permuted."""
    rows = []
    for variant in SINGLE_LAYER:
        masks = decomposed[variant]["mask_acc"]
        against = f"pixels permuted {percent(masks['permuted'])}, no mask {percent(masks['clean'])}"
        rows.append(
            [f"{variant}: under the best mask, norm {decomposed['mask_norm']:g}", percent(masks["best_mask"]), against]
        )
        rows.append([f"{variant}: under a class's mask, mean over classes", percent(masks["mean_mask"]), against])
    return rows


def attribution_rows(decomposed: dict[str, Any]) -> list[list[str]]:
    """Predictions kept without the pixels that add most to them, beside those kept without random lit pixels."""
    kept = decomposed["regularised"]["kept_prediction"]
    return [
        [
            f"regularised: predictions kept when the top {count} of the pixels by attribution are deleted",
            percent(share),
            f"as many random lit pixels {percent(kept['random'][count])}",
        ]
        for count, share in kept["attributed"].items()
    ]


def similarity_rows(decomposed: dict[str, Any]) -> list[list[str]]:
    """How alike the eigenvectors of two seeds are, beside those of untrained networks."""
    labels = {"eigenvectors": "matched eigenvectors", "subspace": "span of the top eigenvectors"}
    return [
        [
            f"{variant}: {label} alike between seeds, absolute cosine",
            decimal(decomposed[variant]["similarity"][kind]),
            f"untrained {decimal(decomposed['untrained']['similarity'][kind])}",
        ]
        for kind, label in labels.items()
        for variant in SINGLE_LAYER
    ]


def two_layer_table(dataset: str, decomposed: dict[str, Any]) -> Table:
    """Accuracy of the two-layer network from a few outer (rows) and inner (columns) eigenvectors."""
    cells = load_csv(DECOMPOSED / dataset / "two_layer.csv")
    inner = list(dict.fromkeys(cell["inner"] for cell in cells))
    rows: dict[str, list[str]] = {}
    for cell in cells:
        rows.setdefault(cell["outer"], [cell["outer"]]).append(
            percent({"mean": float(cell["acc"]), "std": float(cell["std"])})
        )
    whole = percent(decomposed["two_layer"]["full_acc"])
    caption = f"two_layer: accuracy from so many outer (rows) and inner (columns) eigenvectors a class; whole network {whole}."
    return Table(["outer \\ inner", *inner], list(rows.values()), caption)


def render_markdown(sections: list[Section]) -> str:
    """Return the report as Markdown; picture paths are relative to reports/."""
    lines = ["# weightlens report", "", NOTE, ""]
    for section in sections:
        lines += [f"## {section.title}", "", section.question, ""]
        for table in section.tables:
            lines += [table.caption, ""] if table.caption else []
            cells = [table.header, ["---"] * len(table.header), *table.rows]
            lines += [f"| {' | '.join(row)} |" for row in cells] + [""]
        for picture in section.pictures:
            lines += [picture.caption, "", f"![{picture.caption}]({picture.path.relative_to(REPORTS).as_posix()})", ""]
    return "\n".join(lines)


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { text-align: left; padding: .25em .8em; border-bottom: 1px solid #ddd; }
table:first-of-type td:nth-child(2) { font-weight: 600; white-space: nowrap; }
caption, figcaption { color: #555; text-align: left; } figure { margin: 2em 0; } img { max-width: 100%; }
"""


def render_html(sections: list[Section]) -> str:
    """Return the report as one HTML page with the pictures inside."""
    lines = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>weightlens report</title><style>{STYLE}</style><h1>weightlens report</h1><p>{NOTE}</p>",
    ]
    for section in sections:
        lines.append(f"<section><h2>{escape(section.title)}</h2><p>{escape(section.question)}</p>")
        for table in section.tables:
            lines.append(f"<table><caption>{escape(table.caption)}</caption>")
            for tag, row in [("th", table.header), *(("td", row) for row in table.rows)]:
                lines.append("<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>")
            lines.append("</table>")
        for picture in section.pictures:
            data, caption = base64.b64encode(require(picture.path).read_bytes()).decode(), escape(picture.caption)
            image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
            lines.append(f"<figure><figcaption>{caption}</figcaption>{image}</figure>")
        lines.append("</section>")
    return "\n".join([*lines, "</html>", ""])


def main() -> None:
    parse_arguments(__doc__)
    params = Params.load("build_report")
    sections = [bilinear_section(dataset) for dataset in params.bilinear]
    save_text(REPORTS / "report.md", render_markdown(sections))
    save_text(REPORTS / "index.html", render_html(sections))
    print(f"open {REPORTS / 'index.html'}, or read {REPORTS / 'report.md'}")


if __name__ == "__main__":
    run(main)
