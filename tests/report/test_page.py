"""The page as a browser shows it: nothing sticks out, every anchor leads somewhere, all is legible, in light and in dark."""

from pathlib import Path

import browser
import pytest
from matplotlib import pyplot as plt
from reproduction import ROOT

from stages.common.figures import save_plot
from stages.common.report import Detail, Picture, Section, Table, decimal, row
from stages.report.build_report import render_html, render_markdown

needs_browser = pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium here: apt-get install chromium")
HIGHEST = 9000  # pixels, at a width of 1280 and with folds closed
FACTS = {"commit": "abc1234 of 2026-01-01", "machine": "a processor with a very long name " * 4}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with wide tables, wide pictures and long words; or that of the last reproduction."""
    folder = tmp_path_factory.mktemp("page")
    figure, _ = plt.subplots(figsize=(16, 3))
    save_plot(folder / "wide.png", figure)
    picture = Picture(folder / "wide.png", "What is shown.", "An empty plot.")
    cells = [decimal({"mean": 0.5, "low": 0.25, "high": 0.75})] * 12
    table = Table(
        "Numbers, n = 5.",
        ["name", *("a long header" for _ in cells)],
        [row("x" * 60, *cells), row("y", *cells, baseline=True)],
    )
    details = [Detail("All else", [table, table], [picture])]
    sections = [
        Section(key, f"Question {key}?", "data", "One number, 0.5", "guessing has 0.4", table, picture, details)
        for key in ("forecast", "bilinear", "weightnet", "recall", "vit_memory")
    ]
    (folder / "index.html").write_text(render_html(sections, FACTS, details))
    (folder / "report.md").write_text(render_markdown(sections, FACTS, details))
    return folder / "index.html"


def check(page: Path, width: int, dark: bool) -> browser.Seen:
    seen, console = browser.look(page, width, dark)
    assert seen.width <= width, seen.outside
    assert not seen.outside
    assert seen.dark == dark
    assert not seen.dangling
    assert seen.anchors >= 5
    assert not seen.faint
    assert seen.contrast >= 4.5
    assert seen.unseen == 0 < seen.images
    assert not console
    return seen


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, True), (1920, False)])
def test_nothing_sticks_out_and_all_is_legible(page, width, dark):
    check(page, width, dark)


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False), (1920, True)])
def test_the_report_of_the_last_reproduction_too(width, dark):
    path = ROOT / "reports/index.html"
    if not path.exists():
        pytest.skip("nothing has been reproduced here")
    seen = check(path, width, dark)
    assert width < 1280 or seen.height <= HIGHEST


@needs_browser
@pytest.mark.skipif(not browser.AXE.exists(), reason="no axe-core here: npm install --no-save axe-core")
def test_who_hears_the_page_or_has_no_mouse_can_read_it(page, tmp_path):
    passes, violations = browser.audit(page, 1280)
    assert passes > 20 and not violations
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace('alt="An empty plot."', "").replace('<html lang="en">', "<html>"))
    assert {line.split()[0] for line in browser.audit(broken, 1280)[1]} == {"image-alt", "html-has-lang"}


@needs_browser
def test_what_these_tests_look_for_is_found(page, tmp_path):
    """A page that is too wide, too faint and leads nowhere is seen to be all three."""
    text = (
        page.read_text().replace("--ink: #1d2129", "--ink: #b0b0b0").replace("overflow-x: auto", "overflow-x: visible")
    )
    broken = tmp_path / "broken.html"
    broken.write_text(text.replace('href="#recall"', 'href="#nowhere"'))
    seen, _ = browser.look(broken, 390)
    assert seen.width > 390
    assert seen.dangling == ["nowhere"]
    assert seen.faint
    assert seen.contrast < 4.5


def test_the_page_loads_nothing_and_runs_nothing(page):
    text = page.read_text()
    assert "<script" not in text
    assert "http" not in text
    assert text.count("data:image/svg+xml;base64,") == text.count("<img")  # smaller than the PNG, and sharp at any size


def test_markdown_says_the_same(page):
    text = (page.parent / "report.md").read_text()
    assert text.count("<details>") == text.count("</details>") == page.read_text().count("<details")
    for key in ("forecast", "bilinear", "weightnet", "recall", "vit_memory"):
        assert f"(#{key})" in text
        assert f"\n## {key}\n" in text
