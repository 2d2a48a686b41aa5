"""Build the report: one table for each system, every number beside its baseline, then more tables and the pictures.

Reads   reports/<stage>/<item>/ of every member that params.yaml names
Writes  reports/index.html (self-contained: pictures are inside, nothing is loaded from elsewhere)
        reports/build_report/report.md (`python -m stages.report.publish` makes a copy of it that git tracks)
"""

import base64
from html import escape
from os.path import relpath
from pathlib import Path

from stages.common.files import require, save_text
from stages.common.stage import StageParams, parse_arguments, run
from stages.report.bilinear import bilinear_section
from stages.report.elements import REPORTS, Section
from stages.report.forecast import forecast_section
from stages.report.recall import recall_section
from stages.report.vit_memory import vit_memory_section
from stages.report.weightnet import weightnet_section

MARKDOWN = Path("reports/build_report/report.md")
NOTE = "Means ± standard deviations over seeds (of similarities, over pairs of seeds), or [95 % confidence intervals]."


class Params(StageParams):
    """What the report shows of each system."""

    bilinear: str  # the data set
    forecast: str
    weightnet: str
    recall: str
    vit_memory: str


def render_markdown(sections: list[Section]) -> str:
    """Return the report as Markdown; picture paths are relative to its folder."""
    lines = ["# weightlens report", "", NOTE, ""]
    for section in sections:
        lines += [f"## {section.title}", "", section.question, ""]
        for table in section.tables:
            lines += [table.caption, ""] if table.caption else []
            cells = [table.header, ["---"] * len(table.header), *table.rows]
            lines += [f"| {' | '.join(row)} |" for row in cells] + [""]
        for picture in section.pictures:
            lines += [picture.caption, "", f"![{picture.caption}]({relpath(picture.path, MARKDOWN.parent)})", ""]
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
        recall_section(params.recall),
        vit_memory_section(params.vit_memory),
    ]
    save_text(MARKDOWN, render_markdown(sections))
    save_text(REPORTS / "index.html", render_html(sections))
    print(f"open {REPORTS / 'index.html'}, or read {MARKDOWN}")


if __name__ == "__main__":
    run(main)
