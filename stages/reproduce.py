"""`dvc repro` with the systems side by side: DVC runs one stage at a time, but systems do not need each other.

    python -m stages.reproduce            # one system more at a time than there are cores: DVC's own work leaves them idle
    python -m stages.reproduce --jobs 1   # one after the other

The data sets come first, then each system's stages, the system with most of them first, then the report. Each is a `dvc repro` of
its own that waits for DVC's lock, so cache and dvc.lock are as after one `dvc repro`. Where a system fails, the others go on.
What takes a stage longest to import is imported once for all of them (stages/forkserver.py).
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from stages.forkserver import fork_server

DVC = (sys.executable, "-m", "dvc", "--wait-for-lock")


def stages_by_system() -> dict[str, list[str]]:
    """Return each system's stages in dvc.yaml's order, which is that of the work; systems with most of them first."""
    stages = yaml.safe_load(Path("dvc.yaml").read_text())["stages"]
    listed = subprocess.run([*DVC, "stage", "list", "--name-only"], check=True, stdout=subprocess.PIPE, text=True)
    systems: dict[str, list[str]] = {}
    for name in listed.stdout.split():
        stage = stages[name.partition("@")[0]]
        module = stage.get("do", stage)["cmd"].split()[2]  # python -m stages.<system>.<stage>
        systems.setdefault(module.split(".")[1], []).append(name)
    return dict(sorted(systems.items(), key=lambda item: -len(item[1])))


def repro(targets: list[str], label: str, flags: list[str], environment: dict[str, str]) -> int:
    """Run `dvc repro` of these stages alone, in their order, each line that it prints behind `label`; return its exit status."""
    words = [*DVC, "repro", "--single-item", *flags, *targets]
    with subprocess.Popen(
        words, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            if line.strip():
                print(f"{label:10s} {line}", end="", flush=True)
    return process.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = (os.cpu_count() or 1) + 1
    parser.add_argument(
        "--jobs", type=int, default=jobs, help="systems at a time; default: %(default)s, one more than cores"
    )
    arguments, flags = parser.parse_known_args()  # flags: of `dvc repro`, such as --force and --no-run-cache
    with fork_server() as environment:  # before there are threads
        systems = stages_by_system()

        def reproduce(system: str) -> int:
            return repro(systems[system], system, flags, environment)

        status = reproduce("datasets")
        with ThreadPoolExecutor(arguments.jobs) as pool:
            status = max(status, *pool.map(reproduce, [name for name in systems if name not in ("datasets", "report")]))
        return status or reproduce("report")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing is left half-written; run the same command again")
