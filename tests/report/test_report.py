"""Tests of the `report` stage: files, checks of its inputs, and that it runs no stage."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import hf2mnn.report
from evidence import (
    figure_table,
    layer_table,
    make_variant,
    write_bundle,
    write_diagnosis,
    write_evaluation,
    write_reference,
    write_results,
)
from hf2mnn.core.errors import Hf2mnnError, ManifestError
from hf2mnn.core.manifest import Manifest, stage_folder
from hf2mnn.evaluation.aggregate import COLUMNS as FIGURE_COLUMNS
from hf2mnn.report.evidence import REFERENCE_FOLDER
from hf2mnn.report.table import VariantSpec, read_table
from hf2mnn.report.versions import read_report
from hf2mnn.stages.report import make_report

SPECS = [
    VariantSpec("onnxruntime", True, {}),
    VariantSpec("fp32", True, {}),
    VariantSpec("int4", True, {"findings": 0}),
]
FILES = {"summary.csv", "summary.parquet", "figures.csv", "figures.parquet", "report.html"}


@pytest.fixture(autouse=True)
def page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the page, which has its own tests, by its arguments."""
    monkeypatch.setattr(
        "hf2mnn.report.page.render_page", lambda evidence, table: f"{evidence.model} {list(table['variant'])}"
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_results(tmp_path / "m", make_variant("fp32"), make_variant("int4", ("norm is zero",)))


def test_all_files_have_the_same_variants(folder: Path) -> None:
    table = make_report("m", folder, SPECS)
    assert {path.name for path in folder.iterdir() if path.is_file()} == FILES
    pd.testing.assert_frame_equal(read_table(folder / "summary.csv"), table, check_dtype=False)
    assert (folder / "report.html").read_text() == "m ['pytorch', 'onnxruntime', 'fp32', 'int4']"
    for figures in (pd.read_csv(folder / "figures.csv"), pd.read_parquet(folder / "figures.parquet")):
        assert list(figures.columns) == [*FIGURE_COLUMNS, "model", "variant"]
        assert list(figures["variant"]) == ["onnxruntime", "fp32", "int4"]


def test_findings_of_the_diagnosis_reach_the_verdict(folder: Path) -> None:
    table = make_report("m", folder, SPECS).set_index("variant")
    assert list(table["verdict"]) == ["reference", "pass", "pass", "FAIL"]
    assert table.loc["int4", "cause"] == "norm is zero"
    assert pd.isna(table.loc["onnxruntime", "findings"])


def test_wrong_cache_is_a_finding(tmp_path: Path) -> None:
    variant = make_variant("int4")
    parity = pd.DataFrame([("text", "token by token", 10, 1.5, 9.0, 0.1)], columns=variant.parity.columns)
    folder = write_results(tmp_path / "m", replace(variant, parity=parity))
    table = make_report("m", folder, SPECS[::2]).set_index("variant")
    assert table.loc["int4", "reason"] == "findings 1, at most 0 wanted"
    assert "token by token (text) by 1.5" in table.loc["int4", "cause"]


def test_wrong_rendering_of_the_template_is_a_finding(tmp_path: Path) -> None:
    variant = make_variant("int4")
    answers = pd.DataFrame([("q", True, None), ("r", False, "'a' for 'b'")], columns=variant.answers.columns)
    table = make_report("m", write_results(tmp_path / "m", replace(variant, answers=answers)), SPECS[::2])
    cause = table.set_index("variant").loc["int4", "cause"]
    assert cause == "the engine renders 1 of 2 conversations to another prompt: first in r, 'a' for 'b'"


def test_model_without_a_running_bundle_still_has_its_files(tmp_path: Path) -> None:
    variant = make_variant("int4", ("it crashed",), fault="it crashed")
    folder = write_results(tmp_path / "m", replace(variant, figures=figure_table(), layers=layer_table(points=[])))
    table = make_report("m", folder, SPECS[2:])
    assert list(table["verdict"]) == ["reference", "FAIL"]
    assert {path.name for path in folder.iterdir() if path.is_file()} == FILES
    assert list(pd.read_csv(folder / "figures.csv").columns) == [*FIGURE_COLUMNS, "model", "variant"]


@pytest.mark.parametrize("part", ["evaluation", "diagnosis"])
def test_measurements_against_another_reference_are_refused(part: str, folder: Path, tmp_path: Path) -> None:
    other = write_reference(tmp_path / "other", tokens=7)
    write = write_evaluation if part == "evaluation" else write_diagnosis
    write(folder / part / "int4", other, folder / "bundles" / "int4", make_variant())
    with pytest.raises(ManifestError, match=rf"{part}/int4 was measured against another reference"):
        make_report("m", folder, SPECS)
    assert not (folder / "summary.csv").exists()


def test_evaluation_and_diagnosis_of_different_bundles_are_refused(folder: Path, tmp_path: Path) -> None:
    other = write_bundle(tmp_path / "other", "other weights")
    write_diagnosis(folder / "diagnosis" / "int4", folder / REFERENCE_FOLDER, other, make_variant())
    with pytest.raises(ManifestError, match="diagnosis of int4 used different bundles"):
        make_report("m", folder, SPECS)
    assert not (folder / "summary.csv").exists()


def test_bundle_that_is_newer_than_its_evaluation_is_refused(folder: Path) -> None:
    write_bundle(folder / "bundles" / "int4", "other weights")
    with pytest.raises(ManifestError, match="bundles/int4 is newer than its evaluation"):
        make_report("m", folder, SPECS)


def test_benchmark_of_another_bundle_is_refused(folder: Path) -> None:
    digests = {name: Manifest.load(folder / "bundles" / name).digest() for name in ("fp32", "int4")}
    for inputs in (digests, {"int4": digests["int4"]}, digests | {"int4": digests["fp32"]}):
        with stage_folder(folder / "benchmark", Manifest("benchmark", inputs=inputs)) as partial:
            (partial / "benchmark.json").write_text('{"bundles": {}}')
        if inputs["int4"] == digests["int4"]:
            make_report("m", folder, SPECS)
        else:
            with pytest.raises(ManifestError, match=r"benchmark timed another bundle than .*bundles/int4"):
                make_report("m", folder, SPECS)


@pytest.mark.parametrize(
    "name",
    [
        "evaluation/int4/summary.json",
        "evaluation/fp32/answers.parquet",
        "diagnosis/fp32/findings.json",
        "reference/evaluation/golden.safetensors",
    ],
)
def test_changed_inputs_are_refused(name: str, folder: Path) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ManifestError, match=re.escape(path.name)):
        make_report("m", folder, SPECS)
    assert not (folder / "summary.csv").exists()


def test_missing_stage_is_named(folder: Path) -> None:
    shutil.rmtree(folder / "evaluation" / "int4")
    with pytest.raises(ManifestError, match=r"evaluation/int4 has no manifest\.json"):
        make_report("m", folder, SPECS)


def test_report_is_read_back_whole_or_in_part(folder: Path) -> None:
    written = make_report("007", folder, SPECS)
    evidence, table = read_report(folder)
    assert (evidence.model, [variant.name for variant in evidence.variants]) == ("007", ["onnxruntime", "fp32", "int4"])
    pd.testing.assert_frame_equal(table, written, check_dtype=False)
    evidence, table = read_report(folder, ["int4"])
    (variant,) = evidence.variants
    assert variant.name == "int4"
    assert list(table["variant"]) == ["pytorch", "int4"]
    assert [finding["message"] for finding in variant.findings] == ["norm is zero"]


@pytest.mark.parametrize("names", [["int3"], ["int4", "int3"], ["pytorch"]], ids=str)
def test_unknown_variant_is_refused_with_the_known_ones(names: list[str], folder: Path) -> None:
    make_report("m", folder, SPECS)
    with pytest.raises(Hf2mnnError, match=f"has no {names[-1]}; it has onnxruntime, fp32, int4"):
        read_report(folder, names)


def test_folder_without_a_report_is_refused(folder: Path) -> None:
    with pytest.raises(Hf2mnnError, match=r"summary\.csv"):
        read_report(folder)


def test_report_starts_no_process_and_loads_no_runtime() -> None:
    """The package computes no figure: it imports neither the code that measures nor the runtimes."""
    modules = sorted(Path(hf2mnn.report.__file__).parent.glob("*.py"))
    for path in modules:
        names = {name for name in path.read_text().split() if name in ("subprocess", "multiprocessing")}
        assert not names, path
    names = ", ".join(f"hf2mnn.report.{path.stem}" for path in modules if path.stem != "__init__")
    program = f"import sys, {names}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"hf2mnn.report.page", "hf2mnn.evaluation.findings"} <= loaded
    measuring = {
        f"hf2mnn.evaluation.{name}" for name in ("benchmark", "diagnose", "layers", "runtimes", "score", "tune")
    }
    measuring |= {"hf2mnn.mnn.engine", "hf2mnn.onnx.session", "hf2mnn.machine.child"}
    assert loaded & (measuring | {"MNN", "onnxruntime", "torch", "transformers"}) == set()
