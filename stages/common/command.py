"""What every stage's command line shares: arguments, and errors that fit on one line."""

import argparse
import sys
from collections.abc import Callable


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
    """Call `main`; show a user's mistake or a full disk as one line instead of a traceback."""
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was left half-written; run the same command again")
