"""What every stage's script shares: its parameters, its command line, errors that fit on one line, and how long it takes.

params.yaml is the only source of values, and every mistake in it is reported at once. Times are noted outside of what stages make,
so that no result depends on them.
"""

import argparse
import copy
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any, NoReturn, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

PARAMS, DVC_YAML = Path("params.yaml"), Path("dvc.yaml")
TIMES = Path(".work/times")  # a file a stage and item, as DVC calls them
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, where PyYAML was built with it: ten times as fast
# When this process began: what it has computed until here are imports, which wait for nothing.
BEGAN = time.monotonic() - time.process_time()
# Which variants DVC makes, where not all of them: no stage reads these lists.
VARIANT_LISTS = ("backbones", "learned", "raced")


Values = dict[str, Any]  # a mapping of params.yaml: values by name, nested


class InputError(Exception):
    """A mistake that the user can mend. Its message says what is wrong and what to do."""


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


class StageParams(BaseModel):
    """Base of every stage's `Params`: immutable, no unknown keys, no defaults in code.

    A section of params.yaml holds for every item of its stage's matrix; `overrides.<dataset>` changes it for one data
    set, and of `variants` a stage reads the one it is asked for, as its field `variant`:

        train_bilinear:
          datasets: [digits, mnist]     # the matrix: read by DVC, not by the stage
          epochs: 60
          variants:
            regularised: {input_noise: 0.15}
            unregularised: {input_noise: 0.0}
          overrides:
            digits: {}
            mnist: {epochs: 40}
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def load(cls, section: str, dataset: str | None = None, variant: str | None = None) -> Self:
        """Read `section` of params.yaml, for one item of its matrix if it has one; InputError names every problem."""
        values, overrides = lookup(section), {}
        if dataset is not None:
            overrides = lookup(f"{section}.overrides.{dataset}")
            values = {key: value for key, value in values.items() if key not in ("datasets", "overrides")}
            values = _merge(values, overrides, f"{section}.overrides.{dataset}")
        if variant is not None:
            lookup(f"{section}.variants.{variant}")  # names the variants there are if this is none of them
            values = {key: value for key, value in values.items() if key not in VARIANT_LISTS}
            values["variant"] = values.pop("variants")[variant]

        def where(path: list[str]) -> str:
            """Return the full key of a value: in the section, or in the overrides if it comes from there."""
            path = ["variants", str(variant), *path[1:]] if path[:1] == ["variant"] else path
            node: object = overrides
            for part in path:
                node = node.get(part) if isinstance(node, dict) else None
            return ".".join([section, *(["overrides", str(dataset)] if node is not None else []), *path])

        return cls.parse(values, where)

    @classmethod
    def parse(cls, values: Mapping[str, object], where: Callable[[list[str]], str]) -> Self:
        """Validate `values`; InputError has a line for each problem, with the key that `where` gives for its path."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [f"{PARAMS}: {where([str(part) for part in e['loc']])}: {e['msg']}" for e in error.errors()]
            raise InputError("\n".join(lines)) from None


def lookup(key: str) -> Values:
    """Return the mapping at dotted `key` of params.yaml; InputError says which part of the key is missing."""
    try:
        node = _parsed(PARAMS.read_text())
    except FileNotFoundError:
        raise InputError(f"{PARAMS} is missing: run from the project's top folder") from None
    except yaml.YAMLError as error:
        raise InputError(f"{PARAMS} is not valid YAML: {one_line(error)}") from None
    walked: list[str] = []
    for part in key.split("."):
        known = sorted(node) if isinstance(node, dict) else []
        if part not in known:
            raise InputError(f"{PARAMS}: {'.'.join([*walked, part])} is missing (there: {', '.join(known)})")
        node = node[part]
        walked.append(part)
    if not isinstance(node, dict):
        raise InputError(f"{PARAMS}: {key} must be a mapping, got {node!r}")
    return copy.deepcopy(node)


@lru_cache(maxsize=1)
def _parsed(text: str) -> Any:
    """Return what a YAML text says: a stage looks up several keys of one file. Callers must leave it as it is."""
    return yaml.load(text, Loader)


def _merge(base: Values, changes: Values, where: str) -> Values:
    """Return `base` with `changes` laid over it, mapping by mapping; InputError on a change to what `base` lacks."""
    if unknown := sorted(set(changes) - set(base)):
        raise InputError(f"{PARAMS}: {where}.{unknown[0]} changes nothing (there: {', '.join(base)})")
    both = {
        key: _merge(base[key], value, f"{where}.{key}")
        if isinstance(base[key], dict) and isinstance(value, dict)
        else value
        for key, value in changes.items()
    }
    return base | both


def parse_arguments(doc: str | None, **items: str) -> argparse.Namespace:
    """Parse one required `--item` for each keyword; `doc` (the module's docstring) becomes `--help`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in items.items():
        parser.add_argument(f"--{name}", required=True, help=text)
    return parser.parse_args()


def run(main: Callable[[], None]) -> NoReturn:
    """Call `main` and end the process; show a user's mistake, a full disk or Ctrl-C as one line instead of a traceback.

    Where DVC runs it, say which stage of how many it is, and write down how long it took.
    """
    gc.freeze()  # what was imported stays: no collection looks through it
    gc.enable()  # paused by stages/__init__.py until here
    code = 0
    try:
        announce()
        main()
        note()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except SystemExit as left:  # of argparse: 0 after --help, 2 after a mistake
        code = left.code if isinstance(left.code, int) else 1
    except KeyboardInterrupt:
        print("interrupted: nothing is left half-written; run the same command again", file=sys.stderr)
        code = 130
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: sys.exit would wait for threads that still train, and take half a second to unload torch


def settings() -> str:
    """Return a hash of params.yaml: a time tells of the results that lie here only if they were made with the same settings."""
    return sha256(PARAMS.read_bytes()).hexdigest()


def all_stages() -> list[str]:
    """Return what stages and their items are called, in the order in which `dvc repro` comes to them; none without a dvc.yaml."""
    if not DVC_YAML.is_file():
        return []
    params = yaml.load(PARAMS.read_text(), Loader)
    names = []
    for name, stage in yaml.load(DVC_YAML.read_text(), Loader)["stages"].items():
        items = [stage["foreach"]] if "foreach" in stage else stage.get("matrix", {}).values()
        lists = [_values(params, values) for values in items]
        names += [f"{name}@{'-'.join(map(str, item))}" for item in product(*lists)] if lists else [name]
    return names


def _values(params: Values, values: str | Iterable[str]) -> list[str]:
    """Return a list of a matrix, or the list or keys that it names in params.yaml: "${train_bilinear.datasets}"."""
    if isinstance(values, str):
        node: Any = params
        for key in values.strip("${}").split("."):
            node = node[key]
        values = node
    return list(values)


def announce() -> None:
    """Print which of how many stages this is, if DVC runs it."""
    if stage := os.environ.get("DVC_STAGE"):
        names = all_stages()
        if stage in names:
            print(f"stage {names.index(stage) + 1} of {len(names)}", flush=True)


def note() -> None:
    """Write down how long this process has taken until now, if DVC runs it."""
    if stage := os.environ.get("DVC_STAGE"):
        used = os.times()
        processor = used.user + used.system + used.children_user + used.children_system
        taken = {"wall": time.monotonic() - BEGAN, "processor": processor, "settings": settings()}
        TIMES.mkdir(parents=True, exist_ok=True)
        (TIMES / f"{stage}.json").write_text(json.dumps(taken))


def noted() -> dict[str, dict[str, float]]:
    """Return the seconds (wall, processor) of every stage of dvc.yaml that was run here with the settings of now, in order."""
    found = {}
    for stage in all_stages():
        path = TIMES / f"{stage}.json"
        taken = json.loads(path.read_text()) if path.is_file() else {}
        if taken.get("settings") == settings():
            found[stage] = {"wall": taken["wall"], "processor": taken["processor"]}
    return found
