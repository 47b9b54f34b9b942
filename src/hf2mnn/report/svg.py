"""From a matplotlib figure to SVG that stands inside a page: text as text, colours of the page, the same bytes twice.

Ink, grid and background are drawn in colours that nothing else has and then named by the page's CSS variables, so that
a figure is dark on light and light on dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from html import escape
from typing import ParamSpec

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

P = ParamSpec("P")
INK, MUTED, GRID, PAPER, BAD = "#101112", "#505152", "#d0d1d2", "#fefdfc", "#b32710"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", PAPER: "paper", BAD: "bad"}
WIDTH = 4.8
"""Inches of 72 units: as wide as a phone's page, where text then has the size it is given here."""
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hf2mnn",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 11.5,
    "figure.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "hatch.linewidth": 1.2,
    "hatch.color": PAPER,
    "lines.linewidth": 1.8,
    "lines.markersize": 6.5,
}
# All of them reach a contrast of 3 on white and on the page's dark background; told apart by marker and hatch as well.
COLOURS = ("#7a8289", "#0f76b5", "#d55e00", "#00946c", "#b8609a", "#a07000", "#7d62d0")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "h")
HATCHES = ("", "///", "\\\\\\", "xxx", "---", "+++", "|||")
DASHES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Style:
    """How one series looks in every plot."""

    colour: str
    marker: str
    hatch: str
    dash: str


def styles(names: list[str]) -> dict[str, Style]:
    """A look for each name, in order; seven colours and nine markers make sixty-three."""
    cycles = (COLOURS, MARKERS, HATCHES, DASHES)
    return {name: Style(*(cycle[index % len(cycle)] for cycle in cycles)) for index, name in enumerate(names)}


def drawn(plot: Callable[P, str]) -> Callable[P, str]:
    """Matplotlib's settings are the module's while `plot` runs, and afterwards what they were."""

    @wraps(plot)
    def run(*args: P.args, **kwargs: P.kwargs) -> str:
        with matplotlib.rc_context(SETTINGS):
            return plot(*args, **kwargs)

    return run


def new_figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), layout="constrained")


def to_svg(figure: Figure, name: str, label: str) -> str:
    """The <svg> element alone. `name` tells its ids from those of the page's other figures; `label` is read aloud."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>|\s*<style .*?</style>|\s*<!--.*?-->", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href").replace("<defs/>", "")
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r'(href="|url\()#', rf"\g<1>#{name}-", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable}, {colour})")
    text = re.sub(r" font-family: [^;\"]*;", "", text)  # the page's
    width, height = (size * 72 for size in figure.get_size_inches())
    head = f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width:g} {height:g}"'
    return re.sub(r"<svg[^>]*>", lambda _: f'{head} style="stroke-linejoin: round">', text, count=1).strip()
