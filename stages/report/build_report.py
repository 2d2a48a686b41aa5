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
DECOMPOSED = REPORTS / "decompose_bilinear"
FORECAST = REPORTS / "evaluate_forecaster"
WEIGHTNET = REPORTS / "evaluate_weightnet"

SINGLE_LAYER = ("regularised", "unregularised")
NOTE = "Means ± standard deviations over seeds (of similarities, over pairs of seeds)."


class Params(StageParams):
    """What the report shows of each system."""

    bilinear: str  # the data set
    forecast: str
    weightnet: str


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
    """Format a share, with its standard deviation if there is one."""
    return f"{number['mean']:.1%}" + (f" ± {number['std']:.1%}" if "std" in number else "")


def decimal(number: dict[str, float]) -> str:
    """Format a number in 0 to 1, with its standard deviation if there is one."""
    return f"{number['mean']:.2f}" + (f" ± {number['std']:.2f}" if "std" in number else "")


def forecast_section(dataset: str) -> Section:
    """Return the section of the forecasts of weights of one data set."""
    summary = load_json(FORECAST / dataset / "summary.json")
    errors, task = summary["weight_error"], summary["task"]
    regimes, horizons = list(errors["persistence"]), list(task["persistence"]["late"])
    tables = [
        Table(
            ["forecaster, late half", *(f"{regime}, h = {h}" for regime in regimes for h in horizons)],
            [
                [forecaster, *(ratio(by_regime[regime]["late"][h]) for regime in regimes for h in horizons)]
                for forecaster, by_regime in errors.items()
            ],
            "Squared error of the weights h snapshots ahead, on runs that no forecaster has seen, over that of keeping the last weights.",
        )
    ]
    for phase in ("early", "late"):
        rows = [
            [forecaster, *(f"{cells[phase][h]['test_loss']:.3g}, {cells[phase][h]['test_acc']:.1%}" for h in horizons)]
            for forecaster, cells in task.items()
        ]
        caption = f"Test loss and accuracy of the forecast networks, {phase} half; persistence is the network as it is."
        tables.append(Table(["forecaster", *(f"h = {h}" for h in horizons)], rows, caption))
    captions = {
        "horizons": "Error over that of keeping the last weights, by horizon; what is not in the picture is worse.",
        "path": "A run that no forecaster has seen, in the plane of its two main directions, and the transformer's forecasts.",
    }
    return Section(
        title=f"Forecast: {dataset}",
        question="Where will training go next? Forecasts of a network's weights from its past.",
        tables=tables,
        pictures=[Picture(FORECAST / dataset / f"{name}.png", caption) for name, caption in captions.items()],
    )


def ratio(number: dict[str, float]) -> str:
    """Format a ratio with its standard deviation if there is one; a large one by its order of magnitude."""
    if number["mean"] >= 100:
        return f"{number['mean']:.0e}"
    return f"{number['mean']:.2f}" + (f" ± {number['std']:.2f}" if "std" in number else "")


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
            percent(share),
            f"the brightest {percent(kept['brightest'][count])}, random lit ones {percent(kept['random'][count])}",
        ]
        for count, share in kept["attributed"].items()
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


def weightnet_section(dataset: str) -> Section:
    """Return the section of predicted properties of one data set's zoo."""
    summary = load_json(WEIGHTNET / dataset / "summary.json")
    (main, architectures), *transfers = summary["scores"].items()
    (architecture, scores), *_ = architectures.items()
    order = sorted(scores["test_acc"], key=lambda name: -scores["test_acc"][name]["tau"]["mean"])
    rows = [
        [
            name,
            decimal(scores["test_acc"][name]["r2"]) if name in scores["gap"] else "",
            *(decimal(found[name]["tau"]) if name in found else "" for found in scores.values()),
        ]
        for name in order
    ]
    tables = [
        Table(
            ["predictor", "R² of test_acc", *scores],
            rows,
            f"Runs not seen ({main}: {architecture}): R² of the test accuracy, and Kendall's tau of every property.",
        )
    ]
    held = {f"{task}: {name}": found for task, byarch in transfers for name, found in byarch.items()}
    if held:
        names = sorted({who for found in held.values() for who in found["test_acc"]})
        cells = [
            [who, *(decimal(f["test_acc"][who]["tau"]) if who in f["test_acc"] else "" for f in held.values())]
            for who in names
        ]
        caption = "Architectures not seen: Kendall's tau of test accuracy, networks of other architectures learnt from."
        tables.append(Table(["predictor", *held], cells, caption))
    rows = [
        [name, what, f"{moved['relabelled']:.0e}", f"{moved['one_sided']:.2g}"]
        for name, found in summary["relabelling"].items()
        for what, moved in found.items()
    ]
    caption = (
        "What relabelling hidden neurons changes, in float64: outputs over their size, predictions over their spread; one layer's "
        "rows alone, which is another network, for comparison."
    )
    tables.append(Table(["architecture", "of", "relabelled", "one layer's rows alone"], rows, caption))
    captions = {
        "scores": "Kendall's tau of test accuracy. Grey: what sees hyper-parameters or real images.",
        "predictions": "Predicted against measured properties of runs not seen.",
    }
    return Section(
        title=f"WeightNet: {dataset}",
        question="How good is a network? Predicted from its weights, for runs and architectures not seen.",
        tables=tables,
        pictures=[
            Picture(
                REPORTS / "build_zoo" / f"{dataset}-{architecture}" / "zoo.png",
                "What was measured of the zoo's networks.",
            ),
            *(Picture(WEIGHTNET / dataset / f"{name}.png", caption) for name, caption in captions.items()),
        ],
    )


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
    sections = [
        forecast_section(params.forecast),
        bilinear_section(params.bilinear),
        weightnet_section(params.weightnet),
    ]
    save_text(REPORTS / "report.md", render_markdown(sections))
    save_text(REPORTS / "index.html", render_html(sections))
    print(f"open {REPORTS / 'index.html'}, or read {REPORTS / 'report.md'}")


if __name__ == "__main__":
    run(main)
