"""Random numbers: a generator for each purpose, first weights by a seed."""

import math
import random
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_ALONE = threading.Lock()


def generator(seed: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator for one purpose: streams of different purposes or seeds never mix."""
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed}/{purpose}".encode()))


def set_seed(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch. The stages themselves use `generator`."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (the global one is what is asked for)
    torch.manual_seed(seed)


@contextmanager
def seeded_init(seed: int) -> Iterator[None]:
    """Let modules that are built in the block draw by `seed`, whatever other threads build; the generator is left as it was."""
    with _ALONE, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def log_uniform(ends: tuple[float, float], u: float) -> float:
    """Return the number between two ends whose logarithm lies at `u`, in 0 to 1, of the way."""
    low, high = map(math.log, ends)
    return math.exp(low + u * (high - low))
