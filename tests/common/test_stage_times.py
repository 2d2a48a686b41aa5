"""Stages are counted in the order in which DVC runs them, and times tell of results of the same settings alone."""

import pytest
from dvc.repo import Repo
from dvc.repo.reproduce import plan_repro
from reproduction import ROOT

from stages.common import stage
from stages.report import card


def test_stages_are_counted_in_the_order_in_which_dvc_comes_to_them(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with Repo(ROOT) as repo:
        planned = [stage.addressing for stage in plan_repro(repo.index.graph)]  # as `dvc repro` does
    assert stage.all_stages() == planned
    monkeypatch.setenv("DVC_STAGE", planned[6])
    stage.announce()
    assert capsys.readouterr().out == f"stage 7 of {len(planned)}\n"


@pytest.fixture
def two_stages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("draw: {items: [a, b]}\n")
    (tmp_path / "dvc.yaml").write_text("stages: {draw: {matrix: {item: '${draw.items}'}}, build_report: {}}\n")
    return tmp_path


def test_a_time_is_that_of_results_made_with_the_settings_of_now(two_stages, monkeypatch):
    assert stage.noted() == {}
    assert card.time_taken(stage.noted(), stage.all_stages()).startswith("not recorded")
    monkeypatch.setenv("DVC_STAGE", "draw@b")
    stage.note()
    (taken,) = stage.noted().values()
    assert taken["processor"] > 0 and 0 < taken["wall"] < 3600
    assert card.time_taken(stage.noted(), stage.all_stages()).startswith("1 of 2 stages")
    (two_stages / "params.yaml").write_text("draw: {items: [a, b, c]}\n")
    assert stage.noted() == {}


@pytest.mark.usefixtures("two_stages")
def test_what_dvc_does_not_run_is_neither_counted_nor_noted(monkeypatch, capsys):
    monkeypatch.delenv("DVC_STAGE", raising=False)
    stage.announce()
    stage.note()
    assert capsys.readouterr().out == "" and not stage.TIMES.exists()


def test_without_dvc_no_time_is_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert card.time_taken(stage.noted(), stage.all_stages()).startswith("not recorded")
    assert card.times_details() == []


def test_the_longest_stage_comes_first():
    taken = {"draw@a": {"wall": 1.2, "processor": 0.4}, "draw@b": {"wall": 61.0, "processor": 110.0}}
    table = card.times_table(taken)
    assert [[cell.text for cell in row.cells] for row in table.rows] == [["draw@b", "61", "110"], ["draw@a", "1", "0"]]
    assert card.duration(754) == "12 min 34 s"
    assert card.duration(59.6) == "60 s"
