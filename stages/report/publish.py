"""Publish the report of the last run: a copy that git tracks, for readers who have run nothing. No stage writes it.

Reads   reports/build_report/report.md and the pictures that it shows
Writes  reports/report.md     the same, after a line that says where and with what it was made
        reports/published/    its pictures
"""

import platform
import re
import shutil
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path

from stages.common.files import require, save_text
from stages.common.stage import InputError, parse_arguments, run
from stages.report.build_report import MARKDOWN
from stages.report.elements import REPORTS

PUBLISHED = REPORTS / "published"
PICTURE = re.compile(r"\]\(\.\./([^)]+\.png)\)")  # a link of Markdown from the report's folder to another stage's


def processor() -> str:
    """Return the processor's name, and which vector instructions torch uses on it."""
    import torch  # here: --help should not wait for it

    try:
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def commit() -> str:
    """Return the short hash of the commit that is checked out; InputError outside of git."""
    try:
        return subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        raise InputError("the report is published with the commit it was made from: run in a git checkout") from None


def main() -> None:
    parse_arguments(__doc__)
    text = require(MARKDOWN).read_text(encoding="utf-8")
    pictures = sorted(set(PICTURE.findall(text)))
    for picture in pictures:
        require(REPORTS / picture)
    made = f"One run of the default scale, {date.today()}: commit {commit()}, {processor()}, torch {version('torch')}."
    shutil.rmtree(PUBLISHED, ignore_errors=True)
    for picture in pictures:
        (PUBLISHED / picture).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPORTS / picture, PUBLISHED / picture)
    title, _, rest = PICTURE.sub(r"](published/\1)", text).partition("\n")
    save_text(REPORTS / "report.md", f"{title}\n\n{made}\n{rest}")
    print(f"wrote {REPORTS / 'report.md'} and {len(pictures)} pictures: commit them")


if __name__ == "__main__":
    run(main)
