"""Weights read from a .mnn.weight file have the bits that the engine computes with, in every format.

Both in files of MNN's converter ("theirs") and in those of hf2mnn ("ours").
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hf2mnn.metrics import relative_error
from hf2mnn.quant import write
from hf2mnn.quant.formats import DENSE, WeightFormat
from hf2mnn.quant.rounding import round_rows
from hf2mnn.quant.variant import choose_formats
from one_layer import Model, convert, engine_outputs, quantize

INPUTS = 128
ROWS = (24, 13)
"""Outputs of a layer: a multiple of the engine's vectors, and another number."""
GRID = [
    WeightFormat(bits, block, symmetric, scale_bits)
    for bits in range(2, 9)
    for block in (0, 32, 64, 128)
    for symmetric in (False, True)
    for scale_bits in (16, 32)
]
PAIRWISE = [
    WeightFormat(bits, block, (bits + i) % 2 == 1, 16 if (bits // 2 + i // 2) % 2 else 32)
    for bits in range(2, 9)
    for i, block in enumerate((0, 32, 64, 128))
]
"""A quarter of GRID, with all pairs of settings: each format is a run of the converter."""
HQQ = [WeightFormat(bits, 64, method="hqq") for bits in (2, 4, 8)]
INT8_ERROR = 3e-5
"""Share of the largest weight: a one-hot input is exact in int8 but for its scale."""

INT8_OUTPUT_ERROR = 0.01

Engine = dict[str, dict[str, np.ndarray]]


def named(form: WeightFormat) -> str:
    return "-".join(str(value) for value in vars(form).values())


def random_weight(rows: int, inputs: int = INPUTS, seed: int = 0) -> np.ndarray:
    """Return Student-t weights: blocks have outliers, and some rows an offset, for which zero points matter."""
    random = np.random.default_rng([seed, rows, inputs])
    weight = 0.05 * random.standard_t(4, (rows, inputs)) + 0.1 * random.standard_normal((rows, 1)) ** 3
    return weight.astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layers")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> dict[str, Model]:
    """Models of two layers by the converter, by format."""
    weights = {f"layer{rows}": random_weight(rows) for rows in ROWS}
    with ThreadPoolExecutor(2) as pool:
        formats = [*PAIRWISE, *HQQ, WeightFormat(16), WeightFormat()]
        models = pool.map(lambda form: convert(folder / named(form), weights, form), formats)
        return dict(zip(map(named, formats), models, strict=True))


@pytest.fixture(scope="module")
def ours(folder: Path) -> dict[str, Model]:
    """Two models by hf2mnn with a layer for each format, each of another shape."""
    models = {}
    for rows in ROWS:
        formats = [*(replace(form, method="mse") for form in GRID), *HQQ, WeightFormat(16), WeightFormat()]
        weights = {named(form): random_weight(rows, seed=seed) for seed, form in enumerate(formats)}
        model = convert(folder / f"float{rows}", weights)
        models[f"ours{rows}"] = quantize(model, folder / f"ours{rows}", {named(form): form for form in formats})
    return models


@pytest.fixture(scope="module")
def exact(theirs: dict[str, Model], ours: dict[str, Model], folder: Path) -> Engine:
    return engine_outputs(theirs | ours, folder / "exact")


@pytest.fixture(scope="module")
def low_memory(theirs: dict[str, Model], ours: dict[str, Model], folder: Path) -> Engine:
    """With weights that stay quantized, and activations in 8 bits."""
    return engine_outputs(theirs | ours, folder / "low", "low")


@pytest.mark.parametrize("form", [*PAIRWISE, *HQQ, WeightFormat(16), WeightFormat()], ids=named)
def test_the_converters_weights_are_read_as_by_the_engine(
    theirs: dict[str, Model], exact: Engine, form: WeightFormat
) -> None:
    model = theirs[named(form)]
    for name, rows in model.rows().items():
        assert stored_bits(model, name) == form.bits
        assert np.array_equal(exact[named(form)][name], rows), name


def test_our_weights_are_read_as_by_the_engine(ours: dict[str, Model], exact: Engine) -> None:
    for which, model in ours.items():
        bits = {name: stored_bits(model, name) for name in model.by_name}
        assert bits == {name: int(name.split("-")[0]) for name in bits}
        differ = [name for name, rows in model.rows().items() if not np.array_equal(exact[which][name], rows)]
        assert not differ


def stored_bits(model: Model, name: str) -> int:
    stored = model.by_name[name].stored
    return 32 if stored is None else stored["aMaxOrBits"] if stored["type"] == DENSE else 16


def test_weights_that_stay_quantized_are_the_same_weights(
    theirs: dict[str, Model], ours: dict[str, Model], low_memory: Engine
) -> None:
    """They take other code of the engine, with layouts for 2, 3, 4 and 8 bits."""
    for which, model in (theirs | ours).items():
        for name, rows in model.rows().items():
            np.testing.assert_allclose(
                low_memory[which][name], rows, rtol=0, atol=INT8_ERROR * np.abs(rows).max(), err_msg=f"{which} {name}"
            )


def test_outputs_with_8_bit_activations_are_those_of_these_weights(
    theirs: dict[str, Model], ours: dict[str, Model], folder: Path
) -> None:
    """Inputs that fill a row and are not centred, so that sums over blocks and zero points of both sides matter.

    The remaining error is the rounding of activations to 255 steps.
    """
    inputs = (np.random.default_rng(1).standard_normal((20, INPUTS)) + 0.5).astype(np.float32)
    models = theirs | ours
    outputs = {memory: engine_outputs(models, folder / memory, memory, inputs) for memory in ("high", "low")}
    for which, model in models.items():
        for name, rows in model.rows().items():
            expected = rows.astype(np.float64) @ inputs.T.astype(np.float64)
            assert relative_error(outputs["high"][which][name], expected) < 1e-6, (which, name)
            assert relative_error(outputs["low"][which][name], expected) < INT8_OUTPUT_ERROR, (which, name)


# Shapes


def test_more_than_65535_rows_or_blocks(folder: Path) -> None:
    """An lm_head with a large vocabulary, and a layer with many blocks: their dimensions are int32."""
    for rows, inputs, block in ((65_600, 16, 0), (16_416, 128, 32)):
        float_model = convert(folder / f"wide{rows}", {"layer": random_weight(rows, inputs)})
        form = WeightFormat(4, block, method="mse")
        models = {
            "ours": quantize(float_model, folder / f"wide{rows}", {"layer": form}),
            "theirs": convert(folder / f"wide{rows}-theirs", {"layer": random_weight(rows, inputs)}, form),
        }
        outputs = engine_outputs(models, folder / f"wide{rows}")
        for which, model in models.items():
            assert model.by_name["layer"].stored["shapeInt32"], which
            assert np.array_equal(outputs[which]["layer"], model.rows()["layer"]), which


def test_patch_embedding(folder: Path) -> None:
    """Kernels of 14 x 14 over 3 channels: the converter stores one scale for each, with any block."""
    random = np.random.default_rng(3)
    weights = {f"layer{bits}": random.standard_normal((19, 3, 14, 14)).astype(np.float32) for bits in range(2, 9)}
    float_model = convert(folder / "patch", weights)
    requested = {f"layer{bits}": WeightFormat(bits, 64, bits % 2 == 0, method="mse") for bits in range(2, 9)}
    formats = choose_formats(
        float_model.layers, WeightFormat(), {name: vars(form) for name, form in requested.items()}, ""
    )
    assert {form.block for form in formats.values()} == {0}
    models = {"float": float_model, "ours": quantize(float_model, folder / "patch", formats)}
    models |= {f"theirs{bits}": convert(folder / f"patch{bits}", weights, WeightFormat(bits)) for bits in (3, 8)}
    outputs = engine_outputs(models, folder / "patch")
    for which, model in models.items():
        for name, rows in model.rows().items():
            assert rows.shape == (19, 588)
            assert np.array_equal(outputs[which][name], rows), (which, name)
    for name, weight in weights.items():
        assert np.array_equal(outputs["float"][name], weight.reshape(19, 588))


@pytest.mark.parametrize("bits", [2, 3, 5, 7, 8])
def test_chunks_of_rows_meet_in_whole_bytes(folder: Path, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here 8 of 35 rows of 33 weights, whose bits fill no bytes."""
    weight = random_weight(35, 33)
    float_model = convert(folder / f"odd{bits}", {"layer": weight})
    forms = {"layer": WeightFormat(bits, method="mse")}
    whole = quantize(float_model, folder / f"odd{bits}" / "whole", forms)
    monkeypatch.setattr(write, "WEIGHTS_AT_ONCE", 1)
    cut = quantize(float_model, folder / f"odd{bits}" / "cut", forms, threads=3)
    assert whole.weights.path.read_bytes() == cut.weights.path.read_bytes()
    outputs = engine_outputs({"cut": cut}, folder / f"odd{bits}")["cut"]["layer"]
    assert np.array_equal(outputs, cut.rows()["layer"])
    assert np.array_equal(outputs, round_rows(weight, WeightFormat(bits, 0, method="mse")).dequantize())
