"""Tests of changes.md and changes.csv."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd

from evidence import figure_table, make_evidence, make_speed, make_variant, write_reference
from hf2mnn.core.manifest import Manifest
from hf2mnn.report.console import HEADS
from hf2mnn.report.evidence import Evidence
from hf2mnn.report.table import VariantSpec, make_table
from hf2mnn.report.versions import Versions, changed_inputs, changes_page, compare_versions, write_changes

SPEEDS = [{"int4": make_speed(decode_tokens_per_s=(median, median - 1, median + 1))} for median in (100.0, 80.0)]


def version(folder: Path, release: str, weights: str, kld: float, fault: str | None = None) -> Evidence:
    """Return evidence of a version with a bundle of MNN `release`, and a checkpoint with the sha256 `weights`."""
    variant = replace(make_variant(mean_kld=kld, fault=fault), figures=figure_table(mean_kld=(kld, kld, kld)))
    evidence = make_evidence([variant], folder)
    files = {"model.safetensors": {"size": 1, "sha256": weights}, "config.json": {"size": 1, "sha256": "c"}}
    checkpoint, graphs = Manifest("fetch", outputs=files), Manifest("convert", tools={"MNN": release, "numpy": "2"})
    return replace(evidence, manifests=evidence.manifests | {"checkpoint": checkpoint, "graphs": graphs})


def both(folder: Path, fault: str | None = None) -> tuple[Versions, list[pd.DataFrame]]:
    sides = [version(folder / "m", "3.6.1", "a", 0.01), version(folder / "m+old", "3.6.0", "a", 0.2, fault)]
    for side in sides:
        write_reference(side.reference)
    tables = [make_table(side, [VariantSpec("int4", True, {"mean_kld": 0.1})]) for side in sides]
    return compare_versions(*sides, speeds=SPEEDS), tables


def test_changed_tools_and_files_are_listed(tmp_path: Path) -> None:
    before, after = version(tmp_path, "3.6.1", "a", 0.1), version(tmp_path, "3.6.0", "b", 0.1)
    assert changed_inputs(before, before) == ["tools: no change", "checkpoint: no change"]
    assert changed_inputs(before, after) == [
        "tools: MNN 3.6.1 to 3.6.0",
        "checkpoint: changed files: model.safetensors",
    ]


def test_page_begins_with_verdicts_and_figures_side_by_side(tmp_path: Path) -> None:
    """Equal cells are not repeated; the speeds are those of interleaved runs, not those of the summaries."""
    versions, tables = both(tmp_path)
    page = changes_page(versions, [table.assign(decode_tokens_per_s=5.0) for table in tables], SPEEDS)
    (row,) = [line for line in page.splitlines() if line.startswith("| int4 ") and "pass" in line]
    cells = [text.strip() for text in row.strip("|").split("|")]
    columns = dict(zip(HEADS, cells, strict=True))
    assert (columns["variant"], columns["verdict"]) == ("int4", "pass → FAIL")
    assert (columns["mean_kld"], columns["decode_tokens_per_s"]) == ("0.01 → 0.2", "100 → 80")
    assert "- tools: MNN 3.6.1 to 3.6.0\n- checkpoint: no change\n" in page
    assert "- pytorch: no layer changed\n" in page
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert {len(line) for line in lines[: len(lines) - 4]} == {len(lines[0])}, "padded for terminals"


def test_bundle_that_does_not_run_any_more_is_on_the_page(tmp_path: Path) -> None:
    versions, tables = both(tmp_path, fault="it crashed")
    page = changes_page(versions, tables, [{}, {}])
    assert "pass → FAIL" in page and "- int4: does not run any more: it crashed\n" in page
    assert "100" not in page.split("## ")[0].split("int4")[1], "nothing was timed"


def test_table_has_a_row_for_each_change(tmp_path: Path) -> None:
    write_changes(tmp_path, *both(tmp_path), SPEEDS)
    frame = pd.read_csv(tmp_path / "changes.csv")
    assert list(frame.columns) == ["variant", "figure", "before", "after", "change"]
    assert list(frame.itertuples(index=False, name=None)) == [
        ("int4", "mean_kld", 0.01, 0.2, "worse"),
        ("int4", "decode_tokens_per_s", 100.0, 80.0, "slower"),
    ]


def test_equal_versions_have_no_changes(tmp_path: Path) -> None:
    side = version(tmp_path / "m", "3.6.1", "a", 0.01)
    write_reference(side.reference)
    table = make_table(side, [VariantSpec("int4", True, {})])
    page = changes_page(compare_versions(side, side), [table, table], [{}, {}])
    assert "\nNone.\n" in page and "→" not in page
