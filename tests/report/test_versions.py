"""Tests of the comparison of versions, where only changes beyond uncertainty are reported, and of its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from evidence import POINTS, figure_table, layer_table, make_evidence, make_speed, make_variant, write_reference
from hf2mnn.core.manifest import Manifest
from hf2mnn.report.console import HEADS
from hf2mnn.report.evidence import REFERENCE_FOLDER, Evidence, VariantEvidence
from hf2mnn.report.table import VariantSpec, make_table
from hf2mnn.report.versions import Versions, changed_inputs, changes_page, compare_versions, write_changes

Interval = tuple[float, float, float]


Compare = Callable[..., Versions]


@pytest.fixture
def compare(tmp_path: Path) -> Compare:
    """Return a function that compares two variants, or two pieces of evidence, with the same reference."""
    for name in ("before", "after"):
        write_reference(tmp_path / name / REFERENCE_FOLDER)

    def run(before: VariantEvidence | Evidence, after: VariantEvidence | Evidence, speeds: list | None = None):
        sides = []
        for name, side in (("before", before), ("after", after)):
            evidence = make_evidence([side]) if isinstance(side, VariantEvidence) else side
            sides.append(replace(evidence, folder=tmp_path / name))
        return compare_versions(*sides, speeds)

    return run


def with_figures(**intervals: Interval) -> VariantEvidence:
    return replace(make_variant(), figures=figure_table(**intervals))


def with_speed(**measures: Interval) -> Evidence:
    return make_evidence([make_variant()], speed={"int4": make_speed(**measures)})


def changes_of(versions: Versions) -> list[tuple]:
    return list(versions.changes.drop(columns="variant").itertuples(index=False, name=None))


@pytest.mark.parametrize(
    ("figure", "before", "after", "change"),
    [
        ("mean_kld", (0.10, 0.08, 0.12), (0.15, 0.13, 0.17), "worse"),
        ("mean_kld", (0.15, 0.13, 0.17), (0.10, 0.08, 0.12), "better"),
        ("mean_kld", (0.10, 0.08, 0.12), (0.15, 0.12, 0.18), None),  # the intervals touch
        ("mean_kld", (0.10, 0.08, 0.12), (0.10, 0.08, 0.12), None),
        ("task_accuracy", (0.9, 0.85, 0.95), (0.7, 0.6, 0.8), "worse"),
        ("task_accuracy", (0.7, 0.6, 0.8), (0.9, 0.85, 0.95), "better"),
        ("task_accuracy", (0.7, 0.6, 0.86), (0.9, 0.85, 0.95), None),
        ("task_accuracy", (0.7, float("nan"), float("nan")), (0.9, 0.85, 0.95), None),  # unknown uncertainty
    ],
)
def test_figures_with_disjoint_intervals_changed(
    figure: str, before: Interval, after: Interval, change: str | None, compare: Compare
) -> None:
    versions = compare(with_figures(**{figure: before}), with_figures(**{figure: after}))
    assert changes_of(versions) == ([(figure, before[0], after[0], change)] if change else [])


def test_figures_of_one_version_only_are_not_compared(compare: Compare) -> None:
    versions = compare(with_figures(mean_kld=(0.1, 0.1, 0.1)), with_figures(vision_cosine=(0.1, 0.1, 0.1)))
    assert changes_of(versions) == []


def test_sizes_have_no_uncertainty(compare: Compare) -> None:
    small, large = make_variant(bytes=100), make_variant(bytes=101)
    assert changes_of(compare(small, large)) == [("bytes", 100, 101, "larger")]
    assert changes_of(compare(large, small)) == [("bytes", 101, 100, "smaller")]


@pytest.mark.parametrize(
    ("measure", "before", "after", "change"),
    [
        ("decode_tokens_per_s", (100.0, 95.0, 105.0), (120.0, 110.0, 130.0), "faster"),
        ("decode_tokens_per_s", (120.0, 110.0, 130.0), (100.0, 95.0, 105.0), "slower"),
        ("decode_tokens_per_s", (120.0, 105.0, 130.0), (100.0, 95.0, 105.0), None),  # the ranges touch
        ("first_token_s", (0.10, 0.09, 0.11), (0.20, 0.19, 0.21), "slower"),
        ("first_token_s", (0.20, 0.19, 0.21), (0.10, 0.09, 0.11), "faster"),
        ("bundle_mb", (30.0, 29.0, 31.0), (40.0, 39.0, 41.0), "larger"),
        ("bundle_mb", (30.0, 29.9, 30.1), (30.5, 30.4, 30.6), None),  # the variation between runs of one bundle
        ("bundle_mb", (40.0, 39.0, 41.0), (30.0, 29.0, 31.0), "smaller"),
    ],
)
def test_measures_with_disjoint_ranges_changed(
    measure: str, before: Interval, after: Interval, change: str | None, compare: Compare
) -> None:
    versions = compare(with_speed(**{measure: before}), with_speed(**{measure: after}))
    assert changes_of(versions) == ([(measure, before[0], after[0], change)] if change else [])


def test_version_without_a_benchmark_has_no_changed_speeds(compare: Compare) -> None:
    assert changes_of(compare(with_speed(load_s=(1.0, 1.0, 1.0)), make_variant())) == []


def test_variants_of_one_version_only_are_listed(compare: Compare, tmp_path: Path) -> None:
    before = make_evidence([make_variant("int4"), make_variant("fp16", bytes=1)])
    after = make_evidence([make_variant("int4"), make_variant("int3"), make_variant("int2")])
    versions = compare(before, after)
    only = [message for message in versions.messages if message.startswith("only in ")]
    assert only == [f"only in {tmp_path / 'before'}: fp16", f"only in {tmp_path / 'after'}: int3, int2"]
    assert not any("only in" in message for message in compare(before, before).messages)
    assert changes_of(versions) == []


def messages_of(
    folder: Path,
    before: list[VariantEvidence],
    after: list[VariantEvidence],
    tokens: int = 4,
    larger: dict[str, float] | None = None,
) -> list[str]:
    """Return the messages for an `after` whose probe has `tokens` and `larger` activations of PyTorch."""
    write_reference(folder / "before" / REFERENCE_FOLDER)
    write_reference(folder / "after" / REFERENCE_FOLDER, tokens, larger)
    return compare_versions(make_evidence(before, folder / "before"), make_evidence(after, folder / "after")).messages


def test_first_changed_layer_follows_the_order_of_computation(tmp_path: Path) -> None:
    assert sorted(POINTS) != POINTS, "lm_head and layer 10 would come before layer 2"
    variants = [make_variant()]
    torch, int4 = messages_of(tmp_path, variants, variants, larger=dict.fromkeys(POINTS[1:], 0.5))
    assert torch == f"pytorch: first changed layer: {POINTS[1]} (text probe), relative error 0.5"
    assert int4 == "int4: no local error changed"


def test_bundle_that_does_not_run_has_no_layers_to_compare(tmp_path: Path) -> None:
    """Its diagnosis has an empty table of layers; the next variant gives the order of computation."""
    variants = [replace(make_variant("int2"), layers=layer_table(points=[])), make_variant()]
    messages = messages_of(tmp_path, variants, variants, larger={"lm_head": 0.5})
    assert messages[0].startswith("pytorch: first changed layer: lm_head")
    assert [message for message in messages if message.startswith("int2: ")] == []


def test_rounding_is_not_a_changed_layer(tmp_path: Path) -> None:
    torch, _ = messages_of(tmp_path, [make_variant()], [make_variant()], larger={"lm_head": 1e-6})
    assert torch == "pytorch: no layer changed"


def test_different_probes_are_not_compared(tmp_path: Path) -> None:
    torch, _ = messages_of(tmp_path, [make_variant()], [make_variant()], tokens=5)
    assert torch == "pytorch: layers not compared: the text probes differ"


def test_first_changed_local_error_ignores_rounding(tmp_path: Path) -> None:
    errors = [
        {POINTS[0]: 2e-6, POINTS[1]: 0.030, POINTS[2]: 0.02, "lm_head": 0.3},
        {POINTS[0]: 8e-6, POINTS[1]: 0.035, POINTS[2]: 0.5, "lm_head": 0.9},
    ]
    before, after = ([replace(make_variant(), layers=layer_table(local))] for local in errors)
    message = messages_of(tmp_path, before, after)[1]
    assert message == f"int4: first changed local error: {POINTS[2]}, 0.02 to 0.5"


def test_without_a_diagnosis_the_first_changed_layer_is_unknown(tmp_path: Path) -> None:
    variants = [make_variant("onnxruntime", diagnosed=False)]
    (torch,) = messages_of(tmp_path, variants, variants, larger=dict.fromkeys(POINTS[1:], 0.5))
    assert torch == "pytorch: layers changed (text probe); the first is unknown without a diagnosed variant"


def test_bundle_that_runs_in_one_version_only(compare: Compare) -> None:
    broken = replace(make_variant(fault="it crashed"), figures=figure_table(), layers=layer_table(points=[]))
    assert "int4: does not run any more: it crashed" in compare(make_variant(), broken).messages
    assert "int4: runs now" in compare(broken, make_variant()).messages


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("machine", {"cpu": "another", "cores": 2}, "speed not compared: timed on different machines"),
        ("threads", 1, "speed not compared: timed with different settings"),
    ],
)
def test_speeds_of_other_machines_or_settings_are_not_compared(
    key: str, value: object, message: str, compare: Compare
) -> None:
    sides = [with_speed(load_s=(median, median, median)) for median in (1.0, 2.0)]
    for side in sides:
        side.speed.update({"machine": {"cpu": "one", "cores": 2}, "threads": 2})
    assert changes_of(compare(*sides)) == [("load_s", 1.0, 2.0, "slower")]
    sides[1].speed[key] = value
    versions = compare(*sides)
    assert changes_of(versions) == []
    assert message in versions.messages
    interleaved = [side.speed["bundles"] for side in sides]
    assert changes_of(compare(*sides, interleaved)) == [("load_s", 1.0, 2.0, "slower")]


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
