"""How the code lies: imports run one way, what two systems need is in common, and functions are short."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import dependencies
import pytest
from reproduction import ROOT

FILES = [path.relative_to(ROOT) for path in sorted((ROOT / "stages").rglob("*.py")) if path.name != "__init__.py"]
SYSTEMS = ("bilinear", "datasets", "forecast", "recall", "vit_memory", "weightnet")
LONGEST, LONGEST_MAIN = 60, 40


def system(path: Path) -> str:
    return path.parts[1]


def test_there_is_no_circle_of_imports():
    TopologicalSorter({path: dependencies.imports(path) for path in FILES}).prepare()  # raises CycleError


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_run_one_way(path):
    """The report imports systems, these import common alone, and no library imports a script."""
    for imported in dependencies.imports(path):
        allowed = {system(path), "common"} | (set(SYSTEMS) if system(path) == "report" else set())
        assert system(imported) in allowed, f"{path} imports {imported}"
        is_script = "def main()" in (ROOT / imported).read_text()
        assert not is_script or "def main()" in (ROOT / path).read_text(), f"{path}, a library, imports {imported}"


def test_common_holds_what_two_systems_need():
    users: dict[str, set[str]] = {path.stem: set() for path in FILES if system(path) == "common"}
    for path in FILES:
        if system(path) != "common":
            for needed in dependencies.closure(path):
                if system(needed) == "common":
                    users[needed.stem].add(system(path))
    assert {name: found for name, found in users.items() if len(found) < 2} == {}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_functions_are_short(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= (LONGEST_MAIN if node.name == "main" else LONGEST), f"{path}: {node.name} has {lines} lines"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_functions_take_the_values_that_they_read(path):
    """A signature says what its function reads, and it can be called without a stage's params."""
    functions = [node for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef)]
    whole = [
        node.name
        for node in functions
        for argument in (*node.args.args, *node.args.kwonlyargs)
        if argument.annotation is not None and ast.unparse(argument.annotation).split(".")[-1] == "Params"
    ]
    assert not whole, f"{path}: {', '.join(whole)}"
