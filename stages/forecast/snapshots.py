"""Snapshots of one run in a folder, in the order in which they were taken, as far as names and file times tell.

A name is read as words and numbers. What a number counts is said by the word next to it: a number of progress (epoch, step) is
the order, one that was measured or set (acc, lr) never is, and one without a known word is if file times agree. Whatever else
is ambiguous is refused: a wrong order makes a forecast that looks like any other.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from math import lcm
from pathlib import Path
from typing import Any

from stages.common.stage import InputError
from stages.forecast.snapshot_names import (
    CLOCK,
    COMPANIONS,
    COPIES,
    GENERIC,
    LEVELS,
    PROGRESS,
    RUNS,
    SUFFIXES,
    Number,
    is_measured,
    kind_of,
    pattern_of,
    read_names,
    show,
    stem,
    words_in,
)

USUAL = (  # files of weights in the folder of a checkpoint
    "model.safetensors",
    "pytorch_model.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
CONVERTED = "convert them to .safetensors, a file for each snapshot"
OTHERS = {  # endings of files of weights that are not read: what is to be done
    **dict.fromkeys((".h5", ".hdf5", ".keras", ".tflite", ".onnx", ".gguf", ".index"), CONVERTED),
    **dict.fromkeys((".npz", ".npy", ".msgpack", ".pkl", ".pickle", ".joblib"), CONVERTED),
    **dict.fromkeys((".ocdbt", ".pdparams", ".params"), CONVERTED),
    ".distcp": "convert each by torch.distributed.checkpoint.format_utils.dcp_to_torch_save",
    ".zip": "take the file of weights, such as policy.pth, out of each, and name it as the archive",
}
SHARD = re.compile(r"-\d{5}-of-\d{5}$")  # the stem of one of several files that hold a checkpoint
JITTER = Fraction(1, 20)  # by which intervals may differ and still count as even: of rounded numbers
MOST = 2000  # snapshots among which an even subset is sought: the search takes their square


@dataclass(frozen=True)
class Snapshot:
    """A file of weights. name: what orders it, its own or its folder's; time: when it was written, nanoseconds."""

    name: str
    path: Path
    time: int

    @property
    def stem(self) -> str:
        """The name without suffixes of files of weights."""
        return stem(self.name)


@dataclass(frozen=True)
class Snapshots:
    """Snapshots in order. order: by what; steps: where each is, None if that is not known; left_out: names of other files."""

    snapshots: list[Snapshot]
    order: str
    steps: list[Fraction] | None
    left_out: list[str]

    @property
    def paths(self) -> list[Path]:
        """Their files."""
        return [snapshot.path for snapshot in self.snapshots]

    def take(self, places: Sequence[int]) -> "Snapshots":
        """Return those at `places`; the others are left out."""
        taken = set(places)
        left_out = [s.name for i, s in enumerate(self.snapshots) if i not in taken]
        steps = None if self.steps is None else [self.steps[i] for i in places]
        return Snapshots([self.snapshots[i] for i in places], self.order, steps, self.left_out + left_out)

    def __str__(self) -> str:
        names = [s.name for s in self.snapshots]
        interval = "at intervals that names do not tell, taken as even"
        if self.steps is not None:
            interval = f"every {show(self.steps[1] - self.steps[0])}"
        lines = [f"{len(names)} snapshots by {self.order}, {interval}: {names[0]}, {names[1]}, ..., {names[-1]}"]
        if self.left_out:
            more = f" and {len(self.left_out) - 1} more" if len(self.left_out) > 1 else ""
            lines.append(f"left out: {self.left_out[0]}{more}")
        return "\n".join(lines)


def weights_files(folder: Path, deeper: bool = True) -> list[Path]:
    """Return the file of weights in the folder of one checkpoint, or the index of their shards; several if it is not said which it is.

    deeper: if there is none, look into its folders, as DeepSpeed and Megatron have them.
    """
    words = {path: set(words_in(stem(path.name))) for path in sorted(folder.iterdir()) if is_weights(path)}
    files = {path.name: path for path, said in words.items() if "model" in said or not COMPANIONS & said}
    if usual := [files[name] for name in USUAL if name in files]:
        return usual[:1]
    for name in USUAL:
        if (index := folder / f"{name}.index.json").is_file():
            return [index]
    if files or not deeper:
        return list(files.values())
    return [file for path in sorted(folder.iterdir()) if path.is_dir() for file in weights_files(path, deeper=False)]


def is_weights(path: Path) -> bool:
    """Whether a path looks like a file of weights."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def list_snapshots(folder: Path) -> tuple[list[Snapshot], list[str]]:
    """Return the files that look like snapshots, by name, and the names of those that do not though they hold tensors."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder")
    files = {path.name: path for path in sorted(folder.iterdir()) if is_weights(path)}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith(".") and re.search(r"\d", path.name):
            found = weights_files(path)
            files |= {path.name: found[0]} if len(found) == 1 else {}
    words = {name: set(words_in(stem(name))) for name in files}
    companions = {name for name in files if COMPANIONS & words[name]}
    copies = {
        name for name in files if COPIES & words[name] or (words[name] <= GENERIC and not re.search(r"\d", stem(name)))
    }
    shards = {name for name in files if SHARD.search(stem(name))}
    left_out = set()
    for others in (companions, copies, shards):  # unless they are all there is
        left_out |= others if set(files) - left_out - others else set()
    snapshots = [Snapshot(name, path, path.stat().st_mtime_ns) for name, path in files.items() if name not in left_out]
    return snapshots, sorted(left_out)


def find_snapshots(folder: Path, least: int, order: str | None = None, even: bool = False) -> Snapshots:
    """Return the folder's snapshots in order, `least` or more of them at even steps; InputError that names a remedy if not.

    order: None goes by the names, "mtime" by file times, else a regular expression whose groups are the key. even: take
    the most that lie at even steps, if not all do.
    """
    snapshots, left_out = list_snapshots(folder)
    if order == "mtime":
        ordered = by_time(folder, snapshots)
    elif order is not None:
        ordered = by_pattern(folder, snapshots, order)
    else:
        require_count(folder, snapshots, least)
        ordered = by_names(folder, snapshots)
    require_count(folder, ordered.snapshots, least)
    ordered = replace(ordered, left_out=left_out + ordered.left_out)
    return require_even(folder, ordered, least, even)


def require_count(folder: Path, snapshots: list[Snapshot], least: int) -> None:
    """InputError if there are fewer snapshots than a forecaster reads."""
    if len(snapshots) >= least:
        return
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    remedy = "save the run's weights more often, all in one folder"
    if whole := [path for path in folders if sum(map(is_weights, path.iterdir())) >= least]:
        remedy = f"hand over the folder that holds them, such as {whole[0]}"
    elif several := [path for path in folders if len(weights_files(path)) > 1]:
        names = " and ".join(path.name for path in weights_files(several[0])[:2])
        remedy = f"{several[0].name} holds several files of weights, {names}: leave those of one network alone in each folder"
    elif not snapshots:
        paths = (path for depth in ("*", "*/*", "*/*/*") for path in sorted(folder.glob(depth)))
        if other := next((path.name for path in paths if path.suffix.lower() in OTHERS), None):
            remedy = f"{other} is none that can be read: {OTHERS[Path(other).suffix.lower()]}"
    raise InputError(
        f"{folder}: expected {least} snapshots or more ({', '.join(SUFFIXES)}), got {len(snapshots)}: {remedy}"
    )


def by_time(folder: Path, snapshots: list[Snapshot]) -> Snapshots:
    """Return snapshots in the order in which their files were written."""
    ordered = sorted(snapshots, key=lambda s: s.time)
    for first, second in pairwise(ordered):
        if first.time == second.time:
            raise InputError(
                f"{folder}: {first.name} and {second.name} have the same file time: give the order by --order 'REGEX'"
            )
    return Snapshots(ordered, "file time", None, [])


def by_pattern(folder: Path, snapshots: list[Snapshot], pattern: str) -> Snapshots:
    """Return the snapshots whose names a regular expression finds, by its groups: as numbers if all are, else as text."""
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise InputError(f"--order: {pattern!r} is no regular expression ({error})") from None
    if not regex.groups:
        raise InputError(
            f"--order: {pattern!r} has no group: put what orders the snapshots into parentheses, as in 'step_(\\d+)'"
        )
    matches = {s: match.groups() for s in snapshots if (match := regex.search(s.name))}
    if not matches:
        some = f", such as {snapshots[0].name}" if snapshots else ""
        raise InputError(f"--order: {pattern!r} is found in no name in {folder}{some}: mend the regular expression")
    columns = [sort_keys(column) for column in zip(*matches.values(), strict=True)]
    keys = dict(zip(matches, zip(*columns, strict=True), strict=True))
    ordered = sort_unique(folder, list(matches), keys.__getitem__, "the same groups in --order")
    steps = [keys[s][0] for s in ordered] if len(columns) == 1 else []
    numeric = bool(steps) and all(isinstance(step, Fraction) for step in steps)
    left_out = [s.name for s in snapshots if s not in matches]
    return Snapshots(ordered, f"--order {pattern}", steps if numeric else None, left_out)


def sort_keys(column: Sequence[str | None]) -> list[Any]:
    """Return what texts sort by: numbers if all are numbers, else their words and numbers; nothing comes first."""
    if all(re.fullmatch(r"-?\d+(\.\d+)?", text or "") for text in column):
        return [Fraction(text) for text in column]
    pieces = [re.split(r"(\d+)", text or "") for text in column]
    return [[int(piece) if i % 2 else piece for i, piece in enumerate(row)] for row in pieces]


def sort_unique(folder: Path, snapshots: list[Snapshot], key: Callable[[Snapshot], Any], what: str) -> list[Snapshot]:
    """Return snapshots sorted by a key; InputError if two have the same."""
    ordered = sorted(snapshots, key=key)
    for first, second in pairwise(ordered):
        if key(first) == key(second):
            raise InputError(
                f"{folder}: {first.name} and {second.name} have {what}: keep one of them, or give the order by --order mtime"
            )
    return ordered


def by_names(folder: Path, snapshots: list[Snapshot]) -> Snapshots:
    """Return snapshots in the order of the numbers of progress in their names, or of other numbers if file times agree."""
    numbers = dict(zip(snapshots, read_names([s.stem for s in snapshots]), strict=True))
    require_one_kind(folder, numbers)
    first = numbers[snapshots[0]]
    varying = [i for i in range(len(first)) if len({row[i].value for row in numbers.values()}) > 1]
    progress = sorted((i for i in varying if first[i].level is not None), key=lambda i: first[i].level)
    runs = [i for i in varying if first[i].word in RUNS]
    bare = [
        i for i in varying if first[i].level is None and not is_measured(first[i]) and (i not in runs or not progress)
    ]

    def key(columns: Sequence[int]) -> Callable[[Snapshot], tuple[Fraction, ...]]:
        return lambda s: tuple(numbers[s][i].value for i in columns)

    if progress and runs:
        words = sorted({f"{first[i].word} {show(row[i].value)}" for i in runs for row in numbers.values()})
        raise InputError(
            f"{folder}: snapshots of several runs ({', '.join(words[:4])}): move each to a folder of its own, "
            "or choose one by --order 'REGEX'"
        )
    if not progress and not bare:
        raise InputError(
            f"{folder}: no number in names such as {snapshots[0].name} says when they were taken: give the order by --order mtime"
        )
    columns = progress
    if not progress or len({key(progress)(s) for s in snapshots}) < len(snapshots):
        columns = progress + bare
    ordered = sort_unique(folder, snapshots, key(columns), "the same number")
    if columns != progress:
        by_hand = order_by_hand(snapshots[0].stem, [first[i] for i in sorted(columns)])
        require_times(folder, ordered, [[numbers[s][i] for i in bare] for s in ordered], by_hand)
    words = ", ".join(first[i].word for i in progress) or "the number in their names"
    if progress and file_times(ordered) == "otherwise":
        words += " (file times say otherwise)"
    return Snapshots(ordered, words, steps_of([[numbers[s][i] for i in columns] for s in ordered], ordered), [])


def require_one_kind(folder: Path, numbers: dict[Snapshot, list[Number]]) -> None:
    """InputError if a name has no number, or names differ in more than their numbers."""
    kinds = {s: kind_of(s.stem, row) for s, row in numbers.items()}
    most, _ = Counter(kinds.values()).most_common(1)[0]
    usual = next(s for s in numbers if kinds[s] == most)
    counted = [n for n in numbers[usual] if n.level is not None] or [n for n in numbers[usual] if not is_measured(n)]
    remedy = "give the order by " + " or ".join(dict.fromkeys([order_by_hand(usual.stem, counted), "--order mtime"]))
    for snapshot, row in numbers.items():
        if not row:
            raise InputError(f"{folder}: no number in the name of {snapshot.name}, so its place is not known: {remedy}")
    if other := next((s for s in numbers if kinds[s] != most), None):
        raise InputError(f"{folder}: {usual.name} and {other.name} are names of two kinds: {remedy}")


def file_times(ordered: list[Snapshot]) -> str:
    """Return what file times say of an order: "agree", "nothing" (all are the same, or files were copied by name), "otherwise"."""
    times = [s.time for s in ordered]
    if len(set(times)) == 1:
        return "nothing"
    if times == sorted(times):
        return "agree"
    copied = [s.time for s in sorted(ordered, key=lambda s: s.name)]
    return "nothing" if copied == sorted(copied) else "otherwise"


def order_by_hand(name: str, numbers: list[Number]) -> str:
    """Return the option that orders by some numbers of a name, or by file times if groups in the name's order would not."""
    levels = [len(LEVELS) if n.level is None else n.level for n in numbers]
    if not numbers or levels != sorted(levels):
        return "--order mtime"
    return f"--order '{pattern_of(name, numbers)}'"


def require_times(folder: Path, ordered: list[Snapshot], rows: list[list[Number]], by_hand: str) -> None:
    """InputError if numbers that no word explains may be no order: file times contradict, or could alone confirm it."""
    said = file_times(ordered)
    if said == "agree":
        return
    remedy = f"if they are the order nevertheless, {by_hand}; if file times are, --order mtime"
    if said == "otherwise":
        raise InputError(
            f"{folder}: the numbers in names such as {ordered[0].name} do not grow with file time: {remedy}"
        )
    columns = list(zip(*([number.value for number in row] for row in rows), strict=True))
    all_grow = all(list(column) == sorted(column) for column in columns)
    if any(number.fraction for row in rows for number in row) or not (all_grow or CLOCK.search(ordered[0].stem)):
        raise InputError(
            f"{folder}: the numbers in names such as {ordered[0].name} may be measured, or no order: {remedy}"
        )


def steps_of(rows: list[list[Number]], ordered: list[Snapshot]) -> list[Fraction] | None:
    """Return where the run was at each snapshot, if the numbers that order them tell: a count over the whole run."""
    if any(CLOCK.search(s.stem) for s in ordered):
        return None
    columns, first = list(zip(*([number.value for number in row] for row in rows), strict=True)), rows[0]
    whole_run = [i for i, n in enumerate(first) if n.level == max(PROGRESS.values())] if len(columns) > 1 else [0]
    for i in whole_run:
        may_be_measured = first[i].level is None and any(row[i].fraction for row in rows)
        if not may_be_measured and all(a < b for a, b in pairwise(columns[i])):
            return list(columns[i])
    percent = first[-1].word == "pct" or ordered[0].stem[first[-1].end :].startswith(("pct", "percent", "%"))
    if [n.level for n in first] == [1, 2] and percent:
        return [100 * epoch + part for epoch, part in zip(*columns, strict=True)]
    return None


def require_even(folder: Path, snapshots: Snapshots, least: int, even: bool) -> Snapshots:
    """Return snapshots at even steps: all, or those of `even_subset` if asked for; InputError if not, that says which are."""
    if snapshots.steps is None:
        if even:
            raise InputError(f"{folder}: --even: the names do not tell steps: leave it out")
        return snapshots
    gaps = [b - a for a, b in pairwise(snapshots.steps)]
    if max(gaps) <= min(gaps) * (1 + JITTER):
        return snapshots
    subset = snapshots.take(even_subset(snapshots.steps))
    widest = gaps.index(max(gaps))
    shown = ", ".join(show(step) for step in snapshots.steps[max(0, widest - 1) : widest + 2])
    if len(subset.snapshots) < least:
        raise InputError(
            f"{folder}: uneven steps (..., {shown}, ...), and no {least} snapshots are evenly spaced: save them at even "
            "intervals, or, if these numbers are no steps, give the order by --order mtime"
        )
    if even:
        return subset
    raise InputError(
        f"{folder}: uneven steps (..., {shown}, ...), which forecasts take as even: {len(subset.snapshots)} snapshots every "
        f"{show(subset.steps[1] - subset.steps[0])}, {subset.snapshots[0].name} to {subset.snapshots[-1].name}, are: "
        "take these alone by --even"
    )


def even_subset(steps: list[Fraction]) -> list[int]:
    """Return the places of the longest arithmetic progression among increasing steps, of several the one that ends last."""
    start = max(0, len(steps) - MOST)
    scale = lcm(*(step.denominator for step in steps))
    whole = [int(step * scale) for step in steps[start:]]
    # by place, then by gap: the length of the chain that ends there, and the place before
    chains: list[dict[int, tuple[int, int]]] = []
    best = (1, len(whole) - 1, 0)
    for j, step in enumerate(whole):
        chains.append({})
        for i in range(j):
            gap = step - whole[i]
            length = chains[i].get(gap, (1, -1))[0] + 1
            chains[j][gap] = (length, i)
            best = max(best, (length, j, -gap))
    _, place, gap = best
    places = [place]
    while -gap in chains[place]:
        place = chains[place][-gap][1]
        places.append(place)
    return [start + place for place in places[::-1]]
