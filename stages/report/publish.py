"""Publish the report of the last run: a copy that git tracks, for readers who have run nothing. No stage writes it.

Reads   reports/build_report/report.md and the pictures that it shows
Writes  reports/report.md     the same, with the card that says of what, where and with what it was made
        reports/published/    its pictures
"""

import re
import shutil

from stages.common.files import require, save_text
from stages.common.report import REPORTS
from stages.common.stage import parse_arguments, run
from stages.report.build_report import MARKDOWN

PUBLISHED = REPORTS / "published"
PICTURE = re.compile(r"\]\(\.\./([^)]+\.png)\)")  # a link of Markdown from the report's folder to another stage's


def main() -> None:
    parse_arguments(__doc__)
    text = require(MARKDOWN).read_text(encoding="utf-8")
    pictures = sorted(set(PICTURE.findall(text)))
    for picture in pictures:
        require(REPORTS / picture)
    shutil.rmtree(PUBLISHED, ignore_errors=True)
    for picture in pictures:
        (PUBLISHED / picture).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPORTS / picture, PUBLISHED / picture)
    save_text(REPORTS / "report.md", PICTURE.sub(r"](published/\1)", text))
    print(f"wrote {REPORTS / 'report.md'} and {len(pictures)} pictures: commit them")


if __name__ == "__main__":
    run(main)
