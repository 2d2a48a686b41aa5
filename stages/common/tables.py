"""Tables with typed columns, as Parquet files."""

from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from stages.common.artifacts import atomic_path, remedy, require
from stages.common.command import InputError, one_line


def save_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows that share their keys, with the same bytes for the same values."""
    with atomic_path(path) as temporary:
        parquet.write_table(pa.Table.from_pylist(rows), temporary)


def load_table(path: Path) -> dict[str, list[Any]]:
    """Return the columns of a table by name; InputError if it is missing or damaged."""
    try:
        return parquet.read_table(require(path)).to_pydict()
    except pa.ArrowException as error:
        raise InputError(f"{path} is damaged ({one_line(error)[:120]}){remedy(path, '-f ')}") from None
