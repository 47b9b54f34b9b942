"""Exported checkpoints, shared by the files of this folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from exported import SHAPES, Exported


@pytest.fixture(scope="session")
def exports(make_checkpoint: Callable[..., Path], make_once: Callable[..., Path]) -> Callable[[str], Exported]:
    """Function that returns the export of a shape."""
    from hf2mnn.onnx import trace
    from hf2mnn.stages.export import run as export_onnx
    from hf2mnn.stages.fetch import run as fetch_checkpoint

    def make(folder: Path, name: str) -> None:
        shutil.copytree(make_checkpoint(**SHAPES[name]), folder / "saved")
        calls, original = [], trace._trace
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trace, "_trace", lambda *arguments: calls.append(1) or original(*arguments))
            export_onnx(fetch_checkpoint(folder / "checkpoint", folder / "saved"), folder / "onnx")
        # A graph whose layers cannot be repeated is traced a second time.
        assert len(calls) == 2, "decoder and vision tower are traced once each"

    return cache(lambda name: Exported(make_once(f"export-{name}", lambda folder: make(folder, name))))
