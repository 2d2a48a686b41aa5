"""Build the report: what was found of each system in a sentence and a table, every number beside its baseline; all else folded.

Reads   reports/<stage>/<item>/ of every member that params.yaml names; stages/report/page.html
Writes  reports/index.html (self-contained: pictures are inside, nothing is loaded from elsewhere)
        reports/build_report/report.md (`python -m stages.report.publish` makes a copy of it that git tracks)
"""

import base64
from os.path import relpath
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from stages.bilinear.report import bilinear_section
from stages.common.files import require, save_text, vector_path
from stages.common.report import REPORTS, Detail, Picture, Section, Table
from stages.common.stage import StageParams, parse_arguments, run
from stages.forecast.report import forecast_section
from stages.recall.report import recall_section
from stages.report.card import card, times_details
from stages.vit_memory.report import vit_memory_section
from stages.weightnet.report import weightnet_section

MARKDOWN = Path("reports/build_report/report.md")
DPI = 110  # of a page: files of pictures are sharper
PAGE = Path(__file__).with_name("page.html")
ANSWERS = "| question, and of what | answer | against |"
SAID = "Five questions about the weights of trained networks, each answered beside its trivial baseline."
NOTE = (
    "Baselines are shown in {grey}, what is best of the rest in bold. ± is a standard deviation, [ ] a 95 % interval."
)


class Params(StageParams):
    """The data set that the report shows of each system."""

    bilinear: str
    forecast: str
    weightnet: str
    recall: str
    vit_memory: str


def markdown_table(table: Table) -> list[str]:
    """Return a table as lines of Markdown: baselines in italics, the best in bold."""
    best = table.best()

    def written(place: int, column: int, text: str) -> str:
        mark = "*" if table.rows[place].baseline else "**" if (place, column) in best else ""
        return f"{mark}{text}{mark}" if text else ""

    rows = [[written(i, j, cell.text) for j, cell in enumerate(row.cells)] for i, row in enumerate(table.rows)]
    cells = [table.header, ["---"] * len(table.header), *rows]
    return [table.caption, "", *(f"| {' | '.join(row)} |" for row in cells), ""]


def markdown_picture(picture: Picture) -> list[str]:
    """Return a picture and its caption as lines of Markdown; its path is relative to the report's folder."""
    return [f"![{picture.alt}]({relpath(picture.path, MARKDOWN.parent)})", "", f"*{picture.caption}*", ""]


def answers_table(sections: list[Section]) -> list[str]:
    """Return a row a system, as lines of Markdown: its question, which leads to its section, its answer, and trivial ones."""
    rows = [f"| [{s.title}](#{s.key})<br>{s.data} | {s.answer} | {s.baseline} |" for s in sections]
    return [ANSWERS, "| --- | --- | --- |", *rows]


def markdown_section(section: Section) -> list[str]:
    """Return a section as lines of Markdown; what the page folds is folded here, too."""
    lines = [f"## {section.key}", "", f"**{section.title}** ({section.data})", "", section.verdict, ""]
    lines += markdown_table(section.table) + markdown_picture(section.picture)
    return lines + [line for detail in section.details for line in markdown_detail(detail)]


def markdown_detail(detail: Detail) -> list[str]:
    """Return what is folded under a title as lines of Markdown."""
    lines = ["<details>", f"<summary>{detail.title}</summary>", ""]
    lines += [line for table in detail.tables for line in markdown_table(table)]
    lines += [line for picture in detail.pictures for line in markdown_picture(picture)]
    return [*lines, "</details>", ""]


def render_markdown(sections: list[Section], facts: dict[str, str], last: list[Detail]) -> str:
    """Return the report as Markdown: what it is of, the verdicts, then a section a system, and what is folded after the last."""
    lines = ["# weightlens report", "", SAID, "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {fact} |" for name, fact in facts.items()]
    lines += ["", *answers_table(sections), ""]
    lines += [NOTE.format(grey="italics"), ""]
    lines += [line for section in sections for line in markdown_section(section)]
    return "\n".join([*lines, *(line for detail in last for line in markdown_detail(detail))])


def data_url(path: Path) -> str:
    """Return a picture as a URL that holds it: its PNG, or the same as SVG, if there is one and it is smaller."""
    files = {"png": require(path).read_bytes()}
    if vector_path(path).is_file():
        files["svg+xml"] = vector_path(path).read_bytes()
    kind = min(files, key=lambda kind: len(files[kind]))
    return f"data:image/{kind};base64,{base64.b64encode(files[kind]).decode()}"


def shown_width(path: Path) -> int:
    """Return how many pixels wide a page shows a PNG: its inches, which pixels and resolution in its header give, at DPI."""
    head = require(path).read_bytes()[:4096]
    pixels, resolution = int.from_bytes(head[16:20], "big"), head.partition(b"pHYs")[2][:4]  # of IHDR; pixels a metre
    inches = pixels / (int.from_bytes(resolution, "big") * 0.0254) if resolution else pixels / DPI
    return round(inches * DPI)


def render_html(sections: list[Section], facts: dict[str, str], last: list[Detail]) -> str:
    """Return the report as one HTML page with the pictures inside."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"data_url": data_url, "shown_width": shown_width}
    page = environment.from_string(PAGE.read_text(encoding="utf-8"))
    return page.render(sections=sections, facts=facts, last=last, said=SAID, note=NOTE.format(grey="grey"))


def main() -> None:
    parse_arguments(__doc__)
    params = Params.load("build_report")
    sections = [
        forecast_section(params.forecast),
        bilinear_section(params.bilinear),
        weightnet_section(params.weightnet),
        recall_section(params.recall),
        vit_memory_section(params.vit_memory),
    ]
    facts, last = card(sections), times_details()
    save_text(MARKDOWN, render_markdown(sections, facts, last))
    save_text(REPORTS / "index.html", render_html(sections, facts, last))
    print(f"open {REPORTS / 'index.html'}, or read {MARKDOWN}")


if __name__ == "__main__":
    run(main)
