"""Every stage's main(), in the order of the pipeline, at the smallest scale."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from reproduction import ROOT

from stages.bilinear.training import load_model

PIPELINE = [
    ("stages.datasets.fetch_data", {"dataset": "digits"}),
    ("stages.bilinear.train_bilinear", {"dataset": "digits", "variant": "regularised"}),
    ("stages.bilinear.train_bilinear", {"dataset": "digits", "variant": "unregularised"}),
    ("stages.bilinear.train_bilinear", {"dataset": "digits", "variant": "two_layer"}),
    ("stages.bilinear.train_bilinear", {"dataset": "digits", "variant": "linear"}),
    ("stages.bilinear.decompose_bilinear", {"dataset": "digits"}),
    ("stages.report.build_report", {}),
]


RUN_ALL = """
import importlib, json, sys
for module, items in json.loads(sys.argv.pop()):
    sys.argv[1:] = [word for name, value in items.items() for word in (f"--{name}", value)]
    importlib.import_module(module).main()
"""


def run_stage(monkeypatch: pytest.MonkeyPatch, module: str, items: dict[str, str]) -> None:
    flags = [word for name, value in items.items() for word in (f"--{name}", value)]
    monkeypatch.setattr("sys.argv", [module, *flags])
    importlib.import_module(module).main()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def leaves(value: object) -> list[object]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [value]


def test_the_pipeline_runs_and_runs_again_to_the_same_bytes(project, monkeypatch, capsys):
    for module, items in PIPELINE:
        run_stage(monkeypatch, module, items)
    assert "open reports/index.html" in capsys.readouterr().out
    first = files(project)

    for name in (name for name in first if name.endswith("summary.json")):
        numbers = leaves(json.loads(first[name]))
        assert numbers
        assert all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers), name

    decomposition = torch.load("models/decompose_bilinear/digits/decomposition.pt", weights_only=True)
    model, _ = load_model("models/train_bilinear/digits-regularised/seed0/best.pt")
    x = torch.rand(20, 64)
    values, v = decomposition["eigenvalues"], decomposition["eigenvectors_input"]
    rebuilt = torch.einsum("ck,nck->nc", values, torch.einsum("ckd,nd->nck", v, x).square())
    torch.testing.assert_close(rebuilt, model(x), rtol=1e-4, atol=1e-4)

    # once more from nothing, in processes of their own, of one thread and of two
    everything = [sys.executable, "-c", RUN_ALL, json.dumps(PIPELINE)]
    for threads in ("1", "2"):
        for folder in ("data", "models", "reports"):
            shutil.rmtree(project / folder)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads}
        subprocess.run(everything, check=True, env=environment, capture_output=True)
        again = files(project)
        assert again.keys() == first.keys()
        assert [name for name in first if first[name] != again[name]] == []


def test_the_report_is_self_contained_and_shows_every_number_beside_its_baseline(project, monkeypatch):
    for module, items in PIPELINE:
        run_stage(monkeypatch, module, items)
    page = (project / "reports/index.html").read_text()
    sources: list[str] = []
    tables: list[list[list[str]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            sources.extend(value for name, value in attributes if name in ("src", "href"))
            if tag == "table":
                tables.append([])
            elif tag == "tr":
                tables[-1].append([])
            self.inside = tag in ("td", "th")

        def handle_endtag(self, _tag):
            self.inside = False

        def handle_data(self, data):
            if self.inside:
                tables[-1][-1].append(data)

    Reader().feed(page)
    assert len(sources) == 5
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    (header, *rows), (two_header, *two_rows), (random_header, *_) = tables
    assert two_header == random_header
    assert header == ["measure", "value", "baseline"]
    assert len(rows) >= 15
    assert all("±" in value and ("%" in baseline or "untrained" in baseline) for _, value, baseline in rows)
    assert {len(row) for row in two_rows} == {len(two_header)}
    markdown = (project / "reports/report.md").read_text()
    for link in (line.split("](")[1].rstrip(")") for line in markdown.splitlines() if line.startswith("![")):
        assert (project / "reports" / link).is_file()


@pytest.mark.parametrize(("module", "items"), PIPELINE[1:])
def test_a_missing_input_is_one_line_that_says_what_to_run(project, module, items):
    flags = [word for name, value in items.items() for word in (f"--{name}", value)]
    done = subprocess.run(
        [sys.executable, "-m", module, *flags],
        cwd=project,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "dvc repro" in line
    assert not (project / "reports").exists()


@pytest.mark.parametrize("module", sorted({module for module, _ in PIPELINE}))
def test_help_is_the_docstring(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "Writes" in done.stdout
