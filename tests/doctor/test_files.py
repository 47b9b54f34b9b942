"""Weight files that are missing, cut, pointers, another's, or changed since they were made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hf2mnn.doctor.finding import Severity
from hf2mnn.mnn.bundle import CONFIG, DECODER, VISION
from patients import copied, errors, found, own, vouched

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3000000\n"
WEIGHTS = [f"{DECODER}.weight", f"{VISION}.weight"]


@pytest.fixture
def bundle(results: Path, tmp_path: Path) -> Path:
    return copied(results / "bundles" / "int4", tmp_path / "bundle")


@pytest.mark.parametrize("name", WEIGHTS)
def test_missing(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    assert errors(bundle) == {"weight_file_missing"}


@pytest.mark.parametrize("name", WEIGHTS[:1])
def test_lfs_pointer(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    (bundle / name).write_bytes(POINTER)
    assert errors(bundle) == {"weight_file_pointer"}


@pytest.mark.parametrize("kept", [0.999, 0.0])
def test_truncated(bundle: Path, kept: float) -> None:
    """The evidence names the first operator that is not whole."""
    path = own(bundle / f"{DECODER}.weight")
    os.truncate(path, int(path.stat().st_size * kept))
    (said,) = found(bundle, Severity.ERROR).values()
    assert said.check == "weight_file_truncated"
    assert ("logits" in said.evidence) == (kept == 0.999)


@pytest.mark.parametrize("name", [WEIGHTS[0], DECODER])
def test_one_byte_flipped(bundle: Path, name: str) -> None:
    """In the middle of levels nothing else can tell; a graph may become unreadable as well."""
    path = own(bundle / name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert found(bundle)["file_changed"].where == name
    if name in WEIGHTS:
        assert errors(bundle) == {"file_changed"}


def test_edited_settings_are_a_warning(bundle: Path) -> None:
    with own(bundle / CONFIG).open("a") as file:
        file.write("\n")
    assert {f.check: f.severity for f in found(bundle).values()} == {"file_changed": Severity.WARNING}


def test_swapped_with_another_bundles(results: Path, bundle: Path) -> None:
    """int8's weight file under int4's graph: larger, and its headers are of other bits."""
    (bundle / f"{DECODER}.weight").unlink()
    os.link(results / "bundles" / "int8" / f"{DECODER}.weight", bundle / f"{DECODER}.weight")
    vouched(bundle)
    said = found(bundle)
    assert said.keys() == {"weights_of_another"}
    assert "not this graph's weight file" in said["weights_of_another"].sentence


def test_two_conversions_in_one_directory(results: Path, bundle: Path) -> None:
    """Right size, another's bytes from somewhere on."""
    path = own(bundle / f"{DECODER}.weight")
    content, other = path.read_bytes(), (results / "bundles" / "int8" / f"{DECODER}.weight").read_bytes()
    path.write_bytes(content[: len(content) // 2] + other[len(content) // 2 : len(content)])
    vouched(bundle)
    said = found(bundle)
    assert said.keys() == {"weights_of_another"}
    assert "two conversions ran in one directory" in said["weights_of_another"].sentence


def test_float_weights_of_a_larger_model(results: Path, tmp_path: Path) -> None:
    """Floating-point weights have no headers; the size is all that can be told without the checkpoint."""
    bundle = copied(results / "bundles" / "fp16", tmp_path / "fp16")
    (bundle / f"{DECODER}.weight").unlink()
    os.link(results / "bundles" / "fp32" / f"{DECODER}.weight", bundle / f"{DECODER}.weight")
    vouched(bundle)
    assert found(bundle)["weight_file_longer"].severity == Severity.WARNING


def test_graphs_without_weights_in_a_bundle(results: Path, bundle: Path) -> None:
    """Those of the mnn stage, which are right where they were made."""
    for name in (DECODER, f"{DECODER}.weight"):
        (bundle / name).unlink()
        os.link(results / "graphs" / name, bundle / name)
    vouched(bundle)
    assert errors(bundle) == {"weights_absent"}
