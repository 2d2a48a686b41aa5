"""What CI runs: a change is compared with its base on one machine, and workflows are valid."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from reproduction import ROOT

WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
STAGE = """
stages:
  measure:
    cmd: python measure.py
    deps: [measure.py]
    metrics: [metrics.json]
"""


def commit(folder: Path, score: float) -> None:
    """Commit a project whose only stage measures `score`; its lock is of another machine: empty."""
    (folder / "measure.py").write_text(f"open('metrics.json', 'w').write('{{\"score\": {score}}}')")
    identity = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
    for words in (["add", "--all"], [*identity, "commit", "--quiet", "--message", str(score)]):
        subprocess.run(["git", *words], cwd=folder, check=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Two commits of a project, of scores 0.5 and 0.75; nothing has been computed."""
    for words in (["git", "init", "--quiet"], ["dvc", "init", "--quiet"]):
        subprocess.run(words, cwd=tmp_path, check=True)
    (tmp_path / "dvc.yaml").write_text(STAGE)
    (tmp_path / ".gitignore").write_text("/metrics.json\n")
    commit(tmp_path, 0.5)
    commit(tmp_path, 0.75)
    return tmp_path


def compare(project: Path, base: str) -> str:
    words = [str(ROOT / ".ci/compare"), base]
    done = subprocess.run(
        words, cwd=project, capture_output=True, text=True, env=os.environ | {"DVC_NO_ANALYTICS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_metrics_of_a_change_are_compared_with_its_base(project):
    printed = compare(project, "HEAD~1")
    row = next(line for line in printed.splitlines() if "score" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["score", "0.5", "0.75", "0.25"]
    assert subprocess.check_output(["git", "branch"], cwd=project, text=True).count("\n") == 1  # no branch is left


def test_no_change_is_said(project):
    assert "No metric changes." in compare(project, "HEAD")


def test_workflows_run_scripts_that_are_there_and_executable():
    steps = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]
    scripts = {word for step in steps for word in step.get("run", "").split() if word.startswith(".ci/")}
    assert scripts >= {".ci/run", ".ci/compare", ".ci/install"}
    assert all(os.access(ROOT / script, os.X_OK) for script in scripts)
    assert WORKFLOW["jobs"]["check"]["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
