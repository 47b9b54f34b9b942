"""The report's plots: from tables to SVG, by nothing but their arguments."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from hf2mnn.evaluation.names import PREPROCESSING, TOTAL
from hf2mnn.report.svg import (
    BAD,
    COLOURS,
    HATCHES,
    INK,
    MUTED,
    PAPER,
    WIDTH,
    Style,
    drawn,
    new_figure,
    to_svg,
)

FLOOR = 1e-8
"""KL divergence in nats below which plots do not go: float32 logits are not that exact, and a log axis has no zero."""
PERCENTILES = {
    "median_kld": "50 %",
    "p90_kld": "90 %",
    "p95_kld": "95 %",
    "p99_kld": "99 %",
    "p999_kld": "99.9 %",
    "max_kld": "max",
}
LETTER = 6.4
"""Units of 1/72 inch that a letter takes."""
SPEED = {
    "first_token_s": "first token",
    "prefill_tokens_per_s": "prompt",
    "decode_tokens_per_s": "answer",
    "vision_s": "image",
    "load_s": "loading",
    "bundle_mb": "memory",
}
"""Measures of the speed plot; those whose names end otherwise than in _per_s are better when they are smaller."""
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices, by the first number, of the points that no other betters: none is at most as large in both numbers and
    smaller in one. A point that is not a number is none of them.
    """
    known = [(index, point) for index, point in enumerate(points) if not any(map(math.isnan, point))]
    best = [
        (point, index)
        for index, point in known
        if not any(other != point and other[0] <= point[0] and other[1] <= point[1] for _, other in known)
    ]
    return [index for _, index in sorted(best)]


def short(value: float) -> str:
    """Two digits that mean something."""
    if not value:
        return "0"
    return f"{value:.2g}" if abs(value) < 99.5 else f"{value:.0f}"


def _decade(value: float, _: object = None) -> str:
    exponent = round(math.log10(value)) if value > 0 else 0
    if -3 <= exponent <= 3:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(SUPERSCRIPTS)


def _log_axis(axes: Axes, which: str) -> None:
    axis = getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}scale")("log")
    axis.set_major_locator(LogLocator(numticks=9))
    axis.set_major_formatter(FuncFormatter(_decade))
    axis.set_minor_locator(NullLocator())


def _ticks(axes: Axes, which: str, values: Iterable[float]) -> None:
    """Only these ticks, written as they are."""
    axis = getattr(axes, f"{which}axis")
    axis.set_ticks(list(values), labels=[f"{value:g}" for value in values])
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, handles: list) -> None:
    """Below the axes, in as many columns as there is room for; more than two rows make the figure taller."""
    lengths = [len(handle.get_label()) for handle in handles]

    def width(columns: int) -> float:
        return sum(44 + LETTER * max(part, default=0) for part in np.array_split(lengths, columns))

    columns = next((columns for columns in (3, 2) if len(handles) >= columns and width(columns) < 72 * WIDTH + 20), 1)
    figure.set_figheight(figure.get_figheight() + 0.22 * max(0, math.ceil(len(handles) / columns) - 2))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=2.2, columnspacing=1.4)


def _line(name: str, style: Style) -> Line2D:
    return Line2D([], [], label=name, color=style.colour, marker=style.marker, linestyle=style.dash)


def _cost(box: tuple[float, ...], room: tuple[float, ...], taken: list[tuple[float, ...]]) -> int:
    """How bad a place (left, bottom, right, top) is: it leaves `room`, it covers what is `taken`."""
    outside = box[0] < room[0] or box[1] < room[1] or box[2] > room[2] or box[3] > room[3]
    covers = sum(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken)
    return covers + 3 * outside


def _place(axes: Axes, labels: list[tuple[float, float, str]]) -> None:
    """Write each label beside its point where it covers no other label and no point."""
    axes.figure.draw_without_rendering()
    pixel = axes.figure.dpi / 72
    points = [axes.transData.transform((x, y)) / pixel for x, y, _ in labels]
    room = tuple(axes.get_window_extent().extents / pixel)
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    for (x, y), (at, over, text) in zip(points, labels, strict=True):
        text = fill(text, 22)
        lines = text.split("\n")
        wide, high = LETTER * max(map(len, lines)), 13 * len(lines)
        left, middle = -9 - wide, -wide / 2
        offsets = [(9, 3), (left, -high - 1), (9, -high / 2), (left, -high / 2), (middle, 9), (middle, -high - 9)]
        offsets += [(left, 5), (9, -high - 5), (middle, 22), (9, 18), (left, 18), (middle, 35), (left, 31)]
        boxes = [(x + dx, y + dy, x + dx + wide, y + dy + high) for dx, dy in offsets]
        costs = [_cost(box, room, taken) for box in boxes]
        chosen = costs.index(min(costs))
        taken.append(boxes[chosen])
        written = axes.annotate(text, (at, over), offsets[chosen], textcoords="offset points")
        written.set_in_layout(False)  # it has its place; the axes must not shrink for it


@drawn
def size_plot(table: pd.DataFrame, looks: dict[str, Style]) -> str:
    """Size against mean KL divergence. `table` has name, megabytes, mean_kld, low, high, failed and candidate: whether
    the row may stand on the Pareto front.
    """
    figure = new_figure(4.1)
    axes = figure.subplots()
    _log_axis(axes, "y")
    known = table[table["mean_kld"].notna() & table["megabytes"].notna()]
    choice = known[known["candidate"]]
    front = choice.iloc[pareto_front(list(zip(choice["megabytes"], choice["mean_kld"], strict=True)))]
    shown = front["mean_kld"].clip(lower=FLOOR)
    axes.step(front["megabytes"], shown, where="post", color=MUTED, linestyle="--", linewidth=1.2, zorder=1)
    labels = []
    for row in known.itertuples():
        style, height = looks[row.name], max(row.mean_kld, FLOOR)
        if row.high > FLOOR:
            ends = [[max(height - max(row.low, FLOOR), 0)], [max(row.high - height, 0)]]
            axes.errorbar([row.megabytes], [height], ends, color=style.colour, capsize=3, linewidth=1.3)
        axes.plot(
            [row.megabytes],
            [height],
            marker=style.marker if row.mean_kld >= FLOOR else "v",
            color=style.colour,
            markersize=8.5,
            markeredgecolor=BAD if row.failed else style.colour,
            markeredgewidth=1.8,
            markerfacecolor=PAPER if row.failed else style.colour,
            clip_on=False,
            zorder=4,
        )
        below = f" ({short(row.mean_kld)})" if row.mean_kld < FLOOR else ""
        labels.append((row.megabytes, height, f"{row.name}{below}"))
    top = known[["mean_kld", "high"]].max().max() if len(known) else 1.0
    axes.set_ylim(FLOOR, max(10 * FLOOR, 3 * top))
    axes.set_xlim(0, 1.12 * known["megabytes"].max() if len(known) else 1)
    axes.set_xlabel("size, MB")
    axes.set_ylabel("mean KL divergence, nats")
    handles = [Line2D([], [], color=MUTED, linestyle="--", linewidth=1.2, label="Pareto front")]
    if known["failed"].any():
        missed = {"markerfacecolor": PAPER, "markeredgecolor": BAD, "markeredgewidth": 1.8, "linestyle": ""}
        handles.append(Line2D([], [], marker="o", label="misses a gate", **missed))
    if (known["mean_kld"] < FLOOR).any():
        handles.append(Line2D([], [], marker="v", color=MUTED, linestyle="", label=f"below {_decade(FLOOR)}"))
    _legend(figure, handles)
    _place(axes, labels)
    best = ", ".join(front["name"])
    return to_svg(figure, "size", f"Size against mean KL divergence of {len(known)} conversions. On the front: {best}.")


def _shares(found: pd.Series) -> tuple[pd.Series, float, float, float]:
    """Sources with a share, all as shares of the larger of their sum and the total; then total, remainder and what
    image preprocessing would bring.
    """
    total = float(found.get(TOTAL, 0.0))
    sources = found.drop([TOTAL, PREPROCESSING], errors="ignore")
    whole = max(total, float(sources.sum()))
    if not whole:
        return sources, 0.0, 0.0, 0.0
    rest = max(total - float(sources.sum()), 0.0)
    return sources / whole, total / whole, rest / whole, float(found.get(PREPROCESSING, 0.0)) / whole


@drawn
def budget_plot(budgets: dict[str, pd.Series]) -> str:
    """Error budget: a bar for each variant. `budgets` has the mean KL divergence by source of each."""
    names = list(budgets)
    figure = new_figure(1.3 + 0.62 * len(names))
    axes = figure.subplots()
    sources = list(dict.fromkeys(source for found in budgets.values() for source in found.index))
    sources = [source for source in sources if source not in (TOTAL, PREPROCESSING)]
    colours = dict(zip(sources, (COLOURS[i % len(COLOURS)] for i in range(len(sources))), strict=True))
    hatches = dict(zip(sources, (HATCHES[i % len(HATCHES)] for i in range(len(sources))), strict=True))
    for place, found in enumerate(budgets.values()):
        shares, total, rest, preprocessing = _shares(found)
        left = 0.0
        for source, share in shares.items():
            if share > 0:
                axes.barh(place, share, 0.46, left, color=colours[source], hatch=hatches[source], linewidth=0)
                left += share
        if rest > 0.005:
            axes.barh(place, rest, 0.46, left, facecolor="none", edgecolor=MUTED, linestyle=":", linewidth=1.2)
        if total:
            axes.plot([total], [place], marker="D", color=INK, markersize=5.5, clip_on=False, zorder=5)
        if preprocessing:
            axes.barh(place + 0.34, min(preprocessing, 1.0), 0.13, color=MUTED, hatch="////", linewidth=0)
            if preprocessing > 1:
                axes.plot([1.0], [place + 0.34], marker=">", color=MUTED, markersize=5, clip_on=False, zorder=5)
        axes.text(1.04, place, short(float(found.get(TOTAL, 0.0))), va="center", ha="left")
    axes.text(1.04, -0.62, "total, nats", va="center", ha="left", color=MUTED, fontsize=10.5)
    axes.set_yticks(range(len(names)), [fill(name, 16) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_ylim(len(names) - 0.4, -0.8)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    handles = [
        Patch(facecolor=colours[source], hatch=hatches[source], linewidth=0, label=source)
        for source in sources
        if any(found.get(source, 0.0) > 0 for found in budgets.values())
    ]
    handles += [
        Line2D([], [], marker="D", color=INK, linestyle="", markersize=5.5, label="total"),
        Patch(facecolor="none", edgecolor=MUTED, linestyle=":", linewidth=1.2, label="only together"),
        Patch(facecolor=MUTED, hatch="////", linewidth=0, label="image preprocessing"),
    ]
    _legend(figure, handles)
    return to_svg(figure, "budget", f"Error budget of {', '.join(names)}: the share of each source; numbers below.")


def blocks_of(points: pd.Series) -> pd.Series:
    """The block of each point: a point that others lie within and that is numbered; the empty text for those outside.

    A row for each of `points`, which are names of `hf2mnn.reference.tap_points` with their dots.
    """
    numbered = {name for name in points if re.search(r"\.\d+$", name)}
    whole = {name for name in numbered if any(other.startswith(f"{name}.") for other in points)}

    def block(point: str) -> str:
        parts = point.split(".")
        ends = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
        return next((name for name in ends if name in whole), "")

    return points.map(block)


def depth_table(layers: pd.DataFrame, column: str) -> pd.DataFrame:
    """The largest `column` at each depth: place (0 is before the first block), label, value, and whether a point there
    leaves its tolerance.

    For an accumulated error only the blocks' own outputs and the last point count, for `mnn_local` every point.
    """
    made = layers.assign(block=blocks_of(layers["point"])).sort_values("order")
    blocks = [name for name in dict.fromkeys(made["block"]) if name]
    places = {name: place for place, name in enumerate(blocks, 1)}
    firsts = made[made["block"] != ""]["order"]
    outside = np.where(made["order"] < (firsts.min() if len(firsts) else math.inf), 0, len(blocks) + 1)
    made["place"] = made["block"].map(places).fillna(pd.Series(outside, index=made.index)).astype(int)
    if column != "mnn_local":
        last = made["order"] == made.groupby("probe")["order"].transform("max")
        made = made[(made["point"] == made["block"]) | last]
    made = made[made[column].notna()]
    made["over"] = made["mnn_local"] > made["tolerance"]
    table = made.groupby("place").agg(value=(column, "max"), over=("over", "any")).reset_index()
    labels = {0: "in", len(blocks) + 1: "out"}
    table.insert(1, "label", [labels.get(place, str(place - 1)) for place in table["place"]])
    return table


@drawn
def layer_plot(curves: dict[str, pd.DataFrame], looks: dict[str, Style], name: str, title: str, what: str) -> str:
    """`curves` has a `depth_table` for each conversion."""
    figure = new_figure(3.8)
    axes = figure.subplots()
    _log_axis(axes, "y")
    places: dict[int, str] = {}
    smallest = min((t["value"][t["value"] > 0].min() for t in curves.values() if (t["value"] > 0).any()), default=1e-8)
    floor = max(smallest / 3, 1e-9)
    strayed = False
    for conversion, table in curves.items():
        style, values = looks[conversion], table["value"].clip(lower=floor)
        places |= dict(zip(table["place"], table["label"], strict=True))
        step = max(1, len(table) // 8)
        axes.plot(table["place"], values, color=style.colour, linestyle=style.dash, marker=style.marker, markevery=step)
        over = table["over"] & (name.startswith("local"))
        if over.any():
            strayed = True
            ring = {"marker": "o", "markersize": 12, "markerfacecolor": "none", "markeredgecolor": BAD}
            axes.plot(table["place"][over], values[over], linestyle="", markeredgewidth=1.8, **ring)
    ordered = sorted(places)
    step = max(1, math.ceil(len(ordered) / 8))
    kept = [place for place in ordered if places[place] in ("in", "out") or (place - 1) % step == 0]
    if len(kept) > 2 and places[kept[-1]] == "out" and kept[-1] - kept[-2] < step:
        kept.pop(-2)
    axes.set_xticks(kept, [places[place] for place in kept])
    axes.set_xlabel("block")
    axes.set_ylabel(what)
    axes.set_title(title, loc="left")
    handles = [_line(conversion, looks[conversion]) for conversion in curves]
    if strayed:
        ring = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": BAD, "markeredgewidth": 1.8}
        handles.append(Line2D([], [], marker="o", linestyle="", label="out of tolerance", **ring))
    _legend(figure, handles)
    return to_svg(figure, name, f"{title}: {what} by block, for {', '.join(curves)}.")


@drawn
def percentile_plot(figures: dict[str, pd.Series], looks: dict[str, Style]) -> str:
    """How KL divergence is spread over positions. `figures` has those of PERCENTILES for each conversion."""
    figure = new_figure(3.7)
    axes = figure.subplots()
    _log_axis(axes, "y")
    below = False
    for name, found in figures.items():
        values, style = found.reindex(list(PERCENTILES)), looks[name]
        below |= bool((values < FLOOR).any())
        line = {"color": style.colour, "linestyle": style.dash, "marker": style.marker}
        axes.plot(range(len(values)), values.clip(lower=FLOOR), clip_on=False, zorder=3, **line)
    axes.set_ylim(bottom=FLOOR)
    axes.set_xticks(range(len(PERCENTILES)), list(PERCENTILES.values()))
    axes.set_xlabel("share of positions at or below")
    axes.set_ylabel("KL divergence, nats")
    if below:
        axes.text(0, 1.02, f"on the axis: below {_decade(FLOOR)}", transform=axes.transAxes, color=MUTED)
    _legend(figure, [_line(name, looks[name]) for name in figures])
    return to_svg(figure, "percentiles", f"Percentiles of KL divergence for {', '.join(figures)}.")


@drawn
def cache_plot(cache: pd.DataFrame, looks: dict[str, Style]) -> str:
    """Seconds of recomputing over seconds of a cached step. `cache` has bundle, length and worth."""
    figure = new_figure(3.5)
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for name, rows in cache.groupby("bundle", sort=False):
        style = looks[name]
        axes.plot(rows["length"], rows["worth"], color=style.colour, linestyle=style.dash, marker=style.marker)
    low, high = min(cache["worth"].min(), 1.0), cache["worth"].max()
    _ticks(axes, "x", sorted(cache["length"].unique()))
    _ticks(axes, "y", [2.0**power for power in range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)])
    axes.axhline(1, color=MUTED, linewidth=1)
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("times faster with the cache")
    names = list(dict.fromkeys(cache["bundle"]))
    _legend(figure, [_line(name, looks[name]) for name in names])
    return to_svg(figure, "cache", f"What the KV cache is worth by length, for {', '.join(names)}.")


def _times_better(measure: str, figures: dict[str, float], base: float) -> tuple[float, float, float]:
    """Median and quartiles as times better than `base`, the smaller end first."""
    values = [figures[key] for key in ("median", "first_quartile", "third_quartile")]
    ratios = [value / base if measure.endswith("_per_s") else base / value for value in values]
    return ratios[0], min(ratios[1:]), max(ratios[1:])


@drawn
def speed_plot(speed: dict, looks: dict[str, Style]) -> str:
    """Bars to the right of 1 are better than the baseline. `speed` is speed.json."""
    bundles, baseline = speed["bundles"], speed["baseline"]
    names = [name for name in bundles if name != baseline]
    base = bundles[baseline]["measures"]
    measures = [measure for measure in SPEED if base.get(measure, {}).get("median")]
    figure = new_figure(1.2 + 0.17 * len(measures) * (len(names) + 1))
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    height, ends = 0.86 / max(len(names), 1), [1.0]
    for place, measure in enumerate(measures):
        for index, name in enumerate(names):
            found = bundles[name]["measures"].get(measure)
            if not found or not found["median"]:
                continue
            middle, low, high = _times_better(measure, found, base[measure]["median"])
            at, style = place + (index - (len(names) - 1) / 2) * height, looks[name]
            axes.barh(at, middle - 1, 0.86 * height, 1, color=style.colour, hatch=style.hatch, linewidth=0)
            spread = {"color": INK, "linewidth": 1, "capsize": 2, "capthick": 1}
            axes.errorbar([middle], [at], xerr=[[middle - low], [high - middle]], fmt="none", ecolor=INK, **spread)
            ends += [low, high]
    axes.axvline(1, color=MUTED, linewidth=1.2)
    powers = range(math.floor(math.log2(min(ends))), math.ceil(math.log2(max(ends))) + 1)
    _ticks(axes, "x", [2.0**power for power in powers])
    axes.set_yticks(range(len(measures)), [SPEED[measure] for measure in measures])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_ylim(len(measures) - 0.45, -0.55)
    axes.set_xlabel(f"times better than {baseline}")
    handles = [Patch(facecolor=looks[name].colour, hatch=looks[name].hatch, linewidth=0, label=name) for name in names]
    _legend(figure, handles)
    return to_svg(figure, "speed", f"Speed and memory against {baseline}, for {', '.join(names)}.")
