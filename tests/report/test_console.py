"""Tests of terminal output, which must not be cut in the logs of batch systems."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from evidence import POINTS, layer_table, make_evidence, make_speed, make_variant
from hf2mnn.core.errors import ManifestError
from hf2mnn.core.manifest import Manifest
from hf2mnn.figures import readable_size
from hf2mnn.report.console import cell, print_layers, print_stages, print_table, print_versions
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
        messages=["pytorch: no layer changed", "only in results/b: int3, int2"],
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


STAGES = ("fetch", "reference", "convert", "quantize", "evaluate")
RESOURCES = {
    "bundles/int4": ("quantize", 700.0, 1300.0, 2000.0, 900_000_000),
    "checkpoint": ("fetch", 0.04, 0.02, 50.0, 10_000),
    "evaluation/int4": ("evaluate", 3600.0, 7000.0, 5000.0, 2_000_000),
    "graphs": ("convert", 9.0, 8.0, 700.0, 100_000_000),
    "reference/evaluation": ("reference", 90.0, 170.0, 15_000.0, 20_000_000),
    "polished/int4": ("a stage of a later version", 1.0, 1.0, 1.0, 1),
}


def write_manifests(model: Path) -> Path:
    for path, (stage, seconds, cpu, peak, size) in RESOURCES.items():
        manifest = Manifest(stage, seconds=seconds, cpu_seconds=cpu, peak_rss_mb=peak)
        manifest.outputs = {"file": {"size": size, "sha256": ""}}
        (model / path).mkdir(parents=True)
        manifest.write(model / path)
    return model


def printed_stages(results: Path) -> str:
    file = io.StringIO()
    print_stages(results, STAGES, file)
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    return text


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


def test_stages_are_in_the_order_of_the_pipeline_with_their_total(tmp_path: Path) -> None:
    write_manifests(tmp_path / "a-model")
    assert rows_of(printed_stages(tmp_path)) == [
        ["checkpoint", "0.0 s", "0.0 s", "50.0 MB", "10.0 kB"],
        ["reference/evaluation", "90 s", "2 min 50 s", "15.00 GB", "20.0 MB"],
        ["graphs", "9.0 s", "8.0 s", "700.0 MB", "100.0 MB"],
        ["bundles/int4", "12 min", "22 min", "2.00 GB", "900.0 MB"],
        ["evaluation/int4", "60 min", "117 min", "5.00 GB", "2.0 MB"],
        ["polished/int4", "1.0 s", "1.0 s", "1.0 MB", "1 B"],
        ["total", "73 min", "2 h 21 min", "15.00 GB", "1.02 GB"],
    ]


def test_each_model_has_a_table_of_resources(tmp_path: Path) -> None:
    write_manifests(tmp_path / "one")
    write_manifests(tmp_path / "two")
    write_manifests(tmp_path / "one" / ".graphs.partial")
    (tmp_path / "bench").mkdir()
    text = printed_stages(tmp_path)
    assert [line.split(":")[0] for line in text.splitlines() if "resources of each stage" in line] == ["one", "two"]
    assert len(rows_of(text)) == 2 * (len(RESOURCES) + 1)


def test_manifests_without_cpu_time_have_a_dash(tmp_path: Path) -> None:
    for path in write_manifests(tmp_path / "old").rglob("manifest.json"):
        stored = json.loads(path.read_text())
        del stored["cpu_seconds"]
        path.write_text(json.dumps(stored))
    assert {row[2] for row in rows_of(printed_stages(tmp_path))} == {"-"}


def test_folder_without_stages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no stage has finished"):
        print_stages(tmp_path, STAGES)
