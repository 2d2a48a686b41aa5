"""Independent pieces of work on a Ray cluster: optional, and only where RAY_ADDRESS names one."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from stages.common.command import InputError, one_line
from stages.common.runtime import pin_threads

T = TypeVar("T")
R = TypeVar("R")

RETRIES = 10  # of a piece whose worker or node died; an error of the piece itself is raised at once


def has_cluster() -> bool:
    """Whether RAY_ADDRESS names a cluster. It is no parameter: the engine must not move any hash."""
    return bool(os.environ.get("RAY_ADDRESS"))


def cluster_map(function: Callable[[T], R], items: Sequence[T], progress: str) -> Iterator[tuple[int, R]]:
    """Yield (place, function(item)) of all items as they finish, each computed by one core of some node.

    The function and what it refers to travel once, results come back to the caller, who alone writes files. Every node has this
    project on its PYTHONPATH. InputError if Ray is not installed or the cluster cannot be reached.
    """
    address = os.environ["RAY_ADDRESS"]
    try:
        import ray
    except ImportError:
        raise InputError(
            f"RAY_ADDRESS={address}: run 'pip install -r requirements-ray.txt' first, or unset it"
        ) from None
    try:
        ray.init(address, log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"RAY_ADDRESS={address}: no cluster answers ({one_line(error)[:120]})") from None
    try:
        shared = ray.put(function)
        remote = ray.remote(num_cpus=1, max_retries=RETRIES)(_call)
        places = {remote.remote(shared, item): place for place, item in enumerate(items)}
        bar = tqdm(total=len(items), desc=progress, disable=None)
        while places:
            (done, *_), _ = ray.wait(list(places), num_returns=1)
            yield places.pop(done), ray.get(done)
            bar.update()
        bar.close()
    finally:
        ray.shutdown()


def _call(function: Callable[[Any], Any], item: Any) -> Any:
    """Compute one piece as a stage does: on one thread."""
    pin_threads()
    return function(item)
