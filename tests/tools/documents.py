"""What documents claim: blocks of code, what they print, files and commands that they name.

A block of Python that is followed by a block of text is a demonstration: it runs in a fresh clone and prints that text. Of a block of
`console`, each line after "$ " is such a command, and what follows it is what it prints. Other blocks of Python need what the pipeline
makes.
"""

import re
import subprocess
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
