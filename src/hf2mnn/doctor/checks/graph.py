"""Whether a graph can be read at all, and whether the engine here has what it asks for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from hf2mnn.checkpoint.folder import LFS_POINTER
from hf2mnn.core.errors import ConversionError, ExportError
from hf2mnn.core.manifest import tool_versions
from hf2mnn.doctor.finding import Finding, Severity
from hf2mnn.doctor.patient import Model, OnnxPatient
from hf2mnn.mnn.graph import UNSUPPORTED

FETCH = "fetch the file again with its contents: 'git lfs pull' in its folder, or the hub's own client"
AGAIN = "make it again: 'hf2mnn mnn', then 'hf2mnn quantize'; or fetch it again from where it came"


def is_pointer(path: Path) -> bool:
    """Whether a file is what Git leaves of a large file that was not fetched."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def _unreadable(check: str, path: Path, said: str, kind: str, cure: str) -> Finding:
    pointer = path.is_file() and is_pointer(path)
    return Finding(
        check,
        Severity.ERROR,
        path.name,
        f"it is a Git LFS pointer, not the {kind}" if pointer else f"it is no {kind} that can be read",
        f"{path.stat().st_size if path.is_file() else 0} bytes; {said}",
        "nothing runs",
        FETCH if pointer else cure,
    )


def unreadable_graph(model: Model) -> Iterator[Finding]:
    """A .mnn file that is no model: cut short, a pointer, something else."""
    try:
        _ = model.graph
    except ConversionError as error:
        yield _unreadable("unreadable_graph", model.path, str(error), "MNN model", AGAIN)


def unreadable_onnx(patient: OnnxPatient) -> Iterator[Finding]:
    """The same of an .onnx file."""
    try:
        _ = patient.model
    except ExportError as error:
        yield _unreadable(
            "unreadable_onnx", patient.path, str(error), "ONNX model", "export it again with 'hf2mnn onnx'"
        )


def unknown_operators(model: Model) -> Iterator[Finding]:
    """Operators that the installed engine has no code for: what the converter passed through, and types that this
    release's schema (`MNN.fbs`) has no name for.
    """
    # The converter's dump gives a type without a name as its number.
    left = [op for op in model.graph.ops if op["type"] in UNSUPPORTED or op["type"].isdecimal()]
    if left:
        names = ", ".join(f"{op.get('name', '')} ({op['type']})" for op in left[:3])
        yield Finding(
            "unknown_operators",
            Severity.ERROR,
            model.path.name,
            "it holds operators that the installed engine does not have",
            f"{len(left)} of {len(model.graph.ops)}: {names}; engine {tool_versions('MNN')['MNN']}, model written by"
            f" {_version(model) or 'an unknown release'}",
            'the engine cannot compute them: it prints "Don\'t support type", and answers nothing or crashes',
            "install the MNN release that the model was made for, or convert it with the installed one",
        )


def _version(model: Model) -> str:
    info = model.graph.content.get("extraInfo")
    return str(info.get("version", "")) if isinstance(info, dict) else ""


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def engine_too_old(model: Model) -> Iterator[Finding]:
    """`extraInfo.version` is the converter's. The engine never compares it with its own (`Module.cpp` only logs it)."""
    wrote, installed = _version(model), tool_versions("MNN")["MNN"]
    if _numbers(wrote) and _numbers(installed) and _numbers(wrote) > _numbers(installed):
        yield Finding(
            "engine_too_old",
            Severity.WARNING,
            model.path.name,
            "it was written by a newer converter than the installed engine",
            f"converter {wrote}, engine {installed}",
            "the engine loads it without a word; operators or attributes that are new since then are read as others",
            f"pip install 'MNN>={wrote}', or convert it with {installed}",
        )
