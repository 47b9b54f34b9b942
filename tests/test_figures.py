"""The registry of figures: one entry reaches table, gates, schema, console, comparison, page and docs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hf2mnn.figures import FIGURES, UNITS, gated, markdown
from support import REPOSITORY

FAKE = """
import io, json, sys
from hf2mnn import figures
from hf2mnn.figures import ANSWERS, EVERYWHERE, GREEDY, LOWER, Figure, Gate

entry = Figure("fake", "fake label", "share", LOWER, ANSWERS, "A fake.", EVERYWHERE, GREEDY, head="fake head",
               column="degenerate", gate=Gate(0.25, onnxruntime=0.5))
figures.FIGURES["fake"] = entry

from evidence import figure_table, make_evidence, make_variant, write_reference
from dataclasses import replace
from pathlib import Path
from hf2mnn.config.load import parse_config
from hf2mnn.config.schema import Config
from hf2mnn.report import cells, console, versions
from hf2mnn.report.table import COLUMNS, VariantSpec, make_table
import tempfile

config = parse_config({"models": {"m": {"source": {"path": "no"}}}, "variants": {"v": {"bits": 4}}})
rows = [replace(make_variant("v", fake=x), figures=figure_table(fake=(x, x, x))) for x in (0.1, 0.4)]
tables = [make_table(make_evidence([row]), [VariantSpec("v", True, {"fake": 0.25})]) for row in rows]
text = io.StringIO()
console.print_table(tables[1], text)
with tempfile.TemporaryDirectory() as folder:
    sides = [make_evidence([row], Path(folder, name)) for name, row in zip("ab", rows)]
    for side in sides:
        write_reference(side.reference)
    compared = versions.compare_versions(*sides).changes
json.dump({
    "column": "fake" in COLUMNS,
    "values": [table["fake"].tolist()[1] for table in tables],
    "verdicts": [table["verdict"].tolist()[1] for table in tables],
    "reason": tables[1]["reason"].tolist()[1],
    "schema": Config.model_json_schema()["$defs"]["Gates"]["properties"]["fake"],
    "gates": [config.gates_of(row).get("fake") for row in ("v", "onnxruntime")],
    "console": "fake head" in text.getvalue() and "40.0 %" in text.getvalue(),
    "side by side": versions.side_by_side(tables, ({}, {})).splitlines()[0],
    "comparison": compared[["figure", "change"]].to_numpy().tolist(),
    "page": [table.heads for table in cells.figures(sides[0]) if "fake label" in table.heads],
    "docs": [line for line in figures.markdown().splitlines() if "fake" in line],
}, sys.stdout)
"""


@pytest.fixture(scope="module")
def fake() -> dict:
    """Where a fake figure shows that is only added to the registry, before other modules are imported."""
    done = subprocess.run(
        [sys.executable, "-c", FAKE], cwd=REPOSITORY / "tests", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_one_entry_adds_a_figure_to_the_table_and_its_verdict(fake: dict) -> None:
    assert fake["column"] and fake["values"] == [0.1, 0.4]
    assert fake["verdicts"] == ["pass", "FAIL"]
    assert fake["reason"].startswith("fake 0.4, at most 0.25")


def test_one_entry_adds_a_gate_to_the_schema_and_its_defaults(fake: dict) -> None:
    assert fake["schema"]["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 1}
    assert fake["schema"]["description"] == "Upper bound, share. A fake."
    assert fake["gates"] == [0.25, 0.5]


def test_one_entry_adds_a_figure_to_console_comparison_page_and_docs(fake: dict) -> None:
    assert fake["console"] and "fake head" in fake["side by side"]
    assert ["fake", "worse"] in fake["comparison"]
    assert len(fake["page"]) == 1
    assert fake["docs"] == ["| `fake` | share | lower | answers | A fake. | 0.25 | 0.5 |"]


def test_the_docs_are_those_of_the_registry() -> None:
    """`python -m hf2mnn.figures > docs/figures.md` updates them."""
    assert (REPOSITORY / "docs" / "figures.md").read_text(encoding="utf-8") == markdown()


def test_every_figure_is_complete() -> None:
    for name, figure in FIGURES.items():
        assert figure.name == name and figure.unit in UNITS
        assert figure.better in ("higher", "lower", None)
        assert figure.meaning.endswith(".") and figure.meaning[0].isupper() | figure.meaning[0].isdigit()


def test_every_gate_has_a_direction() -> None:
    """Otherwise its bound would have no meaning."""
    assert [figure.name for figure in gated() if figure.better is None] == []


@pytest.mark.parametrize(
    ("name", "value", "bound", "kept"),
    [
        ("top1_agreement", 0.95, 0.95, True),
        ("top1_agreement", 0.94, 0.95, False),
        ("mean_kld", 0.1, 0.1, True),
        ("mean_kld", 0.11, 0.1, False),
        ("mean_kld", float("nan"), 0.1, False),
        ("top1_agreement", float("nan"), 0.1, False),
        ("mean_kld", None, 0.1, False),
        ("vision_cosine", None, 0.99, True),
        ("nc4hw4_decoder", 0, 1, False),
        ("nc4hw4_decoder", None, 1, True),
    ],
)
def test_bounds_are_inclusive_and_nan_keeps_none(name: str, value: float | None, bound: float, kept: bool) -> None:
    """A missing value keeps the gate of an optional figure only."""
    assert FIGURES[name].keeps(value, bound) is kept
