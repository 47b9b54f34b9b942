"""Tests of the report in a real browser: no console message, no request, no overflow, and visible contents.

`make test-browser`; Chromium is $CHROMIUM or on the PATH.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf2mnn.report.page import render_page
from page_evidence import make_evidence, make_table

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
    "--log-level=0",
)
SCHEMES = {"light": 1, "dark": 0}
"""Chromium's numbers for a preferred colour scheme."""
WIDTHS = [320, 360, 768, 1280]


@dataclass(frozen=True)
class Visit:
    """Result of opening a page.

    Attributes:
        output: Standard output of the browser.
        console: Messages on the console.
        requests: URLs that the page requested.
    """

    output: str
    console: list[str]
    requests: set[str]


Browse = Callable[..., Visit]


def chromium() -> str:
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)
    assert program, f"no Chromium ({', '.join(PROGRAMS)}): install one, or set CHROMIUM to its path"
    return program


def requested(log: Path) -> set[str]:
    """Return the URLs in a net log that a page requested; requests of the browser itself are "not an origin"."""
    text = log.read_text(errors="replace").rstrip().rstrip(",")
    events = json.loads(text if text.endswith("}") else f"{text}]}}")["events"]
    requests = [event["params"] for event in events if "initiator" in event.get("params", {})]
    assert all("url" in params for params in requests)
    return {params["url"] for params in requests if params["initiator"] != "not an origin"}


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """Return a function that opens a file in a browser without a network, with a new profile."""
    program = chromium()

    def run(page: Path, *flags: str, width: int = 360, height: int = 800) -> Visit:
        log, profile = tmp_path / "net.json", tmp_path / "profile"
        shutil.rmtree(profile, ignore_errors=True)
        options = [f"--user-data-dir={profile}", f"--window-size={width},{height}", f"--log-net-log={log}"]
        done = subprocess.run(
            [program, *FLAGS, *options, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return Visit(done.stdout, console, requested(log))

    return run


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    evidence = make_evidence(folder / "results")
    page = folder / "report.html"
    page.write_text(render_page(evidence, make_table(evidence, {evidence.variants[-1].name: True})), encoding="utf-8")
    return page


def assert_quiet(visit: Visit) -> None:
    assert visit.console == []
    assert visit.requests == set()


def assert_shows(path: Path, size: tuple[int, int], dark: bool) -> None:
    """Check the size and background of a screenshot, and that it has text and the red of the verdict."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert pixels.shape[:2] == size[::-1]
    corner = pixels[2, 2].mean()
    assert corner < 60 if dark else corner > 240
    different = np.abs(pixels - pixels[2, 2]).sum(axis=-1) > 60
    assert 0.02 < different.mean() < 0.6
    assert different[: size[1] // 2].any() and different[size[1] // 2 :].any()
    red = (pixels[..., 0] - pixels[..., 1:].max(axis=-1)) > 60
    assert red.sum() > 200


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [(360, 800), (1280, 900)], ids=["phone", "desktop"])
def test_screenshot(size: tuple[int, int], scheme: str, report: Path, browse: Browse, tmp_path: Path) -> None:
    shot = tmp_path / "shot.png"
    options = [f"--screenshot={shot}", f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"]
    visit = browse(report, *options, width=size[0], height=size[1])
    assert_quiet(visit)
    assert_shows(shot, size, scheme == "dark")


def test_print(report: Path, browse: Browse, tmp_path: Path) -> None:
    printed = tmp_path / "report.pdf"
    assert_quiet(browse(report, f"--print-to-pdf={printed}", "--no-pdf-header-footer"))
    pdf = printed.read_bytes()
    assert pdf.startswith(b"%PDF")
    pages = re.findall(rb"/MediaBox\s*\[([^\]]*)\]", pdf)
    assert 4 <= len(pages) <= 20
    for box in pages:
        width, height = list(map(float, box.split()))[2:]
        assert (round(width), round(height)) == (595, 842)  # A4


WRAPPER = """<!doctype html><meta charset="utf-8"><title>measure</title>
<iframe style="border:0;width:{width}px;height:800px" src="{page}"></iframe><pre id="result"></pre>
<script>
addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const scrolls = (node) => node.closest(".scroll, .hidden");
  const wide = [...page.body.querySelectorAll("*")].filter(
    (node) => !scrolls(node) && !node.closest("figure svg") && node.getBoundingClientRect().right > {width} + 1);
  const cut = [...page.querySelectorAll("figure svg")].filter((svg) => {{
    const box = svg.getBoundingClientRect();
    return [...svg.querySelectorAll("text")].some((text) => {{
      const at = text.getBoundingClientRect();
      return at.left < box.left - 3 || at.right > box.right + 3;
    }});
  }});
  const small = [...page.querySelectorAll("figure svg text")].map((text) => text.getBoundingClientRect().height);
  const images = [...page.querySelectorAll(".images svg")].map((svg) => svg.getBoundingClientRect());
  document.querySelector("#result").textContent = JSON.stringify({{
    page: root.scrollWidth, wide: wide.map((node) => node.outerHTML.slice(0, 80)),
    cut: cut.map((svg) => svg.getAttribute("aria-label")), letters: Math.min(...small),
    images: images.map((box) => [box.width, box.height]),
    plots: [...page.querySelectorAll("figure svg")].map((svg) => svg.getBoundingClientRect().width),
  }});
}});
</script>"""


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overflows(width: int, report: Path, browse: Browse, tmp_path: Path) -> None:
    """The page runs no script, so another page measures it in a frame."""
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(WRAPPER.format(width=width, page=report.as_uri()))
    visit = browse(wrapper, "--dump-dom", "--allow-file-access-from-files", width=max(width, 1300), height=900)
    result = json.loads(re.search(r'<pre id="result">(.*?)</pre>', visit.output, re.DOTALL)[1])
    assert result["page"] <= width
    assert result["wide"] == []
    assert result["cut"] == []
    assert result["letters"] >= 9
    assert result["plots"] and min(result["plots"]) >= 0.8 * min(width, 400)
    assert result["images"] and all(min(box) >= 40 for box in result["images"])
    assert visit.console == []


def test_policy_blocks_images_and_scripts(report: Path, browse: Browse, tmp_path: Path) -> None:
    """The page's policy blocks an external image and a script, and without it the request is detected."""
    altered, added = (
        tmp_path / "altered.html",
        '<img src="http://example.invalid/x.png"><script>alert(1)</script></main>',
    )
    altered.write_text(report.read_text(encoding="utf-8").replace("</main>", added), encoding="utf-8")
    visit = browse(altered, "--dump-dom")
    assert len([line for line in visit.console if "Content Security Policy" in line]) == 2
    assert visit.requests == set()
    open_page = re.sub(r"<meta http-equiv[^>]*>", "", altered.read_text(encoding="utf-8")).replace("alert(1)", "")
    altered.write_text(open_page, encoding="utf-8")
    assert browse(altered, "--dump-dom").requests == {"http://example.invalid/x.png"}
