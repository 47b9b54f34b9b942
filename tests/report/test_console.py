"""Tests of terminal output, which must not be cut in the logs of batch systems."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from evidence import POINTS, layer_table, make_evidence, make_speed, make_variant
from hf2mnn.figures import readable_size
from hf2mnn.report.console import cell, print_layers, print_table, print_versions
from hf2mnn.report.table import VariantSpec, make_table
from hf2mnn.report.versions import COLUMNS, Versions

LONG = "int4-hqq-block32-vision-int8-symmetric"


def printed(function: Callable[..., None], content: Any) -> str:
    """Return what a function prints to a file: no colours, no line over 120 characters, no cell cut."""
    file = io.StringIO()
    function(content, file)
    text = file.getvalue()
    assert max(len(line) for line in text.splitlines()) <= 120
    assert "\x1b" not in text
    assert "…" not in text
    return text


def joined(text: str) -> str:
    """Join wrapped lines."""
    return " ".join(text.split())


def table(name: str = "int4", gate: float = 0.01, findings: tuple[str, ...] = ()) -> pd.DataFrame:
    variants = [make_variant("onnxruntime", mean_kld=7.5e-14), make_variant(name, findings)]
    evidence = make_evidence(variants, speed={name: make_speed(decode_tokens_per_s=(12345.6, 1.0, 1.0))})
    return make_table(evidence, [VariantSpec("onnxruntime", True, {}), VariantSpec(name, True, {"mean_kld": gate})])


@pytest.mark.parametrize("name", ["int4", LONG])
def test_all_figures_are_printed_for_any_length_of_name(name: str) -> None:
    text = printed(print_table, table(name))
    for word in ("pytorch", "onnxruntime", "95.0 %", "7.5e-14", "0.99000", "4.5 MB", "12346", "reference", "FAIL"):
        assert word in text
    assert f"  {name}: mean_kld 0.1, at most 0.01 wanted\n" in text


def test_causes_are_printed_whether_a_variant_passes_or_not() -> None:
    causes = ("model.language_model.layers.2.self_attn.q_proj (linear layer): it has the weights of layers.1 [sic]",)
    for gate, reason in ((0.01, True), (1.0, False)):
        text = joined(printed(print_table, table(gate=gate, findings=causes)))
        assert f"int4, cause: {causes[0]}" in text
        assert ("at most 0.01 wanted" in text) == reason


def test_each_model_has_its_own_table() -> None:
    text = printed(print_table, pd.concat([table(), table().assign(model="007")]))
    assert [line.split(":")[0] for line in text.splitlines() if "compared with PyTorch" in line] == ["m", "007"]


@pytest.mark.parametrize(
    ("column", "value", "text"),
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
def test_cells_have_significant_digits(column: str, value: object, text: str) -> None:
    assert cell(column, value) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (4_515_196, "4.5 MB"), (4_400_000_000, "4.40 GB")],
)
def test_sizes(size: int, text: str) -> None:
    assert readable_size(size) == text


DEEP = [
    "model.visual.blocks.31.attn.context",
    "model.language_model.layers.27.post_attention_layernorm",
    "model.language_model.layers.27",
    "lm_head",
]


def test_layers_of_a_real_model_fit() -> None:
    layers = layer_table({"lm_head": 0.0654}, DEEP).assign(operator="rotary position embedding")
    text = printed(print_layers, make_evidence([replace(make_variant(), layers=layers)]))
    for word in ("blocks.31.attn.context", "post_attention_layernorm", "6.5e-02", "2.0e-02", "0.99980", "1.0e-01"):
        assert word in text
    assert "int4: all operators are within tolerance" in text


@pytest.mark.parametrize(
    ("errors", "first"),
    [({POINTS[2]: 0.5, "lm_head": 0.9}, POINTS[2]), ({"lm_head": 0.9, POINTS[0]: 0.2}, POINTS[0])],
    ids=["decoder", "vision tower before decoder"],
)
def test_first_operator_out_of_tolerance_is_printed(errors: dict[str, float], first: str) -> None:
    evidence = make_evidence([replace(make_variant(), layers=layer_table(errors))])
    line = f"int4: first out of tolerance: {first} (linear layer): relative error {errors[first]:.2g}"
    assert line in joined(printed(print_layers, evidence))


def test_detail_of_the_first_operator_out_of_tolerance_is_printed() -> None:
    layers = layer_table({"lm_head": 0.9}).assign(detail="all zero")
    text = printed(print_layers, make_evidence([replace(make_variant(), layers=layers)]))
    assert "int4: first out of tolerance: lm_head (linear layer): all zero\n" in text


def test_variants_without_a_diagnosis_have_no_layers() -> None:
    text = printed(print_layers, make_evidence([make_variant("onnxruntime", diagnosed=False)]))
    assert "onnxruntime" not in text


def versions(*changes: tuple) -> Versions:
    return Versions(
        before="results/a",
        after="results/b",
        changes=pd.DataFrame(changes, columns=COLUMNS),
        changed_inputs=["tools: no change"],
        messages=["pytorch: no layer changed"],
        only={"results/a": [], "results/b": ["int3", "int2"]},
    )


def test_changes_between_versions_are_printed() -> None:
    text = printed(print_versions, versions((LONG, "rms_probability_change", 0.1, 0.2, "worse")))
    row = next(line for line in text.splitlines() if LONG in line)
    cells = [part.strip() for part in row.strip("│").split("│")]
    assert cells == [LONG, "rms_probability_change", "0.1", "0.2", "worse"]
    assert "tools: no change\npytorch: no layer changed\n" in text
    assert "only in results/b: int3, int2\n" in text and "only in results/a" not in text


def test_versions_without_changes() -> None:
    text = printed(print_versions, versions())
    assert "Changes beyond uncertainty, results/a to results/b: none\n" in text
