"""A record says of what it is; a run that gives other numbers is told from one that rounds otherwise; what is found is what is asked."""

import copy
import json
from typing import Any

import pytest
import records
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
    assert records.find("97.5 %") == "some/train/digits/acc = 0.975"
    assert records.find("0.12") == "some/train/digits/loss = 0.123456"
    assert "no record" in records.find("0.13")


@pytest.mark.usefixtures("run")
def test_unknown_scales_and_records_are_named():
    with pytest.raises(RecordError, match=r"no record of other \(there: some\)"):
        records.check("other")
    with pytest.raises(RecordError, match=r"no scale unheard-of \(there: default, mnist"):
        records.settings("unheard-of")


def test_settings_of_a_scale_are_the_committed_params_with_its_changes():
    assert records.settings("smoke")["train_bilinear"]["epochs"] == 2
    assert records.settings("default") != records.settings("smoke")


def test_what_was_measured_by_hand_says_how():
    for name, entry in records.read(records.MEASURED).items():
        assert set(entry) == {"what", "command", "date", "commit", "machine", "numbers"}, name
        assert all(entry.values()), name
