"""`python -m stages.reproduce` runs what `dvc repro` does, and a stage after all that it needs."""

from dvc.repo import Repo
from reproduction import ROOT

from stages.reproduce import stages_by_system


def test_every_stage_runs_once_after_data_sets_and_what_it_needs_of_its_system(monkeypatch):
    monkeypatch.chdir(ROOT)
    systems = stages_by_system()
    order = [name for names in systems.values() for name in names]
    with Repo(ROOT) as repo:
        graph = repo.index.graph
        needs = {stage.addressing: {needed.addressing for needed in graph.successors(stage)} for stage in graph}
    assert sorted(order) == sorted(needs)
    for system in systems.keys() - {"datasets", "report"}:
        done = set(systems["datasets"])
        for name in systems[system]:
            assert needs[name] <= done, f"{name} needs {needs[name] - done}"
            done.add(name)
