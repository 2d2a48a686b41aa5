"""`dvc repro` with the systems side by side: DVC runs one stage at a time, but systems do not need each other.

    python -m stages.reproduce            # as many systems at a time as there are cores
    python -m stages.reproduce --jobs 1   # one after the other

The data sets come first, then each system's stages, the system with most of them first, then the report. Each is a `dvc repro` of
its own that waits for DVC's lock, so cache and dvc.lock are as after one `dvc repro`. Where a system fails, the others go on.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

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


def repro(targets: list[str], label: str, flags: list[str]) -> int:
    """Run `dvc repro` of these stages alone, in their order, each line that it prints behind `label`; return its exit status."""
    words = [*DVC, "repro", "--single-item", *flags, *targets]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            if line.strip():
                print(f"{label:10s} {line}", end="", flush=True)
    return process.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="systems at a time; default: one a core")
    arguments, flags = parser.parse_known_args()  # flags: of `dvc repro`, such as --force and --no-run-cache
    systems = stages_by_system()
    first, last = systems.pop("datasets"), systems.pop("report")
    status = repro(first, "datasets", flags)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        status = max(status, *pool.map(lambda name: repro(systems[name], name, flags), systems))
    return status or repro(last, "report", flags)


if __name__ == "__main__":
    sys.exit(main())
