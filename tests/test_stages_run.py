"""Every stage's main(), in the order of the pipeline, at the smallest scale."""

import csv
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import browser
import documents
import pytest
import torch
from reproduction import ROOT, built_zoos, scale_overrides, set_params

from stages.bilinear.training import load_model
from stages.common.stage import InputError
from stages.report import publish

PIPELINE = [
    *(("stages.datasets.fetch_data", {"dataset": dataset}) for dataset in ("glyphs", "shapes", "digits")),
    ("stages.bilinear.train_bilinear", {"dataset": "digits"}),
    ("stages.bilinear.decompose_bilinear", {"dataset": "digits"}),
    ("stages.forecast.train_lenet", {"dataset": "digits"}),
    ("stages.forecast.train_forecaster", {"dataset": "digits"}),
    ("stages.forecast.compress_trajectory", {"dataset": "digits"}),
    ("stages.forecast.tune_jump", {"dataset": "digits"}),
    ("stages.forecast.evaluate_forecaster", {"dataset": "digits"}),
    ("stages.forecast.nowcast_training", {"dataset": "digits"}),
    ("stages.vit_memory.pretrain_backbone", {"variant": "glyphs"}),
    *(
        (f"stages.vit_memory.{stage}", {"dataset": "digits"})
        for stage in ("extract_features", "train_few_shot", "train_continual", "diagnose_memory")
    ),
    *(("stages.weightnet.build_zoo", {"dataset": "digits", "variant": variant}) for variant in built_zoos()),
    *(
        ("stages.weightnet.train_weightnet", {"dataset": "digits", "variant": variant})
        for variant in ("exam", "weightnet", "probe", "baselines", "ablations")
    ),
    ("stages.weightnet.evaluate_weightnet", {"dataset": "digits"}),
    *(("stages.recall.train_mae", {"dataset": dataset}) for dataset in ("glyphs", "shapes", "digits")),
    *(("stages.recall.classify_masked", {"dataset": dataset}) for dataset in ("glyphs", "digits")),
    *(
        ("stages.recall.build_fleet", {"variant": variant})
        for variant in ("classes", "unlabelled", "rules", "independent")
    ),
    *(
        (f"stages.recall.{stage}", {})
        for stage in (
            "vary_recipes",
            "train_auditor",
            "condense_changes",
            "recover_memory",
            "recover_images",
            "map_weight_space",
        )
    ),
    ("stages.report.build_report", {}),
]


RUN_ALL = """
import importlib, json, os, sys
if os.environ.get("WITHOUT_PICTURES"):
    from stages.common import figures
    figures.save_figure = figures.save_plot = lambda _path, figure: figures.plt.close(figure)
for module, items in json.loads(sys.argv.pop()):
    sys.argv[1:] = [word for name, value in items.items() for word in (f"--{name}", value)]
    importlib.import_module(module).main()
"""


def files(folder: Path) -> dict[str, bytes]:
    made = [path for part in ("data", "models", "reports") for path in sorted((folder / part).rglob("*"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in made if path.is_file()}


def leaves(value: object) -> list[object]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [value]


def run_all(folder: Path, threads: str, stages: list = PIPELINE, pictures: bool = True) -> str:
    """Run stages at smoke scale in a folder, in a process of their own, and return what they print. pictures: whether they are saved."""
    shutil.copy(ROOT / "params.yaml", folder)
    set_params(folder / "params.yaml", scale_overrides("smoke"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads, "WEIGHTLENS_DEVICE": "cpu"}
    environment |= {} if pictures else {"WITHOUT_PICTURES": "1"}
    words = [sys.executable, "-c", RUN_ALL, json.dumps(stages)]
    return subprocess.run(words, cwd=folder, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every stage has run, on one thread: here, or as DVC runs it (reproduction.py) if that was just done.

    The report is always made here: what DVC has run says how long it took, and of which commit it is.
    """
    folder = tmp_path_factory.mktemp("finished")
    stages = PIPELINE
    if reproduced := os.environ.get("WEIGHTLENS_SMOKE"):
        shutil.copytree(reproduced, folder, dirs_exist_ok=True)
        stages = [stage for stage in PIPELINE if stage[0] == "stages.report.build_report"]
    assert "open reports/index.html" in run_all(folder, "1", stages).splitlines()[-1]
    return folder


def test_every_metric_is_a_finite_number(finished):
    summaries = list(finished.glob("reports/**/summary.json"))
    assert len(summaries) == 32
    for path in summaries:
        numbers = leaves(json.loads(path.read_text()))
        assert numbers
        assert all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers), path


def test_dvcs_metrics_are_few_and_have_names_of_their_own(finished):
    """`dvc exp show` makes a column of each, and of its path where two share a name."""
    headlines = {path.parent: json.loads(path.read_text()) for path in finished.glob("reports/**/metrics.json")}
    names = [name for numbers in headlines.values() for name in numbers]
    assert len(names) == len(set(names)) <= 40
    assert all(isinstance(number, (int, float)) for numbers in headlines.values() for number in numbers.values())
    systems = {path.stem: path.parent.name for path in (ROOT / "stages").glob("*/*.py")}
    of_system = Counter(
        systems[folder.relative_to(finished).parts[1]] for folder in headlines for _ in headlines[folder]
    )
    assert set(of_system) == {"forecast", "bilinear", "weightnet", "recall", "vit_memory"}
    assert max(of_system.values()) <= 8


def test_the_saved_decomposition_is_that_of_the_saved_network(finished):
    decomposition = torch.load(finished / "models/decompose_bilinear/digits/decomposition.pt", weights_only=True)
    model, _ = load_model(finished / "models/train_bilinear/digits/regularised/seed0/best.pt")
    x = torch.rand(20, 64)
    values, v = decomposition["eigenvalues"], decomposition["eigenvectors_input"]
    rebuilt = torch.einsum("ck,nck->nc", values, torch.einsum("ckd,nd->nck", v, x).square())
    torch.testing.assert_close(rebuilt, model(x), rtol=1e-4, atol=1e-4)


def test_two_threads_give_the_same_bytes_as_one(finished, tmp_path):
    """Of every stage one item is made anew; what it reads and no other stage makes is there, and so are pictures.

    Those are drawn of the same numbers by matplotlib, which knows no threads, and were a third of the time.
    """
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    one_of_each = list({module: (module, items) for module, items in PIPELINE}.values())
    for module, items in one_of_each:
        item = "/".join([module.split(".")[-1], *(["-".join(items.values())] if items else [])])
        made = [path for part in ("models", "reports") for path in (tmp_path / part / item).rglob("*")]
        for path in made:
            if path.is_file() and path.suffix not in (".png", ".svg"):
                path.unlink()
    run_all(tmp_path, "2", one_of_each, pictures=False)
    first, again = files(finished), files(tmp_path)
    assert again.keys() == first.keys()
    assert [name for name in first if first[name] != again[name]] == []


def test_no_cell_of_the_forecast_tables_is_empty(finished):
    runs, origins, horizons, forecasters = 2, 2, 2, 14
    cells = runs * origins * horizons * forecasters
    for name, column, n in (("errors", "error", cells), ("networks", "test_loss", cells)):
        with (finished / f"reports/evaluate_forecaster/digits/{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == n
        assert all(math.isfinite(float(row[column])) and float(row[column]) > 0 for row in rows)


class Reader(HTMLParser):
    """Collects a report's addresses, pictures' texts, captions, and the tables of each section: first the one that is not folded."""

    def __init__(self, page: str):
        super().__init__()
        self.sources: list[str] = []
        self.alts: list[str] = []
        self.captions: list[str] = []
        self.sections: dict[str, list[list[list[str]]]] = {}
        self.baselines: dict[str, list[str]] = {}
        self.inside, self.row_of_baseline = "", False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.sources += [value for name, value in attributes.items() if name in ("src", "href")]
        self.alts += [attributes["alt"]] if tag == "img" else []
        self.captions += [""] if tag == "figcaption" else []
        if tag == "section":
            self.tables = self.sections.setdefault(attributes["id"], [])
            self.grey = self.baselines.setdefault(attributes["id"], [])
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
            self.row_of_baseline = attributes.get("class") == "baseline"
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.inside = tag if tag != "b" else self.inside

    def handle_endtag(self, tag):
        self.inside = "" if tag != "b" else self.inside

    def handle_data(self, data):
        if self.inside in ("td", "th"):
            self.tables[-1][-1][-1] += data
            self.grey += [data] if self.row_of_baseline and len(self.tables[-1][-1]) == 1 else []
        elif self.inside == "figcaption":
            self.captions[-1] += data


def test_the_report_is_self_contained_and_shows_every_number_beside_its_baseline(finished):
    report = Reader((finished / "reports/index.html").read_text())
    assert all(
        source.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,", "#")) for source in report.sources
    )
    markdown = (finished / "reports/build_report/report.md").read_text()
    assert len(report.alts) == markdown.count("![") > 30
    assert len(set(report.alts)) == len(report.alts)  # each says what is seen in it
    assert set(report.sections) == {"forecast", "bilinear", "weightnet", "recall", "vit_memory"}
    for key, (headline, *others) in report.sections.items():
        assert len(headline[0]) <= 6, key
        assert all(len(row) == len(table[0]) for table in (headline, *others) for row in table), key
        assert not any(re.search(r"\de[+-]\d|\w_\w|nan", cell) for row in headline for cell in row), key
    baselines = report.baselines
    assert {"the last weights kept", "linear extrapolation", "any subspace", "Adam"} <= set(baselines["forecast"])
    assert {"nearest neighbour in weights", "kernel ridge on hyper-parameters"} <= set(baselines["weightnet"])
    assert {"most frequent class", "constant answer", "mean of the class answered"} <= set(baselines["recall"])
    assert {"linear probe", "linear probe of pixels", "fine-tuning", "chance"} <= set(baselines["vit_memory"])
    (header, *rows), *_ = report.sections["bilinear"]
    assert header == ["measure", "value", "baseline", "the baseline is"]
    assert all(all(row) for row in rows)
    (header, *rows), *_ = report.sections["recall"]
    assert header[-1] == "ignoring the network"
    assert all(0 <= float(row[-1]) < 0.75 for row in rows)
    assert sum("[" in cell for row in rows for cell in row[1:-1]) > 2 * len(rows)  # an interval of no width is left out
    relabelled = next(table for table in report.sections["weightnet"] if table[0][0] == "architecture")
    assert {row[2] for row in relabelled[1:]} == {"less than 10⁻¹²"}  # relabelled neurons change nothing
    for link in (line.split("](")[1].rstrip(")") for line in markdown.splitlines() if line.startswith("![")):
        assert (finished / "reports/build_report" / link).is_file()


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_the_report_fits_a_phone(finished):
    seen, console = browser.look(finished / "reports/index.html", 390)
    assert seen.width <= 390, seen.outside
    assert not (seen.dangling or seen.faint or seen.unseen or console)


def test_each_headline_says_of_how_many_its_numbers_are(finished):
    markdown = (finished / "reports/build_report/report.md").read_text()
    for section in re.split(r"^## ", markdown, flags=re.MULTILINE)[1:]:
        before_its_table = section.partition("| --- |")[0]
        assert re.search(r"n = \d", before_its_table), before_its_table


def test_what_is_published_is_the_report_and_its_pictures(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "reports", tmp_path / "reports")
    (tmp_path / "reports/published/old").mkdir(parents=True)  # of a run before
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["publish"])
    for page in documents.PAGES:
        (tmp_path / page.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(page, tmp_path / page.relative_to(ROOT))
    publish.main()
    report, published = ((tmp_path / "reports" / name).read_text() for name in ("build_report/report.md", "report.md"))
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", published)
    assert len(links) == report.count("![") > 30
    for link in links:
        original = finished / "reports" / link.removeprefix("published/")
        assert (tmp_path / "reports" / link).read_bytes() == original.read_bytes()
    assert set((tmp_path / "reports/published").rglob("*.png")) == {tmp_path / "reports" / link for link in links}
    assert not (tmp_path / "reports/published/old").exists()
    assert published == re.sub(r"\]\(\.\./", "](published/", report)
    assert "| commit |" in published
    assert "(stages/recall/README.md)<br>" in (tmp_path / "README.md").read_text()
    assert "| forecaster |" in (tmp_path / "stages/forecast/README.md").read_text()


@pytest.mark.parametrize("snippet", [snippet for page in documents.PAGES for snippet in documents.snippets(page)])
def test_what_documents_show_of_the_library_runs_where_the_pipeline_has(finished, snippet):
    shutil.copytree(ROOT / "models/released", finished / "models/released", dirs_exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WEIGHTLENS_DEVICE": "cpu"}
    subprocess.run([sys.executable, "-c", snippet], cwd=finished, env=environment, check=True)


NEEDS_INPUT = dict(PIPELINE)  # one item of every stage
del NEEDS_INPUT["stages.datasets.fetch_data"]
del NEEDS_INPUT["stages.vit_memory.pretrain_backbone"]  # draws its own images


def start(monkeypatch: pytest.MonkeyPatch, module: str, *flags: str) -> None:
    monkeypatch.setattr("sys.argv", [module, *flags])
    importlib.import_module(module).main()


@pytest.mark.parametrize(("module", "items"), NEEDS_INPUT.items())
def test_a_missing_input_says_what_to_run(project, monkeypatch, module, items):
    flags = [word for name, value in items.items() for word in (f"--{name}", value)]
    with pytest.raises(
        InputError, match=r"^[^\n]* is missing: run 'dvc repro \w+@digits[^\n]*'$|^[^\n]*: run 'dvc repro [^\n]*'$"
    ):
        start(monkeypatch, module, *flags)
    assert not (project / "reports").exists()


def test_a_mistake_is_one_line_on_the_command_line(project):
    words = [sys.executable, "-m", "stages.report.build_report"]
    done = subprocess.run(
        words, cwd=project, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: reports/")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("module", sorted({module for module, _ in PIPELINE}))
def test_help_is_the_docstring(monkeypatch, capsys, module):
    with pytest.raises(SystemExit) as left:
        start(monkeypatch, module, "--help")
    assert left.value.code == 0
    assert "Writes" in capsys.readouterr().out
