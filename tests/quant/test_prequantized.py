"""AWQ and GPTQ checkpoints in MNN's format: the same q and scales, and bit-identical weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf2mnn.checkpoint.prequantized import PrequantizedLinear
from hf2mnn.core.errors import QuantizationError
from hf2mnn.mnn.bundle import EngineSettings
from hf2mnn.mnn.convert import read_graph
from hf2mnn.quant.blob import scale_bytes
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.quant.prequantized import Prequantized
from hf2mnn.quant.variant import Choice, Part
from hf2mnn.quant.weights import Operator, WeightFile, operators
from hf2mnn.stages.convert import run as convert_graphs
from hf2mnn.stages.export import run as export_onnx
from hf2mnn.stages.fetch import run as fetch_checkpoint
from hf2mnn.stages.quantize import quantize
from prequantized_layers import Quantized, write_prequantized
from support import TEXT, VISION

KINDS = {"awq": ("awq", 4, 32, False), "gptq 8 bits": ("gptq", 8, -1, True)}


@dataclass(frozen=True)
class Chain:
    """The stages of a prequantized checkpoint, and its layers by parameter."""

    folder: Path
    layers: dict[str, Quantized]
    bits: int

    def quantize(self, name: str, decoder: WeightFormat) -> Path:
        choice = Choice(decoder, WeightFormat(8), EngineSettings())
        stages = self.folder / "onnx", self.folder / "graphs"
        return quantize(*stages, self.folder / name, choice, 1, checkpoint=self.folder / "checkpoint")

    def stored(self, bundle: Path) -> tuple[dict, WeightFile]:
        modules = Part("decoder", self.folder / "onnx", self.folder / "graphs").modules
        graph = read_graph(bundle / "llm.mnn")
        return {o.name: o for o in operators(graph, modules)}, WeightFile(graph, bundle / "llm.mnn.weight")


@pytest.fixture(scope="module", params=list(KINDS))
def chain(request: pytest.FixtureRequest, make_checkpoint: Callable, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    kind, bits, group, symmetric = KINDS[request.param]
    folder = tmp_path_factory.mktemp("prequantized")
    layers = write_prequantized(make_checkpoint(TEXT, VISION), folder / "hub", kind, bits, group, symmetric)
    fetch_checkpoint(folder / "checkpoint", folder / "hub")
    export_onnx(folder / "checkpoint", folder / "onnx")
    convert_graphs(folder / "onnx", folder / "graphs")
    chain = Chain(folder, layers, bits)
    chain.quantize("bundle", WeightFormat(bits, method="checkpoint"))
    return chain


def test_every_weight_is_bit_identical(chain: Chain) -> None:
    """MNN's weight is (q - zero_point) * s, computed here in float64 from the checkpoint's integers."""
    layers, weights = chain.stored(chain.folder / "bundle")
    for parameter, layer in chain.layers.items():
        operator = layers[parameter.removesuffix(".weight")]
        assert operator.stored["aMaxOrBits"] == chain.bits
        np.testing.assert_array_equal(weights.rows(operator).astype(np.float64), layer.weight)
    assert len(chain.layers) == 14


def test_scales_have_the_smallest_exact_type(chain: Chain) -> None:
    """Zero points in the middle are not stored; others are float32, unless float16 holds them."""
    layers, _ = chain.stored(chain.folder / "bundle")
    stored = [layers[name.removesuffix(".weight")].stored for name in chain.layers]
    symmetric = all((layer.zero_points == 2 ** (chain.bits - 1)).all() for layer in chain.layers.values())
    assert {s["readType"] == 0 for s in stored} == {symmetric}
    assert {s["scaleStorage"] for s in stored} == ({"FP16"} if symmetric else {"FP32"})


def test_layers_that_the_checkpoint_does_not_quantize_stay_float16(chain: Chain) -> None:
    layers, weights = chain.stored(chain.folder / "bundle")
    part = Part("decoder", chain.folder / "onnx", chain.folder / "graphs")
    (head,) = [operator for operator in part.operators if operator.name == "lm_head"]
    assert layers["lm_head"].stored["type"] == 3
    np.testing.assert_array_equal(weights.rows(layers["lm_head"]), part.weights.rows(head))


def test_other_bits_than_the_checkpoints_are_refused(chain: Chain) -> None:
    """No weight is quantized twice without a message."""
    with pytest.raises(QuantizationError, match=rf"q_proj: the checkpoint has {chain.bits} bits in blocks of"):
        chain.quantize("other", WeightFormat(12 - chain.bits, method="checkpoint"))
    with pytest.raises(QuantizationError, match=r"q_proj: .* bits in blocks of 16; set these to the checkpoint's"):
        chain.quantize("other", WeightFormat(chain.bits, 16, method="checkpoint"))
    assert not (chain.folder / "other").exists()


def test_another_checkpoint_is_refused(chain: Chain, make_checkpoint: Callable, tmp_path: Path) -> None:
    """The converted float model must be that of the checkpoint."""
    others = make_checkpoint(TEXT, VISION, seed=1)
    kind = "gptq" if chain.bits == 8 else "awq"
    write_prequantized(others, tmp_path / "hub", kind, chain.bits, 32, False)
    checkpoint = fetch_checkpoint(tmp_path / "checkpoint", tmp_path / "hub")
    choice = Choice(WeightFormat(chain.bits, method="checkpoint"), WeightFormat(8), EngineSettings())
    with pytest.raises(
        QuantizationError, match="q_proj: the quantized weight of the checkpoint is not that of the float model"
    ):
        quantize(chain.folder / "onnx", chain.folder / "graphs", tmp_path / "out", choice, 1, checkpoint=checkpoint)
    assert not (tmp_path / "out").exists()


def test_a_float_checkpoint_is_refused(
    onnx_folder: Path, graphs: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    choice = Choice(WeightFormat(4, method="checkpoint"), WeightFormat(8), EngineSettings())
    with pytest.raises(QuantizationError, match="is not an AWQ or GPTQ checkpoint"):
        quantize(onnx_folder, graphs, tmp_path / "out", choice, 1, checkpoint=checkpoint_folder)
    with pytest.raises(QuantizationError, match="--checkpoint"):
        quantize(onnx_folder, graphs, tmp_path / "out", choice, 1)


# Single layers


def operator(layer: PrequantizedLinear) -> Operator:
    outputs, inputs = layer.q.shape
    return Operator("q_proj", outputs, inputs, 1, ((0, 0),) * 3, None)


def method_of(layer: PrequantizedLinear | None) -> Prequantized:
    """The method with a checkpoint of this one layer."""
    return Prequantized(SimpleNamespace(quantization=True, prequantized=lambda _: layer))


@given(
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([16, 32, 64]),
    centred=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_q_zero_points_and_float16_scales_are_exact(bits: int, group: int, centred: bool, seed: int) -> None:
    """Negative, subnormal and zero scales, zero points at the ends: all of them occur in files on hubs."""
    random = np.random.default_rng(seed)
    q = random.integers(0, 2**bits, (8, 64)).astype(np.uint8)
    shape = (8, 64 // group)
    middle = np.full(shape, 2 ** (bits - 1), np.uint8)
    zero_points = middle if centred else random.integers(0, 2**bits, shape).astype(np.uint8)
    scales = random.integers(0, 2**16, shape).astype(np.uint16).view(np.float16)
    scales = np.where(np.isfinite(scales), scales, np.float16(0))
    layer = PrequantizedLinear(q, scales, zero_points, bits, group)
    method, form = method_of(layer), WeightFormat(bits, method="checkpoint")
    form = method.resolve(operator(layer), form)
    assert (form.bits, form.symmetric) == (bits, bool((zero_points == middle).all()))
    quantized = method.prepare(operator(layer), form)(0, layer.dequantize())
    groups = np.arange(64) // group
    exact = (q.astype(float) - zero_points[:, groups]) * scales[:, groups].astype(float)
    np.testing.assert_array_equal(quantized.dequantize().astype(float), exact)
    dtype = np.float16 if form.scale_bits == 16 else np.float32
    pairs = np.frombuffer(scale_bytes(quantized, form.scale_bits), dtype).reshape(8, shape[1], -1).astype(np.float32)
    np.testing.assert_array_equal(pairs[:, :, -1], quantized.scales)
    if quantized.zero_points is not None:
        np.testing.assert_array_equal(pairs[:, :, 0], quantized.zero_points)
