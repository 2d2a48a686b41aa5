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


def run(main: Callable[[], None]) -> None:
    """Call `main`; show a user's mistake, a full disk or Ctrl-C as one line instead of a traceback."""
    try:
        main()
    except (InputError, OSError) as error:
        _leave(f"error: {error}", 1)
    except KeyboardInterrupt:
        _leave("interrupted: nothing is left half-written; run the same command again", 130)


def _leave(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: sys.exit would wait for the threads that still train
