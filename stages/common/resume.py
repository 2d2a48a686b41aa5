"""What long work leaves behind on its way, so that a run that was killed goes on where it was."""

import hashlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from stages.common.artifacts import save_json

WORK = Path(".work")

T = TypeVar("T")


def work_folder(stage: str, recipe: dict[str, Any], *code: Any) -> Path:
    """Return .work/<stage>/<hash of the recipe and of the modules' source>: another recipe or other code starts anew."""
    text = json.dumps(recipe, sort_keys=True, default=str) + "".join(inspect.getsource(module) for module in code)
    return WORK / stage / hashlib.sha256(text.encode()).hexdigest()[:16]


def remembered(path: Path, compute: Callable[[], T]) -> T:
    """Return the JSON in `path`; if it is not there, compute it and keep it there."""
    if not path.is_file():
        save_json(path, compute())
    return json.loads(path.read_text(encoding="utf-8"))
