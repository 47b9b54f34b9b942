"""AWQ and GPTQ checkpoints in MNN's format: the same levels and scales, and weights equal to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf2mnn.checkpoint.prequantized import PrequantizedLinear
from hf2mnn.core.errors import QuantizationError
from hf2mnn.mnn.bundle import EngineSettings
from hf2mnn.mnn.convert import read_graph
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.quant.blob import scale_bytes
from hf2mnn.quant.prequantized import packed_format, packed_levels
from hf2mnn.quant.variant import Choice, Part
from hf2mnn.quant.weights import Operator, WeightFile, operators
from hf2mnn.stages.export import run as export_onnx
from hf2mnn.stages.fetch import run as fetch_checkpoint
from hf2mnn.stages.quantize import run as quantize
from prequantized_layers import Quantized, write_prequantized
from support import TEXT, VISION, float_bundle

KINDS = {"awq": ("awq", 4, 32, False), "gptq 8 bits": ("gptq", 8, -1, True)}


@dataclass(frozen=True)
class Chain:
    """The stages of one packed checkpoint, and what was packed into it."""

    folder: Path
    packed: dict[str, Quantized]
    bits: int

    def quantize(self, name: str, decoder: WeightFormat) -> Path:
        choice = Choice(decoder, WeightFormat(8), EngineSettings())
        stages = self.folder / "onnx", self.folder / "float"
        return quantize(*stages, self.folder / name, choice, 1, source=self.folder / "checkpoint")

    def stored(self, bundle: Path) -> tuple[dict, WeightFile]:
        names = Part("decoder", self.folder / "onnx", self.folder / "float").names
        graph = read_graph(bundle / "llm.mnn")
        return {o.name: o for o in operators(graph, names)}, WeightFile(graph, bundle / "llm.mnn.weight")


@pytest.fixture(scope="module", params=list(KINDS))
def chain(request: pytest.FixtureRequest, make_checkpoint: Callable, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    kind, bits, group, symmetric = KINDS[request.param]
    folder = tmp_path_factory.mktemp("packed")
    packed = write_prequantized(make_checkpoint(TEXT, VISION), folder / "checkpoint", kind, bits, group, symmetric)
    fetch_checkpoint(folder / "checkpoint", folder / "checkpoint")
    export_onnx(folder / "checkpoint", folder / "onnx")
    float_bundle(folder / "onnx", folder / "float")
    return Chain(folder, packed, bits)


def test_every_weight_is_the_checkpoints_to_the_last_bit(chain: Chain) -> None:
    """(level - zero) * scale, computed here in float64 from what was packed, is what MNN's engine unpacks."""
    bundle = chain.quantize("taken", WeightFormat(chain.bits, method="checkpoint"))
    found, weights = chain.stored(bundle)
    for parameter, layer in chain.packed.items():
        operator = found[parameter.removesuffix(".weight")]
        assert operator.stored["aMaxOrBits"] == chain.bits
        np.testing.assert_array_equal(weights.rows(operator).astype(np.float64), layer.weight)
    assert len(chain.packed) == 14


def test_scales_are_as_small_as_is_exact(chain: Chain) -> None:
    """Zero points in the middle are not stored at all; others need float32, unless half floats happen to hold them."""
    bundle = chain.quantize("taken", WeightFormat(chain.bits, method="checkpoint"))
    found, _ = chain.stored(bundle)
    stored = [found[name.removesuffix(".weight")].stored for name in chain.packed]
    symmetric = all((layer.zero_points == 2 ** (chain.bits - 1)).all() for layer in chain.packed.values())
    assert {s["readType"] == 0 for s in stored} == {symmetric}
    assert {s["scaleStorage"] for s in stored} == ({"FP16"} if symmetric else {"FP32"})


def test_what_the_checkpoint_left_in_16_bits_stays_so(chain: Chain) -> None:
    bundle = chain.quantize("taken", WeightFormat(chain.bits, method="checkpoint"))
    found, weights = chain.stored(bundle)
    part = Part("decoder", chain.folder / "onnx", chain.folder / "float")
    (right,) = [operator for operator in part.operators if operator.name == "lm_head"]
    assert found["lm_head"].stored["type"] == 3
    np.testing.assert_array_equal(weights.rows(found["lm_head"]), part.weights.rows(right))


def test_other_bits_than_the_checkpoints_are_refused_with_the_layer(chain: Chain) -> None:
    """Nothing is rounded a second time without a word."""
    with pytest.raises(QuantizationError, match=rf"q_proj: the checkpoint holds {chain.bits} bits in blocks of"):
        chain.quantize("other", WeightFormat(12 - chain.bits, method="checkpoint"))
    with pytest.raises(QuantizationError, match=r"q_proj: .* 16 were asked for"):
        chain.quantize("other", WeightFormat(chain.bits, 16, method="checkpoint"))
    assert not (chain.folder / "other").exists()


def test_levels_of_another_checkpoint_are_noticed(chain: Chain, make_checkpoint: Callable, tmp_path: Path) -> None:
    """The float model that was converted must be the one that is taken over."""
    others = make_checkpoint(TEXT, VISION, seed=1)
    kind = "gptq" if chain.bits == 8 else "awq"
    write_prequantized(others, tmp_path / "checkpoint", kind, chain.bits, 32, False)
    source = fetch_checkpoint(tmp_path / "checkpoint", tmp_path / "checkpoint")
    choice = Choice(WeightFormat(chain.bits, method="checkpoint"), WeightFormat(8), EngineSettings())
    with pytest.raises(QuantizationError, match="q_proj: the packed weight is not the float model's"):
        quantize(chain.folder / "onnx", chain.folder / "float", tmp_path / "out", choice, 1, source=source)
    assert not (tmp_path / "out").exists()


def test_a_float_checkpoint_has_no_levels_to_take(
    onnx_folder: Path, bundle: Path, checkpoint_folder: Path, tmp_path
) -> None:
    choice = Choice(WeightFormat(4, method="checkpoint"), WeightFormat(8), EngineSettings())
    with pytest.raises(QuantizationError, match="no AWQ or GPTQ checkpoint"):
        quantize(onnx_folder, bundle, tmp_path / "out", choice, 1, source=checkpoint_folder)
    with pytest.raises(QuantizationError, match="--source"):
        quantize(onnx_folder, bundle, tmp_path / "out", choice, 1)


# Any layer, without a model


def operator(packed: PrequantizedLinear) -> Operator:
    outputs, inputs = packed.q.shape
    return Operator("q_proj", outputs, inputs, 1, ((0, 0),) * 3, None)


def holding(packed: PrequantizedLinear | None) -> SimpleNamespace:
    """A checkpoint that holds this one layer."""
    return SimpleNamespace(quantization=True, prequantized=lambda _: packed)


@given(
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([16, 32, 64]),
    centred=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_any_levels_zeros_and_half_float_scales_are_held_exactly(
    bits: int, group: int, centred: bool, seed: int
) -> None:
    """Negative, subnormal and zero scales, zero points at the ends: all of them occur in files on hubs."""
    random = np.random.default_rng(seed)
    levels = random.integers(0, 2**bits, (8, 64)).astype(np.uint8)
    shape = (8, 64 // group)
    zeros = (
        np.full(shape, 2 ** (bits - 1), np.uint8) if centred else random.integers(0, 2**bits, shape).astype(np.uint8)
    )
    scales = random.integers(0, 2**16, shape).astype(np.uint16).view(np.float16)
    scales = np.where(np.isfinite(scales), scales, np.float16(0))
    packed = PrequantizedLinear(levels, scales, zeros, bits, group)
    form = packed_format(holding(packed), operator(packed), WeightFormat(bits, method="checkpoint"))
    assert (form.bits, form.symmetric) == (bits, bool((zeros == 2 ** (bits - 1)).all()))
    rows = packed.dequantize()
    found = packed_levels(holding(packed), operator(packed))(0, rows)
    groups = np.arange(64) // group
    right = (levels.astype(float) - zeros[:, groups]) * scales[:, groups].astype(float)
    np.testing.assert_array_equal(found.dequantize().astype(float), right)
    kept = np.frombuffer(scale_bytes(found, form.scale_bits), np.float16 if form.scale_bits == 16 else np.float32)
    pairs = kept.reshape(8, shape[1], -1).astype(np.float32)
    np.testing.assert_array_equal(pairs[:, :, -1], found.scales)
    if found.zeros is not None:
        np.testing.assert_array_equal(pairs[:, :, 0], found.zeros)
