"""Tables of the page as cells of text, which the templates render."""

from __future__ import annotations

from typing import Any, NamedTuple

import pandas as pd

from hf2mnn.evaluation.findings import CACHE_TOLERANCE, out_of_tolerance
from hf2mnn.figures import FIGURES, GREEDY, PREDICTIONS, PROBABILITIES, SPEED, UNITS, Figure, on_page, short
from hf2mnn.report import console
from hf2mnn.report.evidence import Evidence
from hf2mnn.report.table import FAIL, PASS, REFERENCE

DASH = "–"
BY_GROUP = ("mean_kld", "top1_agreement", "greedy_match")
"""Figures that are shown for text and for text after an image separately."""


class Cell(NamedTuple):
    """Cell of a table, with small text below it."""

    text: str
    note: str = ""
    kind: str = ""  # CSS class: "good", "bad", "muted" or "".


class Table(NamedTuple):
    """A table: head and cells of each row; a row without cells is a heading of the rows below it."""

    caption: str
    heads: list[str]
    rows: list[tuple[str, list[Cell]]]
    wraps: bool = False


def number(unit: str, value: float | None) -> str:
    """Format a value of a unit of `hf2mnn.figures`; a dash where it is missing."""
    return DASH if pd.isna(value) else UNITS[unit].format(float(value))


def comparison(table: pd.DataFrame) -> Table:
    """Return the summary with the columns of `hf2mnn table`."""
    kinds = {PASS: "good", FAIL: "bad", REFERENCE: "muted"}
    rows = []
    for row in table.to_dict("records"):
        name, *texts = (console.cell(column, row[column]) for column in console.HEADS)
        rows.append((name, [Cell(DASH if text == "-" else text, "", kinds.get(text, "")) for text in texts]))
    return Table("Variants compared with PyTorch in float32", list(console.HEADS.values()), rows)


def _with_interval(figures: pd.DataFrame, figure: Figure) -> Cell:
    if figure.name not in figures.index:
        return Cell(DASH)
    text, *ends = (number(figure.unit, value) for value in figures.loc[figure.name, ["value", "low", "high"]])
    return Cell(text, "" if DASH in ends or {text} == set(ends) else " … ".join(ends).replace(" %", "", 1))


def figures(evidence: Evidence) -> list[Table]:
    """Return the figures of each variant with their 95 % confidence intervals."""
    values = {variant.name: variant.group("all") for variant in evidence.variants}
    tables = []
    for caption in (PREDICTIONS, PROBABILITIES, GREEDY):
        measured = [f for f in on_page(caption) if any(f.name in frame.index for frame in values.values())]
        rows = [(name, [_with_interval(frame, figure) for figure in measured]) for name, frame in values.items()]
        heads = ["variant", *(figure.label for figure in measured)]
        tables.append(Table(f"{caption}, with 95 % confidence intervals", heads, rows))
    return tables if values else []


def parts(evidence: Evidence) -> Table | None:
    """Return the figures of BY_GROUP for text prompts and for prompts with images separately."""
    groups = [group for group in ("text", "after an image") if any(len(v.group(group)) for v in evidence.variants)]
    if len(groups) < 2:
        return None
    columns = [(FIGURES[name], group) for name in BY_GROUP for group in groups]
    rows = [(v.name, [_with_interval(v.group(group), figure) for figure, group in columns]) for v in evidence.variants]
    heads = [f"{figure.label}, {group}" for figure, group in columns]
    return Table("Text, and text after an image, with 95 % confidence intervals", ["variant", *heads], rows)


def accuracy(evidence: Evidence) -> Table | None:
    """Return task accuracy by category and by language, PyTorch's first."""
    labelled = [variant.answers[variant.answers["score"].notna()] for variant in evidence.variants]
    if not labelled or labelled[0].empty:
        return None

    def cells_of(frames: list[pd.DataFrame]) -> list[Cell]:
        reference = float(frames[0]["reference_score"].mean())
        cells = [Cell(number("share", reference), f"of {len(frames[0])}")]
        for frame in frames:
            mean = float(frame["score"].mean())
            kind = "" if abs(mean - reference) < 1e-9 else "good" if mean > reference else "bad"
            cells.append(Cell(number("share", mean), "", kind))
        return cells

    rows = [("all", cells_of(labelled))]
    for column in ("category", "language"):
        values = sorted(labelled[0][column].unique())
        if len(values) > 1:
            rows.append((f"by {column}", []))
            rows += [(value, cells_of([frame[frame[column] == value] for frame in labelled])) for value in values]
    return Table("Task accuracy", ["", "pytorch", *(variant.name for variant in evidence.variants)], rows)


def parity(evidence: Evidence) -> Table | None:
    """Return the largest KL divergence of each way of filling the KV cache from a single call."""
    columns: dict[str, dict[tuple[str, str], Cell]] = {variant.name: {} for variant in evidence.variants}
    for variant in evidence.variants:
        for row in variant.parity.itertuples():
            note = "" if row.same_top == 1 else f"top-1 {number('share', row.same_top)}"
            kind = "bad" if row.max_kld > CACHE_TOLERANCE else ""
            columns[variant.name][row.probe, row.way] = Cell(short(row.max_kld), note, kind)
    ways = dict.fromkeys(way for cells in columns.values() for way in cells)
    rows = []
    for probe in sorted({probe for probe, _ in ways}):
        rows.append((f"{probe} probe", []))
        for way in [way for way in ways if way[0] == probe]:
            rows.append((way[1], [cells.get(way, Cell(DASH)) for cells in columns.values()]))
    heads = ["largest KLD, nats", *columns]
    return Table("KV cache filled in other ways than by a single call", heads, rows) if ways else None


def budget(budgets: dict[str, pd.Series]) -> Table:
    """Return the error budgets: mean KL divergence by source for each variant."""
    rows = []
    for source in dict.fromkeys(source for values in budgets.values() for source in values.index):
        values = [values.get(source) for values in budgets.values()]
        rows.append((source, [Cell(number("nats", value), "", "" if value else "muted") for value in values]))
    return Table("Mean KL divergence of each source alone, in nats", ["source", *budgets], rows)


def first_out_of_tolerance(evidence: Evidence) -> Table | None:
    """Return the first tap point of each variant whose local error exceeds its tolerance."""
    rows = []
    for variant in [variant for variant in evidence.variants if variant.layers is not None]:
        bad = out_of_tolerance(variant.layers)
        if bad.empty:
            none = Cell("not measured", "", "muted") if variant.layers.empty else Cell("none", "", "good")
            cells = [none, *[Cell("")] * 4]
        else:
            first = bad.iloc[0]
            errors = [Cell(short(first["local_error"]), "", "bad"), Cell(short(first["tolerance"]))]
            cells = [Cell(first["point"]), Cell(first["operator"]), *errors, Cell(first["detail"] or "")]
        rows.append((variant.name, cells))
    heads = ["variant", "tap point", "operator", "local error", "tolerance", "detail"]
    return Table("First operator that exceeds its tolerance", heads, rows, wraps=True) if rows else None


def speed(benchmark: dict[str, Any]) -> Table:
    """Return medians, half interquartile ranges and ratios to the baseline; `benchmark` is benchmark.json."""
    bundles = benchmark["bundles"]
    measures = [f for f in on_page(SPEED) if any(f.name in bundle["measures"] for bundle in bundles.values())]

    rows = []
    for name, bundle in bundles.items():
        cells = []
        for measure in measures:
            runs = bundle["measures"].get(measure.name)
            ratio = f"× {runs['ratio']:.2f}" if runs and name != benchmark["baseline"] else ""
            cells.append(Cell(console.measured(measure.unit, runs) if runs else DASH, ratio))
        rows.append((name, cells))
    return Table(SPEED, ["bundle", *(measure.measure_head for measure in measures)], rows)


def cache(speedups: pd.DataFrame) -> Table:
    """Return the speed-up of a decoding step by the KV cache, by number of tokens in it."""
    wide = speedups.pivot(index="bundle", columns="length", values="speedup").reindex(speedups["bundle"].unique())
    rows = [(name, [Cell(number("nats", value)) for value in row]) for name, row in wide.iterrows()]
    heads = ["bundle", *(f"{length} tokens" for length in wide.columns)]
    return Table("Speed-up of a decoding step by the KV cache", heads, rows)
