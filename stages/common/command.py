"""What every stage's command line shares: arguments, and errors that fit on one line."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class InputError(Exception):
    """A mistake that the user can mend. Its message says what is wrong and what to do."""


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def parse_arguments(doc: str | None, **items: str) -> argparse.Namespace:
    """Parse one required `--item` for each keyword; `doc` (the module's docstring) becomes `--help`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in items.items():
        parser.add_argument(f"--{name}", required=True, help=text)
    return parser.parse_args()


def run(main: Callable[[], None]) -> NoReturn:
    """Call `main` and end the process; show a user's mistake, a full disk or Ctrl-C as one line instead of a traceback."""
    code = 0
    try:
        main()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("interrupted: nothing is left half-written; run the same command again", file=sys.stderr)
        code = 130
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: sys.exit would wait for threads that still train, and take half a second to unload torch
