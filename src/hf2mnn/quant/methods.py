"""The methods by name: what each makes ready for an operator, and how it then rounds rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import QuantizationError
from hf2mnn.mnn.convert import WeightFormat
from hf2mnn.quant.folding import Scales
from hf2mnn.quant.gptq import check_finite, compensation, gptq_rows
from hf2mnn.quant.layer_inputs import Activations
from hf2mnn.quant.prequantized import packed_format, packed_levels
from hf2mnn.quant.rounding import round_rows
from hf2mnn.quant.weights import Operator
from hf2mnn.quant.write import RoundRows

CALIBRATED = ("awq", "gptq")
CHECKPOINT = "checkpoint"
PLAIN = "mse"
"""What calibrated methods fall back to where there is nothing to go by: the patch embedding, which is a convolution."""


class Methods:
    """Rounds any operator by the method that its format names."""

    def __init__(self, activations: Path | None = None, source: Path | None = None) -> None:
        """`activations` is that stage's folder, for awq and gptq; `source` the checkpoint's, for "checkpoint"."""
        self.activations = Activations(activations) if activations else None
        self.source = Checkpoint(source) if source else None
        self.scales = Scales()
        """Folded by awq; set before operators are rounded."""
        self._compensation: tuple[str, np.ndarray] | None = None

    def settle(self, operator: Operator, form: WeightFormat) -> WeightFormat:
        """The format with its method as it will be, and as a packed checkpoint has it.

        Raises:
            QuantizationError: a method lacks what it goes by.
            CheckpointError: a layer of the checkpoint cannot be taken over.
        """
        if form.bits >= 16:
            return form
        if form.method in CALIBRATED:
            if self.activations is None:
                raise QuantizationError(
                    f"{operator.name}: {form.method} goes by recorded activations; give the folder that"
                    " 'hf2mnn activations' has made, by --activations"
                )
            return replace(form, method=PLAIN) if operator.kernel > 1 else form
        if form.method == CHECKPOINT:
            if self.source is None:
                raise QuantizationError(
                    f"{operator.name}: its levels are to be the checkpoint's; give the source stage's folder, --source"
                )
            return packed_format(self.source, operator, form)
        return form

    def __call__(self, operator: Operator, form: WeightFormat) -> RoundRows:
        shape = (form.bits, form.block, form.symmetric, form.scale_bits)
        if form.method == CHECKPOINT:
            return packed_levels(self.source, operator)
        if form.method == "gptq":
            upper = self._upper(operator.name)
            return lambda _, rows: gptq_rows(rows, *shape, upper)
        if form.method == "awq":
            importance = self._importance(operator)
            return lambda _, rows: round_rows(rows, *shape, PLAIN, importance)
        return lambda _, rows: round_rows(rows, *shape, form.method)

    def _importance(self, operator: Operator) -> np.ndarray:
        """Mean squares of the inputs float32 [inputs], after the scales that are folded into them."""
        squares = np.square(self.activations.rows(operator.name), dtype=np.float64).mean(axis=0)
        check_finite(squares, operator.name)
        columns = self.scales.columns.get(operator.name, np.ones(operator.inputs, np.float32))
        return (squares / np.square(columns, dtype=np.float64)).astype(np.float32)

    def _upper(self, module: str) -> np.ndarray:
        """Layers that read the same follow each other, so the last is kept."""
        key = self.activations.tensor(module)
        if self._compensation is None or self._compensation[0] != key:
            self._compensation = None
            self._compensation = (key, compensation(self.activations.second_moment(module), module))
        return self._compensation[1]
