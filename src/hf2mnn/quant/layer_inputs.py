"""What linear layers read on the calibration set, as the `activations` stage has kept it: numpy alone, no torch."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes  # noqa: F401  by it numpy knows bfloat16
import numpy as np
from safetensors import safe_open

from hf2mnn.core.errors import QuantizationError
from hf2mnn.reference.golden import ACTIVATIONS


class Activations:
    """The folder of the `activations` stage; layers have their names in the transformers model."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._file = safe_open(self.folder / ACTIVATIONS, "np")
        self._readers: dict[str, str] = json.loads(self._file.metadata()["readers"])

    @property
    def modules(self) -> list[str]:
        return sorted(self._readers)

    def has(self, module: str) -> bool:
        return module in self._readers

    def tensor(self, module: str) -> str:
        """Name of the tensor that `module` reads: the same for layers that read the same.

        Raises:
            QuantizationError: nothing was kept of this layer.
        """
        if not self.has(module):
            raise QuantizationError(
                f"{self.folder} holds no activations of {module}: no example of the calibration set runs it, or the"
                " model has no such linear layer; a vision tower needs examples with images"
            )
        return self._readers[module]

    def rows(self, module: str) -> np.ndarray:
        """float32 [rows, in_features], the values of bfloat16. Raises QuantizationError as `tensor` does."""
        return self._file.get_tensor(self.tensor(module)).astype(np.float32)

    def second_moment(self, module: str) -> np.ndarray:
        """float32 [in_features, in_features]: the mean over rows of the outer product of a row with itself.

        The same bytes with any BLAS and any number of threads: each column is rounded to whole multiples of a power of
        two (of 4096 rows, 2^19 or more of them up to its largest value), so that float64 holds every partial sum
        exactly and their order does not show. Raises QuantizationError as `tensor` does.
        """
        rows = self.rows(module).astype(np.float64)
        bits = (np.finfo(np.float64).nmant + 1 - len(rows).bit_length()) // 2
        _, exponents = np.frexp(np.abs(rows).max(axis=0))
        whole = np.rint(np.ldexp(rows, bits - exponents))
        moment = np.ldexp(whole.T @ whole, exponents[:, None] + exponents - 2 * bits) / len(rows)
        return moment.astype(np.float32)
