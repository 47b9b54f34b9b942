"""Numbers that no checkpoint has, each written into a sound bundle's weight file, and vouched for by its manifest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hf2mnn.doctor.checks.weights import on_a_grid
from hf2mnn.doctor.finding import Severity
from hf2mnn.doctor.patient import Model
from hf2mnn.mnn.bundle import DECODER, VISION
from hf2mnn.mnn.convert import read_graph
from hf2mnn.mnn.graph import LINEAR, Graph
from hf2mnn.quant.blob import pack, scale_bytes
from hf2mnn.quant.gptq import compensation, gptq_rows
from hf2mnn.quant.rounding import round_rows
from hf2mnn.quant.weights import Operator
from patients import copied, edited, errors, found, own, vouched

Q_PROJ = "model.language_model.layers.1.self_attn.q_proj"
NORM = "model.language_model.layers.2.input_layernorm"


def model_of(bundle: Path, file: str = DECODER) -> Model:
    return Model(bundle / file, bundle / f"{file}.weight")


def operator_of(bundle: Path, name: str) -> Operator:
    return next(operator for operator in model_of(bundle).operators if operator.name == name)


def convolution(graph: Graph, name: str) -> dict:
    return next(op["main"] for op in graph.of_type("Convolution") if op["name"] == f"{name}{LINEAR}")


def write(bundle: Path, offset: int, content: bytes, file: str = DECODER) -> None:
    with own(bundle / f"{file}.weight").open("r+b") as weights:
        weights.seek(offset)
        weights.write(content)


@pytest.fixture(params=["int4", "fp16"])
def bundle(request: pytest.FixtureRequest, results: Path, tmp_path: Path) -> Path:
    return copied(results / "bundles" / request.param, tmp_path / "bundle")


def test_all_zero(bundle: Path) -> None:
    """Of quantized weights the scales: that is what the converter leaves."""
    operator = operator_of(bundle, Q_PROJ)
    quantized = operator.parts[1][1] > 0
    offset, size = operator.parts[1 if quantized else 0]
    write(bundle, offset, bytes(size))
    vouched(bundle)
    assert errors(bundle) == {"weights_constant"}


def test_constant_levels(results: Path, tmp_path: Path) -> None:
    """One level and one scale everywhere."""
    bundle = copied(results / "bundles" / "int4", tmp_path / "bundle")
    operator = operator_of(bundle, Q_PROJ)
    (offset, size), (scales, count), _ = operator.parts
    head = model_of(bundle).file.header(operator).size
    write(bundle, offset + head, b"\x11" * (size - head))
    write(bundle, scales, np.tile(np.array([0.5, 0.25], np.float16), count // 4).tobytes())
    vouched(bundle)
    assert errors(bundle) == {"weights_constant"}


@pytest.mark.parametrize(("variant", "number"), [("int4", np.nan), ("int4", 5e4), ("fp16", np.inf), ("fp16", 5e4)])
def test_a_number_that_is_none(results: Path, tmp_path: Path, variant: str, number: float) -> None:
    bundle = copied(results / "bundles" / variant, tmp_path / "bundle")
    operator = operator_of(bundle, Q_PROJ)
    offset = operator.parts[1 if operator.parts[1][1] else 0][0]
    write(bundle, offset + 200, np.float16(number).tobytes())
    vouched(bundle)
    assert errors(bundle) == {"weights_not_finite"}


def norm_place(bundle: Path, file: str = DECODER, name: str = NORM) -> list[int]:
    return next(op for op in read_graph(bundle / file).of_type("LayerNorm") if op["name"] == name)["main"]["external"]


def test_gamma_of_zeros(results: Path, tmp_path: Path) -> None:
    bundle = copied(results / "bundles" / "int4", tmp_path / "bundle")
    offset, size, _ = norm_place(bundle)
    write(bundle, offset, bytes(size))
    vouched(bundle)
    assert errors(bundle) == {"norm_zero"}


def test_beta_of_zeros(results: Path, tmp_path: Path) -> None:
    """Of the vision tower: the decoder's normalizations have none."""
    bundle = copied(results / "bundles" / "int8", tmp_path / "bundle")
    name = read_graph(bundle / VISION).of_type("LayerNorm")[1]["name"]
    offset, gamma, beta = norm_place(bundle, VISION, name)
    write(bundle, offset + gamma, bytes(beta), VISION)
    vouched(bundle)
    assert {f.check: f.severity for f in found(bundle).values()} == {"norm_zero": Severity.WARNING}


def test_stale_offset_of_a_norm(bundle: Path) -> None:
    """It points into a linear layer's weight, as after a re-quantization by the converter."""
    place = operator_of(bundle, Q_PROJ).parts[0][0] + 512

    def move(graph: Graph) -> None:
        next(op for op in graph.ops if op["name"] == NORM)["main"]["external"][0] = place

    edited(bundle, move)
    vouched(bundle)
    assert errors(bundle) == {"norm_stale"}


def test_bytes_of_levels_in_the_place_of_gamma(results: Path, tmp_path: Path) -> None:
    """No two operators share bytes, but what is there is no gamma."""
    bundle = copied(results / "bundles" / "int4", tmp_path / "bundle")
    offset, size, _ = norm_place(bundle)
    operator = operator_of(bundle, Q_PROJ)
    write(bundle, offset, model_of(bundle).file.raw(operator.parts[0][0] + 64, size))
    vouched(bundle)
    assert errors(bundle) == {"norm_stale"}


@pytest.mark.parametrize(("gamma", "check"), [([0.0] * 32, "norm_zero"), (None, "norm_stale"), ([1.5] * 32, None)])
def test_a_normalization_that_the_rotation_does(bundle: Path, gamma: list[float] | None, check: str | None) -> None:
    """It has its gamma in the graph, or none: `external` is not read there."""
    held = {"gamma": gamma} if gamma else {"external": [0, 128, 128]}

    def normalize(graph: Graph) -> None:
        for op in graph.of_type("RoPE"):
            norm = {"axis": [-1], "epsilon": 1e-6, "group": 1, "useRMSNorm": True, **held}
            op["main"] |= {"q_norm": norm, "k_norm": norm}

    edited(bundle, normalize)
    vouched(bundle)
    assert errors(bundle) == ({check} if check else set())


def test_two_linear_layers_on_the_same_bytes(results: Path, tmp_path: Path) -> None:
    bundle = copied(results / "bundles" / "fp16", tmp_path / "bundle")

    def move(graph: Graph) -> None:
        convolution(graph, Q_PROJ)["external"][0] += 64

    edited(bundle, move)
    vouched(bundle)
    assert errors(bundle) == {"weights_overlap"}


# Quantized twice


def test_requantized(results: Path, tmp_path: Path) -> None:
    """int4's weights rounded again, to 8 bits, in int8's bundle; both alone are sound."""
    bundle = copied(results / "bundles" / "int8", tmp_path / "bundle")
    four, eight = model_of(results / "bundles" / "int4"), model_of(bundle)
    content = bytearray(own(bundle / f"{DECODER}.weight").read_bytes())
    for old, new in zip(four.operators, eight.operators, strict=True):
        levels = round_rows(four.file.rows(old), 8, 64, False, 16, "mse")
        (offset, size), (scales, count), _ = new.parts
        begin = offset + eight.file.header(new).size
        content[begin : offset + size] = pack(levels.levels, 8)
        content[scales : scales + count] = scale_bytes(levels, 16)
    (bundle / f"{DECODER}.weight").write_bytes(content)
    vouched(bundle)
    assert {f.check: f.severity for f in found(bundle).values()} == {"requantized": Severity.WARNING}


def rtn(rows: np.ndarray, bits: int, block: int, symmetric: bool) -> np.ndarray:
    return round_rows(rows, bits, block, symmetric, 16, "rtn").levels


def mse(rows: np.ndarray, bits: int, block: int, symmetric: bool) -> np.ndarray:
    return round_rows(rows, bits, block, symmetric, 16, "mse").levels


def hqq(rows: np.ndarray, bits: int, block: int, symmetric: bool) -> np.ndarray:
    return round_rows(rows, bits, block, symmetric, 16, "hqq").levels


def gptq(rows: np.ndarray, bits: int, block: int, symmetric: bool) -> np.ndarray:
    inputs = np.random.default_rng(1).normal(size=(512, rows.shape[1])).astype(np.float32)
    return gptq_rows(rows, bits, block, symmetric, 16, compensation(inputs.T @ inputs, "layer")).levels


@pytest.mark.parametrize("method", [rtn, mse, hqq, gptq])
def test_weights_rounded_once_are_no_grid(method: Callable) -> None:
    """Heavy-tailed, with outlier channels (as awq leaves them, too), or with a giant in each row that leaves the others
    few levels. Rounded twice they are one, but for gptq, which moves what it has yet to round.
    """
    random = np.random.default_rng(0)
    rows = random.standard_t(3, (16, 512)).astype(np.float32) * 0.02
    scaled = rows * np.where(np.arange(512) % 97 == 0, 8, 1).astype(np.float32)
    giant = rows.copy()
    giant[:, 5] = 3.0
    twice = round_rows(rows, 4, 64, False, 16, "mse").dequantize()
    for bits, block, symmetric in ((8, 0, False), (8, 64, True), (6, 64, False)):
        for weights in (rows, scaled, giant):
            assert not on_a_grid(method(weights, bits, block, symmetric))
        assert on_a_grid(method(twice, bits, block or 64, symmetric)) or method is gptq


# Against the checkpoint


def test_weights_of_the_checkpoint(results: Path, tmp_path: Path) -> None:
    """Two layers' weights changed places: every header fits, every number is plausible."""
    bundle = copied(results / "bundles" / "int4", tmp_path / "bundle")
    one, other = Q_PROJ, Q_PROJ.replace("layers.1", "layers.2")

    def swap(graph: Graph) -> None:
        first, second = (convolution(graph, name) for name in (one, other))
        first["external"], second["external"] = second["external"], first["external"]

    edited(bundle, swap)
    vouched(bundle)
    assert not errors(bundle)
    (said,) = found(bundle, checkpoint=results / "checkpoint").values()
    assert said.check == "not_the_checkpoint" and said.evidence.startswith("2 of ")


def test_swapped_float_weights_of_the_same_size(results: Path, tmp_path: Path) -> None:
    """Another revision's, of the same shape: only the checkpoint tells."""
    bundle = copied(results / "bundles" / "fp32", tmp_path / "bundle")
    path = bundle / f"{DECODER}.weight"
    numbers = np.frombuffer(path.read_bytes(), np.float32)
    operator = operator_of(bundle, Q_PROJ)
    begin, size = operator.parts[0]
    changed = numbers.copy()
    changed[begin // 4 : (begin + size) // 4] = numbers[begin // 4 : (begin + size) // 4][::-1]
    path.unlink()
    path.write_bytes(changed.tobytes())
    vouched(bundle)
    assert not errors(bundle)
    assert errors(bundle, results / "checkpoint") == {"not_the_checkpoint"}
