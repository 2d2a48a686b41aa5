"""Help and mistakes of a stage's command line are answered before the libraries that it imports."""

import os
import subprocess
import sys

import pytest
from reproduction import ROOT

from stages.bilinear import train_bilinear


@pytest.mark.parametrize("words", [[], ["--help"], ["--datset", "digits"], ["--dataset"]], ids=" ".join)
def test_what_is_said_without_torch_is_what_the_stage_says(words, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["train_bilinear.py", *words])
    with pytest.raises(SystemExit) as left:
        train_bilinear.main()
    (tmp_path / "torch.py").write_text("raise ImportError")
    command = [sys.executable, "-m", "stages.bilinear.train_bilinear", *words]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    early = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (early.returncode, early.stdout, early.stderr) == (left.value.code, *capsys.readouterr())
