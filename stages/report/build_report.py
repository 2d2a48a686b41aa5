"""Build the report: one table for each system, every number beside its baseline, then the pictures.

Reads   reports/<stage>/<item>/ of every member that params.yaml names
Writes  reports/report.md, reports/index.html (self-contained: pictures are inside, nothing is loaded from elsewhere)
"""

import base64
import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.common.artifacts import load_csv, load_json, require, save_text
from stages.common.command import parse_arguments, run
from stages.common.params import StageParams

REPORTS = Path("reports")
TRAINED = REPORTS / "train_bilinear"
DECOMPOSED = REPORTS / "decompose_bilinear"


class Params(StageParams):
    """What the report shows."""

    bilinear: list[str]  # data sets


@dataclass(frozen=True)
class Row:
    """One measured number; `baseline` says what it is measured against."""

    measure: str
    value: str
    baseline: str


@dataclass(frozen=True)
class Picture:
    """A picture file and what it shows."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Section:
    """One system's part of the report for one data set."""

    title: str
    question: str
    rows: list[Row]
    pictures: list[Picture]


def percent(number: dict[str, float] | float) -> str:
    """Format a share, with its standard deviation over seeds if it has one."""
    return f"{number:.1%}" if isinstance(number, float) else f"{number['mean']:.1%} ± {number['std']:.1%}"


def decimal(number: dict[str, float]) -> str:
    """Format a number in 0 to 1 with its standard deviation."""
    return f"{number['mean']:.2f} ± {number['std']:.2f}"


def bilinear_section(dataset: str) -> Section:
    """Return the section of the bilinear classifiers of one data set."""
    variants = ("regularised", "unregularised", "two_layer")
    trained = {variant: load_json(TRAINED / f"{dataset}-{variant}" / "summary.json") for variant in variants}
    decomposed: dict[str, Any] = load_json(DECOMPOSED / dataset / "summary.json")
    two_layer = load_csv(DECOMPOSED / dataset / "two_layer.csv")
    norm = decomposed["mask_norm"]
    rows = []
    for variant, summary in trained.items():
        baselines = summary["baseline_test_acc"]
        against = f"linear classifier {percent(baselines['linear'])}, majority {percent(baselines['majority'])}"
        rows.append(Row(f"{variant}: test accuracy", percent(summary["test_acc"]), against))
    for variant in variants[:2]:
        result = decomposed[variant]
        for basis in ("hidden", "data"):
            curves = result["truncated_acc"][basis]
            for k in curves["sign"]:
                measure = f"{variant}: from {k} positive and {k} negative eigenvectors a class, {basis} basis"
                against = (
                    f"whole network {percent(result['full_acc'])}, any {2 * int(k)} {percent(curves['random'][k])}"
                )
                rows.append(Row(measure, percent(curves["sign"][k]), against))
    for variant in variants[:2]:
        masks = decomposed[variant]["mask_acc"]
        against = f"pixels permuted {percent(masks['permuted'])}, no mask {percent(masks['clean'])}"
        rows.append(Row(f"{variant}: under the best mask of norm {norm:g}", percent(masks["best_mask"]), against))
        rows.append(Row(f"{variant}: under a class's mask, mean", percent(masks["mean_mask"]), "as above"))
    kept = decomposed["regularised"]["kept_prediction"]
    for count in kept["attributed"]:
        measure = f"regularised: prediction kept without the {count} pixels that add most to it"
        against = f"without as many random lit pixels {percent(kept['random'][count])}"
        rows.append(Row(measure, percent(kept["attributed"][count]), against))
    for kind, label in (("eigenvectors", "matched eigenvectors"), ("subspace", "span of the top eigenvectors")):
        against = f"untrained {decimal(decomposed['untrained']['similarity'][kind])}"
        for variant in variants[:2]:
            value = decimal(decomposed[variant]["similarity"][kind])
            rows.append(Row(f"{variant}: {label} alike between seeds, absolute cosine", value, against))
    largest = two_layer[-1]
    rows.append(
        Row(
            f"two_layer: from {largest['outer']} outer x {largest['inner']} inner eigenvectors a class",
            percent({"mean": float(largest["acc"]), "std": float(largest["std"])}),
            f"whole network {percent(decomposed['two_layer']['full_acc'])}",
        )
    )
    captions = {
        "eigenvectors": "The most positive and most negative eigenvectors of each class, in pixel space; eigenvalue above.",
        "truncation": "Accuracy from the first eigenvectors of each class. `sign` counts both signs; `random` is the baseline.",
        "spectra": "Eigenvalues of each class.",
        "masks": "The mask of each class: computed from the weights, the most harmful of a few on validation images. Predictions above.",
        "attributions": "What each pixel adds to the predicted logit: exact, the pixels of an image sum to it.",
    }
    return Section(
        title=f"Bilinear: {dataset}",
        question="What features did the network learn? The eigenvectors of its weights, and how much they explain.",
        rows=rows,
        pictures=[Picture(DECOMPOSED / dataset / f"{name}.png", caption) for name, caption in captions.items()],
    )


def render_markdown(sections: list[Section]) -> str:
    """Return the report as Markdown; picture paths are relative to reports/."""
    lines = ["# weightlens report", "", "Means ± standard deviations over seeds.", ""]
    for section in sections:
        lines += [f"## {section.title}", "", section.question, "", "| measure | value | baseline |", "|---|---|---|"]
        lines += [f"| {row.measure} | {row.value} | {row.baseline} |" for row in section.rows]
        for picture in section.pictures:
            lines += ["", picture.caption, "", f"![{picture.caption}]({picture.path.relative_to(REPORTS).as_posix()})"]
        lines.append("")
    return "\n".join(lines)


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .25em .8em; border-bottom: 1px solid #ddd; }
td:nth-child(2) { font-weight: 600; white-space: nowrap; } td:nth-child(3) { color: #666; }
figure { margin: 2em 0; } figcaption { color: #555; } img { max-width: 100%; }
"""


def render_html(sections: list[Section]) -> str:
    """Return the report as one HTML page with the pictures inside."""
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>weightlens report</title><style>{STYLE}</style>",
        "<h1>weightlens report</h1><p>Means ± standard deviations over seeds.</p>",
    ]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2><p>{html.escape(section.question)}</p>")
        parts.append("<table><tr><th>measure</th><th>value</th><th>baseline</th></tr>")
        for row in section.rows:
            cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in (row.measure, row.value, row.baseline))
            parts.append(f"<tr>{cells}</tr>")
        parts.append("</table>")
        for picture in section.pictures:
            data = base64.b64encode(require(picture.path).read_bytes()).decode()
            caption = html.escape(picture.caption)
            parts.append(
                f'<figure><figcaption>{caption}</figcaption><img alt="{caption}" src="data:image/png;base64,{data}"></figure>'
            )
    return "\n".join([*parts, "</html>", ""])


def main() -> None:
    parse_arguments(__doc__)
    params = Params.load("build_report")
    sections = [bilinear_section(dataset) for dataset in params.bilinear]
    save_text(REPORTS / "report.md", render_markdown(sections))
    save_text(REPORTS / "index.html", render_html(sections))
    print(f"open {REPORTS / 'index.html'}, or read {REPORTS / 'report.md'}")


if __name__ == "__main__":
    run(main)
