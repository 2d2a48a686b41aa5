"""Make a zoo of your own networks: python -m stages.weightnet.gather_zoo my_networks --name mine --input-shape 1 28 28

Reads   <folder>/metadata.json, and the files of weights that it names
Writes  models/build_zoo/<name>.json                               its architectures, properties and hyper-parameters
        models/build_zoo/<name>-<architecture>/shard-000.safetensors   weights [m, p]; metadata: the steps of the architecture
        models/build_zoo/<name>-<architecture>/index.parquet           a row for each network
Then `train_weightnet`, `evaluate_weightnet` and `predict` take the zoo by --dataset <name>; how, `train_weightnet.overrides.own` says.

metadata.json has for each file what it is and what you measured, {"a.pt": {"arch": "torchvision:resnet18", "test_acc": 0.91}, ...}:

arch             as for `predict`: an architecture of the zoo, torchvision:<name>, timm:<name>, a .json of layers, package.module:function
activation       "tanh", if it is an architecture of the zoo with tanh in place of ReLU
group            networks of one group (of one run, one seed) are never on both sides of a split; without it each is by itself
hyperparameters  {"<name>": number}, for comparison; those that all networks have are used
any other name   a property, a number: test_acc, which ranks networks, and what else you like; a network may lack some of them
"""

import argparse
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from stages.common.checkpoints import SUFFIXES
from stages.common.files import Rows, save_arrays, save_json, save_table
from stages.common.runtime import pin_threads
from stages.common.stage import InputError, lookup, run
from stages.weightnet.tracing.program import Program, rescaled_input
from stages.weightnet.tracing.saved import to_plain
from stages.weightnet.user_networks import add_network_arguments, load_unique, read_network, user_program
from stages.weightnet.zoo.properties import PROPERTIES, range_of
from stages.weightnet.zoo.reading import OWN, ZOO, own_zoo_path

LEAST = 30  # networks, and networks of which a property is known
LEFT = 10  # networks of which a property is known, when any architecture is left out
RESERVED = (
    "run",
    "snapshot",
    "shard",
    "file",
    "seed",
    "config",
    "row",
    "part",
    "task",
    "split",
    "learned",
    "predictor",
)
SAID: dict[str, type | tuple[type, ...]] = {
    "arch": str,
    "activation": str,
    "group": (str, int),
    "hyperparameters": dict,
}
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Entry:
    """What a metadata.json says of one file."""

    file: str
    arch: str
    tanh: bool
    group: str
    hyperparameters: dict[str, float]
    properties: dict[str, float]


def load_entries(path: Path) -> list[Entry]:
    """Return what a metadata.json says of its files; InputError names the first mistake."""
    said = load_unique(path)
    entries = [parse_entry(path, file, values) for file, values in said.items()]
    if len(entries) < LEAST:
        raise InputError(f"{path} names {len(entries)} networks: a zoo to learn from needs {LEAST}")
    there = {file.name for file in path.parent.iterdir() if file.suffix in SUFFIXES and not file.name.startswith(".")}
    if missing := sorted(there - set(said)):
        raise InputError(f"{path} does not name {missing[0]}: say what it is, or move it out of the folder")
    counts = Counter(name for entry in entries for name in entry.properties)
    for name, count in sorted({"test_acc": 0, **counts}.items()):
        if count < LEAST:
            why = ", and exams are written by networks that are known to be good" if name == "test_acc" else ""
            raise InputError(f"{path}: {name} is known of {count} networks: {LEAST} are needed{why}")
        for arch in (archs := {entry.arch for entry in entries}):
            left = sum(name in entry.properties for entry in entries if entry.arch != arch)
            if len(archs) > 1 and left < LEFT:
                raise InputError(f"{path}: {name} is known of {left} networks that are not {arch}: {LEFT} are needed")
    return entries


def parse_entry(path: Path, file: str, values: Any) -> Entry:
    """Return what is said of a file; InputError names the first mistake."""
    where = f"{path}: {file}"
    if not isinstance(values, dict) or "arch" not in values:
        raise InputError(f'{where}: expected {{"arch": ..., "test_acc": ...}}')
    if not (path.parent / file).exists():
        raise InputError(f"{path} names {file}, which is not there")
    for name, kind in SAID.items():
        if name in values and not isinstance(values[name], kind):
            raise InputError(f"{where}: {name} is {values[name]!r}, which is of another kind than it should be")
    if values.get("activation", "relu") not in ("relu", "tanh"):
        raise InputError(f"{where}: activation is {values['activation']!r}: expected relu or tanh")
    arch = values["arch"] if not values["arch"].endswith(".json") else str(path.parent / values["arch"])
    properties = {
        name: number(where, name, value, *range_of(name)) for name, value in values.items() if name not in SAID
    }
    settings = {
        name: number(where, f"hyperparameters.{name}", value, -math.inf, math.inf)
        for name, value in values.get("hyperparameters", {}).items()
    }
    group = str(values.get("group", f"file {file}"))
    return Entry(file, arch, values.get("activation") == "tanh", group, settings, properties)


def number(where: str, name: str, value: Any, low: float, high: float) -> float:
    """Return a number of a metadata.json; InputError if it is none, or outside its range."""
    short = name.removeprefix("hyperparameters.")
    if not NAME.fullmatch(short) or short in RESERVED or short.endswith(("_low", "_high")):
        raise InputError(f"{where}: {name} is no name for a number: expected letters, digits and _")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where}: {name} is {value!r}: expected a number (leave out what is not known)")
    if not (math.isfinite(value) and low <= value <= high):
        ends = f" from {low:g} to {high:g}" if math.isfinite(low) else ""
        raise InputError(f"{where}: {name} is {value:g}: expected a finite number{ends}")
    return float(value)


def labels_of(archs: Iterable[str]) -> dict[str, str]:
    """Return names for folders, each architecture's its own."""
    labels: dict[str, str] = {}
    for arch in sorted(set(archs)):
        short = re.sub(r"[^A-Za-z0-9_.]+", "_", Path(arch).stem if arch.endswith(".json") else arch)
        labels[arch] = short if short not in labels.values() else f"{short}_{len(labels)}"
    return labels


def in_order(names: set[str]) -> list[str]:
    """Return the names of properties: test accuracy first, then the zoo's others, then those of one's own."""
    return [*(name for name in PROPERTIES if name in names), *sorted(names - set(PROPERTIES))]


@dataclass(frozen=True)
class Read:
    """The networks of one architecture."""

    program: Program
    weights: list[np.ndarray]  # [p] each
    rows: Rows


def read_all(
    folder: Path, entries: list[Entry], shape: tuple[int, int, int], options: argparse.Namespace
) -> dict[str, Read]:
    """Return the networks of a folder by the names of their architectures; InputError names what cannot be read, or is there twice."""
    properties = in_order({name for entry in entries for name in entry.properties})
    settings = sorted(set.intersection(*(set(entry.hyperparameters) for entry in entries)))
    labels = labels_of(entry.arch for entry in entries)
    groups = {name: place for place, name in enumerate(sorted({entry.group for entry in entries}))}
    found: dict[str, Read] = {}
    seen: dict[str, str] = {}

    @cache
    def program_of(arch: str) -> Program:
        return rescaled_input(user_program(arch, shape, options.classes, options.allow_code), *options.pixels)

    for entry in entries:
        program, label = program_of(entry.arch), labels[entry.arch]
        if program.steps[-1].shape != (options.classes,):
            got = program.steps[-1].shape[0]
            raise InputError(
                f"{folder / entry.file}: {entry.arch} has {got} classes, expected {options.classes} (--classes)"
            )
        networks = read_network(folder / entry.file, entry.arch, program, entry.tanh)
        flat = program.layout.flatten(networks.weights)[0].numpy()
        content = hashlib.sha256(entry.arch.encode() + flat.tobytes()).hexdigest()
        if content in seen:
            raise InputError(f"{folder}: {seen[content]} and {entry.file} are the same network: leave one out")
        seen[content] = entry.file
        row: dict[str, Any] = {"run": f"{label}-{groups[entry.group]}", "snapshot": "final", "file": entry.file}
        row |= {"activation": "tanh" if networks.tanh[0] else "relu"}
        row |= {name: entry.properties.get(name, math.nan) for name in properties}
        row |= {f"hyper_{name}": entry.hyperparameters[name] for name in settings} | {"shard": "shard-000.safetensors"}
        read = found.setdefault(label, Read(program, [], []))
        read.weights.append(flat)
        read.rows.append(row)
    return found


def may_be_left_out(found: dict[str, Read]) -> list[str]:
    """Return the architectures without whose groups enough are there to learn from."""
    groups = {label: {str(row["run"]).rpartition("-")[2] for row in read.rows} for label, read in found.items()}
    others = {
        label: set().union(*(g for name, g in groups.items() if name != label)) - groups[label] for label in groups
    }
    return sorted(label for label, left in others.items() if len(left) >= LEFT)


def parse_options() -> argparse.Namespace:
    """Read the command line; InputError where the name is taken or images are not square."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with metadata.json and files of weights")
    parser.add_argument("--name", required=True, help="of the zoo: what --dataset will say")
    parser.add_argument("--input-shape", type=int, nargs=3, required=True, metavar=("C", "H", "W"), help="of an image")
    parser.add_argument("--classes", type=int, default=10, help="that the networks tell apart (default: 10)")
    add_network_arguments(parser)
    options = parser.parse_args()
    shape = tuple(options.input_shape)
    if not NAME.fullmatch(options.name) or options.name in {*lookup("build_zoo.overrides"), OWN}:
        raise InputError(f"--name {options.name}: expected letters, digits and _, and none of params.yaml's data sets")
    if shape[1] != shape[2] or min(shape) < 1:
        raise InputError(f"--input-shape {' '.join(map(str, shape))}: expected square images")
    return options


def main() -> None:
    options = parse_options()
    pin_threads()
    entries = load_entries(options.folder / "metadata.json")
    found = read_all(options.folder, entries, tuple(options.input_shape), options)
    for label, read in found.items():
        columns = [name for name in read.rows[0] if name not in ("run", "snapshot", "file", "activation", "shard")]
        names = {"properties": [n for n in columns if not n.startswith("hyper_")]}
        names |= {"hyperparameters": [n for n in columns if n.startswith("hyper_")]}
        metadata = {**read.program.layout.metadata, "program": to_plain(read.program), **names}
        folder = ZOO / f"{options.name}-{label}"
        save_arrays(folder / "shard-000.safetensors", {"weights": np.stack(read.weights)}, metadata)
        save_table(folder / "index.parquet", read.rows)
    save_json(own_zoo_path(options.name), {"architectures": sorted(found), "held_out": may_be_left_out(found), **names})
    groups = len({entry.group for entry in entries})
    counts = ", ".join(f"{len(read.rows)} of {label}" for label, read in sorted(found.items()))
    print(f"{options.name}: {len(entries)} networks in {groups} groups ({counts})")
    for name in names["properties"]:
        values = np.array([row[name] for read in found.values() for row in read.rows])
        known = values[~np.isnan(values)]
        print(f"  {name:18s} {known.mean():7.3f} ± {known.std():.3f}   known of {len(known)}")
    print(f"now: python -m stages.weightnet.train_weightnet --dataset {options.name} --variant exam")


if __name__ == "__main__":
    run(main)
