"""What a report is of: code, data, machine and versions. The same commit on the same machine gives the same card."""

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

from stages.common.report import Section

DECIDES = (
    "dvc.yaml",
    "params.yaml",
    "requirements.txt",
    "stages",
    ":(exclude)*.md",
)  # dvc.lock changes while stages run
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
        "versions": f"Python {platform.python_version()}, {versions}",
    }


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
