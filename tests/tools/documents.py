"""What documents claim: blocks of code, what they print, files and commands that they name.

A block of Python that is followed by a block of text is a demonstration: it runs in a fresh clone and prints that text. Of a block of
`console`, each line after "$ " is such a command, and what follows it is what it prints. Other blocks of Python need what the pipeline
makes.

python tests/tools/documents.py update     # run the commands of all blocks of console anew, and write there what they print
"""

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from reproduction import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "stages").glob("*/README.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DEMONSTRATION = re.compile(
    r"^```python\n(?P<code>(?:(?!^```).)*)^```\n\n```text\n(?P<printed>.*?)^```$", re.MULTILINE | re.DOTALL
)
COMMAND = re.compile(  # a line, more of them after a backslash, or what stands before END
    r"^\$ (?P<command>.*<<'END'\n(?s:.*?)^END|(?:.*\\\n)*.*)\n(?P<printed>(?:(?!^\$ ).*\n)*)", re.MULTILINE
)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
CLOSE = 0.02  # of a number on another processor: two points of a hundred, or 2 %


@dataclass(frozen=True)
class Demonstration:
    """A command of a document, and what the document says that it prints."""

    page: str
    command: list[str]
    printed: str


def demonstrations(page: Path) -> list[Demonstration]:
    """Return all demonstrations of a document."""
    text, name = page.read_text(encoding="utf-8"), str(page.relative_to(ROOT))
    found = [Demonstration(name, ["python", "-c", m["code"]], m["printed"]) for m in DEMONSTRATION.finditer(text)]
    for kind, block in BLOCK.findall(text):
        for m in COMMAND.finditer(block) if kind == "console" else ():
            found.append(Demonstration(name, ["bash", "-c", m["command"]], m["printed"]))
    return found


def snippets(page: Path) -> list[str]:
    """Return the blocks of Python of a document that are no demonstrations."""
    text = page.read_text(encoding="utf-8")
    shown = {m["code"] for m in DEMONSTRATION.finditer(text)}
    return [block for kind, block in BLOCK.findall(text) if kind == "python" and block not in shown]


def fresh_clone(folder: Path) -> Path:
    """Fill a folder with what git tracks, as it lies in the working tree, and return it."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("reports/published/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def alike(said: str, printed: str) -> bool:
    """Whether two texts are the same but for small differences of their numbers, and for white space."""
    words = [NUMBER.sub("#", " ".join(text.split())) for text in (said, printed)]
    numbers = [[float(x) for x in NUMBER.findall(text)] for text in (said, printed)]
    if words[0] != words[1]:
        return False
    return all(abs(a - b) <= max(CLOSE, CLOSE * abs(a)) for a, b in zip(*numbers, strict=True))


def environment(clone: Path) -> dict[str, str]:
    """Return the environment of a user who has set nothing."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WEIGHTLENS_", "RAY_"))}
    return kept | {"PYTHONPATH": str(clone)}


def renewed(page: Path, clone: Path) -> str:
    """Return a document's text in which every command of a block of console is followed by what it prints now."""
    text = page.read_text(encoding="utf-8")
    for shown in demonstrations(page):
        kind, _, command = shown.command
        if kind == "bash":
            done = subprocess.run(
                shown.command, cwd=clone, env=environment(clone), check=True, stdout=subprocess.PIPE, text=True
            )
            printed = "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())
            text = text.replace(f"$ {command}\n{shown.printed}", f"$ {command}\n{printed}")
    return text


if __name__ == "__main__":
    if sys.argv[1:] != ["update"]:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        clone = fresh_clone(Path(folder))
        for page in PAGES:
            page.write_text(renewed(page, clone), encoding="utf-8")
