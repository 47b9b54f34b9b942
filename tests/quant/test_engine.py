"""Weights read back from a .mnn.weight file are the engine's, to the last bit: for every format that is offered, in
files that the converter wrote and in our own.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hf2mnn.metrics import relative_error
from hf2mnn.mnn.convert import WeightFormat
from hf2mnn.quant import write
from hf2mnn.quant.formats import choose_formats
from hf2mnn.quant.rounding import round_rows
from hf2mnn.quant.weights import LEVELS
from one_layer import Model, convert, engine_outputs, quantize

INPUTS = 128
ROWS = (24, 13)
"""Outputs of a layer: rows in whole vectors, and not."""
GRID = [
    WeightFormat(bits, block, symmetric, scale_bits)
    for bits in range(2, 9)
    for block in (0, 32, 64, 128)
    for symmetric in (False, True)
    for scale_bits in (16, 32)
]
HQQ = [WeightFormat(bits, 64, method="hqq") for bits in (2, 4, 8)]
INT8_ERROR = 3e-5
"""Of the largest weight: a one-hot input is exact in int8 but for the scale that it is divided and multiplied by."""

INT8_OUTPUT_ERROR = 0.01

Engine = dict[str, dict[str, np.ndarray]]


def named(form: WeightFormat) -> str:
    return "-".join(str(value) for value in vars(form).values())


def random_weight(rows: int, inputs: int = INPUTS, seed: int = 0) -> np.ndarray:
    """Student-t, so that blocks have outliers; off centre in some rows, so that zero points matter."""
    random = np.random.default_rng([seed, rows, inputs])
    weight = 0.05 * random.standard_t(4, (rows, inputs)) + 0.1 * random.standard_normal((rows, 1)) ** 3
    return weight.astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layers")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> dict[str, Model]:
    """By format two layers that the converter has quantized."""
    weights = {f"layer{rows}": random_weight(rows) for rows in ROWS}
    with ThreadPoolExecutor(2) as pool:
        formats = [*GRID, *HQQ, WeightFormat(16), WeightFormat()]
        made = pool.map(lambda form: convert(folder / named(form), weights, form), formats)
        return dict(zip(map(named, formats), made, strict=True))


@pytest.fixture(scope="module")
def ours(folder: Path) -> dict[str, Model]:
    """One model with a layer for each format, two shapes of it."""
    made = {}
    for rows in ROWS:
        formats = [*(replace(form, method="mse") for form in GRID), *HQQ, WeightFormat(16), WeightFormat()]
        weights = {named(form): random_weight(rows, seed=seed) for seed, form in enumerate(formats)}
        model = convert(folder / f"float{rows}", weights)
        made[f"ours{rows}"] = quantize(model, folder / f"ours{rows}", {named(form): form for form in formats})
    return made


@pytest.fixture(scope="module")
def exact(theirs: dict[str, Model], ours: dict[str, Model], folder: Path) -> Engine:
    return engine_outputs(theirs | ours, folder / "exact")


@pytest.fixture(scope="module")
def packed(theirs: dict[str, Model], ours: dict[str, Model], folder: Path) -> Engine:
    """With weights that stay packed, and activations in 8 bits."""
    return engine_outputs(theirs | ours, folder / "packed", "low")


@pytest.mark.parametrize("form", [*GRID, *HQQ, WeightFormat(16), WeightFormat()], ids=named)
def test_the_converters_weights_are_read_as_the_engine_unpacks_them(
    theirs: dict[str, Model], exact: Engine, form: WeightFormat
) -> None:
    model = theirs[named(form)]
    for name, rows in model.rows().items():
        assert stored_bits(model, name) == form.bits
        assert np.array_equal(exact[named(form)][name], rows), name


def test_our_own_weights_are_read_as_the_engine_unpacks_them(ours: dict[str, Model], exact: Engine) -> None:
    for which, model in ours.items():
        found = {name: stored_bits(model, name) for name in model.by_name}
        assert found == {name: int(name.split("-")[0]) for name in found}
        differ = [name for name, rows in model.rows().items() if not np.array_equal(exact[which][name], rows)]
        assert not differ


def stored_bits(model: Model, name: str) -> int:
    stored = model.by_name[name].stored
    return 32 if stored is None else stored["aMaxOrBits"] if stored["type"] == LEVELS else 16


def test_weights_that_stay_packed_are_the_same_weights(
    theirs: dict[str, Model], ours: dict[str, Model], packed: Engine
) -> None:
    """Other code of the engine, with layouts of its own for 2, 3, 4 and 8 bits."""
    for which, model in (theirs | ours).items():
        for name, rows in model.rows().items():
            np.testing.assert_allclose(
                packed[which][name], rows, rtol=0, atol=INT8_ERROR * np.abs(rows).max(), err_msg=f"{which} {name}"
            )


def test_outputs_with_8_bit_activations_are_those_of_these_weights(
    theirs: dict[str, Model], ours: dict[str, Model], folder: Path
) -> None:
    """Inputs that fill a row and are not centred: sums over blocks and zero points of both sides. What is left is the
    rounding of activations to 255 steps.
    """
    inputs = (np.random.default_rng(1).standard_normal((20, INPUTS)) + 0.5).astype(np.float32)
    models = theirs | ours
    made = {memory: engine_outputs(models, folder / memory, memory, inputs) for memory in ("high", "low")}
    for which, model in models.items():
        for name, rows in model.rows().items():
            wanted = rows.astype(np.float64) @ inputs.T.astype(np.float64)
            assert relative_error(made["high"][which][name], wanted) < 1e-6, (which, name)
            assert relative_error(made["low"][which][name], wanted) < INT8_OUTPUT_ERROR, (which, name)


# Shapes


def test_more_rows_or_blocks_than_16_bits_count(folder: Path) -> None:
    """A large vocabulary's lm_head, and a layer with many blocks: their dimensions are int32."""
    for rows, inputs, block in ((65_600, 16, 0), (16_416, 128, 32)):
        float_model = convert(folder / f"wide{rows}", {"layer": random_weight(rows, inputs)})
        form = WeightFormat(4, block, method="mse")
        models = {
            "ours": quantize(float_model, folder / f"wide{rows}", {"layer": form}),
            "theirs": convert(folder / f"wide{rows}-theirs", {"layer": random_weight(rows, inputs)}, form),
        }
        found = engine_outputs(models, folder / f"wide{rows}")
        for which, model in models.items():
            assert model.by_name["layer"].stored["shapeInt32"], which
            assert np.array_equal(found[which]["layer"], model.rows()["layer"]), which


def test_patch_embedding(folder: Path) -> None:
    """Kernels of 14 x 14 over 3 channels: the converter gives each one scale, whatever block is asked for."""
    random = np.random.default_rng(3)
    weights = {f"layer{bits}": random.standard_normal((19, 3, 14, 14)).astype(np.float32) for bits in range(2, 9)}
    float_model = convert(folder / "patch", weights)
    asked = {f"layer{bits}": WeightFormat(bits, 64, bits % 2 == 0, method="mse") for bits in range(2, 9)}
    formats = choose_formats(float_model.layers, WeightFormat(), {name: vars(form) for name, form in asked.items()}, "")
    assert {form.block for form in formats.values()} == {0}
    models = {"float": float_model, "ours": quantize(float_model, folder / "patch", formats)}
    models |= {f"theirs{bits}": convert(folder / f"patch{bits}", weights, WeightFormat(bits)) for bits in (3, 8)}
    found = engine_outputs(models, folder / "patch")
    for which, model in models.items():
        for name, rows in model.rows().items():
            assert rows.shape == (19, 588)
            assert np.array_equal(found[which][name], rows), (which, name)
    for name, weight in weights.items():
        assert np.array_equal(found["float"][name], weight.reshape(19, 588))


@pytest.mark.parametrize("bits", [2, 3, 5, 7, 8])
def test_rows_that_fill_no_bytes_are_put_together_rightly(
    folder: Path, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are written in chunks whose bits must meet in whole bytes: here 8 of 35 rows, 33 weights each."""
    weight = random_weight(35, 33)
    float_model = convert(folder / f"odd{bits}", {"layer": weight})
    forms = {"layer": WeightFormat(bits, method="mse")}
    whole = quantize(float_model, folder / f"odd{bits}" / "whole", forms)
    monkeypatch.setattr(write, "WEIGHTS_AT_ONCE", 1)
    cut = quantize(float_model, folder / f"odd{bits}" / "cut", forms, threads=3)
    assert whole.weights.path.read_bytes() == cut.weights.path.read_bytes()
    found = engine_outputs({"cut": cut}, folder / f"odd{bits}")["cut"]["layer"]
    assert np.array_equal(found, cut.rows()["layer"])
    assert np.array_equal(found, round_rows(weight, bits, 0, False, 16, "mse").dequantize())
