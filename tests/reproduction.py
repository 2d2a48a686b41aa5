"""A clone of this commit at smoke scale, and what running its pipeline gives. Used by the tests and by CI.

python tests/reproduction.py check     # the committed metrics come out again, and nothing is left to do after
python tests/reproduction.py update    # write them anew, after a change that is meant to change them
"""

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from dvc.utils.hydra import apply_overrides

ROOT = Path(__file__).parent.parent
EXPECTED = ROOT / "tests/expected/smoke.json"
TOLERANCE = (
    0.05  # absolute, and RELATIVE beyond 0.5: where they were written metrics are equal, elsewhere sums round otherwise
)
RELATIVE = 0.1
TIGHT = {"reconstruction_error": 1e-4}  # keys that contain the name


def scale_overrides(name: str) -> list[str]:
    """Return the `key=value` settings of a scale: what `dvc exp run $(< stages/scales/<name>.args)` sets."""
    words = shlex.split((ROOT / f"stages/scales/{name}.args").read_text())
    assert words[::2] == ["-S"] * len(words[1::2])
    return words[1::2]


def command(folder: Path, *words: str) -> str:
    """Run a command in `folder` and return what it prints; its errors are shown and raised."""
    done = subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed in {folder}:\n{done.stdout}")
    return done.stdout


def clone(source: Path, target: Path) -> Path:
    """Clone the commit at `source`'s HEAD, able to commit, without DVC's cache."""
    command(source.parent, "git", "clone", "--quiet", str(source), str(target))
    for key, value in (("user.name", "test"), ("user.email", "test@localhost")):
        command(target, "git", "config", key, value)
    return target


def smoke_clone(target: Path) -> Path:
    """Clone the project and set its params to smoke scale, as `dvc exp run $(< stages/scales/smoke.args)` would."""
    clone(ROOT, target)
    apply_overrides(target / "params.yaml", scale_overrides("smoke"))
    return target


def metrics(project: Path) -> dict[str, float]:
    """Return every DVC metric of a project's working folder, by file and key."""
    files = json.loads(command(project, "dvc", "metrics", "show", "--json"))[""]["data"]

    def flatten(value: object, key: str) -> dict[str, float]:
        if isinstance(value, dict):
            return {k: v for name, item in value.items() for k, v in flatten(item, f"{key}/{name}").items()}
        return {key: value}

    return {k: v for name, file in files.items() for k, v in flatten(file["data"], name).items()}


def differences(got: dict[str, float], expected: dict[str, float]) -> list[str]:
    """Return a line for every metric that is missing, new, or further off than its tolerance."""
    lines = [f"{key}: missing" for key in sorted(expected.keys() - got.keys())]
    lines += [f"{key}: not expected" for key in sorted(got.keys() - expected.keys())]
    for key in sorted(expected.keys() & got.keys()):
        wide = max(TOLERANCE, RELATIVE * abs(expected[key]))
        tolerance = next((limit for name, limit in TIGHT.items() if name in key), wide)
        if abs(got[key] - expected[key]) > tolerance:
            lines.append(f"{key}: expected {expected[key]:g} ± {tolerance:g}, got {got[key]:g}")
    return lines


def main(action: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        project = smoke_clone(Path(folder, "clone"))
        subprocess.run(["dvc", "repro", "--no-run-cache"], cwd=project, check=True)
        got = metrics(project)
        if action == "update":
            EXPECTED.write_text(json.dumps(got, indent=1) + "\n")
            print(f"wrote {len(got)} metrics to {EXPECTED.relative_to(ROOT)}")
            return
        again = command(project, "dvc", "repro")
        if "Running stage" in again:
            sys.exit(f"the second repro had something to do:\n{again}")
        if lines := differences(got, json.loads(EXPECTED.read_text())):
            sys.exit("\n".join([f"{len(lines)} of {len(got)} metrics do not reproduce:", *lines]))
        print(f"{len(got)} metrics reproduce, and a second repro does nothing")


if __name__ == "__main__":
    if sys.argv[1:] not in (["check"], ["update"]):
        sys.exit(__doc__)
    main(sys.argv[1])
