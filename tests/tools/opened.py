"""Which of the project's files stages open, beside what dvc.yaml says that they read and write.

Every process of a stage notes what it opens below data/, models/, reports/ and stages/: through an audit hook of Python
(recording/sitecustomize.py), and where safetensors or pyarrow.parquet.read_table open a file outside of Python, through a wrapper.

Not seen: whether a file is there, its size and date; what another library opens outside of Python; programs that are not Python;
folders listed through a descriptor; Ray's workers on other nodes; what a stage reads only at another scale or after it was
interrupted. An input of data that is declared and that no item of the stage opens is a slip as well, so that a reader which the
wrappers miss does not go unnoticed.
"""

import os
from pathlib import Path

from dvc.repo import Repo
from dvc.stage import PipelineStage

RECORDING = Path(__file__).parent / "recording"
STARTUP = Path(__file__).parent / "startup"  # what sitecustomize.py of any folder imports


def recording(log: Path) -> dict[str, str]:
    """Return the environment in which every stage appends to `log` what it opens."""
    return {"PYTHONPATH": f"{RECORDING}{os.pathsep}{STARTUP}", "WEIGHTLENS_OPENED": str(log)}


def slips(project: Path, log: Path) -> list[str]:
    """Return a line for every file that a stage opened undeclared, and for every input of data that no item of it did."""
    opened: dict[str, set[Path]] = {}
    for line in log.read_text().splitlines():
        command, _, path = line.partition("\t")
        opened.setdefault(command, set()).add(named(Path(path)))
    with Repo(project) as repo:
        stages = {stage.cmd: stage for stage in repo.index.stages if isinstance(stage, PipelineStage)}
    lines = [f"'{command}' ran, which is no stage's command" for command in sorted(opened.keys() - stages.keys())]
    read: dict[str, set[Path]] = {}  # by the name of a stage in dvc.yaml: all its items together
    listed: dict[str, set[Path]] = {}
    for command, stage in sorted(stages.items()):
        if command not in opened:
            lines.append(f"{stage.name} did not run, or nothing was noted: it opens at least its code")
            continue
        inputs = {Path(dep.def_path) for dep in stage.deps if dep not in stage.params}
        outputs = {Path(out.def_path) for out in stage.outs}
        for path in sorted(opened[command]):
            if not {path, *path.parents} & (inputs | outputs) and path.name != "__init__.py":
                lines.append(f"{stage.name} opens {path}, which dvc.yaml does not list")
        name = stage.name.partition("@")[0]
        read.setdefault(name, set()).update(*((path, *path.parents) for path in opened[command]))
        listed.setdefault(name, set()).update(path for path in inputs if path.suffix != ".py")
    return lines + [f"{name} does not open {path}" for name in listed for path in sorted(listed[name] - read[name])]


def named(path: Path) -> Path:
    """Return the file that a path is about: the source of compiled code, or what a temporary file will be called."""
    if path.parent.name == "__pycache__":
        return path.parents[1] / f"{path.name.partition('.')[0]}.py"
    return path.with_name(path.name[1:].removesuffix(".part")) if path.suffix == ".part" else path
