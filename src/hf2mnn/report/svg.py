"""Conversion of matplotlib figures to deterministic SVG for a page: text stays text, colours are CSS variables.

Ink, grid and background are drawn in reserved colours, which `to_svg` replaces by CSS variables of the page, so that
a plot follows its light and dark scheme.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from html import escape
from typing import Any, ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

P = ParamSpec("P")
INK, MUTED, GRID, PAPER, BAD = "#101112", "#505152", "#d0d1d2", "#fefdfc", "#b32710"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", PAPER: "paper", BAD: "bad"}
WIDTH = 4.8
"""Width of a plot in inches of 72 units: that of a phone's page, where text then has its nominal size."""
# fmt: off
SETTINGS = {
    "svg.fonttype": "none", "svg.hashsalt": "hf2mnn", "text.parse_math": False,
    "font.family": "sans-serif", "font.size": 11.5, "text.color": INK, "figure.facecolor": "none",
    "axes.labelcolor": INK, "axes.edgecolor": MUTED, "axes.facecolor": "none", "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 12, "axes.titleweight": "bold",
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.7,
    "xtick.color": MUTED, "xtick.labelcolor": INK, "ytick.color": MUTED, "ytick.labelcolor": INK,
    "legend.frameon": False, "legend.fontsize": 11, "hatch.linewidth": 1.2, "hatch.color": PAPER,
    "lines.linewidth": 1.8, "lines.markersize": 6.5,
}
# fmt: on
# All colours have a contrast of at least 3 on white and on the page's dark background (WCAG 1.4.11). Markers and
# hatches distinguish series without colour.
COLOURS = ("#7a8289", "#0f76b5", "#d55e00", "#00946c", "#b8609a", "#a07000", "#7d62d0")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "h")
HATCHES = ("", "///", "\\\\\\", "xxx", "---", "+++", "|||")
DASHES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Style:
    """Style of one series, the same in every plot."""

    colour: str
    marker: str
    hatch: str
    dash: str

    @property
    def line(self) -> dict[str, str]:
        """Options of a line."""
        return {"color": self.colour, "marker": self.marker, "linestyle": self.dash}

    @property
    def bar(self) -> dict[str, Any]:
        """Options of a bar."""
        return {"facecolor": self.colour, "hatch": self.hatch, "linewidth": 0}


def assign_styles(names: list[str]) -> dict[str, Style]:
    """Return a style for each name; 63 combinations of colour and marker are distinct."""
    cycles = (COLOURS, MARKERS, HATCHES, DASHES)
    return {name: Style(*(cycle[index % len(cycle)] for cycle in cycles)) for index, name in enumerate(names)}


def plot(function: Callable[P, str]) -> Callable[P, str]:
    """Run a plot function with SETTINGS, and restore matplotlib's settings afterwards."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> str:
        with matplotlib.rc_context(SETTINGS):
            return function(*args, **kwargs)

    return run


def new_figure(height: float) -> tuple[Figure, Axes]:
    """Return a figure of WIDTH and `height` inches, and its axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def to_svg(figure: Figure, name: str, label: str) -> str:
    """Return a figure as an <svg> element; the same figure gives the same bytes.

    `name` is the prefix of its ids, unique on the page; `label` is for screen readers.
    """
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>|\s*<style .*?</style>|\s*<!--.*?-->", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href").replace("<defs/>", "")
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda match: f' id="{name}-{match[1]}"' if match[1] in used else "", text)
    text = re.sub(r'(href="|url\()#', rf"\g<1>#{name}-", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable}, {colour})")
    text = re.sub(r" font-family: [^;\"]*;", "", text)  # the page sets the font
    width, height = (size * 72 for size in figure.get_size_inches())
    head = f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width:g} {height:g}"'
    return re.sub(r"<svg[^>]*>", lambda _: f'{head} style="stroke-linejoin: round">', text, count=1).strip()
