"""Recognize what a path is, and run all checks that apply."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import Hf2mnnError
from hf2mnn.doctor.artifacts import Bundle, MnnModel, OnnxFile
from hf2mnn.doctor.checks import CHECKS, Check
from hf2mnn.doctor.findings import Examination, Finding, Findings, Severity
from hf2mnn.mnn.bundle import CONFIG, DECODER, GRAPHS, MODEL_CONFIG, VISION


def run_check(check: Check, artifact: Any) -> Findings:
    """Run one check and yield its findings; other checks report a file that it cannot read."""
    try:
        for finding in check(artifact):
            yield replace(finding, check=check.__name__)
    except (Hf2mnnError, OSError):
        return
    except ImportError:
        raise
    except Exception as error:  # the contents are untrusted, and the other checks must run
        where = str(artifact.folder if isinstance(artifact, Bundle) else artifact.path)
        message = f"the check {check.__name__} failed on the contents of these files"
        evidence = f"{type(error).__name__}: {error}"
        effect = "a problem that this check reports may be present"
        cure = "convert the files again; if they are right, report this with the evidence"
        yield Finding(where, message, evidence, effect, cure, check="not_examined", severity=Severity.WARNING)


def _artifacts(path: Path, checkpoint: Checkpoint | None, reference: Path | None) -> tuple[str, list[Any]]:
    """Return the kind of a path and its artifacts."""
    if path.is_file() and path.name in (CONFIG, MODEL_CONFIG):
        path = path.parent
    if path.is_file() and path.suffix == ".mnn":
        return "MNN model", [MnnModel(path, checkpoint=checkpoint)]
    folder = path if path.is_dir() else path.parent
    graphs = {
        graph: MnnModel(folder / graph, part, complete=False, weights=folder / weights)
        for part, (graph, weights) in GRAPHS.items()
        if (folder / graph).is_file()
    }
    if path.is_file() and path.name in graphs:
        return "graph of the convert stage", [graphs[path.name]]
    if path.is_file() and path.suffix == ".onnx":
        return "ONNX model", [OnnxFile(path)]
    if not path.exists():
        raise Hf2mnnError(f"{path} does not exist: give a bundle folder, a .mnn file or an .onnx file")
    if path.is_dir() and graphs:
        return "folder of the convert stage", [*graphs.values()]
    onnx, mnn = (sorted(path.glob(pattern)) for pattern in ("*.onnx", "*.mnn"))
    if any((path / name).is_file() for name in (DECODER, MODEL_CONFIG)) or (mnn and (path / CONFIG).is_file()):
        bundle = Bundle(path, checkpoint, reference)
        return "bundle", [bundle, *bundle.models.values()]
    if mnn:
        return "folder of MNN models", [MnnModel(file, checkpoint=checkpoint) for file in mnn]
    if onnx:
        return "folder of ONNX models", [OnnxFile(file, file.stem) for file in onnx]
    raise Hf2mnnError(
        f"{path} cannot be examined: give a bundle folder (with {DECODER}, {VISION}, {CONFIG}), a .mnn or .onnx file,"
        " or a folder of the export or convert stage; 'hf2mnn fetch' checks a checkpoint"
    )


def examine(path: Path, checkpoint: Path | None = None, reference: Path | None = None) -> Examination:
    """Run all checks that apply to `path`; `checkpoint` is compared with, `reference` has the range of activations.

    Raises an Hf2mnnError if `path` is of no known kind, or the checkpoint is incomplete.
    """
    opened = Checkpoint(checkpoint) if checkpoint else None
    if opened:
        opened.check()
    kind, artifacts = _artifacts(path, opened, reference)
    examination = Examination(path, kind, next((a for a in artifacts if isinstance(a, Bundle)), None))
    for artifact in artifacts:
        for check in CHECKS[type(artifact)]:
            examination.add(check.__name__, run_check(check, artifact))
    return examination
