"""Kill `dvc repro` again and again, at random moments, and see that nothing is lost: in the end every hash is as without a kill.

python tests/tools/kills.py [KILLS]     # 24 by default; two runs of the smoke scale, ten minutes on two cores
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from reproduction import FIXED, command, smoke_clone

LONGEST = 25.0  # seconds until a kill: most stages take five
WORDS = ["dvc", "repro", "--no-run-cache"]
ENVIRONMENT = os.environ | FIXED


def hashes(project: Path) -> dict[str, str]:
    """Return the hash of every output in dvc.lock, but of the report, which says how long the others took."""
    stages = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    made = {name: stage.get("outs", []) for name, stage in stages.items() if name != "build_report"}
    return {out["path"]: out["md5"] for outs in made.values() for out in outs}


def run_for(project: Path, seconds: float) -> bool:
    """Run the pipeline and kill it, with all its children, after `seconds`; return whether it had ended by then."""
    log = project.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(
            WORDS, cwd=project, env=ENVIRONMENT, start_new_session=True, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        if process.wait(seconds):
            sys.exit(f"dvc repro failed after a kill:\n{log.read_text()[-2000:]}")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False
    return True


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 24
    moments = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = smoke_clone(Path(folder, "whole")), smoke_clone(Path(folder, "killed"))
        subprocess.run(WORDS, cwd=whole, env=ENVIRONMENT, check=True)
        for number in range(1, kills + 1):
            if run_for(killed, moments.uniform(0, LONGEST)):
                sys.exit(f"the pipeline had ended before kill {number} of {kills}")
            dirty = command(killed, "git", "status", "--porcelain").splitlines()
            assert set(dirty) <= {" M dvc.lock", " M params.yaml"}, dirty  # params.yaml: the smoke scale's
        subprocess.run(WORDS, cwd=killed, env=ENVIRONMENT, check=True)
        n = len(hashes(whole))
        changed = {path for path, value in hashes(whole).items() if hashes(killed).get(path) != value}
        if changed or hashes(whole).keys() != hashes(killed).keys():
            sys.exit(f"after {kills} kills these are not as they should be: {', '.join(sorted(changed))}")
    print(f"{kills} kills, and {n} outputs are the same")


if __name__ == "__main__":
    main()
