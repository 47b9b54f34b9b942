"""Methods of quantization by the names that formats have: rtn, hqq, mse, awq, gptq, checkpoint."""

from __future__ import annotations

from pathlib import Path

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.quant.awq import Awq
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.quant.gptq import Gptq
from hf2mnn.quant.layer_inputs import Activations
from hf2mnn.quant.prequantized import Prequantized
from hf2mnn.quant.rounding import DATA_FREE, Method, RoundRows
from hf2mnn.quant.weights import Operator

CALIBRATED = ("awq", "gptq")


class Methods(Method):
    """Quantizes each operator by the method of its format."""

    def __init__(self, calibration: Path | None = None, checkpoint: Path | None = None) -> None:
        """Open the folder of the calibrate stage for awq and gptq, and that of the fetch stage for checkpoint."""
        activations = Activations(calibration) if calibration else None
        self.awq = Awq(activations)  # its search comes before the operators of a part are quantized
        self._methods: dict[str, Method] = dict.fromkeys(DATA_FREE, Method())
        self._methods |= {"awq": self.awq, "gptq": Gptq(activations)}
        self._methods["checkpoint"] = Prequantized(Checkpoint(checkpoint) if checkpoint else None)

    def resolve(self, operator: Operator, form: WeightFormat) -> WeightFormat:
        """Return the format in which the method of `form` stores an operator."""
        return form if form.bits >= 16 else self._methods[form.method].resolve(operator, form)

    def prepare(self, operator: Operator, form: WeightFormat) -> RoundRows:
        """Return the function that quantizes rows of an operator."""
        return self._methods[form.method].prepare(operator, form)
