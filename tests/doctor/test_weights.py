"""Implausible values in the weight file of a valid bundle, with an updated manifest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from faulty_bundles import edit_graph, errors, file_findings, link_copy, unlink_copy, update_manifest
from hf2mnn.doctor.artifacts import MnnModel
from hf2mnn.doctor.checks.weights import on_a_grid
from hf2mnn.doctor.findings import Severity
from hf2mnn.mnn.bundle import DECODER, VISION
from hf2mnn.mnn.convert import read_graph
from hf2mnn.mnn.graph import LINEAR, Graph
from hf2mnn.quant.blob import pack, scale_bytes
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.quant.gptq import gptq_rows, inverse_cholesky
from hf2mnn.quant.rounding import round_rows
from hf2mnn.quant.weights import Operator

Q_PROJ = "model.language_model.layers.1.self_attn.q_proj"
NORM = "model.language_model.layers.2.input_layernorm"


def model_of(bundle: Path, file: str = DECODER) -> MnnModel:
    return MnnModel(bundle / file, bundle / f"{file}.weight")


def operator_of(bundle: Path, name: str) -> Operator:
    return next(operator for operator in model_of(bundle).operators if operator.name == name)


def convolution(graph: Graph, name: str) -> dict:
    return next(op["main"] for op in graph.of_type("Convolution") if op["name"] == f"{name}{LINEAR}")


def write(bundle: Path, offset: int, content: bytes, file: str = DECODER) -> None:
    with unlink_copy(bundle / f"{file}.weight").open("r+b") as weights:
        weights.seek(offset)
        weights.write(content)


@pytest.fixture(params=["int4", "fp16"])
def bundle(request: pytest.FixtureRequest, results: Path, tmp_path: Path) -> Path:
    return link_copy(results / "bundles" / request.param, tmp_path / "bundle")


def test_all_zero(bundle: Path) -> None:
    """In quantized weights the scales are zero, as the converter writes them."""
    operator = operator_of(bundle, Q_PROJ)
    quantized = operator.parts[1][1] > 0
    offset, size = operator.parts[1 if quantized else 0]
    write(bundle, offset, bytes(size))
    update_manifest(bundle)
    assert errors(bundle) == {"weights_constant"}


def test_constant_quantized_values(results: Path, tmp_path: Path) -> None:
    """All q and all scales are equal."""
    bundle = link_copy(results / "bundles" / "int4", tmp_path / "bundle")
    operator = operator_of(bundle, Q_PROJ)
    (offset, size), (scales, count), _ = operator.parts
    head = model_of(bundle).weight_file.header(operator).size
    write(bundle, offset + head, b"\x11" * (size - head))
    write(bundle, scales, np.tile(np.array([0.5, 0.25], np.float16), count // 4).tobytes())
    update_manifest(bundle)
    assert errors(bundle) == {"weights_constant"}


@pytest.mark.parametrize(("variant", "number"), [("int4", np.nan), ("int4", 5e4), ("fp16", np.inf), ("fp16", 5e4)])
def test_weights_not_finite(results: Path, tmp_path: Path, variant: str, number: float) -> None:
    bundle = link_copy(results / "bundles" / variant, tmp_path / "bundle")
    operator = operator_of(bundle, Q_PROJ)
    offset = operator.parts[1 if operator.parts[1][1] else 0][0]
    write(bundle, offset + 200, np.float16(number).tobytes())
    update_manifest(bundle)
    assert errors(bundle) == {"weights_not_finite"}


def norm_external(bundle: Path, file: str = DECODER, name: str = NORM) -> list[int]:
    return next(op for op in read_graph(bundle / file).of_type("LayerNorm") if op["name"] == name)["main"]["external"]


def test_gamma_of_zeros(results: Path, tmp_path: Path) -> None:
    bundle = link_copy(results / "bundles" / "int4", tmp_path / "bundle")
    offset, size, _ = norm_external(bundle)
    write(bundle, offset, bytes(size))
    update_manifest(bundle)
    assert errors(bundle) == {"norm_zero"}


def test_beta_of_zeros(results: Path, tmp_path: Path) -> None:
    """In the vision tower: the decoder's normalizations have no beta."""
    bundle = link_copy(results / "bundles" / "int8", tmp_path / "bundle")
    name = read_graph(bundle / VISION).of_type("LayerNorm")[1]["name"]
    offset, gamma, beta = norm_external(bundle, VISION, name)
    write(bundle, offset + gamma, bytes(beta), VISION)
    update_manifest(bundle)
    assert {f.check: f.severity for f in file_findings(bundle).values()} == {"norm_zero": Severity.WARNING}


def test_stale_offset_of_a_norm(bundle: Path) -> None:
    """It points into the weight of a linear layer, as after a re-quantization by the converter."""
    offset = operator_of(bundle, Q_PROJ).parts[0][0] + 512

    def move(graph: Graph) -> None:
        next(op for op in graph.ops if op["name"] == NORM)["main"]["external"][0] = offset

    edit_graph(bundle, move)
    update_manifest(bundle)
    assert errors(bundle) == {"norm_stale"}


def test_quantized_values_in_place_of_gamma(results: Path, tmp_path: Path) -> None:
    """No byte ranges overlap, but the values are implausible."""
    bundle = link_copy(results / "bundles" / "int4", tmp_path / "bundle")
    offset, size, _ = norm_external(bundle)
    operator = operator_of(bundle, Q_PROJ)
    write(bundle, offset, model_of(bundle).weight_file.raw(operator.parts[0][0] + 64, size))
    update_manifest(bundle)
    assert errors(bundle) == {"norm_stale"}


@pytest.mark.parametrize(("gamma", "check"), [([0.0] * 32, "norm_zero"), (None, "norm_stale"), ([1.5] * 32, None)])
def test_a_normalization_inside_rope(bundle: Path, gamma: list[float] | None, check: str | None) -> None:
    """Its gamma is in the graph or missing: RoPE does not read `external`."""
    held = {"gamma": gamma} if gamma else {"external": [0, 128, 128]}

    def normalize(graph: Graph) -> None:
        for op in graph.of_type("RoPE"):
            norm = {"axis": [-1], "epsilon": 1e-6, "group": 1, "useRMSNorm": True, **held}
            op["main"] |= {"q_norm": norm, "k_norm": norm}

    edit_graph(bundle, normalize)
    update_manifest(bundle)
    assert errors(bundle) == ({check} if check else set())


def test_weights_overlap(results: Path, tmp_path: Path) -> None:
    bundle = link_copy(results / "bundles" / "fp16", tmp_path / "bundle")

    def move(graph: Graph) -> None:
        convolution(graph, Q_PROJ)["external"][0] += 64

    edit_graph(bundle, move)
    update_manifest(bundle)
    assert errors(bundle) == {"weights_overlap"}


def test_requantized(results: Path, tmp_path: Path) -> None:
    """The weights of int4, rounded again to 8 bits, in the bundle int8."""
    bundle = link_copy(results / "bundles" / "int8", tmp_path / "bundle")
    four, eight = model_of(results / "bundles" / "int4"), model_of(bundle)
    content = bytearray(unlink_copy(bundle / f"{DECODER}.weight").read_bytes())
    for old, new in zip(four.operators, eight.operators, strict=True):
        quantized = round_rows(four.weight_file.rows(old), WeightFormat(8, 64, method="mse"))
        (offset, size), (scales, count), _ = new.parts
        begin = offset + eight.weight_file.header(new).size
        content[begin : offset + size] = pack(quantized.q, 8)
        content[scales : scales + count] = scale_bytes(quantized, 16)
    (bundle / f"{DECODER}.weight").write_bytes(content)
    update_manifest(bundle)
    assert {f.check: f.severity for f in file_findings(bundle).values()} == {"requantized": Severity.WARNING}


def rtn(rows: np.ndarray, bits: int, block: int, symmetric: bool) -> np.ndarray:
    return round_rows(rows, WeightFormat(bits, block, symmetric, 16, "rtn")).q


def mse(rows: np.ndarray, bits: int, block: int, symmetric: bool) -> np.ndarray:
    return round_rows(rows, WeightFormat(bits, block, symmetric, 16, "mse")).q


def hqq(rows: np.ndarray, bits: int, block: int, symmetric: bool) -> np.ndarray:
    return round_rows(rows, WeightFormat(bits, block, symmetric, 16, "hqq")).q


def gptq(rows: np.ndarray, bits: int, block: int, symmetric: bool) -> np.ndarray:
    inputs = np.random.default_rng(1).normal(size=(512, rows.shape[1])).astype(np.float32)
    return gptq_rows(rows, WeightFormat(bits, block, symmetric, 16), inverse_cholesky(inputs.T @ inputs, "layer")).q


@pytest.mark.parametrize("method", [rtn, mse, hqq, gptq])
def test_on_a_grid(method: Callable) -> None:
    """Weights that were rounded twice lie on a grid, except with gptq, which changes weights before it rounds them.

    Weights that were rounded once do not: heavy-tailed ones, with outlier channels (as after awq), or with an outlier
    in each row that leaves few quantized values to the others.
    """
    random = np.random.default_rng(0)
    rows = random.standard_t(3, (16, 512)).astype(np.float32) * 0.02
    scaled = rows * np.where(np.arange(512) % 97 == 0, 8, 1).astype(np.float32)
    giant = rows.copy()
    giant[:, 5] = 3.0
    twice = round_rows(rows, WeightFormat(4, 64, method="mse")).dequantize()
    for bits, block, symmetric in ((8, 0, False), (8, 64, True), (6, 64, False)):
        for weights in (rows, scaled, giant):
            assert not on_a_grid(method(weights, bits, block, symmetric))
        assert on_a_grid(method(twice, bits, block or 64, symmetric)) or method is gptq


def test_swapped_quantized_weights(results: Path, tmp_path: Path) -> None:
    """Two layers read each other's weights: every header fits, every value is plausible."""
    bundle = link_copy(results / "bundles" / "int4", tmp_path / "bundle")
    one, other = Q_PROJ, Q_PROJ.replace("layers.1", "layers.2")

    def swap(graph: Graph) -> None:
        first, second = (convolution(graph, name) for name in (one, other))
        first["external"], second["external"] = second["external"], first["external"]

    edit_graph(bundle, swap)
    update_manifest(bundle)
    assert not errors(bundle)
    (finding,) = file_findings(bundle, checkpoint=results / "checkpoint").values()
    assert finding.check == "not_the_checkpoint" and finding.evidence.startswith("2 of ")


def test_swapped_float_weights_of_the_same_size(results: Path, tmp_path: Path) -> None:
    """Other weights of the same shape: only the checkpoint shows it."""
    bundle = link_copy(results / "bundles" / "fp32", tmp_path / "bundle")
    path = bundle / f"{DECODER}.weight"
    numbers = np.frombuffer(path.read_bytes(), np.float32)
    operator = operator_of(bundle, Q_PROJ)
    begin, size = operator.parts[0]
    changed = numbers.copy()
    changed[begin // 4 : (begin + size) // 4] = numbers[begin // 4 : (begin + size) // 4][::-1]
    path.unlink()
    path.write_bytes(changed.tobytes())
    update_manifest(bundle)
    assert not errors(bundle)
    assert errors(bundle, results / "checkpoint") == {"not_the_checkpoint"}
