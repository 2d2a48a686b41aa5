"""What long work leaves behind on its way, so that a run that was killed goes on where it was."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from stages.common.artifacts import save_json

WORK = Path(".work")

T = TypeVar("T")


def work_folder(stage: str, recipe: dict[str, Any]) -> Path:
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
