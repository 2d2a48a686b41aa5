"""What a report is made of, and how its numbers are written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPORTS = Path("reports")


@dataclass(frozen=True)
class Cell:
    """What a table shows at one place; `number` is what is compared, None where there is nothing to compare."""

    text: str
    number: float | None = None

    def mean(self) -> str:
        """Return what is written before a spread."""
        return self.text.partition(" ")[0]


@dataclass(frozen=True)
class Row:
    """A row of a table. Baselines are shown in grey, and compete with nothing."""

    cells: list[Cell]
    baseline: bool = False


@dataclass(frozen=True)
class Table:
    """A table; every row has as many cells as `header`, and `better` as many directions (or none at all):
    "high", "low", or "" where nothing is compared."""

    caption: str  # says what the numbers are, in which unit, and of how many
    header: list[str]
    rows: list[Row]
    better: list[str] = field(default_factory=list)

    def best(self) -> set[tuple[int, int]]:
        """Return row and column of the best cells of each column that has a direction, among rows that are no baselines.

        Several are best if they are written alike.
        """
        found: set[tuple[int, int]] = set()
        for column, direction in enumerate(self.better):
            cells = {place: row.cells[column] for place, row in enumerate(self.rows) if not row.baseline}
            numbers = {place: cell.number for place, cell in cells.items() if cell.number is not None}
            if direction and numbers:
                top = (max if direction == "high" else min)(numbers, key=lambda place: numbers[place])
                found |= {(place, column) for place in numbers if cells[place].mean() == cells[top].mean()}
        return found


@dataclass(frozen=True)
class Picture:
    """A picture file, what it shows, and what is seen in it by who cannot see it."""

    path: Path
    caption: str
    alt: str


@dataclass(frozen=True)
class Detail:
    """Tables and pictures that are folded away under a title."""

    title: str
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """One system's part of the report."""

    key: str  # the system's folder, and the anchor
    title: str  # the question
    data: str  # what it was answered on
    answer: str  # in one number
    baseline: str  # the trivial answers' numbers, a sentence with what is before
    table: Table  # of at most six columns
    picture: Picture
    details: list[Detail]

    @property
    def verdict(self) -> str:
        """What was found, in one sentence."""
        return f"{self.answer}; {self.baseline}."


def row(name: str, *cells: Cell | str, baseline: bool = False) -> Row:
    """Return a row that begins with a name."""
    return Row([Cell(name), *(Cell(cell) if isinstance(cell, str) else cell for cell in cells)], baseline)


def pictures(folder: Path, captions: dict[str, tuple[str, str]]) -> list[Picture]:
    """Return the pictures <name>.png of a folder, by name with their captions and what is seen."""
    return [Picture(folder / f"{name}.png", caption, alt) for name, (caption, alt) in captions.items()]


def percent(number: dict[str, float] | float, digits: int = 1) -> Cell:
    """Write a share, with its standard deviation or its interval if there is one."""
    return _written(number, lambda x: f"{100 * x:.{digits}f}", " %")


def decimal(number: dict[str, float] | float, digits: int = 2) -> Cell:
    """Write a number, with its standard deviation or its interval if there is one; from 100 on, with two figures."""
    return _written(number, lambda x: short(x, digits), "")


def points(number: dict[str, float]) -> Cell:
    """Write a difference of shares in points, signed, with its interval."""
    return _written(number, lambda x: f"{100 * x:+.1f}", "")


def short(x: float, digits: int = 2) -> str:
    """Write a number without powers of ten: 0.61, 12.3, 850, 24,000."""
    if abs(x) >= 100:
        return f"{float(f'{x:.2g}'):,.0f}"
    return f"{x:.{digits}f}" if abs(x) < 10 else f"{x:.1f}"


def _written(number: dict[str, float] | float, style: Callable[[float], str], unit: str) -> Cell:
    """Write a mean, and ± its standard deviation or [its interval]."""
    if not isinstance(number, dict):
        return Cell(style(number) + unit, number)
    mean = number["mean"]
    if "std" in number:
        return Cell(f"{style(mean)} ± {style(number['std']).lstrip('+')}{unit}", mean)
    if "low" in number and number["low"] < number["high"]:
        return Cell(f"{style(mean)}{unit} [{style(number['low'])}, {style(number['high'])}]", mean)
    return Cell(style(mean) + unit, mean)


def in_order(rows: Sequence[dict[str, str]], column: str) -> list[str]:
    """Return the values of a column, in the order in which they first appear."""
    return list(dict.fromkeys(r[column] for r in rows))
