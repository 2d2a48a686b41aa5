"""What documents claim: blocks of code, what they print, the records that their numbers come from.

A block of Python that is followed by a block of text is a demonstration: it runs in a fresh clone and prints that text. Of a block of
`console`, each line after "$ " is such a command, and what follows it is what it prints. Other blocks of Python need what the pipeline
makes.

A number is a result if it has a decimal point, a thousands' comma, a % or an interval, or is alone in a table's cell; other whole
numbers are settings, sizes and years. Results are read from reports/records/: below a paragraph, list item or table stands
which key each has, from left to right, as in

    A memory is right on 90.4 % of them, a linear probe on 89.1 %.
    <!-- numbers: default/train_few_shot/digits/methods: memory/acc, linear_probe/acc -->

Where a key leads to a mapping with a mean, that is written, and its deviation or interval if there is one. The text says with how
many decimals, and whether in %. `python tests/tools/records.py find 90.4%` finds keys. Results without a key fail a test.

python tests/tools/documents.py numbers    # write the numbers that the records have now, or say which have no record
python tests/tools/documents.py update     # that, and run the commands of all blocks of console anew, and write what they print
"""

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import records
from reproduction import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "stages").glob("*/README.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DEMONSTRATION = re.compile(
    r"^```python\n(?P<code>(?:(?!^```).)*)^```\n\n```text\n(?P<printed>.*?)^```$", re.MULTILINE | re.DOTALL
)
COMMAND = re.compile(  # a line, more of them after a backslash, or what stands before END
    r"^\$ (?P<command>.*<<'END'\n(?s:.*?)^END|(?:.*\\\n)*.*)\n(?P<printed>(?:(?!^\$ ).*\n)*)", re.MULTILINE
)
NOTE = re.compile(r"<!-- numbers:(.*?)-->", re.DOTALL)  # the keys of the results above it
PLAIN = re.compile(  # what holds no results: code, links, comments, quotes of the report (tested elsewhere), names
    r"^```.*?^```|<!-- of reports/report\.md.*?<!-- end -->|<!--.*?-->|`[^`]*`|\]\([^)]*\)|^!\[[^\]]*|Python \d\.\d+|arXiv:\d+\.\d+"
    r"|\d+ % intervals?",
    re.MULTILINE | re.DOTALL,
)
BETWEEN = re.compile(r"\n[ \t]*\n|\n(?=- )|\n(?=#)")  # paragraphs, list items and tables
DIGITS = r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e-?\d+)?"
QUANTITY = re.compile(
    rf"(?<![\w.,/:-])(?P<mean>{DIGITS})(?P<unit>\s?%|\spoints)?"
    rf"(?:\s±\s(?P<std>{DIGITS})(?:\s?%)?|\s\[(?P<low>{DIGITS}),\s(?P<high>{DIGITS})\])?(?!\w|[.,]?\d)"
)
ALONE = re.compile(r"\|\s*\**$"), re.compile(r"\**\s*\|")  # what is around a number that fills a cell
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


class Unsourced(Exception):
    """Numbers of a document that no record holds, a line each."""


def hidden(text: str, pattern: re.Pattern[str]) -> str:
    """Return the text with spaces for what matches, so that places stay what they are."""
    return pattern.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


def results(text: str, start: int, end: int) -> list[re.Match[str]]:
    """Return the results between two places of a text whose plain parts are hidden."""
    found = []
    for m in QUANTITY.finditer(text, start, end):
        alone = ALONE[0].search(text[start : m.start()]) and ALONE[1].match(text, m.end())
        if alone or m["unit"] or m["std"] or m["low"] or re.search("[.,e]", m["mean"]):
            found.append(m)
    return found


def keys(note: str) -> list[str]:
    """Return the keys that a note names: `prefix: a, b; prefix: c`, or without a prefix."""
    found = []
    for part in note.split(";"):
        prefix, _, names = part.rpartition(":")
        found += ["/".join(filter(None, (prefix.strip(), name.strip()))) for name in names.split(",")]
    return [" ".join(key.split()) for key in found]


def blocks(text: str) -> list[tuple[int, list[re.Match[str]], list[str]]]:
    """Return where each paragraph, list item and table of a document begins, its results, and the keys that stand below it."""
    plain = hidden(text, PLAIN)
    ends = [m.end() for m in BETWEEN.finditer(plain)] + [len(plain)]
    spans = [(a, b) for a, b in zip([0, *ends], ends, strict=False) if plain[a:b].strip()]
    named: dict[tuple[int, int], list[str]] = {span: [] for span in spans}
    for note in NOTE.finditer(text):
        above = [span for span in spans if span[0] < note.start()]
        named[above[-1]] += keys(note[1])
    return [(span[0], results(plain, *span), names) for span, names in named.items()]


def looked_up(key: str, known: dict[str, Any]) -> Any:
    """Return the number, or mapping of numbers, at a key of the records; Unsourced if there is none."""
    value: Any = known
    path = key
    while path:
        there: dict[Any, Any] = (
            dict(enumerate(value)) if isinstance(value, list) else value if isinstance(value, dict) else {}
        )
        name = next((n for n in there if f"{path}/".startswith(f"{n}/")), None)  # one may have a / of its own
        if name is None:
            raise Unsourced(f"no record holds {key}: {path} is not among {', '.join(map(str, there))[:200]}")
        value, path = there[name], path[len(str(name)) + 1 :]
    return value


def formatted(number: float, like: str) -> str:
    """Return a number with the sign, the commas, the decimals and the power of ten that another one is written with."""
    sign, comma = "+" * like.startswith("+"), "," * ("," in like)
    mantissa, power, _ = like.partition("e")
    decimals = len(mantissa.partition(".")[2])
    if not power:
        return f"{number:{sign}{comma}.{decimals}f}"
    mantissa, _, exponent = f"{number:{sign}.{decimals}e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def written(m: re.Match[str], value: Any) -> str:
    """Return a result as the record has it, in the form that the document has; Unsourced if it has no such number."""
    parts = value if isinstance(value, dict) else {"mean": value}
    parts = {"std": parts.get("error")} | parts  # the mean's standard error, where the record says so
    text = m[0]
    for name in ("high", "low", "std", "mean"):  # from right to left, so that places stay what they are
        if m[name] is not None:
            if not isinstance(parts.get(name), int | float):
                raise Unsourced(f"{m[0]!r}: the record has no {name}")
            start, end = (place - m.start() for place in m.span(name))
            text = text[:start] + formatted(parts[name] * (100 if m["unit"] else 1), m[name]) + text[end:]
    return text


def sourced(text: str, known: dict[str, Any]) -> str:
    """Return a document's text with the numbers that the records have; Unsourced names every result without one."""
    problems, edits = [], []
    for place, found, names in blocks(text):
        line = f"line {text.count(chr(10), 0, place) + 1}"
        if len(found) != len(names):
            shown = ", ".join(" ".join(m[0].split()) for m in found)
            problems.append(f"{line}: {len(found)} results ({shown}), {len(names)} keys ({', '.join(names)})")
            continue
        for m, name in zip(found, names, strict=True):
            try:
                edits.append((m.start(), m.end(), written(m, looked_up(name, known))))
            except Unsourced as error:
                problems.append(f"{line}: {error}")
    if problems:
        raise Unsourced("\n".join(problems))
    for start, end, shown in reversed(edits):
        text = text[:start] + shown + text[end:]
    return text


def write_numbers() -> None:
    """Write the numbers of the records into all documents; exit with a line for every result that has none."""
    problems = []
    for page in PAGES:
        try:
            page.write_text(sourced(page.read_text(encoding="utf-8"), records.known()), encoding="utf-8")
        except Unsourced as error:
            problems += [f"{page.relative_to(ROOT)}, {line}" for line in str(error).splitlines()]
    if problems:
        sys.exit(
            "\n".join(
                [*problems, "below results stand the keys of their records, <!-- numbers: ... -->: --help says how"]
            )
        )


if __name__ == "__main__":
    if sys.argv[1:] not in (["update"], ["numbers"]):
        sys.exit(__doc__)
    write_numbers()
    if sys.argv[1:] == ["numbers"]:
        sys.exit()
    with tempfile.TemporaryDirectory() as folder:
        clone = fresh_clone(Path(folder))
        for page in PAGES:
            page.write_text(renewed(page, clone), encoding="utf-8")
