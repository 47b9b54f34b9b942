"""The same inputs give the same bundle, wherever and however it is made; and it says what it was made of."""

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
from hf2mnn.stages.quantize import run as quantize
from support import BIN

MEASURED = {"folder", "seconds", "cpu_seconds", "peak_rss_mb"}


def described(folder: Path) -> dict:
    """A manifest but for what it says of the run."""
    return {name: value for name, value in asdict(Manifest.load(folder)).items() if name not in MEASURED}


def test_another_directory_user_and_machine_make_the_same_bundle(
    bundle: Path, onnx_folder: Path, tmp_path: Path
) -> None:
    """Byte for byte, and manifests that differ in times alone."""
    home = tmp_path / "home" / "another user"
    shutil.copytree(onnx_folder, home / "onnx")
    (home / "tmp").mkdir()
    other = {"HOME": str(home), "TMPDIR": str(home / "tmp"), "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    exact = '{"bits": 32, "method": "rtn"}'
    for arguments in (
        ["mnn", "onnx", "--out", "base"],
        ["quantize", "onnx", "base", "--decoder", exact, "--vision", exact, "--threads", "2", "--out", "made"],
    ):
        words = ["sh", "-c", 'umask 077; exec "$@"', "sh", BIN / "hf2mnn", *arguments]
        done = subprocess.run(words, cwd=home, env={**os.environ, **other}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert described(home / "base") == described(bundle.with_name("float-graphs"))
    assert described(home / "made") == described(bundle)
    assert not list((home / "tmp").iterdir())


def test_a_bundle_alone_says_which_checkpoint_it_is_of(bundle: Path, checkpoint_folder: Path) -> None:
    made, source = Manifest.load(bundle), Manifest.load(checkpoint_folder)
    assert made.provenance == {"checkpoint": {"files": source.outputs}}
    assert "model.safetensors" in made.provenance["checkpoint"]["files"]


def test_one_thread_and_four_round_alike(bundle: Path, onnx_folder: Path, tmp_path: Path) -> None:
    form = WeightFormat(4, 32, method="mse")
    choice = Choice(form, form, EngineSettings())
    base = bundle.with_name("float-graphs")
    made = [quantize(onnx_folder, base, tmp_path / str(threads), choice, threads) for threads in (1, 4)]
    assert described(made[0]) == described(made[1])
