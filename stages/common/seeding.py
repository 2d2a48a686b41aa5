"""First weights of modules, which torch draws from its one global generator."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_ALONE = threading.Lock()


@contextmanager
def building(seed: int) -> Iterator[None]:
    """Let modules that are built in the block draw by `seed`, whatever other threads build; the generator is left as it was."""
    with _ALONE, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
