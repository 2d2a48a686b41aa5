"""Long work: what is finished is kept, so that a run that was killed goes on, and pieces run on the cores or on a cluster."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from tqdm import tqdm

from stages.common.files import save_arrays, save_json
from stages.common.runtime import parallel_map, pin_threads
from stages.common.stage import InputError, one_line

WORK = Path(".work")
RETRIES = 10  # of a piece whose worker or node died; an error of the piece itself is raised at once

T = TypeVar("T")
R = TypeVar("R")
Arrays = dict[str, np.ndarray]


def work_folder(stage: str, recipe: Mapping[str, object]) -> Path:
    """Return .work/<stage>/<hash of the recipe, of the project's code that is loaded, and of torch's version>.

    So another recipe or other code starts anew. The recipe has everything else that work follows from: `fingerprint` of its inputs.
    """
    loaded = {name: module for name, module in sys.modules.items() if name.startswith("stages.") or name == "__main__"}
    code = [
        Path(file).read_bytes() for _, module in sorted(loaded.items()) if (file := getattr(module, "__file__", None))
    ]
    text = json.dumps([recipe, torch.__version__], sort_keys=True, default=str).encode()
    return WORK / stage / hashlib.sha256(b"".join([text, *code])).hexdigest()[:16]


def fingerprint(*paths: Path) -> str:
    """Return a hash of the files' contents."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:  # piece by piece: a zoo may be larger than memory
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def remembered(path: Path, compute: Callable[[], T]) -> T:
    """Return the JSON in `path`; if it is not there, compute it and keep it there."""
    if not path.is_file():
        save_json(path, compute())
    return json.loads(path.read_text(encoding="utf-8"))


def compute_pieces(
    function: Callable[[T], Arrays], pieces: Mapping[Path, T], device: torch.device, progress: str
) -> None:
    """Write function(piece) of every piece whose file is not there yet.

    Side by side on the cores, or on a Ray cluster if RAY_ADDRESS names one: then `function` and what it refers to must pickle.
    """
    missing = [path for path in pieces if not path.is_file()]
    if kept := len(pieces) - len(missing):
        print(f"{progress}: {kept} of {len(pieces)} kept", flush=True)
    if has_cluster():
        for place, arrays in cluster_map(function, [pieces[path] for path in missing], progress, kept):
            save_arrays(missing[place], arrays, {})
    else:
        parallel_map(lambda path: save_arrays(path, function(pieces[path]), {}), missing, device, progress, kept)


def has_cluster() -> bool:
    """Whether RAY_ADDRESS names a cluster. It is no parameter: the engine must not move any hash."""
    return bool(os.environ.get("RAY_ADDRESS"))


def cluster_map(
    function: Callable[[T], R], items: Sequence[T], progress: str, kept: int = 0
) -> Iterator[tuple[int, R]]:
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
        bar = tqdm(total=kept + len(items), initial=kept, desc=progress, disable=None)
        while places:
            (done, *_), _ = ray.wait(list(places), num_returns=1)
            yield places.pop(done), ray.get(done)
            bar.update()
        bar.close()
    finally:
        ray.shutdown()


def _call(function: Callable[[T], Arrays], item: T) -> Arrays:
    """Compute one piece as a stage does: on one thread."""
    pin_threads()
    return function(item)
