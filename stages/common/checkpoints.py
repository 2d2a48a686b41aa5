"""Weights on disk: checkpoints of our own, and state_dicts of other people's networks, of which no code is run."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stages.common.files import atomic_path, remedy, require
from stages.common.stage import InputError, one_line

NESTED = ("state_dict", "model_state_dict", "model")  # keys under which checkpoints keep a state_dict


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


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the state_dict in a .safetensors file, or in one of torch's, of which no code is run.

    InputError if the file is missing, damaged, or holds something else.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(require(path))
        except SafetensorError as error:
            raise InputError(f"{path} is damaged ({one_line(error)})") from None
    state: Any = load_torch(path, set())
    for key in NESTED:
        if isinstance(state.get(key), Mapping):
            state = state[key]
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} is no state_dict: expected names and tensors")
    return dict(state)
