"""open_stage: verified inputs, recorded provenance, and an output folder that is published as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf2mnn.core.errors import Hf2mnnError, ManifestError
from hf2mnn.core.files import sha256
from hf2mnn.core.manifest import Manifest, stage_folder, tool_versions
from hf2mnn.core.stage import Stage, open_stage, set_command
from hf2mnn.machine.footprint import Footprint

FOOTPRINT = Footprint(500, 1.0, 10, 60)
EXPORT = Stage("export", tools=("numpy",), footprint=FOOTPRINT, inputs={"checkpoint": "fetch"})


def make_folder(path: Path, stage: str = "fetch", provenance: dict | None = None) -> Path:
    with stage_folder(path, Manifest(stage, provenance=provenance or {})) as folder:
        (folder / "weights").write_bytes(b"weights")
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "checkpoint", provenance={"checkpoint": {"commit": "c" * 40}})


def export(checkpoint: Path | None, destination: Path, **options: object) -> Manifest:
    """Run a stage that writes one file, and return its manifest."""
    with open_stage(EXPORT, destination, {"checkpoint": checkpoint}, {"opset": 20}, **options) as stage:
        (stage.folder / "graph").write_bytes(b"graph")
        stage.results["graphs"] = 1
    return Manifest.load(destination)


def test_manifest_has_inputs_settings_tools_and_results(checkpoint: Path, tmp_path: Path) -> None:
    manifest = export(checkpoint, tmp_path / "onnx", paths={"path": Path("/models/m")})
    assert manifest.stage == "export"
    assert manifest.inputs == {"checkpoint": Manifest.load(checkpoint).digest()}
    assert (manifest.settings, manifest.results) == ({"opset": 20}, {"graphs": 1})
    assert manifest.tools == tool_versions("numpy")
    assert manifest.paths == {"path": "/models/m"}
    assert manifest.provenance == {"checkpoint": {"commit": "c" * 40}}
    assert list(manifest.outputs) == ["graph"] and manifest.verify() == tmp_path / "onnx"


def test_folder_of_another_stage_is_refused(tmp_path: Path) -> None:
    """The message has the folder, its stage, and the stage that is needed."""
    graphs = make_folder(tmp_path / "graphs", "convert")
    with pytest.raises(ManifestError) as refused:
        export(graphs, tmp_path / "onnx")
    message = f"{graphs} is a folder of the stage 'convert', but 'hf2mnn export' needs one of 'fetch' as checkpoint"
    assert str(refused.value) == f"{message}: give that folder"
    assert not (tmp_path / "onnx").exists()


def test_input_without_a_declared_stage_may_be_of_any(tmp_path: Path) -> None:
    """The benchmark names its inputs after the bundles."""
    with open_stage(EXPORT, tmp_path / "out", {"int4": make_folder(tmp_path / "int4", "quantize")}) as stage:
        assert stage.inputs["int4"].stage == "quantize"


def test_changed_input_is_refused_and_nothing_is_written(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "weights").write_bytes(b"tampere")
    with pytest.raises(ManifestError, match="weights differs from its entry"):
        export(checkpoint, tmp_path / "onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_missing_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="has no manifest"):
        export(tmp_path / "nowhere", tmp_path / "onnx")


def test_unused_input_is_left_out(tmp_path: Path) -> None:
    assert export(None, tmp_path / "onnx").inputs == {}


def test_command_line_is_recorded_but_not_in_the_digest(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf2mnn.core.stage._command", [])
    called = export(checkpoint, tmp_path / "called")
    assert called.command == []
    set_command(["hf2mnn", "export", str(checkpoint)])
    manifest = export(checkpoint, tmp_path / "onnx")
    assert manifest.command == ["hf2mnn", "export", str(checkpoint)]
    assert manifest.digest() == called.digest()


def test_user_provided_files_are_hashed(checkpoint: Path, tmp_path: Path) -> None:
    """Another plan is another input."""
    plan = tmp_path / "plan.yaml"
    plan.write_text("decoder: {}\n")
    manifest = export(checkpoint, tmp_path / "onnx", files={"plan": plan})
    assert manifest.inputs["plan"] == sha256(plan)
    plan.write_text("vision: {}\n")
    assert export(checkpoint, tmp_path / "onnx", files={"plan": plan}).digest() != manifest.digest()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_failure_leaves_the_previous_state(
    error: type[BaseException], existing: bool, checkpoint: Path, tmp_path: Path
) -> None:
    before = export(checkpoint, tmp_path / "onnx") if existing else None
    with pytest.raises(error), open_stage(EXPORT, tmp_path / "onnx", {"checkpoint": checkpoint}) as stage:
        (stage.folder / "half").touch()
        raise error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", *(["onnx"] if existing else [])]
    if before:
        assert Manifest.load(tmp_path / "onnx") == before


def test_folder_with_user_files_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(Hf2mnnError, match="holds files that no stage wrote"):
        export(checkpoint, tmp_path / "home")
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.tex"]


def test_tools_of_a_run_replace_the_declared_ones(checkpoint: Path, tmp_path: Path) -> None:
    assert export(checkpoint, tmp_path / "onnx", tools=()).tools == {}


def test_footprint_of_a_variant() -> None:
    larger = Footprint(900, 6.0, 10, 60)
    stage = Stage("evaluate", (), FOOTPRINT, exceptions={"onnxruntime": larger})
    assert [stage.footprint_of(name) for name in (None, "int4", "onnxruntime")] == [FOOTPRINT, FOOTPRINT, larger]
