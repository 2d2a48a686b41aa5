"""A file appears whole under its name or not at all."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from reproduction import ROOT
from safetensors.numpy import load_file

from stages.common.files import (
    atomic_path,
    load_csv,
    load_json,
    load_metadata,
    load_table,
    remedy,
    save_arrays,
    save_csv,
    save_json,
    save_table,
    save_text,
)
from stages.common.stage import InputError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_arrays_come_back_as_they_are_however_they_lie_in_memory(tmp_path):
    images = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    arrays = {"transposed": images.transpose(0, 2, 1), "reversed": images[::-1], "number": np.float32(0.5)}
    save_arrays(tmp_path / "a.safetensors", arrays, {})
    found = load_file(tmp_path / "a.safetensors")
    assert {name: (array.shape, array.tolist()) for name, array in found.items()} == {
        name: (array.shape, array.tolist()) for name, array in arrays.items()
    }


def test_a_failure_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "a" / "file.txt"
    save_text(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert names(path.parent) == ["file.txt"]


def test_a_killed_writer_keeps_the_old_file_and_the_next_one_replaces_what_it_left(tmp_path):
    path = tmp_path / "file.txt"
    save_text(path, "old")
    script = (
        "import sys, time, pathlib; from stages.common.files import atomic_path\n"
        "with atomic_path(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); print('written', flush=True); time.sleep(60)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "written\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert path.read_text() == "old"
    save_text(path, "new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file.txt"]


def test_json_refuses_what_is_no_number(tmp_path):
    save_json(tmp_path / "ok.json", {"a": 1.5})
    assert load_json(tmp_path / "ok.json") == {"a": 1.5}
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            save_json(tmp_path / "bad.json", {"a": value})
    assert names(tmp_path) == ["ok.json"]


def test_csv_round_trip(tmp_path):
    save_csv(tmp_path / "a.csv", [{"k": 1, "acc": 0.123456789}, {"k": 2, "acc": 1.0}])
    assert (tmp_path / "a.csv").read_bytes() == b"k,acc\n1,0.123457\n2,1\n"
    assert load_csv(tmp_path / "a.csv")[0] == {"k": "1", "acc": "0.123457"}


def test_arrays_have_the_same_bytes_every_time(tmp_path):
    arrays = {"b": np.arange(5), "a": np.ones((2, 3), dtype=np.uint8)}
    for name in ("1", "2"):
        save_arrays(tmp_path / name, arrays, {"y": [1], "x": "ü"})
        time.sleep(0.01)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert load_metadata(tmp_path / "1") == {"y": [1], "x": "ü"}


def test_missing_and_damaged_files_say_what_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("data/mnist.safetensors")
    with pytest.raises(InputError, match=r"data/mnist.safetensors is missing: run 'dvc repro fetch_data@mnist'"):
        load_metadata(path)
    path.parent.mkdir()
    path.write_bytes(b"garbage" * 100)
    with pytest.raises(InputError, match=r"damaged .*dvc repro -f fetch_data@mnist"):
        load_metadata(path)
    best = Path("models/train_bilinear/mnist/regularised/seed0/best.pt")
    assert remedy(best) == ": run 'dvc repro train_bilinear@mnist'"
    assert remedy(Path("reports/decompose_bilinear/mnist/summary.json")) == ": run 'dvc repro decompose_bilinear@mnist'"
    assert remedy(Path("/elsewhere/best.pt")) == ""


def test_a_remedy_says_what_params_must_name_before_dvc_knows_the_stage(tmp_path, monkeypatch):
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert remedy(Path("data/digits.safetensors")) == ": run 'dvc repro fetch_data@digits'"
    add = "add {} to {} in params.yaml, then run 'dvc repro {}'"
    for path, name, key, stage in (
        ("data/cifar10.safetensors", "cifar10", "fetch_data.datasets", "fetch_data@cifar10"),
        (
            "models/build_zoo/my-photos-cnn3/networks.safetensors",
            "my-photos",
            "build_zoo.datasets",
            "build_zoo@my-photos-cnn3",
        ),
        (
            "reports/decompose_bilinear/cifar10/summary.json",
            "cifar10",
            "train_bilinear.datasets",
            "decompose_bilinear@cifar10",
        ),
    ):
        assert remedy(Path(path)) == f": {add.format(name, key, stage)}"
    for path, stage in (
        ("models/build_fleet/rules/fleet.safetensors", "build_fleet@rules"),
        ("models/none/x/y.pt", "none@x"),
    ):
        assert remedy(Path(path)) == f": run 'dvc repro {stage}'"


def test_a_table_comes_back_with_its_types_has_the_same_bytes_and_is_refused_if_damaged(tmp_path):
    rows = [{"run": "a-1", "seed": 3, "loss": 0.1 + 0.2}, {"run": "a-2", "seed": 4, "loss": 1e-300}]
    for name in ("a", "b"):
        save_table(tmp_path / f"{name}.parquet", rows)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert load_table(tmp_path / "a.parquet") == {key: [row[key] for row in rows] for key in rows[0]}
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(InputError, match=r"a.parquet is damaged"):
        load_table(tmp_path / "a.parquet")
