"""Scripts pause Python's garbage collector while they import; where the project is imported, nothing is changed."""

import subprocess
import sys

import pytest
from reproduction import ROOT


@pytest.mark.parametrize(
    ("words", "seen"), [(["-m", "stages.probe"], "False"), (["-c", "import stages.probe"], "True")]
)
def test_the_collector_pauses_for_scripts_alone(tmp_path, words, seen):
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/__init__.py").write_text((ROOT / "stages/__init__.py").read_text())
    (tmp_path / "stages/probe.py").write_text("import gc; print(gc.isenabled())")
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.strip() == seen


@pytest.mark.parametrize(("leave", "status"), [("pass", 0), ("sys.exit(2)", 2), ("raise OSError('full')", 1)])
def test_the_collector_runs_while_a_stage_does_and_its_exit_status_is_told(leave, status):
    code = f"import gc, sys; gc.disable()\nfrom stages.common.stage import run\ndef main():\n  print(gc.isenabled())\n  {leave}\nrun(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert (done.stdout.strip(), done.returncode) == ("True", status)
