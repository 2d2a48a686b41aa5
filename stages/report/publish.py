"""Publish the report of the last run, for readers who have run nothing: a copy that git tracks. No stage writes it.

Reads   reports/build_report/report.md and the pictures that it shows
Writes  reports/report.md              the same, with the card that says of what, where and with what it was made
        reports/published/             its pictures
        README.md                      the five answers, between two comments
        stages/<system>/README.md      the system's table, between two comments
"""

import re
import shutil
import textwrap
from pathlib import Path

from stages.common.files import require, save_text
from stages.common.report import REPORTS
from stages.common.stage import InputError, parse_arguments, run
from stages.report.build_report import ANSWERS, MARKDOWN

REPORT = REPORTS / "report.md"
PUBLISHED = REPORTS / "published"
PICTURE = re.compile(r"\]\(\.\./([^)]+\.png)\)")  # a link of Markdown from the report's folder to another stage's
BLOCK = re.compile(r"(<!-- of reports/report\.md[^>]*-->\n).*?(<!-- end -->)", re.DOTALL)
WIDTH = 140  # of a line
SYSTEMS = ("forecast", "bilinear", "weightnet", "recall", "vit_memory")


def answers(report: str) -> str:
    """Return the report's table of answers; its links lead to the systems' pages."""
    lines = report.splitlines()
    start = lines.index(ANSWERS)
    rows = lines[start : start + 2 + len(SYSTEMS)]
    return re.sub(r"\(#(\w+)\)", r"(stages/\1/README.md)", "\n".join(rows))


def headline(report: str, system: str) -> str:
    """Return a system's first table in the report, and what it says of it."""
    section = re.search(rf"^## {system}\n(.*?)^!\[", report, re.MULTILINE | re.DOTALL)
    assert section
    caption, table = section[1].strip().split("\n\n")[-2:]
    return f"{table}\n\n{textwrap.fill(caption, WIDTH)}"


def filled(path: Path, block: str) -> str:
    """Return a document's text in which what stands between the two comments is `block`."""
    text = require(path).read_text(encoding="utf-8")
    if not BLOCK.search(text):
        raise InputError(
            f"{path}: expected a line <!-- of reports/report.md --> and a line <!-- end -->, got none: add them"
        )
    return BLOCK.sub(lambda found: f"{found[1]}\n{block}\n\n{found[2]}", text, count=1)


def documents(report: str) -> dict[Path, str]:
    """Return the texts of the documents that quote a report."""
    pages = {Path(f"stages/{system}/README.md"): headline(report, system) for system in SYSTEMS}
    return {path: filled(path, block) for path, block in {Path("README.md"): answers(report), **pages}.items()}


def main() -> None:
    parse_arguments(__doc__)
    text = require(MARKDOWN).read_text(encoding="utf-8")
    pictures = sorted(set(PICTURE.findall(text)))
    for picture in pictures:
        require(REPORTS / picture)
    report = PICTURE.sub(r"](published/\1)", text)
    quoting = documents(report)
    shutil.rmtree(PUBLISHED, ignore_errors=True)
    for picture in pictures:
        (PUBLISHED / picture).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPORTS / picture, PUBLISHED / picture)
    for path, page in {REPORT: report, **quoting}.items():
        save_text(path, page)
    print(f"wrote {', '.join(map(str, (REPORT, *quoting)))} and {len(pictures)} pictures: commit them")


if __name__ == "__main__":
    run(main)
