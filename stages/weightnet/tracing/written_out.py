"""Layers whose own forward is one function of many: they run by functions that are followed, and are compared with torch's own."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stages.common.stage import InputError

ALIKE = 1e-9  # of the largest number, in float64


def write_out(model: nn.Module, kind: type[nn.Module], forward: Callable[..., Any]) -> None:
    """Let a module's layers of a kind run by `forward`, which is given the layer before what it is called with."""
    for layer in model.modules():
        if isinstance(layer, kind):
            layer.forward = partial(forward, layer)


def require_alike(layer: nn.Module, own: Tensor, found: Tensor) -> None:
    """InputError if what was found is not what the layer's own forward gave."""
    with torch._C.DisableTorchFunction():
        if not torch.allclose(own, found, rtol=ALIKE, atol=ALIKE * float(own.abs().max())):
            raise InputError(f"{type(layer).__name__} is not computed as torch computes it")
