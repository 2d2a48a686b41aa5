"""A record says of what it is; a run that gives other numbers is told from one that rounds otherwise; what is found is what is asked."""

import copy
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import records
import reproduction
from records import RecordError

NUMBERS: dict[str, Any] = {"train/digits": {"acc": {"mean": 0.975, "std": 0.01, "n": 3}, "loss": 0.123456}}
HERE = {"processor": "P", "torch": "2", "threads": 1}


@pytest.fixture
def run(tmp_path, monkeypatch) -> dict[str, Any]:
    """A record of a scale, and the summaries of a run of it."""
    got = copy.deepcopy(NUMBERS)
    monkeypatch.setattr(records, "RECORDS", tmp_path)
    monkeypatch.setattr(records, "machine", lambda: HERE)
    monkeypatch.setattr(records, "summaries", lambda: got)
    (tmp_path / "some.json").write_text(records.lines({"about": HERE, "numbers": NUMBERS, "times": {}}))
    return got


def test_a_record_reads_as_it_was_written_with_six_digits():
    assert json.loads(records.lines(NUMBERS)) == NUMBERS
    assert records.rounded({"a": {"b": 1 / 3, "n": 12345678}}) == {"a": {"b": 0.333333, "n": 12345678}}


def test_the_same_machine_must_give_the_same_numbers(run):
    assert records.check("some").startswith("4 numbers are those")
    run["train/digits"]["loss"] += 1e-5
    with pytest.raises(RecordError, match=r"1 of 4 numbers.*\n.*loss: expected 0.123456"):
        records.check("some")


def test_another_machine_may_round_otherwise_and_is_told_what_differs(run, monkeypatch):
    monkeypatch.setattr(records, "machine", lambda: HERE | {"processor": "Q"})
    run["train/digits"]["acc"]["mean"] += 0.01  # of 0.03: one image of thirty
    said = records.check("some")
    assert "processor Q for P" in said and "acc/mean" in said and "1 of 4 differ" in said
    run["train/digits"]["acc"]["mean"] += 0.1
    with pytest.raises(RecordError, match="acc/mean"):
        records.check("some")


@pytest.mark.parametrize("spoil", [lambda got: got.pop("train/digits"), lambda got: got.update({"new": {"acc": 0.5}})])
def test_a_stage_too_few_or_too_many_is_no_reproduction(run, spoil):
    spoil(run)
    with pytest.raises(RecordError, match=r"missing|not expected"):
        records.check("some")


@pytest.mark.usefixtures("run")
def test_a_number_is_found_by_how_it_is_written():
    assert "some/train/digits/acc = 0.975" in records.find("97.5 %").splitlines()
    assert records.find("0.12") == "some/train/digits/loss = 0.123456"
    assert "no record" in records.find("0.13")


@pytest.mark.usefixtures("run")
def test_unknown_scales_and_records_are_named():
    with pytest.raises(RecordError, match=r"no record of other \(there: some\)"):
        records.check("other")
    with pytest.raises(RecordError, match=r"no scale unheard-of \(there: default, .*mnist"):
        records.settings("unheard-of")


def test_settings_of_a_scale_are_the_committed_params_with_its_changes():
    assert records.settings("smoke")["train_bilinear"]["epochs"] == 2
    assert records.settings("default") != records.settings("smoke")


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project with a scale, whose dvc repro does nothing."""
    for name, text in {"params.yaml": "train: {epochs: 9}\n", "dvc.lock": "stages: {}\n"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "stages/scales").mkdir(parents=True)
    (tmp_path / "stages/scales/small.args").write_text("# Next to nothing: a second on 2 cores\n-S train.epochs=2\n")
    for words in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm a"):
        subprocess.run(["git", *words.split()], cwd=tmp_path, check=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/dvc").write_text("#!/bin/sh\n")
    (tmp_path / "bin/dvc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setattr(reproduction, "ROOT", tmp_path)
    monkeypatch.setattr(records, "keep", lambda scale: f"kept {scale}")
    return tmp_path


def test_a_scale_that_was_killed_goes_on_by_the_same_command(project):
    assert records.run("small") == "kept small"
    (project / "dvc.lock").write_text("stages: {a")  # cut off
    assert records.run("small") == "kept small"
    assert (project / "dvc.lock").read_text() == "stages: {}\n"
    assert "epochs: 2" in (project / "params.yaml").read_text()
    subprocess.run(["git", "checkout", "-q", "params.yaml"], cwd=project, check=True)
    assert records.run("default") == "kept default"
    assert (project / "params.yaml").read_text() == "train: {epochs: 9}\n"


def test_a_scale_does_not_overwrite_what_is_not_committed(project):
    (project / "params.yaml").write_text("train: {epochs: 5}\n")
    with pytest.raises(RecordError, match=r"neither the committed one nor that of small"):
        records.run("small")
    with pytest.raises(RecordError, match=r"params.yaml is not that of small"):
        records.refuse_unfinished("small")


def test_what_was_measured_by_hand_says_how():
    for name, entry in records.read(records.MEASURED).items():
        assert set(entry) == {"what", "command", "date", "commit", "machine", "numbers"}, name
        assert all(entry.values()), name
