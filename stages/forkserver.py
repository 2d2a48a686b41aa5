"""A fork server: stages that `stages.reproduce` has DVC start find torch and its like imported.

To import torch, timm and scikit-learn takes three or four processor seconds a stage, without this a sixth of a whole reproduction. One
process imports these libraries, and nothing of the project: every stage reads its code as it lies there. That process computes nothing,
so a forked copy of it is as good as a new process. What a stage's own process does is in stages/__init__.py: it sends its words,
folder, environment and standard streams, and ends as the copy does. If it is killed, so is the copy.
"""

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import stages

# What most stages import. Not pandas: pyarrow's allocator has a thread, which a copy lacks.
PRELOADED = ("torch", "torchvision", "timm", "pydantic.main", "scipy.stats", "sklearn.ensemble", "matplotlib.pyplot")
LONGEST_ADDRESS = 100  # bytes: of a socket's path, all systems take so many


@contextmanager
def fork_server() -> Iterator[dict[str, str]]:
    """Serve while the context lasts; give the environment in which stages find it, empty where there is none: then they import."""
    with tempfile.TemporaryDirectory(prefix="weightlens-") as folder:
        address = f"{folder}/socket"
        if sys.platform != "linux" or len(os.fsencode(address)) > LONGEST_ADDRESS:  # macOS's libraries bear no fork
            yield {}
            return
        watched, owned = os.pipe()  # whoever reads `watched` hears when this process ends, however it does
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen()
            if not (server := os.fork()):
                os.close(owned)
                serve(listener, watched)
        os.close(watched)
        try:
            yield {stages.FORK_SERVER: address}
        finally:
            os.close(owned)
            os.waitpid(server, 0)


def serve(listener: socket.socket, owner: int) -> NoReturn:
    """Import libraries, then fork a copy for every connection, until the other end of `owner` is closed and all copies have ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C stages hear themselves
    gc.disable()
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # memory that no copy's collector looks through stays shared
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)  # a copy's end is written to `wake`
    clients: dict[int, socket.socket] = {}  # by the process that runs their stage
    waiting: list[int | socket.socket] = [listener, owner]
    while waiting or clients:
        ready, _, _ = select.select([*waiting, woken, *clients.values()], [], [])
        if owner in ready:
            waiting = []
        elif listener in ready:
            client, _ = listener.accept()
            streams, request = receive(client)
            if request:
                if not (process := os.fork()):
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    run_stage(streams, **json.loads(request))
                clients[process] = client
            for stream in streams:
                os.close(stream)
        for process in [process for process, client in clients.items() if client in ready]:
            os.kill(process, signal.SIGKILL)  # a client says nothing more: it has ended
        if woken in ready:
            woken.recv(1024)
            answer_ended(clients)
    os._exit(0)


def receive(client: socket.socket) -> tuple[list[int], str]:
    """Return a client's standard streams as descriptors, and its request: JSON on one line, none if it ended before."""
    _, streams, _, _ = socket.recv_fds(client, 1, 3)
    with client.makefile() as lines:
        request = lines.readline()
    return streams, request if request.endswith("\n") else ""


def answer_ended(clients: dict[int, socket.socket]) -> None:
    """Send the exit status of every copy that has ended to its client, 128 + n after signal n as shells have it, and drop both."""
    for process in list(clients):
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            with clients.pop(process) as client, suppress(OSError):  # it may be gone
                client.sendall(bytes([code if code >= 0 else 128 - code]))


def run_stage(streams: list[int], words: list[str], folder: str, environment: dict[str, str]) -> NoReturn:
    """Do what `words` say, `python -m stages.<system>.<stage> ...`, as a new process would, and end.

    streams: descriptors of its standard input, output and error.
    """
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = folder
    sys.orig_argv[:], sys.argv[:] = words, ["-m", *words[3:]]
    for name in [name for name in sys.modules if name.partition(".")[0] == "stages"]:
        del sys.modules[name]  # the code that lies in the folder now counts
    code = 1
    try:
        if custom := sys.modules.get("sitecustomize"):
            importlib.reload(custom)  # what it does to a process may depend on its words and environment
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
