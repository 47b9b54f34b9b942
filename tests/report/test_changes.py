"""changes.md and changes.csv: an upgrade as a table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd

from evidence import figure_table, make_evidence, make_row, make_speed, write_reference
from hf2mnn.core.manifest import Manifest
from hf2mnn.report.changes import changes_page, write_changes
from hf2mnn.report.evidence import Evidence
from hf2mnn.report.table import RowSpec, make_table
from hf2mnn.report.versions import Versions, changed_inputs, compare_versions

SPEEDS = [{"int4": make_speed(decode_tokens_per_s=(seen, seen - 1, seen + 1))} for seen in (100.0, 80.0)]


def version(folder: Path, release: str, weights: str, kld: float, fault: str | None = None) -> Evidence:
    """One with a bundle that MNN `release` has made of `weights`."""
    row = replace(make_row(mean_kld=kld, fault=fault), figures=figure_table(mean_kld=(kld, kld, kld)))
    made = make_evidence([row], folder)
    files = {"model.safetensors": {"size": 1, "sha256": weights}, "config.json": {"size": 1, "sha256": "c"}}
    source, base = Manifest("source", outputs=files), Manifest("mnn", tools={"MNN": release, "numpy": "2"})
    return replace(made, manifests=made.manifests | {"source": source, "base": base})


def both(folder: Path, fault: str | None = None) -> tuple[Versions, list[pd.DataFrame]]:
    sides = [version(folder / "m", "3.6.1", "a", 0.01), version(folder / "m+old", "3.6.0", "a", 0.2, fault)]
    for side in sides:
        write_reference(side.reference)
    tables = [make_table(side, [RowSpec("int4", True, {"mean_kld": 0.1})]) for side in sides]
    return compare_versions(*sides, speeds=SPEEDS), tables


def test_what_two_versions_were_made_of_is_told(tmp_path: Path) -> None:
    """Without it, a table of differences does not say what it is about."""
    one, other = version(tmp_path, "3.6.1", "a", 0.1), version(tmp_path, "3.6.0", "b", 0.1)
    assert changed_inputs(one, one) == ["tools: the same", "checkpoint: the same"]
    assert changed_inputs(one, other) == [
        "tools: MNN 3.6.1 to 3.6.0",
        "checkpoint: other files: model.safetensors",
    ]


def test_a_page_begins_with_verdicts_and_figures_side_by_side(tmp_path: Path) -> None:
    """What is the same stands there once; the speeds are those that were timed in turns, whatever the tables say."""
    versions, tables = both(tmp_path)
    page = changes_page(versions, [table.assign(decode_tokens_per_s=5.0) for table in tables], SPEEDS)
    (row,) = [line for line in page.splitlines() if line.startswith("| int4 ") and "pass" in line]
    cells = [text.strip() for text in row.strip("|").split("|")]
    assert cells[0] == "int4" and cells[-1] == "pass → FAIL" and cells[2] == "0.01 → 0.2" and cells[-2] == "100 → 80"
    assert "- tools: MNN 3.6.1 to 3.6.0\n- checkpoint: the same\n" in page
    assert "- pytorch: every layer is the same\n" in page
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert {len(line) for line in lines[: len(lines) - 4]} == {len(lines[0])}, "padded, to be read in a terminal"


def test_a_bundle_that_does_not_run_any_more_is_on_the_page(tmp_path: Path) -> None:
    versions, tables = both(tmp_path, fault="it crashed")
    page = changes_page(versions, tables, [{}, {}])
    assert "pass → FAIL" in page and "- int4: does not run any more: it crashed\n" in page
    assert "100" not in page.split("## ")[0].split("int4")[1], "nothing was timed"


def test_the_table_has_a_row_for_each_change(tmp_path: Path) -> None:
    write_changes(tmp_path, *both(tmp_path), SPEEDS)
    frame = pd.read_csv(tmp_path / "changes.csv")
    assert list(frame.columns) == ["variant", "figure", "before", "after", "change"]
    assert list(frame.itertuples(index=False, name=None)) == [
        ("int4", "mean_kld", 0.01, 0.2, "worse"),
        ("int4", "decode_tokens_per_s", 100.0, 80.0, "slower"),
    ]


def test_two_versions_that_are_the_same_say_nothing(tmp_path: Path) -> None:
    side = version(tmp_path / "m", "3.6.1", "a", 0.01)
    write_reference(side.reference)
    table = make_table(side, [RowSpec("int4", True, {})])
    page = changes_page(compare_versions(side, side), [table, table], [{}, {}])
    assert "\nNothing.\n" in page and "→" not in page
