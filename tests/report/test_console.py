"""The comparison in a terminal, and in the log of a batch system, where nothing may be cut."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from evidence import POINTS, layer_table, make_evidence, make_row, make_speed
from hf2mnn.report.console import cell, print_layers, print_table, print_versions, readable_size
from hf2mnn.report.table import RowSpec, make_table
from hf2mnn.report.versions import COLUMNS, Versions

LONG = "int4-hqq-block32-vision-int8-symmetric"


def printed(show: Callable[..., None], what: Any) -> str:
    """What is printed where it is no terminal: no colours, no line too wide, no cell cut."""
    file = io.StringIO()
    show(what, file)
    text = file.getvalue()
    assert max(len(line) for line in text.splitlines()) <= 120
    assert "\x1b" not in text
    assert "…" not in text
    return text


def words(text: str) -> str:
    """In one line, for sentences that go on in the next."""
    return " ".join(text.split())


def table(name: str = "int4", gate: float = 0.01, findings: tuple[str, ...] = ()) -> pd.DataFrame:
    rows = [make_row("onnxruntime", mean_kld=7.5e-14), make_row(name, findings)]
    evidence = make_evidence(rows, speed={name: make_speed(decode_tokens_per_s=(12345.6, 1.0, 1.0))})
    return make_table(evidence, [RowSpec("onnxruntime", True, {}), RowSpec(name, True, {"mean_kld": gate})])


@pytest.mark.parametrize("name", ["int4", LONG])
def test_every_figure_is_there_however_long_the_name(name: str) -> None:
    text = printed(print_table, table(name))
    for word in ("pytorch", "onnxruntime", "95.0 %", "7.5e-14", "0.99000", "4.5 MB", "12346", "reference", "FAIL"):
        assert word in text
    assert f"  {name}: mean_kld 0.1, at most 0.01 wanted\n" in text


def test_causes_are_shown_of_rows_that_fail_and_of_those_that_pass() -> None:
    causes = ("model.language_model.layers.2.self_attn.q_proj (linear layer): it reads the weights of layers.1 [sic]",)
    for gate, reason in ((0.01, True), (1.0, False)):
        text = words(printed(print_table, table(gate=gate, findings=causes)))
        assert f"int4, cause: {causes[0]}" in text
        assert ("at most 0.01 wanted" in text) == reason


def test_models_have_a_table_each() -> None:
    text = printed(print_table, pd.concat([table(), table().assign(model="007")]))
    assert [line.split(":")[0] for line in text.splitlines() if "against PyTorch fp32" in line] == ["m", "007"]


@pytest.mark.parametrize(
    ("column", "value", "shown"),
    [
        ("top1_agreement", 0.9995, "100.0 %"),
        ("task_accuracy", 0.0, "0.0 %"),
        ("mean_kld", 0.0, "0"),
        ("mean_kld", 0.000433, "0.00043"),
        ("cache_parity", 1.2e-12, "1.2e-12"),
        ("vision_cosine", 0.999944, "0.99994"),
        ("decode_tokens_per_s", 598.57, "599"),
        ("decode_tokens_per_s", 3.14, "3.1"),
        ("bytes", np.int64(4_515_196), "4.5 MB"),
        ("bytes", pd.NA, "-"),
        ("task_accuracy", None, "-"),
        ("mean_kld", float("nan"), "-"),
        ("verdict", "FAIL", "FAIL"),
    ],
)
def test_a_cell_has_the_digits_that_mean_something(column: str, value: object, shown: str) -> None:
    assert cell(column, value) == shown


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (4_515_196, "4.5 MB"), (4_400_000_000, "4.40 GB")],
)
def test_sizes(size: int, shown: str) -> None:
    assert readable_size(size) == shown


DEEP = [
    "model.visual.blocks.31.attn.context",
    "model.language_model.layers.27.post_attention_layernorm",
    "model.language_model.layers.27",
    "lm_head",
]


def test_layers_fit_with_every_figure() -> None:
    """The names of a real model are longer than the demo's."""
    layers = layer_table({"lm_head": 0.0654}, DEEP).assign(operator="rotary position embedding")
    text = printed(print_layers, make_evidence([replace(make_row(), layers=layers)]))
    for word in ("blocks.31.attn.context", "post_attention_layernorm", "6.5e-02", "2.0e-02", "0.99980", "1.0e-01"):
        assert word in text
    assert "int4: every operator stays within its tolerance" in text


@pytest.mark.parametrize(
    ("wrong", "first"),
    [({POINTS[2]: 0.5, "lm_head": 0.9}, POINTS[2]), ({"lm_head": 0.9, POINTS[0]: 0.2}, POINTS[0])],
    ids=["decoder", "vision comes first"],
)
def test_the_first_point_out_of_tolerance_is_named(wrong: dict[str, float], first: str) -> None:
    text = words(printed(print_layers, make_evidence([replace(make_row(), layers=layer_table(wrong))])))
    said = f"int4: the first to leave tolerance is {first} (linear layer): off by {wrong[first]:.2g} of its size"
    assert said in text


def test_what_the_first_point_looks_like_is_told_with_it() -> None:
    layers = layer_table({"lm_head": 0.9}).assign(looks="it is all zero")
    text = printed(print_layers, make_evidence([replace(make_row(), layers=layers)]))
    assert "int4: the first to leave tolerance is lm_head (linear layer): it is all zero\n" in text


def test_rows_without_a_diagnosis_have_no_layers() -> None:
    text = printed(print_layers, make_evidence([make_row("onnxruntime", diagnosed=False)]))
    assert "onnxruntime" not in text


def versions(*changes: tuple) -> Versions:
    only = {"results/a": [], "results/b": ["int3", "int2"]}
    frame = pd.DataFrame(changes, columns=COLUMNS)
    return Versions("results/a", "results/b", frame, ["pytorch: every layer is the same"], only, [])


def test_changes_between_versions_are_listed() -> None:
    text = printed(print_versions, versions((LONG, "rms_probability_change", 0.1, 0.2, "worse")))
    row = next(line for line in text.splitlines() if LONG in line)
    assert [part.strip() for part in row.strip("│").split("│")] == [
        LONG,
        "rms_probability_change",
        "0.1",
        "0.2",
        "worse",
    ]
    assert "pytorch: every layer is the same\n" in text
    assert "only in results/b: int3, int2\n" in text and "only in results/a" not in text


def test_no_change_between_versions_is_said_so() -> None:
    text = printed(print_versions, versions())
    assert "From results/a to results/b: what changed beyond its uncertainty: nothing\n" in text
