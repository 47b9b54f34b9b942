"""Comparison of two versions of a model, with the files of the `compare` stage: changes.csv and changes.md."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tabulate import tabulate

from hf2mnn.core.errors import Hf2mnnError, suggest
from hf2mnn.core.files import atomic_file
from hf2mnn.core.manifest import Manifest
from hf2mnn.figures import BENCHMARK, COMPARISON, CONSOLE, FIGURES, HIGHER, shown_in
from hf2mnn.metrics import relative_error
from hf2mnn.reference.golden import Golden
from hf2mnn.report.console import HEADS, cell
from hf2mnn.report.evidence import Evidence, VariantEvidence, read_evidence
from hf2mnn.report.table import SUMMARY, read_table

CHANGES, PAGE = "changes.csv", "changes.md"
SETTINGS = ("threads", "prompt_tokens", "answer_tokens", "image_side")
"""Settings of the benchmark that must be equal for its times to be comparable."""
CHANGED = 1e-5
"""Relative error above which a PyTorch activation counts as changed; equal weights on one machine give 0."""
MIN_CHANGE = 0.02
"""Relative change of a speed or memory below which none is reported; memory varies by 0.7 % between runs."""
LOCAL_FACTOR, LOCAL_FLOOR, LOCAL_MIN = 1.5, 1e-6, 1e-4
"""A local error counts as changed if it changes by this factor; errors below the floor are equal, and one of both must
exceed the minimum: smaller errors are rounding."""
SIZES, SPEEDS = ("smaller", "larger"), ("faster", "slower")
WORDS = {"bytes": SIZES, "MB": SIZES, "s": SPEEDS, "tokens/s": SPEEDS}
"""Words for better and for worse by unit; "better" and "worse" for all others."""
Speeds = Sequence[dict[str, Any]]
"""Entry "bundles" of benchmark.json for each version."""
COLUMNS = ["variant", "figure", "before", "after", "change"]
MARKDOWN = {"tablefmt": "github", "disable_numparse": True}


class Versions(NamedTuple):
    """Differences between two versions."""

    before: str  # Folder of one version.
    after: str  # Folder of the other version.
    changes: pd.DataFrame  # Figures that changed beyond their uncertainty, with COLUMNS.
    changed_inputs: list[str]  # Messages about the tools and the checkpoint.
    messages: list[str]  # Messages about the reference, the benchmark and the variants.


def _intervals(variant: VariantEvidence, measures: dict[str, dict[str, float]]) -> dict[str, tuple]:
    """Return value, lower and upper end by figure: 95 % confidence intervals, ranges of the benchmark, exact size."""
    intervals = {row.Index: (row.value, row.low, row.high) for row in variant.group("all").itertuples()}
    intervals["bytes"] = (variant.summary["bytes"],) * 3
    return intervals | {name: (runs["median"], runs["lowest"], runs["highest"]) for name, runs in measures.items()}


def _changed_figures(before: VariantEvidence, after: VariantEvidence, speeds: Speeds) -> list[tuple]:
    """Return figures whose intervals are disjoint; those of the benchmark must also differ by more than MIN_CHANGE.

    With seven interleaved runs each, ranges are disjoint by chance once in 1,716 times, quartiles once in 12.
    """
    measures = [bundles.get(before.name, {}).get("measures", {}) for bundles in speeds]
    old, new = map(_intervals, (before, after), measures)
    rows = []
    for name, figure in FIGURES.items():
        compared = COMPARISON in figure.shown or name == "bytes"
        if not compared or name not in old or name not in new:
            continue
        (a, a_low, a_high), (b, b_low, b_high) = old[name], new[name]
        larger = figure.source != BENCHMARK or abs(b - a) > MIN_CHANGE * a
        if larger and (a_high < b_low or b_high < a_low):
            better, worse = WORDS.get(figure.unit, ("better", "worse"))
            rows.append((before.name, name, a, b, better if (b > a) == (figure.better == HIGHER) else worse))
    return rows


def first_changed_layer(before: Evidence, after: Evidence) -> str:
    """Describe the first tap point at which PyTorch computes other values from the same input."""
    goldens = [Golden(side.reference) for side in (before, after)]
    probes = [{probe.kind: probe for probe in golden.probes()} for golden in goldens]
    tables = (variant.layers for side in (before, after) for variant in side.variants)
    # Only a diagnosis records the order of computation.
    order = next((table for table in tables if table is not None and len(table)), None)
    kinds = sorted(probes[0].keys() & probes[1].keys())
    for kind in kinds:
        a, b = (side[kind] for side in probes)
        images = [map(golden.image, probe.images) for golden, probe in zip(goldens, (a, b), strict=True)]
        same = all(np.array_equal(x.pixel_values, y.pixel_values) for x, y in zip(*images, strict=False))
        if not same or not np.array_equal(a.ids, b.ids):
            return f"layers not compared: the {kind} probes differ"
        for point in a.tap_points if order is None else order[order["probe"] == kind]["point"]:
            one, other = (probe.tap_points.get(point) for probe in (a, b))
            if one is None or other is None or one.shape != other.shape:
                return f"{point} is missing in one version or has another shape"
            error = relative_error(one, other)
            if error > CHANGED and order is None:
                return f"layers changed ({kind} probe); the first is unknown without a diagnosed variant"
            if error > CHANGED:
                return f"first changed layer: {point} ({kind} probe), relative error {error:.2g}"
    return "no layer changed" if kinds else "layers not compared: the versions have no probe in common"


def first_changed_error(before: VariantEvidence, after: VariantEvidence) -> str | None:
    """Describe the first operator whose local error changed; None without two diagnoses."""
    if any(variant.layers is None or variant.layers.empty for variant in (before, after)):
        return None
    errors = [variant.layers.set_index(["probe", "point"])["local_error"] for variant in (before, after)]
    for key in errors[0].index.intersection(errors[1].index, sort=False):
        a, b = (max(side[key], LOCAL_FLOOR) for side in errors)
        if max(a, b) / min(a, b) > LOCAL_FACTOR and max(a, b) > LOCAL_MIN:
            return f"first changed local error: {key[1]}, {a:.2g} to {b:.2g}"
    return "no local error changed"


def changed_fault(before: VariantEvidence, after: VariantEvidence) -> str | None:
    """Describe a bundle that runs in one version only, or in none; such a bundle has no figures to compare."""
    old, new = (variant.summary.get("fault") for variant in (before, after))
    if new:
        return f"does not run{'' if old else ' any more'}: {new}"
    return "runs now" if old else None


def incomparable_speeds(before: Evidence, after: Evidence) -> str | None:
    """Return the reason why two benchmarks are not comparable; None if they are."""
    if before.speed is None or after.speed is None:
        return None
    machines = [evidence.speed.get("machine", {}) for evidence in (before, after)]
    if any(machines[0].get(key) != machines[1].get(key) for key in ("cpu", "cores")):
        return "timed on different machines"
    if any(before.speed.get(key) != after.speed.get(key) for key in SETTINGS):
        return "timed with different settings"
    return None


def read_report(folder: Path, names: list[str] | None = None) -> tuple[Evidence, pd.DataFrame]:
    """Read evidence and summary of results/<model>, of all variants or `names`; raise Hf2mnnError for unknown names."""
    table = read_table(folder / SUMMARY)
    known = [name for name in table["variant"] if name != "pytorch"]
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        hint = suggest(unknown[0], known, listed=True)
        raise Hf2mnnError(f"{folder} has no {', '.join(unknown)}; it has {', '.join(known)}{hint}")
    names = names or known
    kept = table[table["variant"].isin(["pytorch", *names])]
    return read_evidence(str(table["model"].iloc[0]), folder, names), kept


def _tools(evidence: Evidence) -> dict[str, str]:
    """Return the releases of each package that any stage used."""
    tools = defaultdict(set)
    for manifest in evidence.stage_folders().values():
        for package, release in manifest.tools.items():
            tools[package].add(release)
    return {package: " and ".join(sorted(releases)) for package, releases in tools.items()}


def changed_inputs(before: Evidence, after: Evidence) -> list[str]:
    """Describe the tools with different releases, and the files of the checkpoint that differ."""
    old, new = _tools(before), _tools(after)
    shared = sorted(old.keys() & new.keys(), key=str.lower)
    tools = ", ".join(f"{name} {old[name]} to {new[name]}" for name in shared if old[name] != new[name])
    one, other = (side.manifests.get("checkpoint", Manifest("")).outputs for side in (before, after))
    files = ", ".join(name for name in sorted(one | other) if one.get(name) != other.get(name))
    return [f"tools: {tools or 'no change'}", f"checkpoint: {f'changed files: {files}' if files else 'no change'}"]


def compare_versions(before: Evidence, after: Evidence, speeds: Speeds | None = None) -> Versions:
    """Compare the variants of both versions; `speeds` of interleaved runs are more exact than the benchmarks'."""
    reason = incomparable_speeds(before, after) if speeds is None else None
    if speeds is None:
        speeds = [{} if reason else (side.speed or {}).get("bundles", {}) for side in (before, after)]
    variants = [{variant.name: variant for variant in side.variants} for side in (before, after)]
    changes, messages = [], [f"pytorch: {first_changed_layer(before, after)}"]
    messages += [f"speed not compared: {reason}"] if reason else []
    for name in [name for name in variants[0] if name in variants[1]]:
        pair = variants[0][name], variants[1][name]
        changes += _changed_figures(*pair, speeds)
        messages += [f"{name}: {text}" for text in (changed_fault(*pair), first_changed_error(*pair)) if text]
    for side, own, other in ((before, *variants), (after, *variants[::-1])):
        if names := [name for name in own if name not in other]:
            messages.append(f"only in {side.folder}: {', '.join(names)}")
    table, inputs = pd.DataFrame(changes, columns=COLUMNS), changed_inputs(before, after)
    return Versions(str(before.folder), str(after.folder), table, inputs, messages)


def side_by_side(tables: list[pd.DataFrame], speeds: Speeds) -> str:
    """Return a Markdown table of both versions, with changed cells as "before → after", and only interleaved speeds."""
    timed = [figure.name for figure in shown_in(CONSOLE) if figure.source == BENCHMARK]
    before, after = (table.set_index("variant", drop=False).to_dict("index") for table in tables)
    rows = []
    for name in [name for name in before if name in after]:
        texts = []
        for side, bundles in zip((before, after), speeds, strict=True):
            measures = bundles.get(name, {}).get("measures", {})
            row = side[name] | {figure: measures.get(figure, {}).get("median") for figure in timed}
            texts.append([cell(column, row[column]) for column in HEADS])
        rows.append([old if old == new else f"{old} → {new}" for old, new in zip(*texts, strict=True)])
    return tabulate(rows, list(HEADS.values()), **MARKDOWN)


def changes_page(versions: Versions, tables: list[pd.DataFrame], speeds: Speeds) -> str:
    """Return the contents of changes.md."""
    lines = [f"# Changes from {versions.before} to {versions.after}", ""]
    lines += [f"- {message}" for message in versions.changed_inputs]
    lines += ["", side_by_side(tables, speeds), "", "## Changes beyond uncertainty", ""]
    changes = versions.changes.itertuples()
    rows = [(row.variant, row.figure, f"{row.before:.4g}", f"{row.after:.4g}", row.change) for row in changes]
    lines += [tabulate(rows, COLUMNS, **MARKDOWN) if rows else "None.", ""]
    lines += [f"- {message}" for message in versions.messages]
    return "\n".join(lines) + "\n"


def write_changes(folder: Path, versions: Versions, tables: list[pd.DataFrame], speeds: Speeds) -> None:
    """Write changes.csv and changes.md from the summaries of both versions and the speeds of interleaved runs."""
    with atomic_file(folder / CHANGES) as path:
        versions.changes.to_csv(path, index=False)
    with atomic_file(folder / PAGE) as path:
        path.write_text(changes_page(versions, tables, speeds), encoding="utf-8")
