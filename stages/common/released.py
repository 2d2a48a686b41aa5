"""Models that are published with the project, wherever a process was started."""

from pathlib import Path

PROJECT = Path(__file__).parents[2]


def published(path: Path) -> Path:
    """Return `path` if it is there, below the working folder; else the same in the project's own folder."""
    return path if path.exists() else PROJECT / path
