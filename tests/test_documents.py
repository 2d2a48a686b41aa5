"""What README and the systems' pages say is true: what they show prints that, what they name is there, what they quote is quoted."""

import importlib.util
import re
import subprocess
from pathlib import Path

import documents
import pytest
import records
from documents import PAGES, ROOT, Demonstration

from stages.report import publish

LONGEST, WIDEST = 150, 140  # lines of README, and characters of a line that can be broken
SECONDS = 60  # of a demonstration: it takes a few on an idle processor
DEMONSTRATIONS = [shown for page in PAGES for shown in documents.demonstrations(page)]
REPORT = (ROOT / "reports/report.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has before anything is trained."""
    return documents.fresh_clone(tmp_path_factory.mktemp("clone"))


@pytest.mark.parametrize("shown", DEMONSTRATIONS, ids=lambda shown: f"{shown.page}: {shown.command[-1][:40]!r}")
def test_what_is_shown_runs_in_a_fresh_clone_and_prints_what_is_said(clone, shown: Demonstration):
    done = subprocess.run(
        shown.command, cwd=clone, env=documents.environment(clone), capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert documents.alike(shown.printed, done.stdout), done.stdout


def test_there_are_demonstrations():
    assert {shown.page for shown in DEMONSTRATIONS} >= {"README.md"}


@pytest.mark.parametrize(
    ("said", "printed", "same"),
    [
        ("84.6 % of 1797", "84.5 %  of\n1797", True),
        ("84.6 % of 1797", "70.0 % of 1797", False),
        ("0.95 of A", "0.94 of A", True),
        ("0.95 of A", "0.95 of B", False),
        ("1 and 2", "1", False),
    ],
)
def test_small_differences_of_numbers_are_forgiven_and_no_others(said, printed, same):
    assert documents.alike(said, printed) == same


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_what_is_named_is_there(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"(?<![\w/<-])(?:stages|tests|reports)/[\w./-]+\.(?:py|args|json|png|md)", text):
        assert (ROOT / path).exists() or path == "reports/index.html", path
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        target = (page.parent / path) if path else page
        assert target.exists(), path
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name in headings]
    for module in re.findall(r"python -m (stages[\w.]+)", text):
        assert importlib.util.find_spec(module), module
    if page.parent != ROOT:
        for name in re.findall(r"`(\w+\.py)`", text):
            assert (page.parent / name).exists() or list(page.parent.glob(f"*/{name}")), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_pages_are_short(page):
    text = re.sub(rf"\s*{documents.NOTE.pattern}", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines, prose = text.splitlines(), documents.BLOCK.sub("", text).splitlines()
    assert len(lines) <= LONGEST if page.parent == ROOT else 60 <= len(lines) <= 130
    assert not [line for line in prose if len(line) > WIDEST and not line.startswith(("|", "![", "<!--"))]


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.parent.name)
def test_a_systems_page_says_what_it_asks_finds_and_does_not_find(page):
    headings = re.findall(r"^## (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    first, own, last = headings[:3], headings[3:-2], headings[-2:]
    assert first == ["The idea", "Results", "What did not work"]
    assert len(own) == 1 and own[0].startswith("Your own")
    assert last == ["Files", "Papers"]


def test_what_is_quoted_of_the_published_report_is_what_it_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    for path, text in publish.documents(REPORT).items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run 'python -m stages.report.publish'"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_numbers_of_documents_are_those_of_records(page):
    text = page.read_text(encoding="utf-8")
    assert documents.sourced(text, records.known()) == text, "run 'python tests/tools/documents.py numbers'"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Right on 90.4 %, not 7%; 0.5 of 2,410", ["90.4 %", "7%", "0.5", "2,410"]),
        ("worse by 1.2 points [-1.3, 3.7], 0.61 ±\n0.02, -0.3", ["1.2 points [-1.3, 3.7]", "0.61 ±\n0.02", "-0.3"]),
        ("3 seeds of LeNet-5 at 8x8 pixels in 2024, ViT-B/16, 20 steps", []),
        ("`0.5`, [here](a0.5.md), arXiv:2410.08417, Python 3.11, the 90 % interval, <!-- 0.5 -->", []),
        (
            "| x 5 | 7 | *8* |\n|---|---|---|\n| any 20: 24.4 % | 1051 | 0.1 ± 0.2 |",
            ["7", "*8*", "24.4 %", "1051", "0.1 ± 0.2"],
        ),
        ("```text\n0.5\n```\n\n2e-15 of it", ["2e-15"]),
    ],
)
def test_what_counts_as_a_result(text, found):
    plain = documents.hidden(text, documents.PLAIN)
    assert [m[0] for m in documents.results(plain, 0, len(plain))] == [word.strip("*") for word in found]


KNOWN = {
    "run": {
        "a/b": {"acc": {"mean": 0.904, "std": 0.0251}, "gap": [-0.5, 1234.5]},
        "gain": {"mean": 0.012, "low": 0, "high": 0.02},
    }
}


def test_documents_get_the_numbers_of_records_in_their_own_form():
    text = "It has 1.0 % ± 2 %, 0.1,\n1,000 and\n+3.0 points [1, 1].\n<!-- numbers: run/a/b: acc, gap/0,\n gap/1; run/gain -->\n\n- 0.99"
    text += "\n  <!-- numbers: run/a/b/acc -->\n- none"
    shown = documents.sourced(text, KNOWN)
    assert shown.startswith("It has 90.4 % ± 3 %, -0.5,\n1,234 and\n+1.2 points [0, 2].\n")
    assert "- 0.90\n" in shown and documents.sourced(shown, KNOWN) == shown


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("All 0.5 of it.", "line 1: 1 results .0.5., 0 keys"),
        ("\n\nRight on 5 %\n<!-- numbers: run/a/b/acc, run/gain -->", "1 results .5 %., 2 keys"),
        ("0.5\n<!-- numbers: run/a/b/loss -->", "no record holds run/a/b/loss: loss is not among acc, gap"),
        ("0.5\n<!-- numbers: run/a/b -->", "the record has no mean"),
        ("0.5 [0.1, 0.9]\n<!-- numbers: run/a/b/acc -->", "the record has no high"),
    ],
)
def test_a_number_that_no_record_holds_cannot_be_written(text, why):
    with pytest.raises(documents.Unsourced, match=why):
        documents.sourced(text, KNOWN)
