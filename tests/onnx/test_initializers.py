"""External locations of weights in an untrusted graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from hf2mnn.core.errors import ExportError
from hf2mnn.onnx.initializers import load_graph, stored_initializers


def graph(folder: Path, location: str, offset: str = "0", dims: tuple[int, ...] = (2, 3), kind: int = 1) -> Path:
    table = TensorProto(name="table", data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset)):
        table.external_data.add(key=key, value=value)
    path = folder / "x.onnx"
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [], initializer=[table])), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "graph"
    folder.mkdir()
    for path in (folder / "data", tmp_path / "secret"):
        path.write_bytes(np.arange(6, dtype=np.float32).tobytes())
    (folder / "link").symlink_to(tmp_path / "secret")
    return folder


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "link", "a/../../secret", "", "data\0x"])
def test_a_path_out_of_the_graphs_folder_is_refused(location: str, folder: Path) -> None:
    with pytest.raises(ExportError, match="table has an invalid external location"):
        stored_initializers(graph(folder, location))


@pytest.mark.parametrize(
    ("offset", "dims", "kind"),
    [("-4", (2, 3), 1), ("x", (2, 3), 1), ("0", (-2, -3), 1), ("0", (2, 3), 99), (str(1 << 70), (2, 3), 1)],
)
def test_an_invalid_location_is_refused(offset: str, dims: tuple[int, ...], kind: int, folder: Path) -> None:
    with pytest.raises(ExportError):
        stored_initializers(graph(folder, "data", offset, dims, kind))


def test_a_file_that_is_too_short_is_refused(folder: Path) -> None:
    with pytest.raises(ExportError, match=r"ends at byte \d+ of data, which has 24"):
        stored_initializers(graph(folder, "data", dims=(1 << 40, 1 << 22)))
    assert stored_initializers(graph(folder, "data"))["table"].rows(0, 2).sum() == 15


@pytest.mark.parametrize("content", [b"", b"garbage" * 9, b"\x08"])
def test_an_invalid_graph_is_refused(content: bytes, folder: Path) -> None:
    (folder / "x.onnx").write_bytes(content)
    if not content:  # an empty file is an empty graph
        assert not load_graph(folder / "x.onnx").graph.node
        return
    with pytest.raises(ExportError, match="is not an ONNX graph"):
        load_graph(folder / "x.onnx")
