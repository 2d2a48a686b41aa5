"""Long work in pieces: each is a file of arrays, kept as soon as it is finished, so that a killed run goes on with the rest."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from stages.common.artifacts import save_arrays
from stages.common.cluster import cluster_map, has_cluster
from stages.common.runtime import parallel_map

T = TypeVar("T")
Arrays = dict[str, np.ndarray]


def compute_pieces(
    function: Callable[[T], Arrays], pieces: Mapping[Path, T], device: torch.device, progress: str
) -> None:
    """Write function(piece) of every piece whose file is not there yet.

    Side by side on the cores, or on a Ray cluster if RAY_ADDRESS names one: then `function` and what it refers to must pickle.
    """
    missing = [path for path in pieces if not path.is_file()]
    if has_cluster():
        for place, arrays in cluster_map(function, [pieces[path] for path in missing], progress):
            save_arrays(missing[place], arrays, {})
    else:
        parallel_map(lambda path: save_arrays(path, function(pieces[path]), {}), missing, device, progress)
