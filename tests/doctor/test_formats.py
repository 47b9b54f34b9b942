"""Weights that are stored worse or larger than they need be; and formats that were chosen well."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from hf2mnn.core.manifest import NAME
from hf2mnn.doctor.finding import Severity
from hf2mnn.mnn.bundle import DECODER, PARTS, VISION, EngineSettings, convert_vision
from hf2mnn.mnn.convert import WeightFormat, read_graph
from hf2mnn.quant.variant import Choice
from hf2mnn.stages.quantize import run as quantize
from patients import LLMEXPORT, copied, errors, found, own

FOUR = WeightFormat(4, 64)


@pytest.fixture(scope="module")
def make(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A bundle of the embedded model, by our own quantizer, rounded to nearest."""

    def made(decoder: WeightFormat = FOUR, vision: WeightFormat = WeightFormat(8, 64), **choice: object) -> Path:
        folder = tmp_path_factory.mktemp("made") / "bundle"
        chosen = Choice(decoder, vision, EngineSettings(), **choice)
        return quantize(results / "onnx", results / "graphs", folder, chosen, 1)

    return made


def test_wide_scales(make: Callable) -> None:
    said = found(make(WeightFormat(4, 64, scale_bits=32, method="rtn")))
    assert said.keys() == {"scales_32_bit"}
    assert said["scales_32_bit"].severity == Severity.ADVICE
    assert "0.50 bits a weight" in said["scales_32_bit"].evidence


def test_vision_below_8_bits(make: Callable) -> None:
    bundle = make(vision=WeightFormat(4, 64))
    assert {f.check: f.severity for f in found(bundle).values()} == {"vision_bits": Severity.WARNING}


def test_bits_that_a_plan_chose(results: Path) -> None:
    """The embedded model's plan gives layers of the vision tower fewer than 8 bits, by what they cost the answers."""
    bundle = results / "bundles" / "mixed"
    assert min(weight.bits for weight in read_graph(bundle / VISION).weights()) < 8
    assert not found(bundle)


def test_a_block_that_does_not_divide(results: Path, tmp_path: Path) -> None:
    """The converter asked for blocks of 128: layers of 192 inputs get one scale a channel."""
    bundle = copied(results / "bundles" / "int8", tmp_path / "bundle")
    (bundle / NAME).unlink()
    for name in (VISION, f"{VISION}.weight"):
        (bundle / name).unlink()
    with pytest.raises(Exception, match=r"block channel, where 8 bits, block 128"):
        convert_vision(results / "onnx", bundle, WeightFormat(8, 128))
    (said,) = found(bundle).values()
    assert (said.check, said.severity) == ("block_per_channel", Severity.WARNING)
    assert "192 inputs, which blocks of 128 do not divide" in said.evidence


def test_one_scale_a_channel_everywhere(make: Callable) -> None:
    said = found(make(WeightFormat(4, 0)))
    assert {f.check: f.severity for f in said.values()} == {"block_per_channel": Severity.ADVICE}


# The engine


def patched(path: Path, old: bytes, new: bytes) -> None:
    content = own(path).read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


@pytest.fixture
def llmexport(tmp_path: Path) -> Path:
    return copied(LLMEXPORT, tmp_path / "bundle")


def test_operators_that_the_engine_does_not_know(llmexport: Path) -> None:
    """LayerNorm (603 in the schema) with a number that has no name."""
    patched(llmexport / DECODER, struct.pack("<i", 603), struct.pack("<i", 599))
    said = found(llmexport, Severity.ERROR)
    assert said.keys() == {"unknown_operators"}
    assert "(599)" in said["unknown_operators"].evidence


def test_a_newer_converter(llmexport: Path) -> None:
    patched(llmexport / DECODER, b"3.6.1", b"9.6.1")
    assert found(llmexport)["engine_too_old"].severity == Severity.WARNING
    assert not errors(llmexport)


def test_llmexports_bundle(llmexport: Path) -> None:
    """What is said is true: 4 bits in a small vision tower, and 32-bit scales."""
    assert set(found(llmexport)) == {"vision_bits", "scales_32_bit"}
    assert not errors(llmexport)
    os.link(llmexport / DECODER, llmexport / "alone.mnn")
    os.link(llmexport / f"{DECODER}.weight", llmexport / "alone.mnn.weight")
    assert set(found(llmexport / "alone.mnn")) == {"scales_32_bit"}


@pytest.mark.parametrize("variant", ["fp32", "fp16", "int8", "int4", "int4-gptq", "mixed"])
def test_good_bundles(results: Path, variant: str) -> None:
    assert not found(results / "bundles" / variant, checkpoint=results / "checkpoint")


@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_good_bundles_of_other_methods(make: Callable, results: Path, method: str) -> None:
    """With the embedding in lm_head, too."""
    bundle = make(WeightFormat(4, 64, method=method), embedding="lm_head" if method == "rtn" else "file")
    assert not found(bundle, checkpoint=results / "checkpoint")


@pytest.mark.parametrize("stage", ["graphs", "onnx"])
def test_stages_on_the_way(results: Path, stage: str) -> None:
    assert not found(results / stage)
    for _, (name, graph) in PARTS.items():
        assert not errors(results / stage / (graph if stage == "onnx" else name))
