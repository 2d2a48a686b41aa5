"""Files of tensors as torch writes them."""

import io
from pathlib import Path
from typing import Any

import torch

from stages.common.artifacts import atomic_path, remedy, require
from stages.common.command import InputError, one_line


def save_torch(path: Path, value: dict[str, Any]) -> None:
    """Write a dictionary of tensors and plain values; `load_torch` reads it."""
    buffer = io.BytesIO()  # not the file: torch would store its name inside, and fail obscurely on a full disk
    torch.save(value, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def load_torch(path: Path, keys: set[str], map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Return a dictionary that has `keys`, by unpickling nothing but tensors and plain values.

    InputError if the file is missing, damaged, or holds something else.
    """
    try:
        value = torch.load(require(path), map_location=map_location, weights_only=True)
    except InputError:
        raise
    except Exception as error:  # torch raises anything from EOFError to UnpicklingError on a damaged file
        raise InputError(
            f"{path} is no checkpoint or is damaged ({one_line(error)[:200]}){remedy(path, '-f ')}"
        ) from None
    if not isinstance(value, dict) or not value.keys() >= keys:
        got = ", ".join(map(str, value))[:200] if isinstance(value, dict) else type(value).__name__
        raise InputError(
            f"{path} is no such checkpoint: expected {', '.join(sorted(keys)) or 'names and values'}, got {got}"
        )
    return value
