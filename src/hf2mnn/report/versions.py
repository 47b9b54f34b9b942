"""Two versions of a model side by side: what got better, worse or slower, and where the first layer changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hf2mnn.core.errors import Hf2mnnError
from hf2mnn.core.manifest import Manifest
from hf2mnn.metrics import relative_error
from hf2mnn.reference.golden import Golden
from hf2mnn.report.evidence import Evidence, Row, read_evidence
from hf2mnn.report.table import SUMMARY, read_table

LESS_IS_BETTER = ("mean_kld", "median_kld", "p99_kld", "rms_probability_change", "degenerate", "vision_error")
MORE_IS_BETTER = ("top1_agreement", "top5_overlap", "greedy_match", "task_accuracy", "as_called_accuracy")
MORE_IS_BETTER += ("vision_cosine", "tokenizer_match", "template_match")
SPEEDS = {"load_s": False, "first_token_s": False, "prefill_tokens_per_s": True, "decode_tokens_per_s": True}
SPEEDS |= {"vision_s": False, "bundle_mb": False}
"""Measures of speed, and whether more is better."""
SETTINGS = ("threads", "prompt_tokens", "answer_tokens", "image_side")
"""Of `hf2mnn.evaluation.benchmark`; times under others say nothing of each other."""
CHANGED = 1e-5
"""Relative error above which a layer of PyTorch's has changed; the same weights on the same machine give 0."""
SMALLEST = 0.02
"""Share of a measure of speed below which no change is told; memory of one bundle differs by 0.7 % from run to run."""
Speeds = Sequence[dict[str, Any]]
"""For each version, "bundles" of a benchmark.json."""
COLUMNS = ["variant", "figure", "one", "other", "change"]


@dataclass(frozen=True)
class Versions:
    """changes: a table with COLUMNS, of what changed beyond its uncertainty; first_changed: a sentence each for the
    reference and for every variant that both have; made_of: a sentence each for what was put in, tools and checkpoint.
    """

    one: str
    other: str
    changes: pd.DataFrame
    first_changed: list[str]
    only: dict[str, list[str]]
    made_of: list[str]


def _verdict(one: float, other: float, more: bool) -> str:
    return "better" if (other > one) == more else "worse"


def _changed_figures(one: Row, other: Row) -> list[tuple]:
    """Figures whose 95 % intervals do not meet."""
    rows = []
    tables = [row.figures[row.figures["group"] == "all"].set_index("figure") for row in (one, other)]
    for figure in [*LESS_IS_BETTER, *MORE_IS_BETTER]:
        if not all(figure in table.index for table in tables):
            continue
        a, b = (table.loc[figure] for table in tables)
        if a["high"] < b["low"] or b["high"] < a["low"]:
            change = _verdict(a["value"], b["value"], figure in MORE_IS_BETTER)
            rows.append((one.name, figure, a["value"], b["value"], change))
    sizes = one.summary["bytes"], other.summary["bytes"]
    if sizes[0] != sizes[1]:
        rows.append((one.name, "bytes", *sizes, "smaller" if sizes[1] < sizes[0] else "larger"))
    return rows


def _changed_speed(speeds: Speeds, name: str) -> list[tuple]:
    """Measures whose ranges do not meet, and whose medians differ by more than SMALLEST. Of seven runs in turns, chance
    alone parts the ranges once in 1,716 times, and quartiles once in 12.
    """
    both, rows = [side.get(name, {}).get("measures", {}) for side in speeds], []
    for measure, more in SPEEDS.items():
        if not all(measure in measures for measures in both):
            continue
        a, b = (measures[measure] for measures in both)
        if abs(b["median"] - a["median"]) <= SMALLEST * a["median"]:
            continue
        if a["highest"] < b["lowest"] or b["highest"] < a["lowest"]:
            better = _verdict(a["median"], b["median"], more) == "better"
            kind = ("smaller", "larger") if measure == "bundle_mb" else ("faster", "slower")
            rows.append((name, measure, a["median"], b["median"], kind[0] if better else kind[1]))
    return rows


def first_changed_point(one: Evidence, other: Evidence) -> str:
    """Where PyTorch itself computes something else in the two versions, on the same input."""
    goldens = [Golden(evidence.reference) for evidence in (one, other)]
    probes = [{probe.kind: probe for probe in golden.probes()} for golden in goldens]
    tables = (row.layers for evidence in (one, other) for row in evidence.rows)
    order = next((table for table in tables if table is not None and len(table)), None)
    kinds = sorted(probes[0].keys() & probes[1].keys())
    if not kinds:
        return "no probe is in both, so their layers cannot be laid side by side"
    for kind in kinds:
        a, b = probes[0][kind], probes[1][kind]
        pixels = [
            [golden.image(name).pixel_values for name in probe.images]
            for golden, probe in zip(goldens, (a, b), strict=True)
        ]
        if not np.array_equal(a.ids, b.ids) or not all(map(np.array_equal, *pixels)):
            return f"the {kind} probe is not the same in both, so their layers cannot be laid side by side"
        points = list(a.points) if order is None else list(order[order["probe"] == kind]["point"])
        for point in points:
            if point not in b.points or a.points[point].shape != b.points[point].shape:
                return f"{point} is not in both, or has another shape"
            error = relative_error(a.points[point], b.points[point])
            if error > CHANGED and order is None:
                return f"layers changed ({kind} probe); only a variant that was diagnosed tells which is the first"
            if error > CHANGED:
                return f"{point} is the first that changed ({kind} probe): by {error:.2g} of its size"
    return "every layer is the same"


def first_changed_error(one: Row, other: Row, factor: float = 1.5) -> str | None:
    """Where the error that a variant's own operator makes first differs by more than `factor`."""
    if any(row.layers is None or row.layers.empty for row in (one, other)):
        return None
    tables = [row.layers.set_index(["probe", "point"])["mnn_local"] for row in (one, other)]
    for key in tables[0].index:
        if key not in tables[1].index:
            continue
        a, b = max(tables[0][key], 1e-6), max(tables[1][key], 1e-6)
        if max(a, b) / min(a, b) > factor and max(a, b) > 1e-4:
            return f"{key[1]} is the first whose own error changed: {a:.2g} to {b:.2g}"
    return "no layer's own error changed"


def changed_fault(one: Row, other: Row) -> str | None:
    """Whether a bundle runs: one that does not has no figures that could get worse."""
    before, after = (row.summary.get("fault") for row in (one, other))
    if after:
        return f"does not run{'' if before else ' any more'}: {after}"
    return "runs now" if before else None


def timed_apart(one: Evidence, other: Evidence) -> str | None:
    """What differs between two timings beside the bundles."""
    if one.speed is None or other.speed is None:
        return None
    machines = [evidence.speed.get("machine", {}) for evidence in (one, other)]
    if any(machines[0].get(key) != machines[1].get(key) for key in ("cpu", "cores")):
        return "timed on another machine"
    if any(one.speed.get(key) != other.speed.get(key) for key in SETTINGS):
        return "timed with other settings"
    return None


def read_report(folder: Path, names: list[str] | None = None) -> tuple[Evidence, pd.DataFrame]:
    """The evidence and the summary of a finished model's folder; only the rows `names` where they are given.

    Raises:
        Hf2mnnError: there is no such folder, or no such row in it.
        ManifestError: a stage's files are not what its manifest says.
    """
    table = read_table(folder / SUMMARY)
    rows = [name for name in table["variant"] if name != "pytorch"]
    unknown = [name for name in names or [] if name not in rows]
    if unknown:
        raise Hf2mnnError(f"{folder} has no {', '.join(unknown)}; it has {', '.join(rows)}")
    kept = table[table["variant"].isin(["pytorch", *(names or rows)])]
    return read_evidence(str(table["model"].iloc[0]), folder, names or rows), kept


def _tools(evidence: Evidence) -> dict[str, str]:
    """Releases by package, of all stages; what two stages were made by in two releases has both."""
    found: dict[str, dict[str, None]] = {}
    manifests = [*evidence.manifests.values(), *(made for row in evidence.rows for made in row.manifests.values())]
    for manifest in manifests:
        for package, release in manifest.tools.items():
            found.setdefault(package, {})[release] = None
    return {package: " and ".join(sorted(releases)) for package, releases in found.items()}


def _files(evidence: Evidence) -> dict[str, str]:
    """sha256 of each file of the checkpoint."""
    return {name: entry["sha256"] for name, entry in evidence.manifests.get("checkpoint", Manifest("")).outputs.items()}


def changed_inputs(one: Evidence, other: Evidence) -> list[str]:
    """What the two were made of: releases of the tools that differ, and files of the checkpoint."""
    tools, files = [_tools(evidence) for evidence in (one, other)], [_files(evidence) for evidence in (one, other)]
    shared = sorted(tools[0].keys() & tools[1].keys(), key=str.lower)
    said = [f"{name} {tools[0][name]} to {tools[1][name]}" for name in shared if tools[0][name] != tools[1][name]]
    changed = sorted(name for name in files[0].keys() | files[1].keys() if files[0].get(name) != files[1].get(name))
    return [
        f"tools: {', '.join(said) or 'the same'}",
        f"checkpoint: {'other files: ' + ', '.join(changed) if changed else 'the same'}",
    ]


def compare_versions(one: Evidence, other: Evidence, speeds: Speeds | None = None) -> Versions:
    """Compare the conversions that both have by name. `speeds` are those of both versions timed against each other;
    without them the times of two runs are taken, which are worth less: machines are not always equally busy.
    """
    apart = timed_apart(one, other) if speeds is None else None
    if speeds is None:
        speeds = [{} if apart else (evidence.speed or {}).get("bundles", {}) for evidence in (one, other)]
    rows = [{row.name: row for row in evidence.rows} for evidence in (one, other)]
    changes, sentences = [], [f"pytorch: {first_changed_point(one, other)}"]
    sentences += [f"speed: {apart}, so not compared"] if apart else []
    for name in [name for name in rows[0] if name in rows[1]]:
        if sentence := changed_fault(rows[0][name], rows[1][name]):
            sentences.append(f"{name}: {sentence}")
        changes += _changed_figures(rows[0][name], rows[1][name]) + _changed_speed(speeds, name)
        if sentence := first_changed_error(rows[0][name], rows[1][name]):
            sentences.append(f"{name}: {sentence}")
    only = {
        str(evidence.folder): [name for name in mine if name not in theirs]
        for evidence, mine, theirs in ((one, *rows), (other, *rows[::-1]))
    }
    frame = pd.DataFrame(changes, columns=COLUMNS)
    return Versions(str(one.folder), str(other.folder), frame, sentences, only, changed_inputs(one, other))
