"""Work that was killed goes on; a Ray cluster computes what the cores of one machine compute, even if a node dies."""

import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reproduction import ROOT, set_params
from running import start

from stages.common import work
from stages.common.stage import InputError
from stages.common.work import cluster_map, compute_pieces, remembered, work_folder
from stages.datasets import fetch_data
from stages.weightnet import build_zoo


@pytest.fixture(scope="module")
def cluster():
    """A head that computes nothing, and two nodes of one core each, with the project on their path."""
    pytest.importorskip("ray", reason="ray is not installed: pip install -r requirements-ray.txt")
    from ray.cluster_utils import Cluster

    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT}/tests:{ROOT}/tests/tools:{before}"
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [found.add_node(num_cpus=1) for _ in range(2)]
    found.wait_for_nodes()
    os.environ["PYTHONPATH"] = before
    yield found, nodes
    found.shutdown()


def slow(folder: Path, item: int) -> int:
    """Leave a mark that names the node, and take long enough for it to die meanwhile."""
    import ray

    (folder / f"{ray.get_runtime_context().get_node_id()}-{item}").touch()
    time.sleep(3)
    return item * item


def test_a_zoo_built_on_a_cluster_has_the_same_bytes(cluster, project, monkeypatch):
    set_params(project / "params.yaml", ["build_zoo.variants.flat={runs: 8, stack: 2}"])
    start(monkeypatch, fetch_data, dataset="digits")
    start(monkeypatch, build_zoo, dataset="digits", variant="flat")
    first = {path.name: path.read_bytes() for path in Path("models/build_zoo/digits-flat").iterdir()}
    shutil.rmtree(".work")
    shutil.rmtree("models/build_zoo")
    monkeypatch.setenv("RAY_ADDRESS", cluster[0].address)
    monkeypatch.setattr(work, "parallel_map", None)  # nothing trains here
    start(monkeypatch, build_zoo, dataset="digits", variant="flat")
    assert {path.name: path.read_bytes() for path in Path("models/build_zoo/digits-flat").iterdir()} == first


def test_pieces_of_a_node_that_dies_are_computed_elsewhere(cluster, tmp_path, monkeypatch):
    found, nodes = cluster
    monkeypatch.setenv("RAY_ADDRESS", found.address)
    doomed = nodes[0].node_id

    def begun() -> set[str]:
        return {path.name.removeprefix(f"{doomed}-") for path in tmp_path.glob(f"{doomed}-*")}

    def kill() -> None:
        while not begun():
            time.sleep(0.05)
        found.remove_node(nodes[0], allow_graceful=False)

    killer = Thread(target=kill, daemon=True)
    killer.start()
    results = dict(cluster_map(partial(slow, tmp_path), range(4), "squares"))
    killer.join()
    assert results == {item: item * item for item in range(4)}
    elsewhere = {path.name.rpartition("-")[2] for path in tmp_path.iterdir() if not path.name.startswith(doomed)}
    assert begun() & elsewhere  # begun on the node that died, and again on another


def test_a_cluster_that_does_not_answer_is_named(monkeypatch):
    pytest.importorskip("ray", reason="ray is not installed: pip install -r requirements-ray.txt")
    monkeypatch.setenv("RAY_ADDRESS", "nowhere:1:2")
    with pytest.raises(InputError, match="RAY_ADDRESS=nowhere:1:2: no cluster answers"):
        list(cluster_map(str, [1], "nothing"))


def test_what_was_kept_is_counted_and_not_computed_again(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    computed = []

    def square(item: int) -> dict[str, np.ndarray]:
        computed.append(item)
        return {"square": np.array([item**2])}

    pieces = {tmp_path / f"{item}.safetensors": item for item in range(3)}
    compute_pieces(square, dict(list(pieces.items())[:1]), torch.device("cpu"), "squares")
    assert "kept" not in capsys.readouterr().out
    compute_pieces(square, pieces, torch.device("cpu"), "squares")
    assert capsys.readouterr().out == "squares: 1 of 3 kept\n"
    assert sorted(computed) == [0, 1, 2] and all(path.is_file() for path in pieces)


def test_work_is_found_again_for_the_same_recipe_and_code_alone(project, monkeypatch):
    one, same, other = (work_folder("stage", recipe) for recipe in ({"a": 1}, {"a": 1}, {"a": 2}))
    (project / "more.py").write_text("x = 1")
    monkeypatch.setitem(sys.modules, "stages.more", SimpleNamespace(__file__=str(project / "more.py")))
    with_more = work_folder("stage", {"a": 1})
    (project / "more.py").write_text("x = 2")
    edited = work_folder("stage", {"a": 1})
    assert one == same
    assert len({one, other, with_more, edited}) == 4
    calls = []

    def compute():
        calls.append(1)
        return {"x": [1, 2.5]}

    assert [remembered(project / "r.json", compute) for _ in range(2)] == [{"x": [1, 2.5]}] * 2
    assert calls == [1]
