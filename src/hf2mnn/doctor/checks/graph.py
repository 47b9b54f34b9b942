"""Checks whether a graph can be read, and whether the installed engine supports it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from hf2mnn.checkpoint.folder import is_lfs_pointer
from hf2mnn.core.errors import ConversionError, ExportError
from hf2mnn.core.manifest import tool_versions
from hf2mnn.doctor.artifacts import MnnModel, OnnxFile
from hf2mnn.doctor.findings import Finding, Severity
from hf2mnn.mnn.engine_facts import UNSUPPORTED_OPERATORS

GIT_LFS_PULL = "run 'git lfs pull' in its folder, or download the file with the hub's own client"
CONVERT_AGAIN = "run 'hf2mnn convert' and 'hf2mnn quantize' again, or download it again"


def _unreadable(path: Path, error: Exception, kind: str, cure: str) -> Finding:
    pointer = path.is_file() and is_lfs_pointer(path)
    return Finding(
        where=path.name,
        message=f"the file is a Git LFS pointer, not the {kind}" if pointer else f"the file is not a readable {kind}",
        evidence=f"{path.stat().st_size if path.is_file() else 0} bytes; {error}",
        effect="the model cannot be loaded",
        cure=GIT_LFS_PULL if pointer else cure,
    )


def unreadable_graph(model: MnnModel) -> Iterator[Finding]:
    """Report a .mnn file that is truncated, a Git LFS pointer, or of another format."""
    try:
        _ = model.graph
    except ConversionError as error:
        yield _unreadable(model.path, error, "MNN model", CONVERT_AGAIN)


def unreadable_onnx(model: OnnxFile) -> Iterator[Finding]:
    """Report an .onnx file that is truncated, a Git LFS pointer, or of another format."""
    try:
        _ = model.graph
    except ExportError as error:
        yield _unreadable(model.path, error, "ONNX model", "run 'hf2mnn export' again")


def _version(model: MnnModel) -> str:
    """Return the release of the converter that wrote the model."""
    info = model.graph.content.get("extraInfo")
    return str(info.get("version", "")) if isinstance(info, dict) else ""


def unknown_operators(model: MnnModel) -> Iterator[Finding]:
    """Report operators that the installed engine does not implement.

    The converter passes operators through that it does not know. Its dump writes the number of a type that the
    schema (`MNN.fbs`) of this release does not name.
    """
    unknown = [op for op in model.graph.ops if op["type"] in UNSUPPORTED_OPERATORS or op["type"].isdecimal()]
    if unknown:
        names = ", ".join(f"{op.get('name', '')} ({op['type']})" for op in unknown[:3])
        engine = tool_versions("MNN")["MNN"]
        message = "the graph has operators that the installed engine does not implement"
        evidence = f"{len(unknown)}: {names}; engine {engine}, converter {_version(model) or 'unknown'}"
        effect = 'the engine prints "Don\'t support type" and returns no answer or crashes'
        cure = "install the MNN release that the model was converted for, or convert it with the installed one"
        yield Finding(where=model.path.name, message=message, evidence=evidence, effect=effect, cure=cure)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def engine_too_old(model: MnnModel) -> Iterator[Finding]:
    """Report a model of a newer converter; the engine only logs the difference (`Module.cpp`)."""
    converter, engine = _version(model), tool_versions("MNN")["MNN"]
    if _numbers(converter) and _numbers(engine) and _numbers(converter) > _numbers(engine):
        yield Finding(
            severity=Severity.WARNING,
            where=model.path.name,
            message="the converter that wrote the model is newer than the installed engine",
            evidence=f"converter {converter}, engine {engine}",
            effect="the engine loads it without an error and misinterprets newer operators and attributes",
            cure=f"run pip install 'MNN>={converter}', or convert the model with {engine}",
        )


MODEL_CHECKS = (unreadable_graph, unknown_operators, engine_too_old)
