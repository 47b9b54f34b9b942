"""The `report` stage on a folder with little in it: what it writes, and what it refuses to put side by side."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from evidence import (
    figure_table,
    layer_table,
    make_row,
    write_bundle,
    write_diagnosis,
    write_evaluation,
    write_reference,
    write_results,
)
from hf2mnn.core.errors import Hf2mnnError, ManifestError
from hf2mnn.evaluation.figures import COLUMNS as FIGURE_COLUMNS
from hf2mnn.report import report
from hf2mnn.report.table import RowSpec, read_table
from hf2mnn.report.versions import read_report
from hf2mnn.stages.report import run as make_report

SPECS = [RowSpec("onnxruntime", True, {}), RowSpec("fp32", True, {}), RowSpec("int4", True, {"findings": 0})]
FILES = {"summary.csv", "summary.parquet", "figures.csv", "figures.parquet", "report.html"}


@pytest.fixture(autouse=True)
def page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page has tests of its own; here it says what it was given."""
    monkeypatch.setattr(report, "render_page", lambda evidence, table: f"{evidence.model} {list(table['variant'])}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_results(tmp_path / "m", make_row("fp32"), make_row("int4", ("norm is zero",)))


def test_all_files_are_of_the_same_rows(folder: Path) -> None:
    table = make_report("m", folder, SPECS)
    assert {path.name for path in folder.iterdir() if path.is_file()} == FILES
    pd.testing.assert_frame_equal(read_table(folder / "summary.csv"), table, check_dtype=False)
    assert (folder / "report.html").read_text() == "m ['pytorch', 'onnxruntime', 'fp32', 'int4']"
    for figures in (pd.read_csv(folder / "figures.csv"), pd.read_parquet(folder / "figures.parquet")):
        assert list(figures.columns) == [*FIGURE_COLUMNS, "model", "variant"]
        assert list(figures["variant"]) == ["onnxruntime", "fp32", "int4"]


def test_the_diagnosis_reaches_the_verdict(folder: Path) -> None:
    table = make_report("m", folder, SPECS).set_index("variant")
    assert list(table["verdict"]) == ["reference", "pass", "pass", "FAIL"]
    assert table.loc["int4", "cause"] == "norm is zero"
    assert pd.isna(table.loc["onnxruntime", "findings"])


def test_a_cache_that_answers_otherwise_is_a_cause_as_well(tmp_path: Path) -> None:
    """The evaluation measures it, not the diagnosis."""
    row = make_row("int4")
    row = replace(row, parity=pd.DataFrame([("text", "token by token", 10, 1.5, 9.0, 0.1)], columns=row.parity.columns))
    table = make_report("m", write_results(tmp_path / "m", row), SPECS[::2]).set_index("variant")
    assert table.loc["int4", "reason"] == "findings 1, at most 0 wanted"
    assert "token by token (text) by 1.5" in table.loc["int4", "cause"]


def test_a_template_that_the_engine_reads_otherwise_is_a_cause_as_well(tmp_path: Path) -> None:
    row = make_row("int4")
    answers = pd.DataFrame([("q", True, None), ("r", False, "'a' for 'b'")], columns=row.answers.columns)
    table = make_report("m", write_results(tmp_path / "m", replace(row, answers=answers)), SPECS[::2])
    cause = table.set_index("variant").loc["int4", "cause"]
    assert cause == "the engine makes another prompt of 1 of 2 conversations: first in r, 'a' for 'b'"


def test_a_model_of_which_nothing_runs_still_has_its_files(tmp_path: Path) -> None:
    row = make_row("int4", ("it crashed",), fault="it crashed")
    row = replace(row, figures=figure_table(), layers=layer_table(points=[]))
    folder = write_results(tmp_path / "m", row)
    table = make_report("m", folder, SPECS[2:])
    assert list(table["verdict"]) == ["reference", "FAIL"]
    assert {path.name for path in folder.iterdir() if path.is_file()} == FILES
    assert list(pd.read_csv(folder / "figures.csv").columns) == [*FIGURE_COLUMNS, "model", "variant"]


@pytest.mark.parametrize("stage", ["eval", "diagnosis"])
def test_what_was_measured_against_another_reference_is_refused(stage: str, folder: Path, tmp_path: Path) -> None:
    """By hand it is easy to lay yesterday's evaluation beside today's reference: figures of two different things."""
    other = write_reference(tmp_path / "other", tokens=7)
    write = write_evaluation if stage == "eval" else write_diagnosis
    write(folder / stage / "int4", other, folder / "bundles" / "int4", make_row())
    with pytest.raises(ManifestError, match=rf"{stage}/int4 was measured against another reference"):
        make_report("m", folder, SPECS)
    assert not (folder / "summary.csv").exists()


def test_evaluation_and_diagnosis_of_two_bundles_are_refused(folder: Path, tmp_path: Path) -> None:
    other = write_bundle(tmp_path / "other", "other weights")
    write_diagnosis(folder / "diagnosis" / "int4", folder / "reference", other, make_row())
    with pytest.raises(ManifestError, match="int4 are not of the same bundle"):
        make_report("m", folder, SPECS)
    assert not (folder / "summary.csv").exists()


def test_a_bundle_that_was_made_again_is_refused(folder: Path) -> None:
    """The page would show the figures of one bundle beside the settings and sizes of another."""
    write_bundle(folder / "bundles" / "int4", "other weights")
    with pytest.raises(ManifestError, match="int4"):
        make_report("m", folder, SPECS)


@pytest.mark.parametrize(
    "harmed",
    [
        "evaluation/int4/summary.json",
        "evaluation/fp32/answers.parquet",
        "diagnosis/fp32/findings.json",
        "reference/golden.safetensors",
    ],
)
def test_inputs_must_be_whole(harmed: str, folder: Path) -> None:
    """A verdict on a file that was cut or changed is worth nothing; nothing is written then."""
    path = folder / harmed
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ManifestError, match=re.escape(path.name)):
        make_report("m", folder, SPECS)
    assert not (folder / "summary.csv").exists()


def test_a_stage_that_has_not_run_is_named(folder: Path) -> None:
    shutil.rmtree(folder / "evaluation" / "int4")
    with pytest.raises(ManifestError, match=r"evaluation/int4 has no manifest\.json"):
        make_report("m", folder, SPECS)


def test_a_report_is_read_back_whole_or_in_part(folder: Path) -> None:
    made = make_report("007", folder, SPECS)
    evidence, table = read_report(folder)
    assert (evidence.model, [row.name for row in evidence.rows]) == ("007", ["onnxruntime", "fp32", "int4"])
    pd.testing.assert_frame_equal(table, made, check_dtype=False)
    evidence, table = read_report(folder, ["int4"])
    assert [row.name for row in evidence.rows] == ["int4"]
    assert list(table["variant"]) == ["pytorch", "int4"]
    assert [finding["sentence"] for finding in evidence.rows[0].findings] == ["norm is zero"]


@pytest.mark.parametrize("names", [["int3"], ["int4", "int3"], ["pytorch"]], ids=str)
def test_a_row_that_is_not_there_is_refused_with_those_that_are(names: list[str], folder: Path) -> None:
    make_report("m", folder, SPECS)
    with pytest.raises(Hf2mnnError, match=f"has no {names[-1]}; it has onnxruntime, fp32, int4"):
        read_report(folder, names)


def test_a_folder_without_a_report_is_refused(folder: Path) -> None:
    with pytest.raises(Hf2mnnError, match=r"summary\.csv"):
        read_report(folder)
