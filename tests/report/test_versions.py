"""Two versions of a model: only what changed beyond its uncertainty is told, and where the first layer changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from evidence import POINTS, figure_table, layer_table, make_evidence, make_row, make_speed, write_reference
from hf2mnn.core.errors import Hf2mnnError
from hf2mnn.core.manifest import Manifest
from hf2mnn.report import versions
from hf2mnn.report.evidence import Evidence, Row
from hf2mnn.report.versions import compare_versions

Interval = tuple[float, float, float]


@pytest.fixture
def compared(tmp_path: Path):
    """Compares two rows, or two pieces of evidence, on the same PyTorch."""
    for name in ("one", "other"):
        write_reference(tmp_path / name / "reference")

    def compare(one: Row | Evidence, other: Row | Evidence, speeds: list[dict] | None = None):
        made = []
        for name, side in (("one", one), ("other", other)):
            evidence = make_evidence([side]) if isinstance(side, Row) else side
            made.append(replace(evidence, folder=tmp_path / name))
        return compare_versions(*made, speeds)

    return compare


def with_figures(**intervals: Interval) -> Row:
    return replace(make_row(), figures=figure_table(**intervals))


def told(changes: pd.DataFrame) -> list[tuple]:
    return list(changes.drop(columns="variant").itertuples(index=False, name=None))


@pytest.mark.parametrize(
    ("figure", "one", "other", "change"),
    [
        ("mean_kld", (0.10, 0.08, 0.12), (0.15, 0.13, 0.17), "worse"),
        ("mean_kld", (0.15, 0.13, 0.17), (0.10, 0.08, 0.12), "better"),
        ("mean_kld", (0.10, 0.08, 0.12), (0.15, 0.12, 0.18), None),  # the intervals touch
        ("mean_kld", (0.10, 0.08, 0.12), (0.10, 0.08, 0.12), None),
        ("task_accuracy", (0.9, 0.85, 0.95), (0.7, 0.6, 0.8), "worse"),
        ("task_accuracy", (0.7, 0.6, 0.8), (0.9, 0.85, 0.95), "better"),
        ("task_accuracy", (0.7, 0.6, 0.86), (0.9, 0.85, 0.95), None),
        ("task_accuracy", (0.7, float("nan"), float("nan")), (0.9, 0.85, 0.95), None),  # nothing known of its spread
    ],
)
def test_a_figure_is_better_or_worse_where_the_intervals_do_not_meet(
    figure: str, one: Interval, other: Interval, change: str | None, compared
) -> None:
    changes = compared(with_figures(**{figure: one}), with_figures(**{figure: other})).changes
    assert told(changes) == ([(figure, one[0], other[0], change)] if change else [])


def test_a_figure_of_one_version_only_is_left_out(compared) -> None:
    changes = compared(with_figures(mean_kld=(0.1, 0.1, 0.1)), with_figures(vision_cosine=(0.1, 0.1, 0.1))).changes
    assert told(changes) == []


def test_a_bundle_has_no_uncertainty(compared) -> None:
    assert told(compared(make_row(bytes=100), make_row(bytes=101)).changes) == [("bytes", 100, 101, "larger")]
    assert told(compared(make_row(bytes=101), make_row(bytes=100)).changes) == [("bytes", 101, 100, "smaller")]


@pytest.mark.parametrize(
    ("measure", "one", "other", "change"),
    [
        ("decode_tokens_per_s", (100.0, 95.0, 105.0), (120.0, 110.0, 130.0), "faster"),
        ("decode_tokens_per_s", (120.0, 110.0, 130.0), (100.0, 95.0, 105.0), "slower"),
        ("decode_tokens_per_s", (120.0, 105.0, 130.0), (100.0, 95.0, 105.0), None),  # the ranges touch
        ("first_token_s", (0.10, 0.09, 0.11), (0.20, 0.19, 0.21), "slower"),
        ("first_token_s", (0.20, 0.19, 0.21), (0.10, 0.09, 0.11), "faster"),
        ("bundle_mb", (30.0, 29.0, 31.0), (40.0, 39.0, 41.0), "larger"),
        ("bundle_mb", (30.0, 29.9, 30.1), (30.5, 30.4, 30.6), None),  # as the same bundle does from run to run
        ("bundle_mb", (40.0, 39.0, 41.0), (30.0, 29.0, 31.0), "smaller"),
    ],
)
def test_a_measure_is_faster_or_slower_where_the_ranges_do_not_meet(
    measure: str, one: Interval, other: Interval, change: str | None, compared
) -> None:
    sides = [make_evidence([make_row()], speed={"int4": make_speed(**{measure: seen})}) for seen in (one, other)]
    assert told(compared(*sides).changes) == ([(measure, one[0], other[0], change)] if change else [])


def test_a_version_that_was_not_timed_is_not_slower(compared) -> None:
    timed = make_evidence([make_row()], speed={"int4": make_speed(load_s=(1.0, 1.0, 1.0))})
    assert told(compared(timed, make_row()).changes) == []


def test_rows_of_one_version_only_are_named_and_not_compared(compared) -> None:
    one = make_evidence([make_row("int4"), make_row("fp16", bytes=1)])
    other = make_evidence([make_row("int4"), make_row("int3"), make_row("int2")])
    found = compared(one, other)
    assert list(found.only.values()) == [["fp16"], ["int3", "int2"]]
    assert told(found.changes) == []


def versions_of(folder: Path, one: Row, other: Row, tokens: int = 4, **larger: dict[str, float]) -> list[str]:
    """What is said of layers where PyTorch's own activations are `larger` in the other version."""
    write_reference(folder / "one" / "reference")
    write_reference(folder / "other" / "reference", tokens, larger.get("larger"))
    sides = [make_evidence([row], folder / name) for name, row in (("one", one), ("other", other))]
    return compare_versions(*sides).first_changed


def test_the_first_layer_that_changed_is_named_in_the_order_of_computation(tmp_path: Path) -> None:
    """Not of the alphabet, in which lm_head and layer 10 come before layer 2."""
    assert sorted(POINTS) != POINTS
    changed = dict.fromkeys(POINTS[1:], 0.5)
    torch, int4 = versions_of(tmp_path, make_row(), make_row(), larger=changed)
    assert torch == f"pytorch: {POINTS[1]} is the first that changed (text probe): by 0.5 of its size"
    assert int4 == "int4: no layer's own error changed"


def test_a_bundle_without_layers_does_not_hide_what_changed(tmp_path: Path) -> None:
    """The first variant did not run, so its diagnosis has a table of layers, and nothing in it."""
    broken = replace(make_row("int2"), layers=layer_table(points=[]))
    write_reference(tmp_path / "one" / "reference")
    write_reference(tmp_path / "other" / "reference", larger={"lm_head": 0.5})
    sides = [make_evidence([broken, make_row()], tmp_path / name) for name in ("one", "other")]
    said = compare_versions(*sides).first_changed
    assert said[0].startswith("pytorch: lm_head is the first that changed")
    assert [sentence for sentence in said if sentence.startswith("int2: ")] == []


def test_rounding_is_no_change_of_a_layer(tmp_path: Path) -> None:
    torch, _ = versions_of(tmp_path, make_row(), make_row(), larger={"lm_head": 1e-6})
    assert torch == "pytorch: every layer is the same"


def test_probes_of_other_texts_are_not_laid_side_by_side(tmp_path: Path) -> None:
    torch, _ = versions_of(tmp_path, make_row(), make_row(), tokens=5)
    assert torch == "pytorch: the text probe is not the same in both, so their layers cannot be laid side by side"


def test_the_first_layer_whose_own_error_changed_is_named(tmp_path: Path) -> None:
    """Errors that are small or nearly alike are what another release rounds otherwise."""
    one = replace(make_row(), layers=layer_table({POINTS[0]: 2e-6, POINTS[1]: 0.030, POINTS[2]: 0.02, "lm_head": 0.3}))
    other = replace(make_row(), layers=layer_table({POINTS[0]: 8e-6, POINTS[1]: 0.035, POINTS[2]: 0.5, "lm_head": 0.9}))
    assert versions_of(tmp_path, one, other)[1] == (
        f"int4: {POINTS[2]} is the first whose own error changed: 0.02 to 0.5"
    )


def test_without_a_diagnosis_no_layer_is_called_the_first(tmp_path: Path) -> None:
    """Only a diagnosis knows the order; by name, lm_head would be the first."""
    bare = make_row("onnxruntime", diagnosed=False)
    (torch,) = versions_of(tmp_path, bare, bare, larger=dict.fromkeys(POINTS[1:], 0.5))
    assert torch == "pytorch: layers changed (text probe); only a variant that was diagnosed tells which is the first"


def test_a_bundle_that_does_not_run_any_more_is_told(compared) -> None:
    """It has no figures that could be worse."""
    broken = replace(make_row(fault="it crashed"), figures=figure_table(), layers=layer_table(points=[]))
    assert "int4: does not run any more: it crashed" in compared(make_row(), broken).first_changed
    assert "int4: runs now" in compared(broken, make_row()).first_changed


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("machine", {"cpu": "another", "cores": 2}, "speed: timed on another machine, so not compared"),
        ("threads", 1, "speed: timed with other settings, so not compared"),
    ],
)
def test_times_of_other_machines_or_settings_are_not_compared(key: str, value: object, said: str, compared) -> None:
    sides = [make_evidence([make_row()], speed={"int4": make_speed(load_s=(seen, seen, seen))}) for seen in (1.0, 2.0)]
    common = {"machine": {"cpu": "one", "cores": 2}, "threads": 2}
    sides[0].speed.update(common)
    sides[1].speed.update(common)
    assert told(compared(*sides).changes) == [("load_s", 1.0, 2.0, "slower")]
    sides[1].speed[key] = value
    found = compared(*sides)
    assert told(found.changes) == []
    assert said in found.first_changed


def test_times_of_both_in_turns_come_before_those_of_two_runs(compared, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many threads and tokens as the first was timed with; only bundles that both have."""
    asked = []

    def timed(one: dict, other: dict, settings: dict, python: Path | None) -> list[dict]:
        asked.append((list(one), list(other), settings["threads"]))
        return [{"int4": make_speed(load_s=(seen, seen, seen))} for seen in (1.0, 2.0)]

    monkeypatch.setattr(versions, "time_versions", timed)
    rows = [replace(make_row(name), manifests={"bundle": Manifest("quantize")}) for name in ("int4", "int3")]
    one = make_evidence([make_row("onnxruntime"), *rows], speed={"int4": make_speed(load_s=(1.0, 1.0, 1.0))})
    one.speed["threads"] = 2
    other = make_evidence([make_row("onnxruntime"), rows[0]], speed={"int4": make_speed(load_s=(1.0, 1.0, 1.0))})
    other.speed["threads"] = 2
    assert told(compared(one, other).changes) == []
    assert told(compared(one, other, versions.time_both(one, other)).changes) == [("load_s", 1.0, 2.0, "slower")]
    assert asked == [(["int4"], ["int4"], 2)]


def test_versions_that_cannot_be_timed_are_refused() -> None:
    timed = make_evidence([make_row()], speed={"int4": make_speed()})
    with pytest.raises(Hf2mnnError, match=r"speed\.json"):
        versions.time_both(make_evidence([make_row()]), timed)
    with pytest.raises(Hf2mnnError, match="no bundle of one name"):
        versions.time_both(timed, timed)
