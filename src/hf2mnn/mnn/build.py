"""Operators in the form in which MNN's converter reads a graph (JSON of `schema/default/MNN.fbs`)."""

from __future__ import annotations

from typing import Any

Op = dict[str, Any]


def operator(
    kind: str, main_type: str, main: Any, name: str, read: list[int], made: list[int], form: str = "NHWC"
) -> Op:
    """`read` and `made` are tensors by index; `form` is the layout of what it makes, where nothing else says it."""
    op = {"type": kind, "main_type": main_type, "main": main, "name": name, "inputIndexes": read}
    return op | {"outputIndexes": made, "defaultDimentionFormat": form}


def reshape(name: str, dims: list[int], read: int, made: int) -> Op:
    return operator("Reshape", "Reshape", {"dims": dims, "dimType": "NCHW"}, name, [read], [made])


def change_layout(name: str, source: str, dest: str, read: int, made: int) -> Op:
    return operator("ConvertTensor", "TensorConvertInfo", {"source": source, "dest": dest}, name, [read], [made])
