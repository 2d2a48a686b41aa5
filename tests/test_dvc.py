"""Only what changed is computed: across repeats, params, machines and a killed stage."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from reproduction import clone, command, differences, smoke_clone

TARGET = "decompose_bilinear@digits"  # and all that it needs: enough to see what DVC does, in a third of the time


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone at smoke scale with TARGET computed, committed and pushed to a folder remote."""
    folder = tmp_path_factory.mktemp("dvc")
    project = smoke_clone(folder / "first")
    command(project, "dvc", "remote", "add", "--default", "folder", str(folder / "remote"))
    assert "Running stage 'train_bilinear@digits-regularised'" in command(project, "dvc", "repro", TARGET)
    command(project, "dvc", "push", "--with-deps", TARGET)
    command(project, "git", "commit", "--quiet", "--all", "--message", "smoke")
    return project


def test_a_second_repro_does_nothing(computed):
    assert "Running stage" not in command(computed, "dvc", "repro", TARGET)
    assert command(computed, "git", "status", "--porcelain") == ""


def test_a_fresh_clone_pulls_and_computes_nothing(computed, tmp_path):
    fresh = clone(computed, tmp_path / "fresh")
    assert "Running stage" not in command(fresh, "dvc", "repro", "--pull", TARGET)
    best = "models/train_bilinear/digits-regularised/seed0/best.pt"
    assert (fresh / best).read_bytes() == (computed / best).read_bytes()


def changed_stages(project: Path) -> set[str]:
    return set(json.loads(command(project, "dvc", "status", "--json", "--with-deps", TARGET)))


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

    variants = ("regularised", "unregularised", "two_layer", "linear")
    train = {f"train_bilinear@digits-{variant}" for variant in variants}
    assert after(lambda p: p["train_bilinear"]["overrides"]["mnist"].update(epochs=1)) == set()
    assert after(lambda p: p["train_bilinear"]["overrides"]["digits"].update(epochs=1)) == train
    assert after(lambda p: p["train_bilinear"].update(epochs=1)) == train
    noise = {"train_bilinear@digits-regularised"}
    assert after(lambda p: p["train_bilinear"]["variants"]["regularised"].update(input_noise=0.1)) == noise
    assert after(lambda p: p["decompose_bilinear"].update(mask_norm=1.0)) == {"decompose_bilinear@digits"}


def test_a_stage_killed_while_it_writes_is_repeated_to_the_same_result(computed, tmp_path):
    project = clone(computed, tmp_path / "killed")
    command(project, "dvc", "pull", "--quiet", "--with-deps", TARGET)
    written = project / "reports/decompose_bilinear/digits/spectra.png"  # neither the first file nor the last
    words = ["dvc", "repro", "--quiet", "--single-item", "--force", "--no-run-cache", TARGET]
    process = subprocess.Popen(
        words, cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    for there in (False, True):  # DVC removes what is there before the stage runs
        while written.exists() != there:
            assert process.poll() is None
            time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert "Running stage" in command(project, "dvc", "repro", TARGET)
    assert command(project, "git", "status", "--porcelain") == ""  # the lock, too, is as it was


def test_the_reproduction_check_can_fail():
    expected = {"a/acc": 0.5, "a/reconstruction_error/mean": 1e-6}
    assert differences({"a/acc": 0.52, "a/reconstruction_error/mean": 2e-6}, expected) == []
    assert len(differences({"a/acc": 0.6, "a/reconstruction_error/mean": 0.01}, expected)) == 2
    assert differences({"a/acc": 0.5, "b": 1.0}, expected) == [
        "a/reconstruction_error/mean: missing",
        "b: not expected",
    ]
