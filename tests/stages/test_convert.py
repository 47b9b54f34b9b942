"""Reproducibility: equal inputs give equal bundles on any machine, with their provenance."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

from hf2mnn.core.manifest import Manifest
from hf2mnn.mnn.bundle import EngineSettings
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.quant.variant import Choice
from hf2mnn.stages.quantize import quantize
from support import BIN

PER_RUN = {"folder", "command", "seconds", "cpu_seconds", "peak_rss_mb"}


def manifest_of(folder: Path) -> dict:
    """Return a manifest without the entries of the run."""
    return {name: value for name, value in asdict(Manifest.load(folder)).items() if name not in PER_RUN}


def test_another_directory_user_and_machine_make_the_same_bundle(
    bundle: Path, onnx_folder: Path, tmp_path: Path
) -> None:
    """The files are equal byte for byte, and the manifests but for command, times and memory."""
    home = tmp_path / "home" / "another user"
    shutil.copytree(onnx_folder, home / "onnx")
    (home / "tmp").mkdir()
    other = {"HOME": str(home), "TMPDIR": str(home / "tmp"), "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    exact = '{"bits": 32, "method": "rtn"}'
    commands = (
        ["convert", "onnx", "--out", "graphs"],
        ["quantize", "onnx", "graphs", "--decoder", exact, "--vision", exact, "--threads", "2", "--out", "bundle"],
    )
    for command in commands:
        arguments = ["sh", "-c", 'umask 077; exec "$@"', "sh", BIN / "hf2mnn", *command]
        done = subprocess.run(arguments, cwd=home, env={**os.environ, **other}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert manifest_of(home / "graphs") == manifest_of(bundle.with_name("float-graphs"))
    assert manifest_of(home / "bundle") == manifest_of(bundle)
    assert not list((home / "tmp").iterdir())


def test_bundle_has_the_provenance_of_its_checkpoint(bundle: Path, checkpoint_folder: Path) -> None:
    manifest, source = Manifest.load(bundle), Manifest.load(checkpoint_folder)
    assert manifest.provenance == {"checkpoint": {"files": source.outputs}}
    assert "model.safetensors" in manifest.provenance["checkpoint"]["files"]


def test_number_of_threads_does_not_change_the_bundle(bundle: Path, onnx_folder: Path, tmp_path: Path) -> None:
    int4 = WeightFormat(4, 32, method="mse")
    choice = Choice(int4, int4, EngineSettings())
    graphs = bundle.with_name("float-graphs")
    bundles = [quantize(onnx_folder, graphs, tmp_path / str(threads), choice, threads) for threads in (1, 4)]
    assert manifest_of(bundles[0]) == manifest_of(bundles[1])
