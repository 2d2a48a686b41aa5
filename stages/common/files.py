"""Files a stage leaves behind. A file appears whole under its name or not at all, whenever the process dies."""

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError, safe_open
from safetensors import numpy as safetensors_numpy

from stages.common.stage import DVC_YAML, PARAMS, InputError, Loader, one_line

Cell = str | int | float | bool | None
Row = dict[str, Cell]  # of a table: a value for each column
Rows = list[Row]
Metadata = dict[str, Any]  # of a file of arrays: each has keys of its own
Summary = dict[str, Any]  # numbers by the names of what was measured, nested: each summary.json has names of its own


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; flush it to disk and rename it to `path` if the block succeeds.

    The temporary name is fixed, so that the next run replaces what a killed one left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the rename itself must survive a power cut
        os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def save_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def vector_path(path: Path) -> Path:
    """Return where the SVG of a plot lies whose PNG is `path`: in a folder, so that a stage has one such output."""
    return path.parent / "vector" / f"{path.stem}.svg"


def save_json(path: Path, value: object) -> None:
    """Write `value` as JSON; a NaN or infinity is an error, since no metric may be one."""
    save_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def load_json(path: Path) -> Any:
    """Read a JSON file; InputError if it is missing."""
    return json.loads(require(path).read_text(encoding="utf-8"))


def save_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows that share their keys as CSV with a header; floats keep 6 significant digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    save_text(path, text.getvalue())


def load_csv(path: Path) -> list[dict[str, str]]:
    """Read a CSV file with a header; InputError if it is missing."""
    with require(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def save_table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows that share their keys as Parquet, which keeps types, with the same bytes for the same values."""
    import pyarrow as pa  # here: 0.2 s that most stages do without
    from pyarrow import parquet

    with atomic_path(path) as temporary:
        parquet.write_table(pa.Table.from_pylist(rows), temporary)


def load_table(path: Path) -> dict[str, list[Cell]]:
    """Return the columns of a Parquet file by name; InputError if it is missing or damaged."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return parquet.read_table(require(path)).to_pydict()
    except pa.ArrowException as error:
        raise InputError(f"{path} is damaged ({one_line(error)[:120]}){remedy(path, '-f ')}") from None


def save_arrays(path: Path, arrays: dict[str, np.ndarray], metadata: Metadata) -> None:
    """Write arrays as safetensors. `metadata` becomes one JSON string, because several keys are not byte-stable."""
    # safetensors writes memory as it lies
    in_order = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(safetensors_numpy.save(in_order, metadata={"json": json.dumps(metadata, sort_keys=True)}))


def load_metadata(path: Path) -> Metadata:
    """Return the metadata that `save_arrays` stored; InputError if the file is missing, damaged, or not of `save_arrays`."""
    try:
        with safe_open(require(path), framework="numpy") as file:
            return dict(json.loads(file.metadata()["json"]))
    except SafetensorError:
        why = "its header is not readable, or it is cut off"
    except (TypeError, KeyError, ValueError, RecursionError):
        why = "it has no metadata of a stage of this project"
    raise InputError(f"{path} is damaged ({why}){remedy(path, '-f ') or ': make it again'}")


def require(path: Path) -> Path:
    """Return `path` if it exists; else InputError that says which stage makes it."""
    if not path.is_file():
        raise InputError(f"{path} is missing{remedy(path)}")
    return path


def remedy(path: Path, flags: str = "") -> str:
    """Return what to run to get `path`, whose place names its producer; nothing if it lies elsewhere.

    data/<item>.* come from fetch_data@<item>, models/<stage>/<item>/* and reports/<stage>/<item>/* from <stage>@<item>, and
    models/<stage>/* and reports/<stage>/* from <stage>. models/released/* is tracked by git. Where params.yaml must name the item
    before DVC knows its stage, that is said first.
    """
    match path.parts:
        case ("models", "released", *_):
            return f": run 'git checkout {path}'"
        case ("data", name):
            stage = f"fetch_data@{Path(name).stem}"
        case ("models" | "reports", name, item, _, *_):
            stage = f"{name}@{item}"
        case ("models" | "reports", stage, _):
            pass
        case _:
            return ""
    return f": {missing_from_list(stage)}run 'dvc repro {flags}{stage}'"


def missing_from_list(stage: str) -> str:
    """Return what to add to params.yaml, so that <stage>@<item> is a stage of dvc.yaml; nothing if it is one, or if neither is there."""
    name, _, item = stage.partition("@")
    try:
        matrix = yaml.load(DVC_YAML.read_text(), Loader)["stages"][name]["matrix"]
        params = yaml.load(PARAMS.read_text(), Loader)
    except (OSError, KeyError, yaml.YAMLError):
        return ""
    for variant in next((values for values in matrix.values() if isinstance(values, list)), []):
        item = item.removesuffix(f"-{variant}")
    for values in matrix.values():
        if isinstance(values, str):  # "${train_bilinear.datasets}"
            key = values.strip("${}")
            if item not in reduce(dict.__getitem__, key.split("."), params):
                return f"add {item} to {key} in params.yaml, then "
    return ""
