"""The table and its verdicts: what a person decides by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evidence import SUMMARY, make_evidence, make_row, make_speed
from hf2mnn.core.errors import Hf2mnnError
from hf2mnn.report.table import (
    COLUMNS,
    RowSpec,
    join_tables,
    make_table,
    missed_gates,
    read_table,
    reasons,
    write_table,
)

ASKED = ["model", "variant", "top1_agreement", "mean_kld", "greedy_match", "task_accuracy", "vision_cosine", "bytes"]


@pytest.mark.parametrize(
    ("gate", "value", "bound", "kept"),
    [
        ("top1_agreement", 0.95, 0.95, True),
        ("top1_agreement", np.nextafter(0.95, 0), 0.95, False),
        ("greedy_match", 1.0, 1, True),
        ("greedy_match", 0.99, 1, False),
        ("vision_cosine", 0.99, 0.99, True),
        ("vision_cosine", 0.98, 0.99, False),
        ("vision_cosine", None, 0.99, True),  # no images, nothing to keep
        ("mean_kld", 0.1, 0.1, True),
        ("mean_kld", np.nextafter(0.1, 1), 0.1, False),
        ("mean_kld", float("nan"), 0.1, False),
        ("top1_agreement", float("nan"), 0.1, False),
        ("top1_agreement", None, 0.0, False),  # always measured: none is a fault
        ("cache_parity", 0.05, 0.05, True),
        ("cache_parity", 0.051, 0.05, False),
        ("cache_parity", None, 0.05, True),
        ("tokenizer_match", 1.0, 1, True),
        ("tokenizer_match", 0.995, 1, False),
        ("tokenizer_match", None, 1, True),  # ONNX Runtime has no tokenizer
        ("template_match", 0.995, 1, False),
        ("template_match", None, 1, True),  # nor a template
        ("findings", 0, 0, True),
        ("findings", 1, 0, False),
        ("findings", None, 0, True),  # nor a diagnosis
    ],
)
def test_bounds_are_inclusive_and_nan_keeps_none(gate: str, value: float | None, bound: float, kept: bool) -> None:
    missed = reasons({**SUMMARY, gate: value}, 15, {gate: bound})
    assert missed == [] if kept else len(missed) == 1
    for sentence in missed:
        assert sentence.startswith(f"{gate} ")
        assert f"{bound:g} wanted" in sentence


@pytest.mark.parametrize(
    ("right", "reference", "labelled", "lost"),
    [(15, 15, 20, 0), (14, 15, 20, 1), (16, 15, 20, -1), (0, 20, 20, 20), (149, 150, 168, 1), (111, 167, 177, 56)],
)
def test_answers_lost_counts_answers(right: int, reference: int, labelled: int, lost: int) -> None:
    """The count survives the share that summary.json keeps; more right answers than PyTorch has is no loss."""
    summary = {**SUMMARY, "task_accuracy": right / labelled, "labelled": labelled}
    for gate, unit in (("answers_lost", 1), ("accuracy_lost", labelled)):
        assert reasons(summary, reference, {gate: lost / unit}) == []
        (missed,) = reasons(summary, reference, {gate: (lost - 0.5) / unit})
        assert missed.startswith(f"{gate} ")


def test_task_gates_hold_where_nothing_is_labelled() -> None:
    summary = {**SUMMARY, "task_accuracy": None, "labelled": 0}
    assert reasons(summary, 0, {"answers_lost": 0, "accuracy_lost": 0.0}) == []


def test_all_missed_gates_are_told() -> None:
    gates = {"top1_agreement": 0.99, "mean_kld": 0.01, "accuracy_lost": 0.05, "greedy_match": 0.9, "findings": 0}
    assert reasons(SUMMARY | {"findings": 2}, 20, gates) == [
        "accuracy_lost 0.25, at most 0.05 wanted",
        "findings 2, at most 0 wanted",
        "mean_kld 0.1, at most 0.01 wanted",
        "top1_agreement 0.95, at least 0.99 wanted",
    ]


def test_a_bundle_that_does_not_run_fails_for_that_alone_and_without_gates() -> None:
    """Six figures that are missing say less than what the engine did."""
    summary = dict.fromkeys(SUMMARY) | {"fault": "the engine crashed (signal 11)"}
    assert reasons(summary, 15, {"mean_kld": 0.1, "top1_agreement": 0.9}) == ["the engine crashed (signal 11)"]
    assert reasons(summary, 15, {}) == ["the engine crashed (signal 11)"]


def made(*specs: RowSpec, findings: tuple[str, ...] = (), model: str = "m") -> pd.DataFrame:
    """A table of rows that are alike but for their gates; the last has `findings`."""
    rows = [make_row(spec.name, findings if spec is specs[-1] else ()) for spec in specs]
    speed = {specs[0].name: make_speed(decode_tokens_per_s=(598.5, 580.0, 610.0), prefill_s=(1.0, 1.0, 1.0))}
    return make_table(make_evidence(rows, speed=speed), list(specs)).assign(model=model)


GOOD, BAD = RowSpec("fp32", True, {"mean_kld": 0.2}), RowSpec("int4", False, {"mean_kld": 0.01})


def test_table_has_a_row_each_with_a_verdict() -> None:
    frame = made(GOOD, BAD)
    assert list(frame.columns) == COLUMNS
    assert [column for column in COLUMNS if column in ASKED] == ASKED
    assert list(frame["variant"]) == ["pytorch", "fp32", "int4"]
    assert list(frame["verdict"]) == ["reference", "pass", "FAIL"]
    assert frame.loc[2, "reason"] == "mean_kld 0.1, at most 0.01 wanted"
    assert list(frame["task_accuracy"]) == [0.75, 0.75, 0.75]
    assert frame.loc[1, "bytes"] == SUMMARY["bytes"]
    assert frame.loc[1, "decode_tokens_per_s"] == 598.5 and pd.isna(frame.loc[2, "decode_tokens_per_s"])


def test_of_a_model_that_does_not_see_nothing_is_said_of_images() -> None:
    row = make_row("fp32", vision_cosine=None)
    frame = make_table(make_evidence([row]), [RowSpec("fp32", True, {"vision_cosine": 0.99})])
    assert frame["vision_cosine"].isna().all()
    assert list(frame["verdict"]) == ["reference", "pass"]


def test_a_named_cause_fails_a_row_and_stands_beside_the_reason() -> None:
    frame = made(GOOD, RowSpec("int4", True, {"findings": 0}), findings=("ids are shifted", "norm is zero"))
    assert list(frame["findings"])[1:] == [0, 2]
    assert frame.loc[2, "reason"] == "findings 2, at most 0 wanted"
    assert frame.loc[2, "cause"] == "ids are shifted; norm is zero"


def test_findings_of_a_row_without_a_diagnosis_are_not_counted_as_none() -> None:
    row = make_row("onnxruntime", diagnosed=False)
    frame = make_table(make_evidence([row]), [RowSpec("onnxruntime", True, {"findings": 0})])
    assert pd.isna(frame.loc[1, "findings"]) and frame.loc[1, "verdict"] == "pass"


def test_table_without_labels_or_answers_survives_its_file(tmp_path: Path) -> None:
    """Nothing of the bundle was measured; the columns keep their kinds, so that models' files fit together."""
    evidence = make_evidence([make_row("int4", **(dict.fromkeys(SUMMARY) | {"fault": "it crashed", "labelled": 0}))])
    evidence.manifests["reference"].results |= {"labelled": 0, "right": 0}
    frame = make_table(evidence, [RowSpec("int4", False, {})])
    assert list(frame["verdict"]) == ["reference", "FAIL"]
    write_table(frame, tmp_path / "summary.csv")
    read = read_table(tmp_path / "summary.csv")
    pd.testing.assert_frame_equal(read, pd.read_parquet(tmp_path / "summary.parquet"), check_dtype=False)
    assert read["task_accuracy"].isna().all()


@pytest.mark.parametrize("name", ["m", "007", "1.10", "null", "NA", "nan", "true"])
def test_csv_and_parquet_give_back_what_was_written(name: str, tmp_path: Path) -> None:
    """config.yaml takes these as names of models and of variants; no file must make numbers or holes of them."""
    frame = made(RowSpec(name, True, GOOD.gates), BAD, findings=('norm "n", is\nzero',), model=name)
    write_table(frame, tmp_path / "summary.csv")
    for read in (read_table(tmp_path / "summary.csv"), pd.read_parquet(tmp_path / "summary.parquet")):
        pd.testing.assert_frame_equal(read, frame, check_dtype=False)
        assert list(read["model"]) == [name] * 3
        assert list(read["variant"]) == ["pytorch", name, "int4"]


def test_joined_tables_stand_under_each_other(tmp_path: Path) -> None:
    for name in ("007", "null"):
        write_table(made(GOOD, BAD, model=name), tmp_path / f"{name}.csv")
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
def test_what_is_no_table_is_called_so(stored: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "summary.csv"
    if stored is not None:
        path.write_bytes(stored)
    with pytest.raises(Hf2mnnError, match=r"summary\.csv") as refused:
        read_table(path)
    assert len(str(refused.value).splitlines()) == 1


def test_only_required_rows_fail_the_run_and_their_cause_is_told() -> None:
    assert missed_gates(made(GOOD, BAD)) == []
    strict = RowSpec("int4", True, BAD.gates)
    assert missed_gates(made(GOOD, strict)) == ["m/int4: mean_kld 0.1, at most 0.01 wanted"]
    (told,) = missed_gates(made(GOOD, strict, findings=("norm is zero",)))
    assert told == "m/int4: mean_kld 0.1, at most 0.01 wanted (cause: norm is zero)"
