"""Comparison of two versions of a model, with the files of the `compare` stage: changes.csv and changes.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tabulate import tabulate

from hf2mnn.core.errors import Hf2mnnError, suggest
from hf2mnn.core.files import atomic_file
from hf2mnn.core.manifest import Manifest
from hf2mnn.figures import BENCHMARK, COMPARISON, CONSOLE, HIGHER, Figure, shown_in
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
Speeds = Sequence[dict[str, Any]]
"""Entry "bundles" of benchmark.json for each version."""
COLUMNS = ["variant", "figure", "before", "after", "change"]


@dataclass(frozen=True)
class Versions:
    """Differences between two versions."""

    before: str  # Folder of one version.
    after: str  # Folder of the other version.
    changes: pd.DataFrame  # Figures that changed beyond their uncertainty, with COLUMNS.
    changed_inputs: list[str]  # Messages about the tools and the checkpoint.
    messages: list[str]  # Messages about the reference, the benchmark and the variants.
    only: dict[str, list[str]]  # Variants that only one version has, by folder.

    def only_in(self) -> list[str]:
        """Describe the variants that only one version has."""
        return [f"only in {folder}: {', '.join(names)}" for folder, names in self.only.items() if names]


def _verdict(figure: Figure, before: float, after: float) -> str:
    return "better" if (after > before) == (figure.better == HIGHER) else "worse"


def _changed_figures(before: VariantEvidence, after: VariantEvidence) -> list[tuple]:
    """Return figures whose 95 % confidence intervals are disjoint, and the size of the bundle if it changed."""
    rows, tables = [], (before.whole_set(), after.whole_set())
    for figure in shown_in(COMPARISON):
        if all(figure.name in table.index for table in tables):
            a, b = (table.loc[figure.name] for table in tables)
            if a["high"] < b["low"] or b["high"] < a["low"]:
                change = _verdict(figure, a["value"], b["value"])
                rows.append((before.name, figure.name, a["value"], b["value"], change))
    sizes = before.summary["bytes"], after.summary["bytes"]
    if sizes[0] != sizes[1]:
        rows.append((before.name, "bytes", *sizes, "smaller" if sizes[1] < sizes[0] else "larger"))
    return rows


def _changed_speed(speeds: Speeds, name: str) -> list[tuple]:
    """Return measures of the benchmark whose ranges are disjoint and whose medians differ by more than MIN_CHANGE.

    With seven interleaved runs each, ranges are disjoint by chance once in 1,716 times, quartiles once in 12.
    """
    both, rows = [side.get(name, {}).get("measures", {}) for side in speeds], []
    for figure in shown_in(COMPARISON):
        if figure.source != BENCHMARK or not all(figure.name in measures for measures in both):
            continue
        a, b = (measures[figure.name] for measures in both)
        larger = abs(b["median"] - a["median"]) > MIN_CHANGE * a["median"]
        if larger and (a["highest"] < b["lowest"] or b["highest"] < a["lowest"]):
            better = _verdict(figure, a["median"], b["median"]) == "better"
            words = ("smaller", "larger") if figure.unit == "MB" else ("faster", "slower")
            rows.append((name, figure.name, a["median"], b["median"], words[0] if better else words[1]))
    return rows


def first_changed_layer(before: Evidence, after: Evidence) -> str:
    """Describe the first tap point at which PyTorch computes other values from the same input."""
    goldens = [Golden(evidence.reference) for evidence in (before, after)]
    probes = [{probe.kind: probe for probe in golden.probes()} for golden in goldens]
    tables = (variant.layers for evidence in (before, after) for variant in evidence.variants)
    # Only a diagnosis records the order of computation.
    order = next((table for table in tables if table is not None and len(table)), None)
    kinds = sorted(probes[0].keys() & probes[1].keys())
    if not kinds:
        return "layers not compared: the versions have no probe in common"
    for kind in kinds:
        a, b = probes[0][kind], probes[1][kind]
        pixels = [
            [golden.image(name).pixel_values for name in probe.images]
            for golden, probe in zip(goldens, (a, b), strict=True)
        ]
        if not np.array_equal(a.ids, b.ids) or not all(map(np.array_equal, *pixels)):
            return f"layers not compared: the {kind} probes differ"
        points = list(a.tap_points) if order is None else list(order[order["probe"] == kind]["point"])
        for point in points:
            if point not in b.tap_points or a.tap_points[point].shape != b.tap_points[point].shape:
                return f"{point} is missing in one version or has another shape"
            error = relative_error(a.tap_points[point], b.tap_points[point])
            if error > CHANGED and order is None:
                return f"layers changed ({kind} probe); the first is unknown without a diagnosed variant"
            if error > CHANGED:
                return f"first changed layer: {point} ({kind} probe), relative error {error:.2g}"
    return "no layer changed"


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
    """Read the evidence and the summary of results/<model>, of all variants or of those with `names`.

    Raises:
        Hf2mnnError: There is no such folder or variant.
        ManifestError: Files of a stage differ from its manifest.
    """
    table = read_table(folder / SUMMARY)
    known = [name for name in table["variant"] if name != "pytorch"]
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise Hf2mnnError(
            f"{folder} has no {', '.join(unknown)}; it has {', '.join(known)}{suggest(unknown[0], known, listed=True)}"
        )
    names = names or known
    kept = table[table["variant"].isin(["pytorch", *names])]
    return read_evidence(str(table["model"].iloc[0]), folder, names), kept


def _tools(evidence: Evidence) -> dict[str, str]:
    """Return the releases of each package that any stage used."""
    tools: dict[str, set[str]] = {}
    manifests = [*evidence.manifests.values(), *(m for v in evidence.variants for m in v.manifests.values())]
    for package, release in (tool for manifest in manifests for tool in manifest.tools.items()):
        tools.setdefault(package, set()).add(release)
    return {package: " and ".join(sorted(releases)) for package, releases in tools.items()}


def changed_inputs(before: Evidence, after: Evidence) -> list[str]:
    """Describe the tools with different releases, and the files of the checkpoint that differ."""
    old, new = _tools(before), _tools(after)
    shared = sorted(old.keys() & new.keys(), key=str.lower)
    updated = [f"{name} {old[name]} to {new[name]}" for name in shared if old[name] != new[name]]
    checkpoints = [side.manifests.get("checkpoint", Manifest("")).outputs for side in (before, after)]
    files = [{(name, entry["sha256"]) for name, entry in outputs.items()} for outputs in checkpoints]
    changed = sorted({name for name, _ in files[0] ^ files[1]})
    return [
        f"tools: {', '.join(updated) or 'no change'}",
        f"checkpoint: {'changed files: ' + ', '.join(changed) if changed else 'no change'}",
    ]


def compare_versions(before: Evidence, after: Evidence, speeds: Speeds | None = None) -> Versions:
    """Compare the variants that both versions have.

    `speeds` are timed in interleaved runs; None for those of the two benchmarks, which are less precise because the
    load of a machine changes.
    """
    reason = incomparable_speeds(before, after) if speeds is None else None
    if speeds is None:
        speeds = [{} if reason else (side.speed or {}).get("bundles", {}) for side in (before, after)]
    variants = [{variant.name: variant for variant in side.variants} for side in (before, after)]
    changes, messages = [], [f"pytorch: {first_changed_layer(before, after)}"]
    messages += [f"speed not compared: {reason}"] if reason else []
    for name in [name for name in variants[0] if name in variants[1]]:
        pair = variants[0][name], variants[1][name]
        changes += _changed_figures(*pair) + _changed_speed(speeds, name)
        messages += [f"{name}: {text}" for text in (changed_fault(*pair), first_changed_error(*pair)) if text]
    only = {
        str(side.folder): [name for name in own if name not in other]
        for side, own, other in ((before, *variants), (after, *variants[::-1]))
    }
    table, inputs = pd.DataFrame(changes, columns=COLUMNS), changed_inputs(before, after)
    return Versions(str(before.folder), str(after.folder), table, inputs, messages, only)


def _markdown(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a padded Markdown table."""
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True).splitlines()


def side_by_side(tables: list[pd.DataFrame], speeds: Speeds) -> list[str]:
    """Return a Markdown table of the variants of both versions, with changed cells as "before → after".

    Speeds are those of interleaved runs; without such runs they are missing.
    """
    timed = [figure.name for figure in shown_in(CONSOLE) if figure.source == BENCHMARK]
    sides = []
    for table, bundles in zip(tables, speeds, strict=True):
        variants = {row["variant"]: row for row in table.to_dict("records")}
        for name, row in variants.items():
            measures = bundles.get(name, {}).get("measures", {})
            row |= {figure: measures.get(figure, {}).get("median") for figure in timed}
        sides.append(variants)
    rows = []
    for name in [name for name in sides[0] if name in sides[1]]:
        pairs = [tuple(cell(column, side[name][column]) for side in sides) for column in HEADS]
        rows.append([before if before == after else f"{before} → {after}" for before, after in pairs])
    return _markdown(list(HEADS.values()), rows)


def changes_page(versions: Versions, tables: list[pd.DataFrame], speeds: Speeds) -> str:
    """Return the contents of changes.md."""
    lines = [f"# Changes from {versions.before} to {versions.after}", ""]
    lines += [f"- {message}" for message in versions.changed_inputs]
    lines += ["", *side_by_side(tables, speeds), "", "## Changes beyond uncertainty", ""]
    rows = [
        [row.variant, row.figure, f"{row.before:.4g}", f"{row.after:.4g}", row.change]
        for row in versions.changes.itertuples()
    ]
    lines += _markdown(COLUMNS, rows) if rows else ["None."]
    lines += ["", *(f"- {message}" for message in versions.messages + versions.only_in())]
    return "\n".join(lines) + "\n"


def write_changes(folder: Path, versions: Versions, tables: list[pd.DataFrame], speeds: Speeds) -> None:
    """Write changes.csv and changes.md from the summaries of both versions and the speeds of interleaved runs."""
    with atomic_file(folder / CHANGES) as path:
        versions.changes.to_csv(path, index=False)
    with atomic_file(folder / PAGE) as path:
        path.write_text(changes_page(versions, tables, speeds), encoding="utf-8")
