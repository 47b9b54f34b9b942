"""The report's tables, as cells that the page writes down."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from hf2mnn.evaluation.findings import out_of_tolerance
from hf2mnn.report.console import HEADS, cell
from hf2mnn.report.evidence import Evidence, Row
from hf2mnn.report.plots import short
from hf2mnn.report.speed import HEADS as SPEED_HEADS
from hf2mnn.report.speed import shown

DASH = "–"
# name: (label, kind of number, what it is and what is good)
DIVERGENCE = {
    "mean_kld": ("mean KLD", "nats", "how far the conversion's choice of words is from PyTorch's; 0 is equal"),
    "median_kld": ("median KLD", "nats", "half of the positions are closer than this"),
    "p99_kld": ("99 % KLD", "nats", "one position in a hundred is further off"),
    "max_kld": ("largest KLD", "nats", "the worst position of all"),
    "top1_agreement": ("top-1", "share", "positions at which the first choice is PyTorch's; 100 % is best"),
    "top5_overlap": ("top-5 overlap", "share", "how many of PyTorch's five likeliest tokens are among the five"),
}
VALUES = {
    "rms_probability_change": ("RMS Δp", "share", "typical change of the right token's probability; 0 is best"),
    "perplexity_ratio": ("perplexity ratio", "ratio", "perplexity over PyTorch's, on PyTorch's answers; 1 is equal"),
    "logprob_correlation": ("correlation", "near one", "of log-probabilities with PyTorch's; 1 is best"),
    "vision_cosine": ("vision cosine", "near one", "of image embeddings with PyTorch's; 1 is equal"),
    "vision_error": ("vision error", "nats", "size of the error of image embeddings over theirs; 0 is equal"),
    "tokenizer_match": ("tokenizer match", "share", "prompts of which the bundle's tokenizer makes the same ids"),
    "template_match": ("template match", "share", "conversations of which the engine makes the same prompt"),
}
ANSWERS = {
    "greedy_match": ("greedy match", "share", "whole answers that are PyTorch's, token for token"),
    "common_prefix": ("common prefix", "share", "how much of an answer is PyTorch's before the first other token"),
    "degenerate": ("degenerate", "share", "answers that end in a loop where PyTorch's do not; 0 is best"),
    "task_accuracy": ("task accuracy", "share", "labelled questions that are answered rightly"),
    "as_called_match": ("as called: match", "share", "answers of a plain call of the engine that are PyTorch's"),
    "as_called_accuracy": ("as called: accuracy", "share", "task accuracy of a plain call of the engine"),
}
FIGURES = DIVERGENCE | VALUES | ANSWERS
GROUPS = {
    "How close the predictions are": DIVERGENCE,
    "Probabilities, images, tokens": VALUES,
    "Answers": ANSWERS,
}
PARTS = {"mean_kld": "mean KLD", "top1_agreement": "top-1", "greedy_match": "greedy match"}


@dataclass(frozen=True)
class Cell:
    """kind: good, bad or muted."""

    text: str
    note: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """`rows` are a head and its cells; a row of no cells is a head of those below it. `wraps` lets text wrap."""

    caption: str
    heads: list[str]
    rows: list[tuple[str, list[Cell]]] = field(default_factory=list)
    wraps: bool = False


def number(kind: str, value: float | None) -> str:
    if value is None or pd.isna(value):
        return DASH
    if kind == "share":
        return f"{100 * value:.1f} %" if not 0 < value < 0.001 else f"{100 * value:.1g} %"
    return {"ratio": f"{value:.4f}", "near one": f"{value:.5f}"}.get(kind, short(float(value)))


def comparison(table: pd.DataFrame) -> Table:
    """The main table, as `hf2mnn table` prints it."""
    heads = {column: head for column, head in HEADS.items() if column in table}
    kinds = {"pass": "good", "FAIL": "bad", "reference": "muted"}
    rows = []
    for row in table.to_dict("records"):
        first, *others = heads
        cells = [
            Cell(cell(column, row[column]).replace("-", DASH, cell(column, row[column]) == "-")) for column in others
        ]
        if "verdict" in heads:
            cells[others.index("verdict")] = Cell(row["verdict"], "", kinds.get(row["verdict"], ""))
        rows.append((str(row[first]), cells))
    return Table("Every conversion against PyTorch in float32", list(heads.values()), rows)


def _group(row: Row, group: str) -> pd.DataFrame:
    return row.figures[row.figures["group"] == group].set_index("figure")


def _with_interval(figures: pd.DataFrame, name: str, kind: str) -> Cell:
    if name not in figures.index:
        return Cell(DASH)
    value, low, high = figures.loc[name, ["value", "low", "high"]]
    told, *ends = (number(kind, number_) for number_ in (value, low, high))
    return Cell(told, "" if DASH in ends or {told} == set(ends) else " … ".join(ends).replace(" %", "", 1))


def figures(evidence: Evidence) -> list[Table]:
    """Each figure of each conversion with its 95 % interval."""
    wholes = {row.name: _group(row, "all") for row in evidence.rows}
    made = []
    for caption, told in GROUPS.items():
        names = [name for name in told if any(name in whole.index for whole in wholes.values())]
        rows = [
            (variant, [_with_interval(whole, name, told[name][1]) for name in names])
            for variant, whole in wholes.items()
        ]
        made.append(Table(f"{caption}, with 95 % intervals", ["variant", *(told[name][0] for name in names)], rows))
    return made if wholes else []


def parts(evidence: Evidence) -> Table | None:
    """Text and what follows an image, apart."""
    groups = [group for group in ("text", "after an image") if any(len(_group(row, group)) for row in evidence.rows)]
    if len(groups) < 2:
        return None
    rows = [
        (row.name, [_with_interval(_group(row, group), name, FIGURES[name][1]) for name in PARTS for group in groups])
        for row in evidence.rows
    ]
    heads = [f"{label}, {group}" for label in PARTS.values() for group in groups]
    return Table("Text, and text after an image, with 95 % intervals", ["variant", *heads], rows)


def accuracy(evidence: Evidence) -> Table | None:
    """Task accuracy by category and by language, PyTorch's first."""
    labelled = [row.answers[row.answers["score"].notna()] for row in evidence.rows]
    if not labelled or labelled[0].empty:
        return None

    def line(chosen: dict[str, Any]) -> list[Cell]:
        picked = [frame[(frame[list(chosen)] == pd.Series(chosen)).all(axis=1)] for frame in labelled]
        right = float(picked[0]["reference_score"].mean())
        cells = [Cell(number("share", right), f"of {len(picked[0])}")]
        for frame in picked:
            mean = float(frame["score"].mean())
            kind = "" if abs(mean - right) < 1e-9 else "good" if mean > right else "bad"
            cells.append(Cell(number("share", mean), "", kind))
        return cells

    rows = [("all", line({}))]
    for column in ("category", "language"):
        values = sorted(labelled[0][column].unique())
        if len(values) > 1:
            rows.append((f"by {column}", []))
            rows += [(value, line({column: value})) for value in values]
    return Table("Task accuracy", ["", "pytorch", *(row.name for row in evidence.rows)], rows)


def parity(evidence: Evidence, tolerance: float) -> Table | None:
    """Largest KL divergence between two ways of filling the KV cache."""
    tables = [row.parity.set_index(["probe", "way"]) for row in evidence.rows]
    ways = list(dict.fromkeys(way for table in tables for way in table.index))
    if not ways:
        return None
    rows, probe = [], None
    for way in sorted(ways, key=lambda way: way[0]):
        if way[0] != probe:
            probe = way[0]
            rows.append((f"{probe} probe", []))
        cells = []
        for table in tables:
            if way not in table.index:
                cells.append(Cell(DASH))
                continue
            found = table.loc[way]
            note = "" if found["same_top"] == 1 else f"top-1 {number('share', found['same_top'])}"
            cells.append(Cell(short(found["max_kld"]), note, "bad" if found["max_kld"] > tolerance else ""))
        rows.append((way[1], cells))
    heads = ["largest KLD, nats", *(row.name for row in evidence.rows)]
    return Table("The same text, put into the KV cache in another way than at once", heads, rows)


def budget(budgets: dict[str, pd.Series]) -> Table:
    """The error budget in numbers."""
    sources = list(dict.fromkeys(source for found in budgets.values() for source in found.index))
    rows = [
        (
            source,
            [
                Cell(number("nats", found.get(source)), "", "" if found.get(source) else "muted")
                for found in budgets.values()
            ],
        )
        for source in sources
    ]
    return Table("Mean KL divergence that each source brings alone, in nats", ["source", *budgets], rows)


def strays(evidence: Evidence) -> Table | None:
    """The first point of each conversion that leaves its tolerance."""
    rows = []
    for row in evidence.rows:
        if row.layers is None:
            continue
        bad = out_of_tolerance(row.layers)
        if row.layers.empty:
            rows.append((row.name, [Cell("not measured", "", "muted"), *[Cell("")] * 4]))
        elif bad.empty:
            rows.append((row.name, [Cell("none", "", "good"), *[Cell("")] * 4]))
        else:
            first = bad.iloc[0]
            error = [Cell(short(first["mnn_local"]), "", "bad"), Cell(short(first["tolerance"]))]
            rows.append((row.name, [Cell(first["point"]), Cell(first["operator"]), *error, Cell(first["looks"] or "")]))
    heads = ["variant", "point", "operator", "local error", "tolerance", "looks like"]
    return Table("First point that leaves its tolerance", heads, rows, wraps=True) if rows else None


def speed(measured: dict[str, Any]) -> Table:
    """Medians, half the distance of the quartiles, and the ratio to the baseline."""
    names = [measure for measure in SPEED_HEADS if any(measure in b["measures"] for b in measured["bundles"].values())]
    rows = []
    for name, bundle in measured["bundles"].items():
        cells = []
        for measure in names:
            found = bundle["measures"].get(measure)
            if found is None:
                cells.append(Cell(DASH))
                continue
            spread = (found["third_quartile"] - found["first_quartile"]) / 2
            ratio = "" if name == measured["baseline"] else f"× {found['ratio']:.2f}"
            cells.append(Cell(shown(measure, found["median"], spread), ratio))
        rows.append((name, cells))
    return Table("Times and memory", ["bundle", *(SPEED_HEADS[measure] for measure in names)], rows)


def cache(worth: pd.DataFrame) -> Table:
    """Times that a step is faster with the KV cache than without."""
    wide = worth.pivot(index="bundle", columns="length", values="worth").reindex(dict.fromkeys(worth["bundle"]))
    rows = [
        (name, [Cell(number("nats", value)) for value in values])
        for name, values in zip(wide.index, wide.to_numpy(), strict=True)
    ]
    heads = ["bundle", *(f"{length} tokens" for length in wide.columns)]
    return Table("Times that a step is faster with the KV cache", heads, rows)
