"""Notes which of the project's files a stage opens: a process with this folder on PYTHONPATH appends to the file WEIGHTLENS_OPENED
a line for each, its command and the path. See opened.py. Python imports a module of this name when it starts.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from after_import import AfterImport

EVENTS = {  # and below which folders of the project they count: Python itself lists the folders of its modules
    "open": ("data", "models", "reports", "stages"),
    "os.listdir": ("data", "models", "reports"),
    "os.scandir": ("data", "models", "reports"),
}


def record(command: str, log: str) -> None:
    """Note from now on what this process opens below its working folder; child processes do the same in its name."""
    os.environ["WEIGHTLENS_OPENED_BY"] = command
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    project = f"{Path.cwd()}{os.sep}"
    below = {event: tuple(f"{project}{folder}{os.sep}" for folder in folders) for event, folders in EVENTS.items()}
    noted = set()

    def note(event: str, arguments: tuple) -> None:
        if event not in below or not isinstance(arguments[0], str | bytes | os.PathLike):
            return  # a descriptor's path was noted when it was opened
        path = os.path.abspath(os.fsdecode(arguments[0]))  # noqa: PTH100 (it may be bytes)
        if path in noted or not f"{path}{os.sep}".startswith(below[event]):
            return
        if event == "open" and os.path.isdir(path):  # noqa: PTH112
            return  # to flush it: who wants to know what is in it lists it
        noted.add(path)
        os.write(file, f"{command}\t{path.removeprefix(project)}\n".encode())

    sys.addaudithook(note)


def announcing(function: str) -> Callable[[ModuleType], None]:
    """Return what makes a module's function say which file it opens, outside of Python."""

    def change(module: ModuleType) -> None:
        original = getattr(module, function)

        def announced(path, *arguments, **options):
            sys.audit("open", path, "r", 0)
            return original(path, *arguments, **options)

        setattr(module, function, announced)

    return change


if "safetensors" not in sys.modules:  # in copies of the fork server, which runs this again, it is there and changed
    opening = (("safetensors", "safe_open"), ("pyarrow.parquet", "read_table"))
    sys.meta_path[:0] = [AfterImport(module, announcing(function)) for module, function in opening]
words = sys.orig_argv
is_stage = "DVC_STAGE" in os.environ and words[1:2] == ["-m"] and words[2].startswith("stages.")
if command := os.environ.get("WEIGHTLENS_OPENED_BY") or (is_stage and " ".join(words)):
    record(command, os.environ["WEIGHTLENS_OPENED"])
