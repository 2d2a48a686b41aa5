"""Files of tensors as torch writes them."""

import io
from pathlib import Path
from typing import Any

import torch

from stages.common.artifacts import atomic_path


def save_torch(path: Path, value: dict[str, Any]) -> None:
    """Write a dictionary of tensors and plain values; torch.load reads it with weights_only=True."""
    buffer = io.BytesIO()  # not the file: torch would store its name inside, and fail obscurely on a full disk
    torch.save(value, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
