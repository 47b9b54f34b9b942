"""Weight files that are missing, truncated, Git LFS pointers, of another model, or changed; unsupported graphs."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from faulty_bundles import LLMEXPORT, errors, file_findings, link_copy, unlink_copy, update_manifest
from hf2mnn.doctor.findings import Severity
from hf2mnn.mnn.bundle import CONFIG, DECODER, GRAPHS, VISION
from hf2mnn.mnn.convert import read_graph, write_graph

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3000000\n"
WEIGHTS = [f"{DECODER}.weight", f"{VISION}.weight"]


@pytest.fixture
def bundle(results: Path, tmp_path: Path) -> Path:
    return link_copy(results / "bundles" / "int4", tmp_path / "bundle")


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
    """The evidence names the first incomplete operator."""
    path = unlink_copy(bundle / f"{DECODER}.weight")
    os.truncate(path, int(path.stat().st_size * kept))
    (finding,) = file_findings(bundle, Severity.ERROR).values()
    assert finding.check == "weight_file_truncated"
    assert ("logits" in finding.evidence) == (kept == 0.999)


@pytest.mark.parametrize("name", [WEIGHTS[0], DECODER])
def test_one_byte_flipped(bundle: Path, name: str) -> None:
    """In quantized values only the manifest shows it; a graph may become unreadable, too."""
    path = unlink_copy(bundle / name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert file_findings(bundle)["file_changed"].where == name
    if name in WEIGHTS:
        assert errors(bundle) == {"file_changed"}


@pytest.mark.parametrize(
    ("edit", "check", "severity", "evidence"),
    [
        ({"thread_num": 1}, "settings_edited", Severity.ADVICE, "thread_num 4 -> 1"),
        ({"thread_num": "1"}, "file_changed", Severity.WARNING, "thread_num: input should be a valid integer"),
        ({"llm_model": "visual.mnn"}, "file_changed", Severity.WARNING, 'llm_model is "visual.mnn" in place of'),
    ],
)
def test_edited_settings_are_no_damage(
    edit: dict[str, Any], check: str, severity: Severity, evidence: str, bundle: Path
) -> None:
    path = unlink_copy(bundle / CONFIG)
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    (finding,) = [entry for entry in file_findings(bundle).values() if entry.where == CONFIG]
    assert (finding.check, finding.severity) == (check, severity) and evidence in finding.evidence


def test_a_reformatted_configuration_has_no_finding(bundle: Path) -> None:
    with unlink_copy(bundle / CONFIG).open("a") as file:
        file.write("\n")
    assert file_findings(bundle) == {}


def test_weight_file_of_another_bundle(results: Path, bundle: Path) -> None:
    """The weight file of int8 with the graph of int4: larger, with headers of other bits."""
    (bundle / f"{DECODER}.weight").unlink()
    os.link(results / "bundles" / "int8" / f"{DECODER}.weight", bundle / f"{DECODER}.weight")
    update_manifest(bundle)
    (finding,) = file_findings(bundle).values()
    assert finding.check == "weights_of_another"
    assert "belongs to another graph" in finding.message


def test_two_conversions_in_one_directory(results: Path, bundle: Path) -> None:
    """A file of the right size whose second half is another model's."""
    path = unlink_copy(bundle / f"{DECODER}.weight")
    content, other = path.read_bytes(), (results / "bundles" / "int8" / f"{DECODER}.weight").read_bytes()
    path.write_bytes(content[: len(content) // 2] + other[len(content) // 2 : len(content)])
    update_manifest(bundle)
    (finding,) = file_findings(bundle).values()
    assert finding.check == "weights_of_another"
    assert "two conversions ran in one directory" in finding.message


def test_float_weights_of_a_larger_model(results: Path, tmp_path: Path) -> None:
    """Floating-point weights have no headers: without the checkpoint only the size shows it."""
    bundle = link_copy(results / "bundles" / "fp16", tmp_path / "fp16")
    (bundle / f"{DECODER}.weight").unlink()
    os.link(results / "bundles" / "fp32" / f"{DECODER}.weight", bundle / f"{DECODER}.weight")
    update_manifest(bundle)
    assert file_findings(bundle)["weight_file_longer"].severity == Severity.WARNING


def test_graphs_without_weights_in_a_bundle(results: Path, bundle: Path) -> None:
    """Graphs of the convert stage, which are valid in its folder."""
    for name in (DECODER, f"{DECODER}.weight"):
        (bundle / name).unlink()
    graph, weights = (results / "graphs" / name for name in GRAPHS["decoder"])
    write_graph(read_graph(graph), bundle / DECODER)
    os.link(weights, bundle / f"{DECODER}.weight")
    update_manifest(bundle)
    assert errors(bundle) == {"weights_absent"}


def patch(path: Path, old: bytes, new: bytes) -> None:
    content = unlink_copy(path).read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


@pytest.fixture
def llmexport(tmp_path: Path) -> Path:
    return link_copy(LLMEXPORT, tmp_path / "llmexport")


def test_unknown_operators(llmexport: Path) -> None:
    """LayerNorm (603 in the schema) with a number that the schema does not name."""
    patch(llmexport / DECODER, struct.pack("<i", 603), struct.pack("<i", 599))
    (finding,) = file_findings(llmexport, Severity.ERROR).values()
    assert finding.check == "unknown_operators"
    assert "(599)" in finding.evidence


def test_a_newer_converter(llmexport: Path) -> None:
    patch(llmexport / DECODER, b"3.6.1", b"9.6.1")
    assert file_findings(llmexport)["engine_too_old"].severity == Severity.WARNING
    assert not errors(llmexport)
