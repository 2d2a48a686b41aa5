"""A stage that the fork server runs does what it does in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reproduction import ROOT

import stages

STAGE = """
import json, os, signal, sys, time
print(json.dumps([__name__, sys.argv, sys.orig_argv[1:], os.getcwd(), os.environ["COLOUR"], sys.stdin.read()]))
print("an error", file=sys.stderr)
print(os.getpid(), file=open("pid", "w"), flush=True)
match sys.argv[1:]:
    case ["leaves", code]: sys.exit(int(code))
    case ["says"]: sys.exit("why")
    case ["fails"]: raise ValueError("of a reason")
    case ["dies"]: os.kill(os.getpid(), signal.SIGTERM)
    case ["lasts"]: time.sleep(60)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder with the package's own first file, and one stage."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "stages").mkdir()
    (folder / "stages/__init__.py").write_text(Path(stages.__file__).read_text())
    (folder / "stages/stage.py").write_text(STAGE)
    return folder


@pytest.fixture(scope="module")
def served():
    """The environment in which stages find a fork server: a process of its own has it, since this one has threads."""
    code = "from stages.forkserver import fork_server\nwith fork_server() as found: print(*found.values(), flush=True), input()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as server:
        yield {stages.FORK_SERVER: server.stdout.readline().strip()}
        server.communicate("\n")
    assert server.returncode == 0


def start(project: Path, environment: dict[str, str], *words: str, module: str = "stage") -> subprocess.Popen:
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", f"stages.{module}", *words]
    environment = os.environ | {"COLOUR": "red"} | environment
    return subprocess.Popen(command, cwd=project, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("words", [["ends"], ["leaves", "0"], ["leaves", "7"], ["says"], ["fails"]], ids=" ".join)
def test_it_prints_reads_and_ends_as_by_itself(project, served, words):
    alone, forked = start(project, {}, *words), start(project, served, *words)
    (out, errors), (forked_out, forked_errors) = (process.communicate("typed") for process in (alone, forked))
    assert forked_out == out
    assert forked.returncode == alone.returncode
    assert forked_errors.splitlines()[-1:] == errors.splitlines()[-1:]


def test_it_runs_the_code_that_lies_there_at_the_time(project, served):
    for text in ("one", "another"):
        (project / "stages/changing.py").write_text(f"print('{text}')")
        assert start(project, served, module="changing").communicate()[0] == f"{text}\n"


def test_libraries_are_imported_already(project, served):
    (project / "stages/asking.py").write_text(
        "import sys; print('torch' in sys.modules, 'stages.forkserver' in sys.modules)"
    )
    assert start(project, served, module="asking").communicate()[0] == "True False\n"


def test_a_signal_that_ends_it_is_told_as_shells_tell_it(project, served):
    process = start(project, served, "dies")
    process.communicate("")
    assert process.returncode == 128 + signal.SIGTERM


def test_it_is_killed_with_its_process(project, served):
    (project / "pid").unlink(missing_ok=True)
    process = start(project, served, "lasts")
    process.stdin.close()
    while not (project / "pid").is_file() or not (pid := (project / "pid").read_text()):
        time.sleep(0.05)
    assert int(pid) != process.pid
    process.kill()
    for _ in range(200):
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("it goes on")


def test_without_a_server_it_runs_by_itself(project, tmp_path):
    process = start(project, {stages.FORK_SERVER: str(tmp_path / "nobody")}, "leaves", "3")
    out, _ = process.communicate("")
    assert '"__main__"' in out
    assert process.returncode == 3
