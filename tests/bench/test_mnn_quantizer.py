"""Quantization by MNN's converter: another format than the requested one is an error, and constants stay exact."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hf2mnn.core.errors import ConversionError
from hf2mnn.mnn.convert import read_graph
from hf2mnn.mnn.graph import Graph, check_size
from hf2mnn.onnx.initializers import float_values
from hf2mnn.quant.formats import WeightFormat
from mnn_quantizer import check_weights, convert_decoder, convert_vision

LAYERS = 2
BLOCKS = {2: 64, 3: 0, 4: 64, 5: 0, 6: 64, 7: 0, 8: 64}
FORMATS = [WeightFormat(bits, block) for bits, block in BLOCKS.items()]
FORMATS += [WeightFormat(4, 32), WeightFormat(3, 128), WeightFormat(8, 0)]
FORMATS += [WeightFormat(bits, block, symmetric=True) for bits, block in ((2, 64), (4, 128), (8, 0))]
FORMATS += [WeightFormat(4, 64, scale_bits=32), WeightFormat(4, 64, method="hqq"), WeightFormat(16), WeightFormat()]
FREQUENCIES = {
    "llm.mnn": ("decoder.onnx", "model.language_model.rotary_emb.inv_freq"),
    "visual.mnn": ("vision.onnx", "model.visual.rotary_pos_emb.inv_freq"),
}


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: "-".join(map(str, vars(form).values())))
def test_weights_are_stored_as_requested(onnx_folder: Path, tmp_path: Path, form: WeightFormat) -> None:
    """Bits, block, zero points and scales of every layer, and bytes on disk computed independently.

    The converter takes 16 bits for 8, a bare --weightQuantAsymmetric for its opposite, and an odd block for none.
    """
    layers = convert_decoder(onnx_folder, tmp_path, LAYERS, form).weights()
    assert len(layers) == 7 * LAYERS + 1
    for layer in layers:
        assert layer.bits == form.bits
        if form.bits >= 16:
            size = layer.inputs * layer.outputs * form.bits // 8
        else:
            block = form.block or layer.inputs
            # One block a row is one scale per channel.
            assert layer.block == (block if block < layer.inputs else 0)
            assert (layer.symmetric, layer.scale_bits) == (form.symmetric, form.scale_bits)
            scales = layer.outputs * (layer.inputs // block) * (1 if form.symmetric else 2)
            size = layer.inputs * layer.outputs * form.bits // 8 + scales * form.scale_bits // 8
        # Biases are float; the header of quantized weights lists at most 256 values.
        assert size <= layer.size <= size + 4 * layer.outputs + 512, layer.name


@pytest.mark.parametrize("block", [40, 48, 256])
def test_a_block_that_does_not_fit_is_an_error_and_not_another_block(
    onnx_folder: Path, tmp_path: Path, block: int
) -> None:
    """The converter uses one scale per channel instead: fewer bytes, much larger errors."""
    with pytest.raises(ConversionError, match=rf"128 inputs.* block channel, instead of 4 bits, block {block};"):
        convert_decoder(onnx_folder, tmp_path, LAYERS, WeightFormat(4, block))


def test_each_setting_is_checked(onnx_folder: Path, tmp_path: Path) -> None:
    convert_decoder(onnx_folder, tmp_path, LAYERS, WeightFormat(4, 64))
    graph = read_graph(tmp_path / "llm.mnn")
    check_weights(graph, "llm.mnn", WeightFormat(4, 64))
    for form in (
        WeightFormat(8, 64),
        WeightFormat(4, 32),
        WeightFormat(4, 0),
        WeightFormat(4, 64, symmetric=True),
        WeightFormat(4, 64, scale_bits=32),
    ):
        with pytest.raises(ConversionError, match="is stored with 4 bits, block 64"):
            check_weights(graph, "llm.mnn", form)
    size = (tmp_path / "llm.mnn.weight").stat().st_size
    check_size(graph, "llm.mnn.weight", size)
    with pytest.raises(ConversionError, match=r"^llm\.mnn\.weight has .* truncated"):
        check_size(graph, "llm.mnn.weight", graph.external_size() - 1)


def test_the_vision_tower_is_stored_as_requested(onnx_folder: Path, tmp_path: Path) -> None:
    """All but its patch embedding, whose 14 x 14 kernels no block divides: it has one scale per channel."""
    for block in (0, 32):
        graph = convert_vision(onnx_folder, tmp_path, WeightFormat(8, block))
        assert graph.inputs == ["patches", "position_ids", "attention_mask"]
        stored = [(layer.bits, layer.block) for layer in graph.weights()]
        assert stored == [(8, 0)] * 2 + [(8, block)] * 6
    with pytest.raises(ConversionError, match=r"96 inputs.* instead of 8 bits, block 80;"):
        convert_vision(onnx_folder, tmp_path, WeightFormat(8, 80))


def test_parallel_conversions_have_the_same_bytes(onnx_folder: Path, tmp_path: Path) -> None:
    """Two conversions in one working directory would exchange weights; the sizes would be right."""
    formats = [WeightFormat(), WeightFormat(4, 64), WeightFormat(3)]
    folders = [tmp_path / f"{when}{index}" for when in ("alone", "parallel") for index in range(len(formats))]
    for folder in folders:
        folder.mkdir()

    def convert(folder: Path, form: WeightFormat) -> list[bytes]:
        convert_decoder(onnx_folder, folder, LAYERS, form)
        return [(folder / name).read_bytes() for name in ("llm.mnn", "llm.mnn.weight")]

    alone = [convert(*pair) for pair in zip(folders, formats, strict=False)]
    with ThreadPoolExecutor(len(formats)) as pool:
        parallel = list(pool.map(convert, folders[len(formats) :], formats))
    assert [one == other for one, other in zip(alone, parallel, strict=True)] == [True] * len(formats)
    assert len({weights for _, weights in alone}) == len(formats)


# Constants


def exact_frequencies(onnx_folder: Path, file: str) -> bytes:
    """Return the rotary frequencies of the ONNX graph as the bytes of a flatbuffer."""
    source, name = FREQUENCIES[file]
    return float_values(onnx_folder / source)[name].astype("<f4").tobytes()


def convert_parts(onnx_folder: Path, folder: Path, form: WeightFormat) -> dict[str, bytes]:
    convert_decoder(onnx_folder, folder, LAYERS, form)
    convert_vision(onnx_folder, folder, WeightFormat(8) if form.bits < 16 else form)
    return {file: (folder / file).read_bytes() for file in FREQUENCIES}


@pytest.mark.parametrize("form", [WeightFormat(16), WeightFormat(4, 64)], ids=lambda form: str(form.bits))
def test_rotary_frequencies_are_exactly_the_onnx_graphs(onnx_folder: Path, tmp_path: Path, form: WeightFormat) -> None:
    for file, content in convert_parts(onnx_folder, tmp_path, form).items():
        assert exact_frequencies(onnx_folder, file) in content, file


@pytest.mark.parametrize(("form", "error"), [(WeightFormat(), 5e-4), (WeightFormat(16), 1e-4)])
def test_without_restored_constants_they_are_rounded(
    onnx_folder: Path, tmp_path: Path, form: WeightFormat, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To six decimals by the converter's JSON, to float16 by --fp16; positions multiply either error."""
    monkeypatch.setattr(Graph, "restore_constants", lambda *_: None)
    for file, content in convert_parts(onnx_folder, tmp_path, form).items():
        assert exact_frequencies(onnx_folder, file) not in content, file
    (constant,) = [op for op in read_graph(tmp_path / "llm.mnn").of_type("Const") if op["name"].endswith("inv_freq")]
    exact = np.frombuffer(exact_frequencies(onnx_folder, "llm.mnn"), np.float32)
    if form.bits == 16:
        assert constant["main"]["dataType"] == "DT_HALF"
        stored = np.array(constant["main"]["uint8s"], np.int16).astype(np.uint8).view(np.float16)
    else:
        stored = np.array(constant["main"]["float32s"], np.float32)
    assert np.abs(stored / exact - 1).max() > error
