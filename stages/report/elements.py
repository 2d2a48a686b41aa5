"""What a report is made of, and how its numbers are written."""

from dataclasses import dataclass
from pathlib import Path

REPORTS = Path("reports")


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


def interval(number: dict[str, float]) -> str:
    """Format a mean with its confidence interval if there is one; a large one by its order of magnitude."""
    if number["mean"] >= 100:
        return f"{number['mean']:.0e}"
    return f"{number['mean']:.2f}" + (f" [{number['low']:.2f}, {number['high']:.2f}]" if "low" in number else "")
