"""Tests of the summary table and its verdicts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evidence import SUMMARY, make_evidence, make_speed, make_variant
from hf2mnn.core.errors import Hf2mnnError
from hf2mnn.core.manifest import Manifest
from hf2mnn.report.evidence import BUNDLES, REFERENCE_FOLDER
from hf2mnn.report.table import (
    COLUMNS,
    VariantSpec,
    join_tables,
    make_table,
    missed_gates,
    read_table,
    reasons,
    write_table,
)

FIRST = ["model", "variant", "top1_agreement", "mean_kld", "greedy_match", "task_accuracy", "vision_cosine", "bytes"]


@pytest.mark.parametrize(
    ("gate", "value", "bound", "kept"),
    [
        ("top1_agreement", 0.95, 0.95, True),
        ("top1_agreement", np.nextafter(0.95, 0), 0.95, False),
        ("greedy_match", 1.0, 1, True),
        ("greedy_match", 0.99, 1, False),
        ("vision_cosine", 0.99, 0.99, True),
        ("vision_cosine", 0.98, 0.99, False),
        ("vision_cosine", None, 0.99, True),  # optional: no images
        ("mean_kld", 0.1, 0.1, True),
        ("mean_kld", np.nextafter(0.1, 1), 0.1, False),
        ("mean_kld", float("nan"), 0.1, False),
        ("top1_agreement", float("nan"), 0.1, False),
        ("top1_agreement", None, 0.0, False),  # never optional
        ("cache_parity", 0.05, 0.05, True),
        ("cache_parity", 0.051, 0.05, False),
        ("cache_parity", None, 0.05, True),
        ("tokenizer_match", 1.0, 1, True),
        ("tokenizer_match", 0.995, 1, False),
        ("tokenizer_match", None, 1, True),  # optional: ONNX Runtime has no tokenizer
        ("template_match", 0.995, 1, False),
        ("template_match", None, 1, True),  # nor a template
        ("findings", 0, 0, True),
        ("findings", 1, 0, False),
        ("findings", None, 0, True),  # nor a diagnosis
    ],
)
def test_bounds_are_inclusive_and_nan_misses_all(gate: str, value: float | None, bound: float, kept: bool) -> None:
    missed = reasons({**SUMMARY, gate: value}, 15, {gate: bound})
    assert missed == [] if kept else len(missed) == 1
    for reason in missed:
        assert reason.startswith(f"{gate} ")
        assert f"{bound:g} wanted" in reason


@pytest.mark.parametrize(
    ("right", "reference", "labelled", "lost"),
    [(15, 15, 20, 0), (14, 15, 20, 1), (16, 15, 20, -1), (0, 20, 20, 20), (149, 150, 168, 1), (111, 167, 177, 56)],
)
def test_answers_lost_counts_answers(right: int, reference: int, labelled: int, lost: int) -> None:
    """summary.json stores a share, from which the count is exact; more correct answers than PyTorch are no loss."""
    summary = {**SUMMARY, "task_accuracy": right / labelled, "labelled": labelled}
    for gate, unit in (("answers_lost", 1), ("accuracy_lost", labelled)):
        assert reasons(summary, reference, {gate: lost / unit}) == []
        (missed,) = reasons(summary, reference, {gate: (lost - 0.5) / unit})
        assert missed.startswith(f"{gate} ")


def test_task_gates_pass_without_labelled_examples() -> None:
    summary = {**SUMMARY, "task_accuracy": None, "labelled": 0}
    assert reasons(summary, 0, {"answers_lost": 0, "accuracy_lost": 0.0}) == []


def test_all_missed_gates_are_listed() -> None:
    gates = {"top1_agreement": 0.99, "mean_kld": 0.01, "accuracy_lost": 0.05, "greedy_match": 0.9, "findings": 0}
    assert reasons(SUMMARY | {"findings": 2}, 20, gates) == [
        "accuracy_lost 0.25, at most 0.05 wanted",
        "findings 2, at most 0 wanted",
        "mean_kld 0.1, at most 0.01 wanted",
        "top1_agreement 0.95, at least 0.99 wanted",
    ]


def test_fault_is_the_only_reason_and_needs_no_gates() -> None:
    summary = dict.fromkeys(SUMMARY) | {"fault": "the engine crashed (signal 11)"}
    assert reasons(summary, 15, {"mean_kld": 0.1, "top1_agreement": 0.9}) == ["the engine crashed (signal 11)"]
    assert reasons(summary, 15, {}) == ["the engine crashed (signal 11)"]


def table_of(*specs: VariantSpec, findings: tuple[str, ...] = (), model: str = "m") -> pd.DataFrame:
    """Return a table of equal variants with different gates; the last has `findings`."""
    variants = [make_variant(spec.name, findings if spec is specs[-1] else ()) for spec in specs]
    speed = {specs[0].name: make_speed(decode_tokens_per_s=(598.5, 580.0, 610.0), prefill_s=(1.0, 1.0, 1.0))}
    return make_table(make_evidence(variants, speed=speed), list(specs)).assign(model=model)


GOOD, BAD = VariantSpec("fp32", True, {"mean_kld": 0.2}), VariantSpec("int4", False, {"mean_kld": 0.01})


def test_each_variant_has_a_verdict() -> None:
    frame = table_of(GOOD, BAD)
    assert list(frame.columns) == COLUMNS
    assert [column for column in COLUMNS if column in FIRST] == FIRST
    assert list(frame["variant"]) == ["pytorch", "fp32", "int4"]
    assert list(frame["verdict"]) == ["reference", "pass", "FAIL"]
    assert frame.loc[2, "reason"] == "mean_kld 0.1, at most 0.01 wanted"
    assert list(frame["task_accuracy"]) == [0.75, 0.75, 0.75]
    assert frame.loc[1, "bytes"] == SUMMARY["bytes"]
    assert frame.loc[1, "decode_tokens_per_s"] == 598.5 and pd.isna(frame.loc[2, "decode_tokens_per_s"])


def test_text_models_have_no_figures_of_images() -> None:
    variant = make_variant("fp32", vision_cosine=None)
    frame = make_table(make_evidence([variant]), [VariantSpec("fp32", True, {"vision_cosine": 0.99})])
    assert frame["vision_cosine"].isna().all()
    assert list(frame["verdict"]) == ["reference", "pass"]


def test_findings_fail_a_variant_and_are_its_cause() -> None:
    frame = table_of(GOOD, VariantSpec("int4", True, {"findings": 0}), findings=("ids are shifted", "norm is zero"))
    assert list(frame["findings"])[1:] == [0, 2]
    assert frame.loc[2, "reason"] == "findings 2, at most 0 wanted"
    assert frame.loc[2, "cause"] == "ids are shifted; norm is zero"


def test_findings_without_a_diagnosis_are_missing_and_not_zero() -> None:
    variant = make_variant("onnxruntime", diagnosed=False)
    frame = make_table(make_evidence([variant]), [VariantSpec("onnxruntime", True, {"findings": 0})])
    assert pd.isna(frame.loc[1, "findings"]) and frame.loc[1, "verdict"] == "pass"


@pytest.mark.parametrize(
    ("results", "value", "reason"),
    [
        ({"decoder_layout": "NC4HW4"}, 1, ""),
        (
            {"decoder_layout": "NCHW", "layout_reason": "MNN 3.5.0 lacks it"},
            0,
            "nc4hw4_decoder 0, at least 1 wanted (MNN 3.5.0 lacks it)",
        ),
        ({}, None, ""),  # the manifest does not say
        (None, None, ""),  # there is no bundle
    ],
)
def test_a_decoder_in_the_slower_layout_fails_with_its_reason(
    results: dict | None, value: int | None, reason: str
) -> None:
    manifests = {} if results is None else {BUNDLES: Manifest("quantize", results=results)}
    variant = replace(make_variant(), manifests=manifests)
    for gates, missed in (({"nc4hw4_decoder": 1}, reason), ({}, "")):
        frame = make_table(make_evidence([variant]), [VariantSpec("int4", True, gates)])
        assert (None if pd.isna(frame.loc[1, "nc4hw4_decoder"]) else frame.loc[1, "nc4hw4_decoder"]) == value
        assert frame.loc[1, "reason"] == missed


def test_table_without_figures_is_read_back(tmp_path: Path) -> None:
    """Columns have the same types for every model, so that summaries can be joined."""
    evidence = make_evidence(
        [make_variant("int4", **(dict.fromkeys(SUMMARY) | {"fault": "it crashed", "labelled": 0}))]
    )
    evidence.manifests[REFERENCE_FOLDER].results |= {"labelled": 0, "right": 0}
    frame = make_table(evidence, [VariantSpec("int4", False, {})])
    assert list(frame["verdict"]) == ["reference", "FAIL"]
    write_table(frame, tmp_path / "summary.csv")
    read = read_table(tmp_path / "summary.csv")
    pd.testing.assert_frame_equal(read, pd.read_parquet(tmp_path / "summary.parquet"), check_dtype=False)
    assert read["task_accuracy"].isna().all()


@pytest.mark.parametrize("name", ["m", "007", "1.10", "null", "NA", "nan", "true"])
def test_csv_and_parquet_are_read_back(name: str, tmp_path: Path) -> None:
    """These are valid names of models and variants; they must not become numbers or missing values."""
    frame = table_of(VariantSpec(name, True, GOOD.gates), BAD, findings=('norm "n", is\nzero',), model=name)
    write_table(frame, tmp_path / "summary.csv")
    for read in (read_table(tmp_path / "summary.csv"), pd.read_parquet(tmp_path / "summary.parquet")):
        pd.testing.assert_frame_equal(read, frame, check_dtype=False)
        assert list(read["model"]) == [name] * 3
        assert list(read["variant"]) == ["pytorch", name, "int4"]


def test_summaries_are_joined(tmp_path: Path) -> None:
    for name in ("007", "null"):
        write_table(table_of(GOOD, BAD, model=name), tmp_path / f"{name}.csv")
    joined = join_tables([tmp_path / "007.csv", tmp_path / "null.csv"], tmp_path / "all.csv")
    assert list(joined["model"]) == ["007"] * 3 + ["null"] * 3
    assert list(joined["variant"]) == ["pytorch", "fp32", "int4"] * 2
    for read in (read_table(tmp_path / "all.csv"), pd.read_parquet(tmp_path / "all.parquet")):
        pd.testing.assert_frame_equal(read, joined, check_dtype=False)


@pytest.mark.parametrize(
    "stored",
    [
        None,
        b"",
        b"a,b\n1,2\n1,2,3\n",
        b"a,b\n1,2\n",
        b"\xff\xfe\x00",
        ",".join(COLUMNS).encode() + b'\n"',
        ",".join(COLUMNS).encode() + b"\n",
    ],
    ids=["missing", "empty", "ragged", "other columns", "binary", "open quote", "no rows"],
)
def test_other_files_are_refused(stored: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "summary.csv"
    if stored is not None:
        path.write_bytes(stored)
    with pytest.raises(Hf2mnnError, match=r"summary\.csv") as refused:
        read_table(path)
    assert len(str(refused.value).splitlines()) == 1


def test_only_required_variants_fail_the_run() -> None:
    assert missed_gates(table_of(GOOD, BAD)) == []
    strict = VariantSpec("int4", True, BAD.gates)
    assert missed_gates(table_of(GOOD, strict)) == ["m/int4: mean_kld 0.1, at most 0.01 wanted"]
    (message,) = missed_gates(table_of(GOOD, strict, findings=("norm is zero",)))
    assert message == "m/int4: mean_kld 0.1, at most 0.01 wanted (cause: norm is zero)"
