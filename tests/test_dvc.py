"""Only what changed is computed: across repeats, params, machines and a killed stage."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from reproduction import clone, command, differences, smoke_clone


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone at smoke scale with everything computed, committed and pushed to a folder remote."""
    folder = tmp_path_factory.mktemp("dvc")
    project = smoke_clone(folder / "first")
    command(project, "dvc", "remote", "add", "--default", "folder", str(folder / "remote"))
    assert "Running stage 'train_bilinear@digits-regularised'" in command(project, "dvc", "repro")
    command(project, "dvc", "push")
    command(project, "git", "commit", "--quiet", "--all", "--message", "smoke")
    return project


def test_a_second_repro_does_nothing(computed):
    assert "Running stage" not in command(computed, "dvc", "repro")
    assert command(computed, "git", "status", "--porcelain") == ""


def test_a_fresh_clone_pulls_and_computes_nothing(computed, tmp_path):
    fresh = clone(computed, tmp_path / "fresh")
    assert "Running stage" not in command(fresh, "dvc", "repro", "--pull")
    assert (fresh / "reports/index.html").read_bytes() == (computed / "reports/index.html").read_bytes()
    best = "models/train_bilinear/digits-regularised/seed0/best.pt"
    assert (fresh / best).read_bytes() == (computed / best).read_bytes()


def changed_stages(project: Path) -> set[str]:
    return set(json.loads(command(project, "dvc", "status", "--json")))


def test_a_change_reaches_the_stages_that_read_it_and_no_other(computed):
    path = computed / "params.yaml"
    original = path.read_text()

    def after(change) -> set[str]:
        params = yaml.safe_load(original)
        change(params)
        path.write_text(yaml.safe_dump(params))
        try:
            return changed_stages(computed)
        finally:
            path.write_text(original)

    train = {f"train_bilinear@digits-{variant}" for variant in ("regularised", "unregularised", "two_layer")}
    assert after(lambda _: None) == set()
    assert after(lambda p: p["train_bilinear"]["overrides"]["mnist"].update(epochs=1)) == set()
    assert after(lambda p: p["train_bilinear"]["overrides"]["digits"].update(epochs=1)) == train
    assert after(lambda p: p["train_bilinear"].update(epochs=1)) == train
    noise = {"train_bilinear@digits-regularised"}
    assert after(lambda p: p["train_bilinear"]["variants"]["regularised"].update(input_noise=0.1)) == noise
    assert after(lambda p: p["decompose_bilinear"].update(mask_norm=1.0)) == {"decompose_bilinear@digits"}
    assert after(lambda p: p["build_report"].update(bilinear=[])) == {"build_report"}


def test_a_killed_stage_leaves_nothing_that_changes_the_result(computed, tmp_path):
    project = clone(computed, tmp_path / "killed")
    for folder in ("data", "models"):
        shutil.copytree(computed / folder, project / folder, dirs_exist_ok=True)
    stage = ["python", "-m", "stages.bilinear.decompose_bilinear", "--dataset", "digits"]
    expected = {path.name: path.read_bytes() for path in (project / "reports/decompose_bilinear/digits").iterdir()}
    for delay in (2.5, 3.5, 4.5):  # seconds: while it imports, measures, writes
        process = subprocess.Popen(stage, cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    command(project, *stage)
    got = {path.name: path.read_bytes() for path in (project / "reports/decompose_bilinear/digits").iterdir()}
    assert got == expected


def test_the_reproduction_check_can_fail():
    expected = {"a/acc": 0.5, "a/reconstruction_error/mean": 1e-6}
    assert differences({"a/acc": 0.52, "a/reconstruction_error/mean": 2e-6}, expected) == []
    assert len(differences({"a/acc": 0.6, "a/reconstruction_error/mean": 0.01}, expected)) == 2
    assert differences({"a/acc": 0.5, "b": 1.0}, expected) == [
        "a/reconstruction_error/mean: missing",
        "b: not expected",
    ]
