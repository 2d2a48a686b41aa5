"""How long stages take, and which of all is running: noted outside of what they make, so that no result depends on it."""

import json
import os
import time
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import yaml

TIMES = Path(".work/times")  # a file a stage and item, as DVC calls them
PARAMS, DVC_YAML = Path("params.yaml"), Path("dvc.yaml")
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, where PyYAML was built with it: ten times as fast
# When this process began: what it has computed until here are imports, which wait for nothing.
BEGAN = time.monotonic() - time.process_time()


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


def _values(params: dict[str, Any], values: Any) -> list[Any]:
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
