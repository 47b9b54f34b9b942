"""The diagnosis: its files, and its findings on a bundle that does not run."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from hf2mnn.core.errors import BundleError, BundleFault, EngineError
from hf2mnn.core.manifest import Manifest
from hf2mnn.evaluation import causes, error_budget, layers
from hf2mnn.evaluation.findings import BUDGET, FINDINGS, LAYERS, Finding
from hf2mnn.stages.diagnose import run as diagnose

SETTING, LAYER = Finding("settings", "image_mean", "a setting"), Finding("decoder", "p", "a layer")


def run(shapes: Path, destination: Path, bundle: Path | None = None) -> list[Finding]:
    bundle = bundle or shapes / "bundles" / "fp32"
    return diagnose(
        shapes / "reference" / "evaluation", shapes / "onnx", shapes / "baseline", bundle, destination, 1, 60
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Replace measurements by constants."""
    monkeypatch.setattr(causes, "wrong_settings", lambda *_: [SETTING])
    monkeypatch.setattr(layers, "compare_layers", lambda *_: pd.DataFrame([["text"]], columns=["probe"]))
    monkeypatch.setattr(causes, "wrong_layers", lambda _: [LAYER])
    monkeypatch.setattr(error_budget, "budget", lambda *_: pd.DataFrame([["total"]], columns=["source"]))
    return monkeypatch


def test_all_findings_are_written_in_the_order_of_the_checks(
    shapes: Path, tmp_path: Path, quick: pytest.MonkeyPatch
) -> None:
    assert run(shapes, tmp_path / "out") == [SETTING, LAYER]
    assert json.loads((tmp_path / "out" / FINDINGS).read_text()) == [
        {"part": "settings", "point": "image_mean", "message": "a setting"},
        {"part": "decoder", "point": "p", "message": "a layer"},
    ]
    assert pd.read_parquet(tmp_path / "out" / LAYERS)["probe"].tolist() == ["text"]
    assert pd.read_parquet(tmp_path / "out" / BUDGET)["source"].tolist() == ["total"]
    manifest = Manifest.load(tmp_path / "out")
    manifest.verify()
    assert manifest.results == {"findings": ["a setting", "a layer"]}
    assert manifest.inputs.keys() == {"reference", "onnx", "baseline", "bundle"}


def test_a_bundle_that_the_engine_refuses_is_a_finding_and_earlier_measurements_stay(
    shapes: Path, tmp_path: Path, quick: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise BundleFault("the bundle answers garbage")

    garbage = Finding("engine", None, "the bundle answers garbage")
    quick.setattr(error_budget, "budget", refuse)
    assert run(shapes, tmp_path / "later") == [SETTING, LAYER, garbage]
    assert len(pd.read_parquet(tmp_path / "later" / LAYERS)) == 1
    quick.setattr(layers, "compare_layers", refuse)
    assert run(shapes, tmp_path / "first") == [SETTING, garbage]
    assert list(pd.read_parquet(tmp_path / "first" / LAYERS).columns) == layers.COLUMNS
    assert list(pd.read_parquet(tmp_path / "first" / BUDGET).columns) == error_budget.COLUMNS


def test_an_engine_that_was_stopped_is_no_finding(shapes: Path, tmp_path: Path, quick: pytest.MonkeyPatch) -> None:
    """A shortage of memory is no fault of the bundle."""

    def stop(*_: object) -> None:
        raise EngineError("MNN's engine was stopped")

    quick.setattr(error_budget, "budget", stop)
    with pytest.raises(EngineError, match="stopped"):
        run(shapes, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_was_changed_is_not_diagnosed(shapes: Path, tmp_path: Path, quick: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for path in (shapes / "bundles" / "fp32").iterdir():
        (bundle / path.name).write_bytes(path.read_bytes())
    (bundle / "llm_config.json").write_text("{}")
    with pytest.raises(BundleError, match=r"llm_config\.json differs from its entry"):
        run(shapes, tmp_path / "out", bundle)
