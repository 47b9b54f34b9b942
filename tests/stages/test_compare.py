"""Tests of the `compare` stage: which bundles of two versions it times."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from evidence import make_evidence, make_speed, make_variant
from hf2mnn.core.errors import Hf2mnnError
from hf2mnn.core.manifest import Manifest
from hf2mnn.report.evidence import BUNDLES
from hf2mnn.stages.compare import _time_both


def test_shared_bundles_are_timed_with_the_settings_of_the_first_version(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def time_versions(before: dict, after: dict, settings: dict, python: Path | None) -> list[dict]:
        calls.append((before, after, settings["threads"], python))
        return [{"int4": make_speed(load_s=(median, median, median))} for median in (1.0, 2.0)]

    monkeypatch.setattr("hf2mnn.evaluation.benchmark.time_versions", time_versions)
    onnx = make_variant("onnxruntime")
    bundles = [replace(make_variant(name), manifests={BUNDLES: Manifest("quantize")}) for name in ("int4", "int3")]
    before = make_evidence([onnx, *bundles], Path("results/a"), {"int4": make_speed()})
    after = make_evidence([onnx, bundles[0]], Path("results/b"), {"int4": make_speed()})
    before.speed["threads"], after.speed["threads"] = 2, 4
    speeds = _time_both(before, after, Path("python"))
    assert [side["int4"]["measures"]["load_s"]["median"] for side in speeds] == [1.0, 2.0]
    folders = ({"int4": Path(f"results/{name}/bundles/int4")} for name in "ab")
    assert calls == [(*folders, 2, Path("python"))]


def test_versions_that_cannot_be_timed_are_refused() -> None:
    timed = make_evidence([make_variant()], speed={"int4": make_speed()})
    with pytest.raises(Hf2mnnError, match=r"results/m/benchmark is missing"):
        _time_both(make_evidence([make_variant()]), timed, None)
    with pytest.raises(Hf2mnnError, match="no bundle with the same name"):
        _time_both(timed, timed, None)
