"""Plots of the report: functions from tables to SVG."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from textwrap import fill

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator
from matplotlib.transforms import Bbox

from hf2mnn.evaluation.findings import PREPROCESSING, TOTAL
from hf2mnn.figures import FIGURES, HIGHER, POSITIONS, SPEED, measured_on, on_page, short
from hf2mnn.report.svg import BAD, INK, MUTED, PAPER, WIDTH, Style, assign_styles, new_figure, plot, to_svg

FLOOR = 1e-8
"""Lower end of the axes of KL divergence in nats: float32 logits are less exact, and a log axis has no zero."""
PERCENTILES = {
    figure.name: f"{100 * figure.quantile:g} %" if figure.quantile < 1 else "max"
    for figure in measured_on(POSITIONS)
    if figure.quantile
}
LETTER = 6.4
"""Width of a letter in units of 1/72 inch."""
SHIFTS = [sign * 13 * step for step in range(1, 11) for sign in (1, -1)]
"""Vertical shifts of labels that do not fit next to their points, in units of 1/72 inch."""
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def pareto_front(points: np.ndarray) -> np.ndarray:
    """Return the indices of the Pareto front of `points`, [n, 2], by x; smaller is better, and a NaN is never on it."""
    dominated = (points[:, None] >= points).all(axis=2) & (points[:, None] > points).any(axis=2)
    front = np.flatnonzero(~dominated.any(axis=1) & ~np.isnan(points).any(axis=1))
    return front[np.argsort(points[front, 0], kind="stable")]


def _decade(value: float, _: object = None) -> str:
    """Format a power of ten; the second argument is the position that matplotlib passes."""
    exponent = round(math.log10(value)) if value > 0 else 0
    if -3 <= exponent <= 3:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(SUPERSCRIPTS)


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=9))
    axes.yaxis.set_major_formatter(_decade)
    axes.minorticks_off()


def _binary_axis(axes: Axes, which: str, values: Sequence[float]) -> None:
    """Set a logarithmic axis of base 2 with ticks at `values`."""
    getattr(axes, f"set_{which}scale")("log", base=2)
    getattr(axes, f"set_{which}ticks")(values, [f"{value:g}" for value in values])
    axes.minorticks_off()


def _powers_of_two(values: Iterable[float]) -> list[float]:
    """Return the powers of two from below the smallest to above the largest value."""
    low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    return [2.0**power for power in range(low, high + 1)]


def _bar_axis(axes: Axes, labels: list[str], bottom: float, top: float) -> None:
    """Label the rows of a plot of horizontal bars, the first at the top."""
    axes.set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - bottom, top))
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def _legend(figure: Figure, axes: Axes, handles: Sequence[Artist] = ()) -> None:
    """Add a legend of the labelled lines and `handles` below the axes; more than two rows make the figure taller."""
    handles = [*axes.get_legend_handles_labels()[0], *handles]
    lengths = [len(handle.get_label()) for handle in handles]

    def width(columns: int) -> float:
        return sum(44 + LETTER * max(part, default=0) for part in np.array_split(lengths, columns))

    columns = next((columns for columns in (3, 2) if len(handles) >= columns and width(columns) < 72 * WIDTH + 20), 1)
    figure.set_figheight(figure.get_figheight() + 0.22 * max(0, math.ceil(len(handles) / columns) - 2))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=2.2, columnspacing=1.4)


# Not adjustText: 1.4.0 puts labels on markers and on each other where points are close or lie on an axis.
def _label_points(axes: Axes, labels: list[tuple[float, float, str]]) -> None:
    """Write labels, given as (x, y, text), near their points where they cover the fewest labels and points."""
    axes.figure.draw_without_rendering()
    pixel = axes.figure.dpi / 72
    points = [axes.transData.transform((x, y)) / pixel for x, y, _ in labels]
    room = Bbox(axes.get_window_extent().get_points() / pixel)
    occupied = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in points]
    # From the top and from the right, where labels have the least room.
    by_height = sorted(zip(points, labels, strict=True), key=lambda pair: (-round(pair[0][1]), -pair[0][0]))
    for (x, y), (*point, text) in by_height:
        text = fill(text, 22)
        width, height = LETTER * max(map(len, text.split("\n"))), 13 * (text.count("\n") + 1)
        left, middle, half = -9 - width, -width / 2, height / 2
        adjacent = [(9, 3), (left, -height - 1), (9, -half), (left, -half), (middle, 9), (middle, -height - 9)]
        offsets = adjacent + [(dx, dy + shift) for shift in SHIFTS for dx, dy in adjacent]
        boxes = [Bbox.from_bounds(x + dx, y + dy, width, height) for dx, dy in offsets]
        covered = [box.count_overlaps(occupied) for box in boxes]
        outside = [(box.min < room.min).any() or (box.max > room.max).any() for box in boxes]
        best = np.argmin(np.array(covered) + 3 * np.array(outside))  # leaving the axes is as bad as covering three
        occupied.append(boxes[best])
        leader = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.8, "shrinkB": 4} if best >= len(adjacent) else None
        label = axes.annotate(text, point, offsets[best], textcoords="offset points", arrowprops=leader, zorder=5)
        label.set_in_layout(False)  # the axes must not shrink for a label


@plot
def size_plot(table: pd.DataFrame, styles: dict[str, Style]) -> Markup:
    """Plot size against mean KL divergence.

    `table` has name, megabytes, mean_kld, low, high, failed (misses a gate) and candidate (for the Pareto front).
    """
    figure, axes = new_figure(4.1)
    _log_axis(axes)
    known = table[table["mean_kld"].notna() & table["megabytes"].notna()]
    choice = known[known["candidate"]]
    front = choice.iloc[pareto_front(choice[["megabytes", "mean_kld"]].to_numpy(float))]
    shown = front["mean_kld"].clip(lower=FLOOR)
    axes.step(front["megabytes"], shown, where="post", color=MUTED, linestyle="--", linewidth=1.2, zorder=1)
    labels, open_marker = [], {"markerfacecolor": PAPER, "markeredgecolor": BAD, "markeredgewidth": 1.8}
    for row in known.itertuples():
        line, height = styles[row.name].line, max(row.mean_kld, FLOOR)
        if row.high > FLOOR:
            ends = [[max(height - max(row.low, FLOOR), 0)], [max(row.high - height, 0)]]
            axes.errorbar([row.megabytes], [height], ends, color=line["color"], capsize=3, linewidth=1.3)
        shape = {"color": line["color"], "marker": line["marker"] if row.mean_kld >= FLOOR else "v"}
        shape |= open_marker if row.failed else {"markeredgewidth": 1.8}
        axes.plot([row.megabytes], [height], markersize=8.5, clip_on=False, zorder=4, **shape)
        value = f" ({short(row.mean_kld)})" if row.mean_kld < FLOOR else ""
        labels.append((row.megabytes, height, f"{row.name}{value}"))
    top = known[["mean_kld", "high"]].max().max() if len(known) else 1.0
    right = 1.12 * known["megabytes"].max() if len(known) else 1
    axes.set(xlabel="size, MB", ylabel="mean KL divergence, nats")
    axes.set(xlim=(0, right), ylim=(FLOOR, max(10 * FLOOR, 3 * top)))
    handles = [Line2D([], [], color=MUTED, linestyle="--", linewidth=1.2, label="Pareto front")]
    if known["failed"].any():
        handles.append(Line2D([], [], marker="o", linestyle="", label="misses a gate", **open_marker))
    if (known["mean_kld"] < FLOOR).any():
        handles.append(Line2D([], [], marker="v", color=MUTED, linestyle="", label=f"below {_decade(FLOOR)}"))
    _legend(figure, axes, handles)
    _label_points(axes, labels)
    best = ", ".join(front["name"])
    return to_svg(figure, "size", f"Size against mean KL divergence of {len(known)} variants. Pareto front: {best}.")


def _shares(budget: pd.Series) -> tuple[pd.Series, float, float, float]:
    """Return shares of sources, total, remainder (total - sum) and preprocessing; 1 is the larger of total and sum."""
    sources = budget.drop([TOTAL, PREPROCESSING], errors="ignore")
    total, added = float(budget.get(TOTAL, 0.0)), float(sources.sum())
    scale = max(total, added) or math.inf  # the shares of nothing are 0
    return sources / scale, total / scale, max(total - added, 0.0) / scale, budget.get(PREPROCESSING, 0.0) / scale


@plot
def budget_plot(budgets: dict[str, pd.Series]) -> Markup:
    """Plot the error budget as one bar for each variant; `budgets` holds its mean KL divergence by source."""
    names = list(budgets)
    figure, axes = new_figure(1.3 + 0.62 * len(names))
    sources = dict.fromkeys(source for budget in budgets.values() for source in budget.index)
    styles = assign_styles([source for source in sources if source not in (TOTAL, PREPROCESSING)])
    dotted = {"facecolor": "none", "edgecolor": MUTED, "linestyle": ":", "linewidth": 1.2}
    hatched = {"facecolor": MUTED, "hatch": "////", "linewidth": 0}
    for y, budget in enumerate(budgets.values()):
        shares, total, rest, preprocessing = _shares(budget)
        left = 0.0
        for source, share in shares.items():
            if share > 0:
                axes.barh(y, share, 0.46, left, **styles[source].bar)
                left += share
        if rest > 0.005:
            axes.barh(y, rest, 0.46, left, **dotted)
        if total:
            axes.plot([total], [y], marker="D", color=INK, markersize=5.5, clip_on=False, zorder=5)
        if preprocessing:
            axes.barh(y + 0.34, min(preprocessing, 1.0), 0.13, **hatched)
            if preprocessing > 1:
                axes.plot([1.0], [y + 0.34], marker=">", color=MUTED, markersize=5, clip_on=False, zorder=5)
        axes.text(1.04, y, short(float(budget.get(TOTAL, 0.0))), va="center", ha="left")
    axes.text(1.04, -0.62, "total, nats", va="center", ha="left", color=MUTED, fontsize=10.5)
    _bar_axis(axes, [fill(name, 16) for name in names], 0.4, -0.8)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    drawn = [source for source in styles if any(budget.get(source, 0.0) > 0 for budget in budgets.values())]
    handles = [Patch(label=source, **styles[source].bar) for source in drawn]
    handles.append(Line2D([], [], marker="D", color=INK, linestyle="", markersize=5.5, label="total"))
    handles += [Patch(label="interaction", **dotted), Patch(label="image preprocessing", **hatched)]
    _legend(figure, axes, handles)
    label = f"Error budget of {', '.join(names)}: share of each source; the table below has the numbers."
    return to_svg(figure, "budget", label)


def blocks_of(points: pd.Series) -> pd.Series:
    """Return the block of each tap point (`hf2mnn.reference.golden`); "" outside of the blocks.

    A block is a tap point with a numbered name that is a prefix of other names: "model.layers.0".
    """
    numbered = {name for name in points if re.search(r"\.\d+$", name)}
    blocks = {name for name in numbered if any(other.startswith(f"{name}.") for other in points)}
    return points.map(lambda point: max((b for b in blocks if f"{point}.".startswith(f"{b}.")), key=len, default=""))


def depth_table(layers: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the largest error of each block, from one part of a table of layers (`hf2mnn.evaluation.layers.COLUMNS`).

    `column` is "local_error", of every tap point, or an accumulated error, of block outputs and the last tap point.
    The columns are depth (0 before the first block), value, over (a tap point exceeds its tolerance) and label.
    """
    table = layers.assign(block=blocks_of(layers["point"])).sort_values("order")
    codes, blocks = pd.factorize(table["block"].mask(table["block"] == ""))
    after = table["order"] >= table["order"][codes >= 0].min()  # false without blocks, whose minimum is NaN
    table["depth"] = np.where(codes >= 0, codes + 1, np.where(after, len(blocks) + 1, 0))
    if column != "local_error":
        last = table["order"] == table.groupby("probe")["order"].transform("max")
        table = table[(table["point"] == table["block"]) | last]
    table = table[table[column].notna()]
    table["over"] = table["local_error"] > table["tolerance"]
    table = table.groupby("depth").agg(value=(column, "max"), over=("over", "any")).reset_index()
    labels = {0: "in", len(blocks) + 1: "out"}
    return table.assign(label=[labels.get(depth, str(depth - 1)) for depth in table["depth"]])


@plot
def layer_plot(curves: dict[str, pd.DataFrame], styles: dict[str, Style], name: str, title: str, label: str) -> Markup:
    """Plot a `depth_table` for each variant; the name of a plot of local errors begins with "local"."""
    figure, axes = new_figure(3.8)
    _log_axis(axes)
    points = pd.concat(curves.values())
    positive = points["value"][points["value"] > 0]
    floor = max(positive.min() / 3, 1e-9) if len(positive) else 1e-8 / 3
    ring = {"marker": "o", "linestyle": "", "markerfacecolor": "none", "markeredgecolor": BAD, "markeredgewidth": 1.8}
    rings = []
    for variant, table in curves.items():
        values = table["value"].clip(lower=floor)
        step = max(1, len(table) // 8)
        axes.plot(table["depth"], values, label=variant, markevery=step, **styles[variant].line)
        if name.startswith("local") and table["over"].any():
            axes.plot(table["depth"][table["over"]], values[table["over"]], markersize=12, **ring)
            rings = [Line2D([], [], label="exceeds tolerance", markersize=11, **ring)]
    labels = dict(zip(points["depth"], points["label"], strict=True))
    step = max(1, math.ceil(len(labels) / 8))
    ticks = [depth for depth in sorted(labels) if labels[depth] in ("in", "out") or (depth - 1) % step == 0]
    if len(ticks) > 2 and labels[ticks[-1]] == "out" and ticks[-1] - ticks[-2] < step:
        ticks.pop(-2)
    axes.set_xticks(ticks, [labels[depth] for depth in ticks])
    axes.set(xlabel="block", ylabel=label, title=title)
    _legend(figure, axes, rings)
    return to_svg(figure, name, f"{title}: {label} by block, for {', '.join(curves)}.")


@plot
def percentile_plot(figures: dict[str, pd.Series], styles: dict[str, Style]) -> Markup:
    """Plot percentiles of KL divergence over positions; `figures` holds those of PERCENTILES for each variant."""
    figure, axes = new_figure(3.7)
    _log_axis(axes)
    values = pd.DataFrame(figures).reindex(list(PERCENTILES))
    for name, curve in values.items():
        axes.plot(range(len(curve)), curve.clip(lower=FLOOR), label=name, clip_on=False, zorder=3, **styles[name].line)
    axes.set_xticks(range(len(PERCENTILES)), list(PERCENTILES.values()))
    axes.set(xlabel="percentile of positions", ylabel="KL divergence, nats", ylim=(FLOOR, None))
    if (values < FLOOR).any(axis=None):
        axes.text(0, 1.02, f"values on the axis are below {_decade(FLOOR)}", transform=axes.transAxes, color=MUTED)
    _legend(figure, axes)
    return to_svg(figure, "percentiles", f"Percentiles of KL divergence for {', '.join(figures)}.")


@plot
def cache_plot(cache: pd.DataFrame, styles: dict[str, Style]) -> Markup:
    """Plot the speed-up by the KV cache; `cache` has the columns bundle, length and speedup."""
    figure, axes = new_figure(3.5)
    for name, rows in cache.groupby("bundle", sort=False):
        axes.plot(rows["length"], rows["speedup"], label=name, **styles[name].line)
    _binary_axis(axes, "x", sorted(cache["length"].unique()))
    _binary_axis(axes, "y", _powers_of_two([1.0, *cache["speedup"]]))
    axes.axhline(1, color=MUTED, linewidth=1)
    axes.set(xlabel="tokens in the cache", ylabel="speed-up")
    _legend(figure, axes)
    return to_svg(figure, "cache", f"Speed-up by the KV cache by length, for {', '.join(cache['bundle'].unique())}.")


def _improvement(measure: str, values: dict[str, float], base: float) -> tuple[float, float, float]:
    """Return median, lower and upper quartile as factors by which they are better than `base`."""
    quartiles = [values[key] for key in ("median", "first_quartile", "third_quartile")]
    ratios = [value / base if FIGURES[measure].better == HIGHER else base / value for value in quartiles]
    return ratios[0], min(ratios[1:]), max(ratios[1:])


@plot
def speed_plot(speed: dict, styles: dict[str, Style]) -> Markup:
    """Plot medians and quartiles of the benchmark as factors of the baseline; `speed` is benchmark.json."""
    bundles, baseline = speed["bundles"], speed["baseline"]
    names = [name for name in bundles if name != baseline]
    base = bundles[baseline]["measures"]
    measures = [figure for figure in on_page(SPEED) if base.get(figure.name, {}).get("median")]
    figure, axes = new_figure(1.2 + 0.17 * len(measures) * (len(names) + 1))
    height, ends = 0.86 / max(len(names), 1), [1.0]
    whisker = {"fmt": "none", "color": INK, "linewidth": 1, "capsize": 2, "capthick": 1}
    for row, measure in enumerate(measures):
        for index, name in enumerate(names):
            values = bundles[name]["measures"].get(measure.name)
            if not values or not values["median"]:
                continue
            median, low, high = _improvement(measure.name, values, base[measure.name]["median"])
            y = row + (index - (len(names) - 1) / 2) * height
            axes.barh(y, median - 1, 0.86 * height, 1, **styles[name].bar)
            axes.errorbar([median], [y], xerr=[[median - low], [high - median]], **whisker)
            ends += [low, high]
    axes.axvline(1, color=MUTED, linewidth=1.2)
    _binary_axis(axes, "x", _powers_of_two(ends))
    _bar_axis(axes, [measure.label for measure in measures], 0.45, -0.55)
    axes.set_xlabel(f"improvement over {baseline}, factor")
    _legend(figure, axes, [Patch(label=name, **styles[name].bar) for name in names])
    return to_svg(figure, "speed", f"Speed and memory relative to {baseline}, for {', '.join(names)}.")
