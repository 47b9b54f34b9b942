"""Inputs of linear layers on the calibration set, read without PyTorch, and the base class of calibrated methods."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np
from safetensors import safe_open

from hf2mnn.core.errors import QuantizationError
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.quant.rounding import Method
from hf2mnn.quant.weights import Operator
from hf2mnn.reference.golden import ACTIVATIONS


class Activations:
    """Folder of the calibrate stage; layers have their names in the transformers model."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._file = safe_open(self.folder / ACTIVATIONS, "np")
        self._tensors: dict[str, str] = json.loads(self._file.metadata()["readers"])

    @property
    def modules(self) -> list[str]:
        """Names of the recorded layers."""
        return sorted(self._tensors)

    def tensor(self, module: str) -> str:
        """Return the name of a layer's input, which layers may share. Raise QuantizationError if it is not recorded."""
        if module not in self._tensors:
            raise QuantizationError(
                f"{self.folder} holds no activations of {module}: no example of the calibration set runs it, or the"
                " model has no such linear layer; a vision tower needs examples with images"
            )
        return self._tensors[module]

    def rows(self, module: str) -> np.ndarray:
        """Return the inputs of a layer, bfloat16 values as float32 [rows, in_features]."""
        return self._file.get_tensor(self.tensor(module)).astype(np.float32)

    def second_moment(self, module: str) -> np.ndarray:
        """Return H = E[x x^T], float32 [in_features, in_features], x being a row of inputs.

        The bytes are the same for any BLAS and any number of threads: each column is rounded to whole multiples of a
        power of two (for 4096 rows, its largest value is at least 2^19 of them), so that float64 holds every partial
        sum exactly and their order does not matter.
        """
        rows = self.rows(module).astype(np.float64)
        bits = (np.finfo(np.float64).nmant + 1 - len(rows).bit_length()) // 2
        _, exponents = np.frexp(np.abs(rows).max(axis=0))
        whole = np.rint(np.ldexp(rows, bits - exponents))
        H = np.ldexp(whole.T @ whole, exponents[:, None] + exponents - 2 * bits) / len(rows)
        return H.astype(np.float32)


def check_finite(values: np.ndarray, name: str) -> None:
    """Raise QuantizationError if statistics of the inputs of the operator `name` are not finite."""
    if not np.isfinite(values).all():
        raise QuantizationError(
            f"{name}: its recorded inputs hold NaN or infinite numbers; run 'hf2mnn calibrate' again"
        )


class Calibrated(Method):
    """A method that needs the inputs of layers."""

    def __init__(self, activations: Activations | None) -> None:
        self.activations = activations

    def resolve(self, operator: Operator, form: WeightFormat) -> WeightFormat:
        """Return the format with mse for the patch embedding, a convolution whose inputs are not recorded."""
        if self.activations is None:
            raise QuantizationError(
                f"{operator.name}: {form.method} needs recorded inputs of layers; give the folder of 'hf2mnn calibrate'"
                " by --calibration"
            )
        return replace(form, method="mse") if operator.kernel > 1 else form
