"""Only what changed is computed: across repeats, params, machines and a killed stage."""

import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from reproduction import EXPECTED, TIMES, clone, command, copy_made, counts, differences, measure, smoke_clone

HEADLINES = (
    "train_bilinear/digits/summary.json/regularised/test_acc/mean",
    "evaluate_forecaster/digits/summary.json/weight_error/transformer/late/1",
    "evaluate_weightnet/digits/summary.json/scores/cnn3/test_acc/exam/tau/mean",
    "recover_memory/summary.json/decoded/classes/present/change/bits/mean",
    "train_few_shot/digits/summary.json/methods/memory_head/acc/mean",
)
TARGET = "decompose_bilinear@digits"  # and all that it needs: enough to see what DVC does, in a third of the time
TRAINED = {"train_bilinear@digits"}


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone at smoke scale with TARGET computed, committed and pushed to a folder remote."""
    folder = tmp_path_factory.mktemp("dvc")
    project = smoke_clone(folder / "first")
    command(project, "dvc", "remote", "add", "--default", "folder", str(folder / "remote"))
    assert "Running stage 'train_bilinear@digits'" in command(project, "dvc", "repro", TARGET)
    command(project, "dvc", "push", "--with-deps", TARGET)
    command(project, "git", "commit", "--quiet", "--all", "--message", "smoke")
    return project


def test_a_second_repro_does_nothing(computed):
    assert "Running stage" not in command(computed, "dvc", "repro", TARGET)
    assert command(computed, "git", "status", "--porcelain") == ""


def test_a_fresh_clone_pulls_and_computes_nothing(computed, tmp_path):
    fresh = clone(computed, tmp_path / "fresh")
    assert "Running stage" not in command(fresh, "dvc", "repro", "--pull", TARGET)
    best = "models/train_bilinear/digits/regularised/seed0/best.pt"
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

    assert after(lambda p: p["train_bilinear"]["overrides"]["mnist"].update(epochs=1)) == set()
    assert after(lambda p: p["train_bilinear"]["overrides"]["digits"].update(epochs=1)) == TRAINED
    assert after(lambda p: p["train_bilinear"].update(epochs=1)) == TRAINED
    assert after(lambda p: p["train_bilinear"]["variants"]["regularised"].update(input_noise=0.1)) == TRAINED
    assert after(lambda p: p["decompose_bilinear"].update(mask_norm=1.0)) == {"decompose_bilinear@digits"}


def test_after_a_sweep_a_table_of_160_columns_shows_the_parameter_and_its_effect(computed, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    project = clone(computed, tmp_path / "sweep")
    command(project, "dvc", "pull", "--quiet", TARGET, *sorted(TRAINED), "fetch_data@digits")
    command(project, "dvc", "exp", "run", "--quiet", "-S", "decompose_bilinear.similarity_rank=2", TARGET)
    table = command(project, "dvc", "exp", "show", "--only-changed", "--no-pager").splitlines()
    assert max(len(line.rstrip()) for line in table) <= 160
    shown = "\n".join(table)
    assert "…" not in shown.replace("└──", "")
    assert "similarity_rank" in shown and "similarity_untrained" in shown
    assert "acc_linear" not in shown  # it did not change


def test_a_stage_killed_while_it_writes_is_repeated_to_the_same_result(computed, tmp_path):
    project = clone(computed, tmp_path / "killed")
    command(project, "dvc", "pull", "--quiet", "fetch_data@digits", *sorted(TRAINED))  # all but the results of TARGET
    written = project / "reports/decompose_bilinear/digits/spectra.png"  # neither the first file nor the last
    words = ["dvc", "repro", "--quiet", "--single-item", TARGET]
    process = subprocess.Popen(
        words, cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not written.exists():
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert "Running stage" in command(project, "dvc", "repro", TARGET)
    assert command(project, "git", "status", "--porcelain") == ""  # the lock, and so every hash, is as it was


def test_what_stages_made_is_copied_and_nothing_that_git_tracks(tmp_path):
    project, kept = tmp_path / "project", tmp_path / "kept"
    for path in (
        "models/a/made.pt",
        "models/released/kept.pt",
        "reports/made é.png",
        "reports/tracked.md",
        ".work/piece",
    ):
        (project / path).parent.mkdir(parents=True, exist_ok=True)
        (project / path).write_text(path)
    (project / ".gitignore").write_text("/models/*\n!/models/released\n/reports/*\n!/reports/tracked.md\n/.work\n")
    command(project, "git", "init", "--quiet")
    command(project, "git", "add", "--all")
    copy_made(project, kept)
    copied = {str(path.relative_to(kept)): path.read_text() for path in kept.rglob("*") if path.is_file()}
    assert copied == {path: path for path in ("models/a/made.pt", "reports/made é.png")}


def test_what_a_metric_may_move_by_is_what_it_was_seen_to_move_by():
    kept = {f"reports/a/summary.json/acc/{i}": 0.5 for i in range(20)}
    runs = [kept | {"reports/a/summary.json/acc/x": x, "reports/a/summary.json/n": 7} for x in (0.5, 0.5, 0.52)]
    measured = measure(runs)
    acc, still, n = (measured[f"reports/a/summary.json/{name}"] for name in ("acc/x", "acc/0", "n"))
    assert acc["spread"] == pytest.approx(0.02) and acc["tolerance"] == pytest.approx(TIMES * 0.02)
    assert 0 <= still["tolerance"] < acc["tolerance"]  # what is usual for the kind, though it was never seen to move
    assert n["tolerance"] == 0


def test_a_chaotic_metric_is_checked_for_its_range_alone():
    key = "reports/a/summary.json/tau/mean"
    measured = measure([{key: 0.5}, {key: -0.5}])
    assert measured[key]["range"] == [-1, 1]
    assert counts(measured) == {name: {"by value": 0, "chaotic": 1} for name in ("all", "a")}
    assert differences({key: -0.9}, measured) == []
    for value in (1.1, math.nan, math.inf):
        assert len(differences({key: value}, measured)) == 1


def test_the_reproduction_check_can_fail():
    expected = {
        "a/acc": {"value": 0.5, "spread": 0.01, "tolerance": 0.03},
        "a/error": {"value": 1e-6, "spread": 0, "tolerance": 0},
    }
    assert differences({"a/acc": 0.52, "a/error": 1e-6}, expected) == []
    for got in (0.6, math.nan):
        assert len(differences({"a/acc": got, "a/error": 2e-6}, expected)) == 2
    assert differences({"a/acc": 0.5, "b": 1.0}, expected) == ["a/error: missing", "b: not expected"]


def test_most_metrics_of_every_stage_are_checked_by_value_and_each_systems_headline_is():
    """The committed file: a check of nothing would pass."""
    expected = json.loads(EXPECTED.read_text())["metrics"]
    rows = counts(expected)
    assert rows["all"]["by value"] >= 0.6 * len(expected)
    assert all(row["by value"] for row in rows.values())
    for headline in HEADLINES:
        assert "tolerance" in expected[f"reports/{headline}"], headline
