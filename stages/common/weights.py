"""Weights of other people's networks, from files that nothing is known of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stages.common.artifacts import require
from stages.common.checkpoints import load_torch
from stages.common.command import InputError, one_line

NESTED = ("state_dict", "model_state_dict", "model")  # keys under which checkpoints keep a state_dict


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
