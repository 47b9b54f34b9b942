"""Tables of the page as cells of text, which the templates render."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from hf2mnn.evaluation.findings import out_of_tolerance
from hf2mnn.figures import FIGURES, GREEDY, PREDICTIONS, PROBABILITIES, SPEED, UNITS, Figure, on_page, short
from hf2mnn.report.console import HEADS, cell, shown
from hf2mnn.report.evidence import Evidence

DASH = "–"
BY_GROUP = ("mean_kld", "top1_agreement", "greedy_match")
"""Figures that are shown for text and for text after an image separately."""


@dataclass(frozen=True)
class Cell:
    """Cell of a table, with small text below it."""

    text: str
    note: str = ""
    kind: str = ""  # CSS class: "good", "bad", "muted" or "".


@dataclass(frozen=True)
class Table:
    """A table: head and cells of each row; a row without cells is a heading of the rows below it."""

    caption: str
    heads: list[str]
    rows: list[tuple[str, list[Cell]]]
    wraps: bool = False


def number(unit: str, value: float | None) -> str:
    """Format a value of a unit of `hf2mnn.figures`; a dash where it is missing."""
    return DASH if value is None or pd.isna(value) else UNITS[unit].format(float(value))


def comparison(table: pd.DataFrame) -> Table:
    """Return the summary with the columns of `hf2mnn table`."""
    first, *others = [column for column in HEADS if column in table]
    kinds = {"pass": "good", "FAIL": "bad", "reference": "muted"}
    rows = []
    for row in table.to_dict("records"):
        texts = [cell(column, row[column]) for column in others]
        cells = [Cell(DASH if text == "-" else text, "", kinds.get(text, "")) for text in texts]
        rows.append((str(row[first]), cells))
    return Table("Variants compared with PyTorch in float32", [HEADS[column] for column in (first, *others)], rows)


def _with_interval(figures: pd.DataFrame, figure: Figure) -> Cell:
    if figure.name not in figures.index:
        return Cell(DASH)
    text, *ends = (number(figure.unit, value) for value in figures.loc[figure.name, ["value", "low", "high"]])
    return Cell(text, "" if DASH in ends or {text} == set(ends) else " … ".join(ends).replace(" %", "", 1))


def figures(evidence: Evidence) -> list[Table]:
    """Return the figures of each variant with their 95 % confidence intervals."""
    values = {variant.name: variant.whole_set() for variant in evidence.variants}
    tables = []
    for caption in (PREDICTIONS, PROBABILITIES, GREEDY):
        measured = [f for f in on_page(caption) if any(f.name in frame.index for frame in values.values())]
        rows = [(name, [_with_interval(frame, figure) for figure in measured]) for name, frame in values.items()]
        heads = ["variant", *(figure.label for figure in measured)]
        tables.append(Table(f"{caption}, with 95 % confidence intervals", heads, rows))
    return tables if values else []


def parts(evidence: Evidence) -> Table | None:
    """Return the figures of BY_GROUP for text prompts and for prompts with images separately."""
    groups = ("text", "after an image")
    groups = [group for group in groups if any(len(variant.group(group)) for variant in evidence.variants)]
    if len(groups) < 2:
        return None
    rows = [
        (v.name, [_with_interval(v.group(group), FIGURES[name]) for name in BY_GROUP for group in groups])
        for v in evidence.variants
    ]
    heads = [f"{FIGURES[name].label}, {group}" for name in BY_GROUP for group in groups]
    return Table("Text, and text after an image, with 95 % confidence intervals", ["variant", *heads], rows)


def accuracy(evidence: Evidence) -> Table | None:
    """Return task accuracy by category and by language, PyTorch's first."""
    labelled = [variant.answers[variant.answers["score"].notna()] for variant in evidence.variants]
    if not labelled or labelled[0].empty:
        return None

    def cells_of(selection: dict[str, Any]) -> list[Cell]:
        frames = [frame[(frame[list(selection)] == pd.Series(selection)).all(axis=1)] for frame in labelled]
        reference = float(frames[0]["reference_score"].mean())
        cells = [Cell(number("share", reference), f"of {len(frames[0])}")]
        for frame in frames:
            mean = float(frame["score"].mean())
            kind = "" if abs(mean - reference) < 1e-9 else "good" if mean > reference else "bad"
            cells.append(Cell(number("share", mean), "", kind))
        return cells

    rows = [("all", cells_of({}))]
    for column in ("category", "language"):
        values = sorted(labelled[0][column].unique())
        if len(values) > 1:
            rows.append((f"by {column}", []))
            rows += [(value, cells_of({column: value})) for value in values]
    return Table("Task accuracy", ["", "pytorch", *(variant.name for variant in evidence.variants)], rows)


def parity(evidence: Evidence, tolerance: float) -> Table | None:
    """Return the largest KL divergence of each way of filling the KV cache from a single call."""
    tables = [variant.parity.set_index(["probe", "way"]) for variant in evidence.variants]
    ways = list(dict.fromkeys(way for table in tables for way in table.index))
    if not ways:
        return None

    def cell_of(table: pd.DataFrame, way: tuple[str, str]) -> Cell:
        if way not in table.index:
            return Cell(DASH)
        same_top, max_kld = table.loc[way, ["same_top", "max_kld"]]
        note = "" if same_top == 1 else f"top-1 {number('share', same_top)}"
        return Cell(short(max_kld), note, "bad" if max_kld > tolerance else "")

    rows = []
    for probe in sorted({probe for probe, _ in ways}):
        rows.append((f"{probe} probe", []))
        rows += [(way[1], [cell_of(table, way) for table in tables]) for way in ways if way[0] == probe]
    heads = ["largest KLD, nats", *(variant.name for variant in evidence.variants)]
    return Table("KV cache filled in other ways than by a single call", heads, rows)


def budget(budgets: dict[str, pd.Series]) -> Table:
    """Return the error budgets: mean KL divergence by source for each variant."""
    rows = []
    for source in dict.fromkeys(source for values in budgets.values() for source in values.index):
        values = [values.get(source) for values in budgets.values()]
        rows.append((source, [Cell(number("nats", value), "", "" if value else "muted") for value in values]))
    return Table("Mean KL divergence of each source alone, in nats", ["source", *budgets], rows)


def first_out_of_tolerance(evidence: Evidence) -> Table | None:
    """Return the first tap point of each variant whose local error exceeds its tolerance."""
    rows, columns = [], ["point", "operator", "local_error", "tolerance", "detail"]
    for variant in evidence.variants:
        if variant.layers is None:
            continue
        bad = out_of_tolerance(variant.layers)
        if bad.empty:
            none = Cell("not measured", "", "muted") if variant.layers.empty else Cell("none", "", "good")
            rows.append((variant.name, [none, *[Cell("")] * 4]))
        else:
            point, operator, error, tolerance, detail = bad.iloc[0][columns]
            error = Cell(short(error), "", "bad")
            rows.append(
                (variant.name, [Cell(point), Cell(operator), error, Cell(short(tolerance)), Cell(detail or "")])
            )
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
            if (values := bundle["measures"].get(measure.name)) is None:
                cells.append(Cell(DASH))
                continue
            spread = (values["third_quartile"] - values["first_quartile"]) / 2
            ratio = "" if name == benchmark["baseline"] else f"× {values['ratio']:.2f}"
            cells.append(Cell(shown(measure.unit, values["median"], spread), ratio))
        rows.append((name, cells))
    return Table(SPEED, ["bundle", *(measure.measure_head for measure in measures)], rows)


def cache(speedups: pd.DataFrame) -> Table:
    """Return the speed-up of a decoding step by the KV cache, by number of tokens in it."""
    wide = speedups.pivot(index="bundle", columns="length", values="speedup")
    wide = wide.reindex(dict.fromkeys(speedups["bundle"])).map(lambda value: Cell(number("nats", value)))
    rows = [(name, list(row)) for name, row in wide.iterrows()]
    heads = ["bundle", *(f"{length} tokens" for length in wide.columns)]
    return Table("Speed-up of a decoding step by the KV cache", heads, rows)
