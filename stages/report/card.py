"""What a report is of: code, data, machine and versions, and how long it took. But for that a commit gives the same card on a machine."""

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

from stages.common.report import Detail, Section, Table, row
from stages.common.stage import all_stages, noted

DECIDES = (
    "dvc.yaml",
    "params.yaml",
    "requirements.txt",
    "stages",
    ":(exclude)*.md",
)  # dvc.lock changes while stages run
REPORT = "build_report"
PACKAGES = ("torch", "numpy", "scikit-learn", "dvc")
VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2"}  # other vector instructions round otherwise


def card(sections: list[Section]) -> dict[str, str]:
    """Return facts by what they are about."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return {
        "commit": commit(),
        "scale": scale(),
        "data": "; ".join(section.data for section in sections),
        "machine": machine(),
        "time": time_taken(noted(), all_stages()),
        "versions": f"Python {platform.python_version()}, {versions}",
    }


def time_taken(taken: dict[str, dict[str, float]], stages: list[str]) -> str:
    """Return how long the stages took whose times are known, and how many of all these are; the report itself is none of them."""
    known = [seconds for stage, seconds in taken.items() if stage != REPORT]
    if not known:
        return "not recorded: all results come from DVC's cache, or were made with other settings"
    wall, processor = (duration(sum(seconds[of] for seconds in known)) for of in ("wall", "processor"))
    return f"{len(known)} of {len(stages) - 1} stages ran here with these settings: {wall}, of processors {processor}"


def times_table(taken: dict[str, dict[str, float]]) -> Table:
    """Return how long each stage took, the longest first."""
    longest = sorted(
        ((s["wall"], s["processor"], stage) for stage, s in taken.items() if stage != REPORT), reverse=True
    )
    rows = [row(stage, f"{wall:.0f}", f"{processor:.0f}") for wall, processor, stage in longest]
    caption = "Seconds of the stages that ran here with these settings; what is missing came from DVC's cache. One run."
    return Table(caption, ["stage", "wall clock, s", "processors, s"], rows)


def times_details() -> list[Detail]:
    """Return what is folded at the end of a report: nothing if no time is known."""
    table = times_table(noted())
    return [Detail("How long each stage took", [table])] if table.rows else []


def duration(seconds: float) -> str:
    """Write seconds, from two minutes on with minutes."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes >= 2 else f"{seconds:.0f} s"


def git(*words: str) -> str | None:
    """Return what git prints, or None if it fails or is not there."""
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def commit() -> str:
    """Return the commit that is checked out, its date, and whether what numbers depend on is as committed."""
    found = git("log", "-1", "--format=%h of %cs")
    if not found:
        return "unknown: not in a git checkout"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *DECIDES) or ""
    names = [line.split()[-1] for line in changed.splitlines()]
    return f"{found}, then changed: {', '.join(names[:4])}{' and others' if names[4:] else ''}" if names else found


def scale() -> str:
    """Return whether params.yaml is the committed one, and else which values differ, a few of them."""
    changes = git("diff", "-U0", "HEAD", "--", "params.yaml")
    if changes is None:
        return "of params.yaml"
    values = [line[1:].strip() for line in changes.splitlines() if line.startswith("+") and not line.startswith("+++")]
    if not values:
        return "params.yaml as committed"
    return f"params.yaml changed: {'; '.join(values[:6])}{' and more' if values[6:] else ''}"


def machine() -> str:
    """Return the processor's name, its vector instructions and the number of cores."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    names = re.findall(r"^model name\s*: (.+)$", text, re.MULTILINE) or [platform.processor() or platform.machine()]
    flags = set((re.findall(r"^flags\s*: (.+)$", text, re.MULTILINE) or [""])[0].split())
    vectors = next((f", {name}" for flag, name in VECTORS.items() if flag in flags), "")
    return f"{names[0]}{vectors}, {os.cpu_count()} cores"
