"""Conversion of matplotlib figures to deterministic SVG for a page: text stays text, colours are CSS variables.

Ink, grid and background have reserved colours, which `to_svg` replaces by variables of the light and dark schemes.
"""

from __future__ import annotations

import io
import re
from html import escape
from itertools import cycle
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

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
    "axes.titlelocation": "left", "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.7,
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
plot = matplotlib.rc_context(SETTINGS)
"""Decorator: run a plot function with SETTINGS, and restore matplotlib's settings afterwards."""


class Style(NamedTuple):
    """Style of one series, the same in every plot: options of its line and of its bar."""

    line: dict[str, Any]
    bar: dict[str, Any]


def assign_styles(names: list[str]) -> dict[str, Style]:
    """Return a style for each name; 63 combinations of colour and marker are distinct."""
    styles = {}
    for name, colour, marker, hatch, dash in zip(names, cycle(COLOURS), cycle(MARKERS), cycle(HATCHES), cycle(DASHES)):
        line = {"color": colour, "marker": marker, "linestyle": dash}
        styles[name] = Style(line, {"facecolor": colour, "hatch": hatch, "linewidth": 0})
    return styles


def new_figure(height: float) -> tuple[Figure, Axes]:
    """Return a figure of WIDTH and `height` inches, and its axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def to_svg(figure: Figure, name: str, label: str) -> Markup:
    """Return a figure as <svg>, always the same bytes; `name` prefixes its ids, `label` is for screen readers."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = re.split(r"<svg[^>]*>", buffer.getvalue(), maxsplit=1)[1]
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
    return Markup(f'{head} style="stroke-linejoin: round">{text.rstrip()}')
