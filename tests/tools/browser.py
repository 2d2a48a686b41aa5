"""What a browser makes of a page: Debian's chromium, without a window, on files alone.

python tests/tools/browser.py reports/index.html out.png [width] [dark]     # a picture of the whole page

The page is shown in a frame, since chromium's own windows are at least 500 pixels wide; styles that ask for the width see the frame's.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from html import unescape
from pathlib import Path

ROOT = Path(__file__).parents[2]
AXE = ROOT / "node_modules/axe-core/axe.min.js"  # npm install --no-save axe-core
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FRAME = """<!doctype html><style>body {{ margin: 0 }} iframe {{ border: 0; width: {width}px; height: {height}px }}</style>
<iframe id="frame" src="{page}"></iframe><pre id="found"></pre><script>
window.onload = () => {{
  const frame = document.getElementById("frame"), page = frame.contentDocument, view = frame.contentWindow
  const closed = page.documentElement.scrollHeight
  page.querySelectorAll("details").forEach(each => each.open = true)
  const rgb = text => text.match(/[\\d.]+/g).map(Number)
  const light = colour => colour.slice(0, 3).map(x => x / 255).map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0)
  const behind = node => {{
    for (; node; node = node.parentElement) {{
      const colour = rgb(view.getComputedStyle(node).backgroundColor)
      if (colour.length < 4 || colour[3] > 0) return colour
    }}
    return [255, 255, 255]
  }}
  const contrast = node => {{
    const [a, b] = [light(rgb(view.getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x)
    return (a + .05) / (b + .05)
  }}
  const texts = [...page.querySelectorAll("body *")].filter(node => [...node.childNodes].some(c => c.nodeType == 3 && c.data.trim()))
  const anchors = [...page.querySelectorAll('a[href^="#"]')].map(a => a.getAttribute("href").slice(1))
  const inside = node => {{ const box = node.closest(".scroll") || node; return box.getBoundingClientRect().right <= {width} + .5 }}
  document.getElementById("found").textContent = JSON.stringify({{
    width: page.documentElement.scrollWidth,
    height: closed,
    outside: [...page.querySelectorAll("body *")].filter(n => !inside(n)).map(n => n.outerHTML.slice(0, 80)),
    dangling: anchors.filter(id => !page.getElementById(id)),
    anchors: anchors.length,
    contrast: Math.min(...texts.map(contrast)),
    faint: texts.filter(node => contrast(node) < 4.5).map(node => node.outerHTML.slice(0, 80)),
    dark: light(behind(page.body)) < .5,
    unseen: [...page.images].filter(image => !image.naturalWidth || !image.alt).length,
    images: page.images.length,
  }})
}}
</script>
"""
AUDIT = """<!doctype html><style>body {{ margin: 0 }} iframe {{ border: 0; width: {width}px; height: 900px }}</style>
<iframe id="frame" src="{page}"></iframe><pre id="found"></pre><script>
window.onload = () => {{
  const frame = document.getElementById("frame"), page = frame.contentDocument
  page.querySelectorAll("details").forEach(each => each.open = true)
  const script = page.createElement("script")
  script.src = "{axe}"
  script.onload = () => frame.contentWindow.axe.run(page, {{ iframes: false }}).then(result => {{
    const lines = result.violations.map(v => `${{v.id}} (${{v.impact}}): ${{v.nodes.length}} times, ${{v.nodes[0].html.slice(0, 120)}}`)
    document.getElementById("found").textContent = JSON.stringify({{ passes: result.passes.length, violations: lines }})
  }})
  page.head.append(script)
}}
</script>
"""


@dataclass(frozen=True)
class Seen:
    """What was found in a page of some width, all of it unfolded but for `height`."""

    width: int  # of what is in it: more than the page's if it must be scrolled sideways
    height: int  # while folds are closed
    outside: list[str]  # elements that stick out
    dangling: list[str]  # anchors that lead nowhere
    anchors: int
    contrast: float  # the least between a text and what is behind it
    faint: list[str]  # texts of less than 4.5
    dark: bool
    unseen: int  # pictures that do not load or say nothing
    images: int


def chromium(address: str, *flags: str, dark: bool = False) -> subprocess.CompletedProcess[str]:
    """Open an address, with what the page may say on its console in stderr."""
    assert CHROMIUM
    words = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
    ]
    words += [
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--virtual-time-budget=20000",
        *flags,
        address,
    ]
    return subprocess.run([CHROMIUM, *words], capture_output=True, text=True, timeout=120, check=True)


def look(page: Path, width: int, dark: bool = False) -> tuple[Seen, list[str]]:
    """Return what is found in a page of `width` pixels, and the lines of its console."""
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
        frame.write_text(FRAME.format(width=width, height=900, page=page.resolve().as_uri()))
        done = chromium(frame.as_uri(), f"--window-size={max(width, 500)},1000", "--dump-dom", dark=dark)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found and found[1], done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(**json.loads(unescape(found[1]))), console


def audit(page: Path, width: int, dark: bool = False) -> tuple[int, list[str]]:
    """Return how many of axe-core's rules for accessible pages hold for a page, all of it unfolded, and a line for each that does not."""
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
        frame.write_text(AUDIT.format(width=width, page=page.resolve().as_uri(), axe=AXE.resolve().as_uri()))
        done = chromium(frame.as_uri(), f"--window-size={max(width, 500)},1000", "--dump-dom", dark=dark)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found and found[1], done.stderr
    result = json.loads(unescape(found[1]))
    return result["passes"], result["violations"]


def picture(page: Path, out: Path, width: int, dark: bool = False) -> None:
    """Write a picture of the whole page, folds closed."""
    height = look(page, width, dark)[0].height
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
        frame.write_text(
            FRAME.partition("<script>")[0].format(width=width, height=height, page=page.resolve().as_uri())
        )
        chromium(
            frame.as_uri(), f"--window-size={max(width, 500)},{height}", f"--screenshot={out.resolve()}", dark=dark
        )


if __name__ == "__main__":
    page, out, *rest = sys.argv[1:]
    picture(Path(page), Path(out), int(rest[0]) if rest else 1280, "dark" in rest)
