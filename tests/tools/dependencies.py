"""What dvc.yaml repeats of the code and of params.yaml, computed: DVC follows no imports, and lists cannot be interpolated.

python tests/tools/dependencies.py check     # dvc.yaml says the same, or what it should say and exit status 1
python tests/tools/dependencies.py update    # write it there; what is written by hand stays

Of each stage: the files that its script imports, directly or not; the keys of params.yaml that it reads, which are the fields of
its `Params`; inputs and outputs of which there is one for each member of a list in params.yaml (MEMBERS); and a matrix's
variants. Inputs that are data are written by hand, but for members. Stages are read here, and none is imported. The graph that
follows is drawn at the end of stages/README.md.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))  # the project need not be installed
from stages.common.stage import Loader

ROOT = Path(__file__).parents[2]
DVC_YAML, PARAMS, PAGE = ROOT / "dvc.yaml", ROOT / "params.yaml", ROOT / "stages/README.md"
COMMAND = "python tests/tools/dependencies.py update"
WIDTH = 140

ZOOS = {"models/build_zoo/${item.dataset}-*": "train_weightnet.tasks.architectures"}
FORECASTERS = {"models/train_forecaster/${item.dataset}/*/forecaster.pt": "train_forecaster.variants"}
FLEETS = {"models/condense_changes/*.safetensors": "build_fleet.variants"}
MEMBERS = {  # by stage: paths with a star for a member, and the list or mapping of params.yaml that names the members
    "train_forecaster": FORECASTERS,
    "evaluate_forecaster": FORECASTERS,
    "train_weightnet": ZOOS,
    "evaluate_weightnet": ZOOS | {"models/train_weightnet/${item.dataset}-*": "train_weightnet.variants"},
    "condense_changes": FLEETS | {"models/build_fleet/*/fleet.safetensors": "build_fleet.variants"},
    "recover_memory": FLEETS,
    "learn_world": {"models/train_world/*": "learn_world.datasets", "data/*.safetensors": "learn_world.datasets"},
}
VARIANTS = {"build_zoo": "train_weightnet.tasks.architectures"}  # of a matrix, where it's not <stage>.variants


@cache
def tree(path: Path) -> ast.Module:
    """Return the syntax of a file of the project."""
    return ast.parse((ROOT / path).read_text())


@cache
def imports(path: Path) -> list[Path]:
    """Return the project's files that a file imports itself, wherever in it."""
    names: list[str] = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise SystemExit(f"{path}:{node.lineno}: import from stages.<system>, not relative")
            names += [f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)]
    files = [Path(*name.split(".")).with_suffix(".py") for name in names if name.startswith("stages.")]
    return [file for file in files if (ROOT / file).is_file()]


def closure(path: Path) -> set[Path]:
    """Return the project's files that `path` imports, directly or not, and itself."""
    found, queue = set(), [path]
    while queue:
        path = queue.pop()
        if path not in found:
            found.add(path)
            queue += imports(path)
    return found


def keys_read(name: str, script: Path, arguments: dict[str, str]) -> set[str]:
    """Return the keys of params.yaml that a script reads for one item of its stage's matrix."""
    for node in tree(script).body:
        if isinstance(node, ast.ClassDef) and node.name == "Params":
            rows = [row.target for row in node.body if isinstance(row, ast.AnnAssign)]
            keys = {row.id for row in rows if isinstance(row, ast.Name)} - {"variant"}
            keys |= {f"overrides.{arguments['dataset']}"} if "dataset" in arguments else set()
            keys |= {f"variants.{arguments['variant']}"} if "variant" in arguments else set()
            return {f"{name}.{key}" for key in keys}
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SECTION":  # a key for each item, no other
            return {f"{ast.literal_eval(node.value)}.{arguments['dataset']}"}
    raise SystemExit(f"{script} has no class Params")


def read_params() -> dict[str, Any]:
    """Return what params.yaml says."""
    return yaml.load(PARAMS.read_text(), Loader)


def lookup(params: dict[str, Any], key: str) -> list[str]:
    """Return the members that a list or mapping of params.yaml names."""
    node: Any = params
    for part in key.split("."):
        node = node[part]
    return list(node)


def with_members(paths: list[str], patterns: dict[str, list[str]]) -> list[str]:
    """Return `paths`, sorted, in which those alike a pattern with a star are one for each of its members."""
    for pattern, members in patterns.items():
        alike = re.compile(re.escape(pattern).replace(r"\*", "[^/]+"))
        paths = [path for path in paths if not alike.fullmatch(path)] + [pattern.replace("*", name) for name in members]
    return sorted(paths)


def wanted(name: str, stage: dict[str, Any], params: dict[str, Any]) -> dict[str, list[str]]:
    """Return what the computed lists of a stage are: deps, params, and if they have members, outs and a matrix's variants."""
    command, module, *words = stage["cmd"].removeprefix("python ").split()
    if command != "-m":
        raise SystemExit(f"dvc.yaml: {name}: cmd must be python -m stages.<system>.{name}")
    arguments = {flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
    script = Path(*module.split(".")).with_suffix(".py")
    made, read = {}, {}
    for pattern, key in MEMBERS.get(name, {}).items():
        own = pattern.startswith(f"models/{name}/")
        (made if own else read)[pattern] = lookup(params, key)
    data = [dep for dep in stage.get("deps", []) if not is_code(dep)]
    lists = {"deps": [*with_members(data, read), *sorted(map(str, closure(script)))]}
    lists["params"] = sorted(keys_read(name, script, arguments))
    if made:
        lists["outs"] = with_members(stage.get("outs", []), made)
    if isinstance(stage.get("matrix", {}).get("variant"), list):
        lists["variant"] = lookup(params, VARIANTS.get(name, f"{name}.variants"))
    return lists


def is_code(path: str) -> bool:
    """Whether a dependency is a file of Python."""
    return path.startswith("stages/") and path.endswith(".py")


@dataclass(frozen=True)
class Edit:
    """A list of dvc.yaml that should be another one."""

    start: int
    end: int
    text: str
    note: str


def edits(text: str, params: dict[str, Any]) -> Iterator[Edit]:
    """Yield what makes the text of dvc.yaml say what `wanted` does."""
    stages = yaml.load(text, Loader)["stages"]
    for name, node in children(children(yaml.compose(text, Loader))["stages"]).items():
        stage, nodes = stages[name], children(node)
        if "do" in stage:
            stage, nodes = stage["do"], children(nodes["do"])
        lists = wanted(name, stage, params)
        nodes |= {"variant": children(nodes["matrix"])["variant"]} if "variant" in lists else {}
        indent = nodes["cmd"].start_mark.column - len("cmd: ")
        for key, items in lists.items():
            listed = [item.value for item in nodes[key].value] if key in nodes else []
            if listed == items:
                continue
            changes = [f"  + {item}" for item in items if item not in listed]
            changes += [f"  - {item}" for item in listed if item not in items]
            note = "\n".join([f"dvc.yaml: {name}: {key}", *(changes or ["  in another order"])])
            if key in nodes:
                start, column = nodes[key].start_mark.index, nodes[key].start_mark.column
                old = text[start : nodes[key].end_mark.index].rstrip()
                if re.search(r"(^|\s)#", old):
                    raise SystemExit(f"dvc.yaml: {name}: {key} is written by '{COMMAND}': move the comment out of it")
                yield Edit(start, start + len(old), flow(items, column, indent + 2), note)
            else:
                start = nodes["cmd"].end_mark.index
                head = f"\n{' ' * indent}{key}: "
                yield Edit(start, start, head + flow(items, len(head) - 1, indent + 2), note)


def children(node: Any) -> dict[str, Any]:
    """Return the nodes of a mapping's values by key."""
    return {key.value: value for key, value in node.value}


def flow(items: list[str], column: int, indent: int) -> str:
    """Return a list in YAML's flow style, from `column` on, wrapped; code has lines of its own below the data."""
    lines = [" " * column + "["]
    for place, item in enumerate(items):
        word = (f'"{item}"' if set(item) & set("{}[],") else item) + ("," if item != items[-1] else "]")
        first_code = place > 0 and is_code(item) and not is_code(items[place - 1])
        if first_code or len(lines[-1]) + 1 + len(word) > WIDTH:
            lines.append(" " * indent + word)
        else:
            lines[-1] += f" {word}" if place else word
    return "\n".join(lines)[column:] if items else "[]"


def updated(text: str, params: dict[str, Any]) -> str:
    """Return the text of dvc.yaml as it should be."""
    for edit in sorted(edits(text, params), key=lambda edit: edit.start, reverse=True):
        text = text[: edit.start] + edit.text + text[edit.end :]
    return text


def page_with_graph() -> str:
    """Return stages/README.md with the graph of the pipeline as dvc.yaml has it now."""
    words = ["dvc", "dag", "--md", "--collapse-foreach-matrix"]
    graph = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return PAGE.read_text().partition("```mermaid")[0] + graph.strip() + "\n"


def main(action: str) -> None:
    text, params = DVC_YAML.read_text(), read_params()
    notes = [edit.note for edit in edits(text, params)]
    if action == "update":
        DVC_YAML.write_text(updated(text, params))
    page = page_with_graph()
    if page != PAGE.read_text():
        notes.append(f"{PAGE.relative_to(ROOT)}: the graph is another one")
    if action == "update":
        PAGE.write_text(page)
        print("\n".join(notes) or "dvc.yaml is as it should be")
    elif notes:
        sys.exit("\n".join([*notes, f"run '{COMMAND}'"]))


if __name__ == "__main__":
    if sys.argv[1:] not in (["check"], ["update"]):
        sys.exit(__doc__)
    main(sys.argv[1])
