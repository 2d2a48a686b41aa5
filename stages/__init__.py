"""Five systems that treat the weights of networks as data.

Run as a script (`python -m stages.<system>.<stage>`, sys.argv[0] is "-m" then), Python's garbage collector pauses until
`stages.common.stage.run`: importing torch and its like makes half a million objects, none of them garbage, and to look through
them again and again takes a fifth of the time of all imports or more. Under `stages.reproduce`, a process that has imported them
already takes over. Where this is imported, nothing is changed.
"""

import ast
import gc
import json
import os
import signal
import socket
import sys
from pathlib import Path

FORK_SERVER = "WEIGHTLENS_FORK_SERVER"  # in the environment: where it listens


def hand_over(address: str) -> None:
    """Let a copy of the fork server (stages/forkserver.py) run this process's stage, and end as it does; return if nobody listens."""
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(address)
        except OSError:
            return
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C the copy hears itself
        environment = {name: value for name, value in os.environ.items() if name != FORK_SERVER}
        request = {"words": sys.orig_argv, "folder": str(Path.cwd()), "environment": environment}
        socket.send_fds(server, [b"\n"], [0, 1, 2])
        server.sendall(json.dumps(request).encode() + b"\n")
        status = server.recv(1)
    os._exit(status[0] if status else 1)


def answer_early(source: Path) -> None:
    """Answer `--help` and mistakes in the command line of the stage that lies in `source`, before its imports, which take seconds.

    What it says to parse_arguments is read from its text; scripts with parsers of their own answer for themselves.
    """
    tree = ast.parse(source.read_text())
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "parse_arguments":
            from stages.common.stage import parse_arguments

            sys.argv[0] = str(source)
            parse_arguments(
                ast.get_docstring(tree), **{k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
            )
            sys.argv[0] = "-m"
            return


if sys.argv[:1] == ["-m"]:
    gc.disable()
    _, option, module, *_ = *sys.orig_argv, ""
    if option == "-m" and module.startswith("stages."):  # and Python itself was given no options
        if address := os.environ.get(FORK_SERVER):
            hand_over(address)
        script = Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
        if script.is_file():
            answer_early(script)
