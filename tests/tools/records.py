"""Records of scales: every number that a run gave, and of what, where and how long it ran. Documents quote records alone.

python tests/tools/records.py run mnist      # run the scale, and keep its record; if it is killed, the same command goes on
python tests/tools/records.py keep default   # write reports/records/default.json of what `dvc repro` has left here
python tests/tools/records.py check default  # compare what is here with the record
python tests/tools/records.py find 97.5%     # which numbers of which records are written so

On the processor, torch and number of threads that made a record, a run gives its numbers again. Elsewhere each may be further off by
what numbers like it move by at smoke scale (tests/expected/smoke.json); all that differ are listed, with that tolerance.

What was measured by hand stands in reports/records/measured.json: by what command, when, at which commit and on what machine. Of
what was measured before there were records, date and commit are those that brought the numbers into the documents.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from dvc.repo import Repo
from dvc.utils.hydra import apply_overrides
from reproduction import EXPECTED, ROOT, alike, command, differences, flatten, kind_of, scale_overrides, width

sys.path.insert(0, str(ROOT))  # the project need not be installed
from stages.common.times import noted
from stages.report import card

RECORDS = ROOT / "reports/records"
MEASURED = "measured"  # the record that is written by hand
DIGITS = 6  # of a number in a record
ROUNDING = 10.0 ** (1 - DIGITS)
DECIDES = ("dvc.yaml", "requirements.txt", "stages", ":(exclude)*.md", ":(exclude)stages/scales")
SAME = ("processor", "torch", "threads")  # what must agree for the same bytes
MENDABLE = "the kill cut dvc.lock off: git has the one before, and DVC's cache what was finished"


class RecordError(Exception):
    """Why there is no record, and what to do."""


def overrides(scale: str) -> list[str]:
    """Return the `key=value` settings of a scale; `default` has none."""
    if scale == "default":
        return []
    if not (ROOT / f"stages/scales/{scale}.args").is_file():
        there = ", ".join(sorted(path.stem for path in (ROOT / "stages/scales").glob("*.args")))
        raise RecordError(f"there is no scale {scale} (there: default, {there})")
    return scale_overrides(scale)


def params_text(scale: str) -> str:
    """Return params.yaml as committed, with the settings of a scale; those of `default` are none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "params.yaml")
        path.write_text(command(ROOT, "git", "show", "HEAD:params.yaml"))
        if changes := overrides(scale):
            apply_overrides(path, changes)
        return path.read_text()


def settings(scale: str) -> dict[str, Any]:
    """Return the values of a scale."""
    return dict(yaml.safe_load(params_text(scale)))


def summaries() -> dict[str, dict[str, Any]]:
    """Return the summaries of the stages that params.yaml asks for, by their folder in reports/, without what other runs left."""
    with Repo(str(ROOT)) as repo:
        paths = sorted(out.def_path for stage in repo.index.stages for out in stage.outs)
    return {
        str(Path(path).parent.relative_to("reports")): json.loads((ROOT / path).read_text())
        for path in paths
        if path.endswith("/summary.json")
    }


def refuse_unfinished(scale: str) -> None:
    """Raise RecordError unless what lies here was made by this commit with this scale's settings."""
    if yaml.safe_load((ROOT / "params.yaml").read_text()) != settings(scale):
        raise RecordError(f"params.yaml is not that of {scale}: run 'python tests/tools/records.py run {scale}'")
    if changed := command(ROOT, "git", "status", "--porcelain", "--untracked-files=no", "--", *DECIDES).split("\n")[
        :-1
    ]:
        raise RecordError(f"not committed: {', '.join(line[3:] for line in changed)}; a record is of a commit")
    if left := json.loads(command(ROOT, "dvc", "status", "--json")):
        raise RecordError(
            f"{len(left)} stages are not as this commit makes them ({', '.join(list(left)[:3])}): run 'dvc repro'"
        )


def rounded(value: Any) -> Any:
    """Return a summary with six digits of each number."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def machine() -> dict[str, Any]:
    """Return what decides how numbers are rounded here."""
    return {
        "processor": card.machine(),
        "torch": version("torch"),
        "threads": int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
    }


def about(scale: str) -> dict[str, Any]:
    """Return of what a record is: the scale's settings, commit and machine."""
    commit, date = command(ROOT, "git", "log", "-1", "--format=%h %cs").split()
    asked = "dvc repro" if scale == "default" else f"python tests/tools/records.py run {scale}"
    now = datetime.now(UTC).date().isoformat()
    return {"command": asked, "commit": commit, "of": date, "kept": now, **machine()}


def times() -> dict[str, dict[str, float]]:
    """Return seconds, of the clock and of processors, of the stages that ran here with these settings, where they noted them."""
    with chdir(ROOT):
        taken = noted()
    return {stage: {clock: round(value, 1) for clock, value in seconds.items()} for stage, seconds in taken.items()}


def lines(value: Any, indent: str = " ") -> str:
    """Return JSON in which a mapping of numbers alone takes one line: small, and easy to compare in git."""
    if not isinstance(value, dict) or not any(isinstance(item, dict) for item in value.values()):
        return json.dumps(value, sort_keys=True, allow_nan=False)
    rows = [f"{indent}{json.dumps(key)}: {lines(value[key], indent + ' ')}" for key in sorted(value)]
    return "{\n" + ",\n".join(rows) + "\n" + indent[1:] + "}"


def keep(scale: str) -> str:
    """Write the record of what was run here."""
    refuse_unfinished(scale)
    numbers, path = summaries(), RECORDS / f"{scale}.json"
    record = {"about": about(scale), "numbers": rounded(numbers), "times": times()}
    path.write_text(lines(record) + "\n")
    return f"wrote {path.relative_to(ROOT)}: {len(flatten(numbers, ''))} numbers of {len(numbers)} stages; commit it"


def by_file(numbers: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return all numbers of summaries by the keys that the smoke scale's have."""
    return {
        key: value
        for folder, summary in numbers.items()
        for key, value in flatten(summary, f"reports/{folder}/summary.json").items()
    }


def tolerances(numbers: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Return what `differences` compares a run on another machine with: numbers may move as those like them did at smoke scale."""
    moves: dict[tuple[str, str, str], float] = {}
    for key, known in json.loads(EXPECTED.read_text())["metrics"].items():
        share = math.inf if "range" in known else known["tolerance"] / width(key, [known["value"]])
        moves[alike(key)] = max(share, moves.get(alike(key), 0.0))
    expected = {}
    for key, value in numbers.items():
        kind = kind_of(key)
        share = max(moves.get(alike(key), kind.step), ROUNDING)
        if math.isinf(share):
            ends = [end if math.isfinite(end) else None for end in (kind.low, kind.high)]
            expected[key] = {"value": value, "range": ends}
        else:
            expected[key] = {"value": value, "tolerance": share * width(key, [value])}
    return expected


def exact(numbers: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Return what `differences` compares a run on the same machine with."""
    return {key: {"value": value, "tolerance": ROUNDING * abs(value)} for key, value in numbers.items()}


def check(scale: str) -> str:
    """Compare the numbers that lie here with the record; RecordError names those that are off."""
    record = read(scale)
    numbers, got = by_file(record["numbers"]), by_file(summaries())
    here = machine()
    others = [
        f"{name} {here[name]} for {record['about'][name]}" for name in SAME if here[name] != record["about"][name]
    ]
    moved = differences(got, exact(numbers))
    wrong = differences(got, tolerances(numbers)) if others else moved
    if wrong:
        raise RecordError("\n".join([f"{len(wrong)} of {len(numbers)} numbers are not those of the record:", *wrong]))
    if not others:
        return f"{len(numbers)} numbers are those of the record"
    allowed = tolerances(numbers)
    shown = [f"{line} (allowed: {allowed[line.partition(': ')[0]]})" for line in moved]
    return "\n".join(
        [f"another machine: {'; '.join(others)}", *shown, f"{len(moved)} of {len(numbers)} differ, none by more"]
    )


def read(name: str) -> dict[str, Any]:
    """Return a record; RecordError if there is none of this name."""
    path = RECORDS / f"{name}.json"
    if not path.is_file():
        there = ", ".join(sorted(path.stem for path in RECORDS.glob("*.json")))
        raise RecordError(f"there is no record of {name} (there: {there}): python tests/tools/records.py run {name}")
    return dict(json.loads(path.read_text()))


def known() -> dict[str, Any]:
    """Return the numbers of all records by the record's name, and what is set: params.yaml as `params`."""
    found: dict[str, Any] = {"params": yaml.safe_load((ROOT / "params.yaml").read_text())}
    for path in sorted(RECORDS.glob("*.json")):
        record = read(path.stem)
        measured = path.stem == MEASURED
        found[path.stem] = {name: entry["numbers"] for name, entry in record.items()} if measured else record["numbers"]
    return found


def quantities(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """Yield numbers by their key; the mean of a mapping that has one by the mapping's."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from quantities(item, key if name == "mean" else f"{key}/{name}")
    elif isinstance(value, int | float):
        yield key, value


def find(written: str) -> str:
    """Return keys and values of all numbers that are written so, as in '97.5%' or '0.67', or as a difference of their sign."""
    share, number = written.endswith("%"), written.rstrip("% ").replace(",", "")
    decimals, sign = len(number.partition(".")[2]), float(number) < 0
    hits = []
    for name, numbers in known().items():
        for key, value in quantities(numbers, name):
            shown = f"{abs(value) * (100 if share else 1):.{decimals}f}"
            if shown == number.lstrip("+-") and (not sign or value < 0):
                hits.append(f"{key} = {value:g}")
    return "\n".join(hits) or f"no record has {written}"


def run(scale: str) -> str:
    """Run a scale in the working tree and keep its record. Stages that are finished are not run again, and long ones go on."""
    lock = ROOT / "dvc.lock"
    try:
        yaml.safe_load(lock.read_text())
    except yaml.YAMLError:
        print(MENDABLE)
        command(ROOT, "git", "checkout", "--", "dvc.lock")
    if yaml.safe_load((ROOT / "params.yaml").read_text()) not in (settings("default"), settings(scale)):
        raise RecordError(
            f"params.yaml is neither the committed one nor that of {scale}: commit it, or 'git checkout params.yaml'"
        )
    (ROOT / "params.yaml").write_text(params_text(scale))
    if subprocess.run(["dvc", "repro"], cwd=ROOT).returncode:
        raise RecordError("dvc repro failed, see above; the same command goes on from there")
    return keep(scale)


COMMANDS = {"run": run, "keep": keep, "check": check, "find": find}

if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    try:
        print(COMMANDS[sys.argv[1]](sys.argv[2]))
    except (RecordError, FileNotFoundError) as error:
        sys.exit(str(error))
