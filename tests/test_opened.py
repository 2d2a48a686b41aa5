"""What a stage opens is seen, whoever opens it, and compared with what dvc.yaml lists."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import opened
import pytest
import torch
from dvc.repo import Repo
from pyarrow import Table, parquet
from safetensors.torch import save_file

DVC_YAML = """
stages:
  reader:
    cmd: python -m stages.reader
    deps: [data/declared, data/folder, data/unread, stages/reader.py]
    outs: [models/reader/own.txt]
"""
READER = """
import os, subprocess, sys, threading
from pathlib import Path
import numpy, torch
from pyarrow import parquet
from safetensors import numpy as arrays, safe_open
from safetensors.torch import load_file
import stages.library

Path("data/declared").read_bytes()
open("data/folder/file").close()
with open("models/reader/.own.txt.part", "w") as file:
    file.write("own")
Path("models/reader/.own.txt.part").rename("models/reader/own.txt")
os.close(os.open("models/reader", os.O_RDONLY))  # to flush it
Path("elsewhere").read_bytes()
numpy.load("data/undeclared.npy")
torch.load("data/undeclared.pt", weights_only=True)
load_file("data/torch.safetensors")
arrays.load_file("data/numpy.safetensors")
safe_open("data/metadata.safetensors", framework="numpy")
parquet.read_table("data/undeclared.parquet")
thread = threading.Thread(target=Path("data/by_a_thread").read_bytes)
thread.start()
thread.join()
subprocess.run([sys.executable, "-c", "open('data/by_a_child')"], check=True)
list(Path("data/listed").iterdir())
list(Path("models").iterdir())
"""
UNDECLARED = (
    "data/by_a_child",
    "data/by_a_thread",
    "data/listed",
    "data/metadata.safetensors",
    "data/numpy.safetensors",
    "data/torch.safetensors",
    "data/undeclared.npy",
    "data/undeclared.parquet",
    "data/undeclared.pt",
    "models",
    "stages/library.py",
)


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    """A project of one stage, which reads what it may and a lot that it may not."""
    for folder in ("data/folder", "data/listed", "models/reader", "stages"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("declared", "folder/file", "unread", "by_a_thread", "by_a_child"):
        (tmp_path / "data" / name).touch()
    for name in ("elsewhere", "stages/__init__.py", "stages/library.py"):
        (tmp_path / name).touch()
    np.save(tmp_path / "data/undeclared.npy", np.zeros(1))
    torch.save({}, tmp_path / "data/undeclared.pt")
    for name in ("torch", "numpy", "metadata"):
        save_file({"a": torch.zeros(1)}, tmp_path / f"data/{name}.safetensors")
    parquet.write_table(Table.from_pylist([{"a": 1}]), tmp_path / "data/undeclared.parquet")
    (tmp_path / "stages/reader.py").write_text(READER)
    (tmp_path / "dvc.yaml").write_text(DVC_YAML)
    Repo.init(tmp_path, no_scm=True).close()
    return tmp_path


def test_files_that_a_stage_opens_undeclared_are_named_and_inputs_that_it_does_not_open(reader, tmp_path):
    log = tmp_path / "opened"
    for _ in range(2):  # the second time, code is compiled
        environment = (
            os.environ
            | opened.recording(log)
            | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DVC_STAGE": "reader"}
        )
        subprocess.run(["python", "-m", "stages.reader"], cwd=reader, env=environment, check=True)
        undeclared = [f"reader opens {path}, which dvc.yaml does not list" for path in UNDECLARED]
        assert opened.slips(reader, log) == [*undeclared, "reader does not open data/unread"]


def test_a_stage_of_which_nothing_is_noted_is_named(reader, tmp_path):
    log = tmp_path / "opened"
    log.write_text("python -m stages.gone\tdata/declared\n")
    ran, missing = opened.slips(reader, log)
    assert ran == "'python -m stages.gone' ran, which is no stage's command"
    assert missing.startswith("reader did not run")


def test_a_process_that_is_no_stage_notes_nothing(reader, tmp_path):
    log = tmp_path / "opened"
    subprocess.run(
        [sys.executable, "-c", "open('data/unread')"], cwd=reader, env=os.environ | opened.recording(log), check=True
    )
    assert not log.exists()
