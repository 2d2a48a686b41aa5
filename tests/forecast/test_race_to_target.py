"""Races keep their finished runs: what is added to a race is all that is trained."""

from pathlib import Path

import pytest
from reproduction import ROOT, set_params

from stages.common.files import load_json, save_json
from stages.forecast import race_to_target
from stages.forecast.race_to_target import REPORTS, methods_of
from stages.forecast.released import OUTPUTS, RELEASED

WORK = Path(".work/race_to_target/fm16")
SETTINGS = (
    "race_to_target.rates=[2.0]",
    "race_to_target.cosine=[[8000,2.0],[8000,4.0]]",
)
METHODS = (
    "adamw",
    "adamw x 2",
    "cosine 8000 x 2",
    "cosine 8000 x 4",
    "moved",
    "line",
    "cosine 8000 x 2, moved",
    "cosine 8000 x 2, line",
    "cosine 8000 x 4, moved",
    "cosine 8000 x 4, line",
    "nowcast",
)


@pytest.fixture
def race(tmp_path, monkeypatch):
    """Race seeds in an empty folder, without training anything; return the seeds of the runs that would have been trained."""
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / RELEASED.parent).mkdir(parents=True)
    for file in (p.with_suffix(kind) for p in (RELEASED, OUTPUTS) for kind in (".json", p.suffix)):
        (tmp_path / file).write_bytes((ROOT / file).read_bytes())
    (tmp_path / "data").mkdir()
    (tmp_path / "data/fashion_mnist.safetensors").write_bytes(b"images")
    monkeypatch.chdir(tmp_path)
    trained: list[int] = []

    def train(_data, _params, seed, *_, **__):
        trained.append(seed)
        rows = [
            {"step": 100 * (seed + 1), "method": method, "seconds": 1.0, "validation": 1.0, "test": None}
            for method in ("adamw", "nowcast")
        ]
        return {"history": rows, "chosen": ["stay"]}

    def run(seeds: list[int], *overrides: str) -> list[int]:
        set_params(Path("params.yaml"), [f"race_to_target.seeds={seeds}", *SETTINGS, *overrides])
        trained.clear()
        race_to_target.main()
        return list(trained)

    monkeypatch.setattr(race_to_target, "train", train)
    monkeypatch.setattr(race_to_target, "load_data", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["race_to_target", "--variant", "fm16"])
    return run


def test_another_seed_costs_that_seed_alone(race):
    assert race([0, 1]) == [0] * len(METHODS) + [1] * len(METHODS)
    assert race([0, 1, 7]) == [7] * len(METHODS)
    together = load_json(REPORTS / "fm16" / "summary.json")
    assert race([7, 1]) == []
    for folder in WORK.iterdir():  # as one race from the start says the same
        for file in folder.iterdir():
            file.unlink()
    race([0, 1, 7])
    assert load_json(REPORTS / "fm16" / "summary.json") == together


def test_runs_of_other_recipes_are_not_found_and_are_removed(race):
    race([0])
    (before,) = WORK.iterdir()
    save_json(WORK.parent / "fm32" / "other" / "adamw-0.json", {})
    assert race([0], "race_to_target.decay=0.9") == [0] * len(METHODS)
    (after,) = WORK.iterdir()
    assert after != before
    Path("data/fashion_mnist.safetensors").write_bytes(b"other images")
    assert race([0]) == [0] * len(METHODS)
    assert (WORK.parent / "fm32" / "other").is_dir()  # another task's


def test_another_checkpoint_of_nino_costs_its_own_runs_alone(race, monkeypatch):
    race([0])
    monkeypatch.setattr(race_to_target, "Nino", lambda path: path)
    monkeypatch.setattr("sys.argv", ["race_to_target", "--variant", "fm16", "--nino", "nino.pt"])
    for content in (b"one", b"another"):
        Path("nino.pt").write_bytes(content)
        assert race([0]) == [0] * 3  # at the task's rate, and on two schedules
        assert race([0]) == []


def test_every_method_has_runs_of_its_own(race):
    race([3])
    (work,) = WORK.iterdir()
    assert sorted(file.name for file in work.iterdir()) == sorted(f"{method}-3.json" for method in METHODS)


def test_training_is_moved_at_the_task_s_rate_and_on_every_schedule():
    def moves(_network):
        raise AssertionError("nothing is trained here")

    methods = methods_of("{}".format, "{} moved".format, [2.0], [(80, 4.0)], {"line": (moves, "1")})
    assert [(name, m.rate, m.schedule, m.checkpoint) for name, m in methods.items()] == [
        ("adamw", 1.0, None, ""),
        ("adamw x 2", 2.0, None, ""),
        ("cosine 80 x 4", 1.0, (80, 4.0), ""),
        ("line", 1.0, None, "1"),
        ("cosine 80 x 4, line", 1.0, (80, 4.0), "1"),
    ]
    moved = {name for name, method in methods.items() if method.mover is moves}
    assert moved == {"line", "cosine 80 x 4, line"}
    assert all(method.readers == (f"{name} moved" if name in moved else name) for name, method in methods.items())
