"""Linear layers of AWQ and GPTQ checkpoints: low-bit weights, bit-packed into 32-bit words.

    AWQ     qweight int32 [inputs, outputs / 8]          8 outputs per word, from the lowest bits: 0 2 4 6 1 3 5 7
            qzeros  int32 [groups, outputs / 8]          like qweight
            scales  float16 [groups, outputs]
    GPTQ    qweight int32 [inputs * bits / 32, outputs]  consecutive inputs, from the lowest bits
            qzeros  int32 [groups, outputs * bits / 32]  consecutive outputs; minus 1 in format "gptq", not in "gptq_v2"
            scales  float16 [groups, outputs]
            g_idx   int32 [inputs]                       group of each input; optional

A weight is (q - zero_point) * scale. Sources: `WQLinear_GEMM` of AutoAWQ (version "gemm"), `QuantLinear` of AutoGPTQ,
`convert_gptq_v1_to_v2_format_module` of GPTQModel. The tensors alone decide which layers are prequantized. Not read
with those libraries: they bring compiled kernels, most of them for GPUs, and compute in float16.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from hf2mnn.checkpoint.tensors import Layout
from hf2mnn.core.errors import CheckpointError

BITS = {"awq": (4,), "gptq": (4, 8)}
FORMATS = {"awq": ("gemm",), "gptq": ("gptq", "gptq_v2")}
GROUP_UNIT = 16  # MNN's blocks are multiples of this many inputs
WEIGHT, QWEIGHT = ".weight", ".qweight"
REQUIRED = {"qweight": ("I32",), "qzeros": ("I32",), "scales": ("F16", "BF16")}
"""Tensors of every prequantized layer, and their supported dtypes in safetensors."""
TENSORS = (*REQUIRED, "g_idx")
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # position in a word, from the lowest bits, of each of AWQ's 8 outputs


@dataclass(frozen=True)
class Quantization:
    """Contents of `quantization_config` in config.json; its claim of symmetry is ignored, the zero points decide."""

    method: str  # "awq" or "gptq"
    format: str  # "gemm", "gptq" or "gptq_v2"
    bits: int
    group: int  # inputs per group; -1 for one group per row
    act_order: bool  # claim of the file; g_idx decides where it is stored

    @classmethod
    def parse(cls, stored: Any, path: Path) -> Quantization | None:
        """Parse a `quantization_config`; return None for an empty one. `path` is the file that holds it."""
        if not stored:
            return None
        method = stored.get("quant_method") if isinstance(stored, dict) else stored
        if not isinstance(method, str) or method not in BITS:
            raise CheckpointError(
                f"{path} has the unsupported quant_method {method!r}; supported are: {', '.join(BITS)}; or give the"
                " model in float16 or bfloat16"
            )
        prefix = f"{path} has {method} weights"
        if not isinstance(stored, dict):
            raise CheckpointError(f"{prefix} without bits and group_size; download it again")
        keys = ("version", "format", "checkpoint_format") if method == "awq" else ("checkpoint_format", "format")
        names = [stored[key] for key in keys if stored.get(key)] or FORMATS[method]
        # llm-awq: transformers' name for MIT's own order.
        layout = "llm-awq" if stored.get("backend") == "llm-awq" else str(names[0]).lower()
        if layout not in FORMATS[method]:
            raise CheckpointError(
                f"{prefix} of the unsupported format {layout!r}; supported are: {', '.join(FORMATS[method])}"
            )
        bits, group = stored.get("bits"), stored.get("group_size")
        if type(bits) is not int or bits not in BITS[method]:
            raise CheckpointError(
                f"{prefix} of unsupported {bits!r} bits; supported are: {', '.join(map(str, BITS[method]))}"
            )
        if type(group) is not int or (group != -1 and (group <= 0 or group % GROUP_UNIT)):
            raise CheckpointError(
                f"{prefix} with group_size {group!r}, which MNN's format cannot hold; supported are multiples of"
                f" {GROUP_UNIT}, and -1 for one group per row"
            )
        return cls(method, layout, bits, group, bool(stored.get("desc_act")))


@dataclass(frozen=True)
class PrequantizedLinear:
    """Weight of a prequantized linear layer."""

    q: np.ndarray  # uint8 [outputs, inputs] in [0, 2^bits)
    scales: np.ndarray  # float16 [outputs, groups], as stored
    zero_points: np.ndarray  # uint8 [outputs, groups] in [0, 2^bits)
    bits: int
    group: int  # consecutive inputs that share a scale and a zero point

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is the middle of the range, 2^(bits-1)."""
        return bool((self.zero_points == 1 << self.bits - 1).all())

    def dequantize(self) -> np.ndarray:
        """Return (q - zero_point) * scale as float32 [outputs, inputs].

        Exact: the difference has at most 8 significant bits and the scale 11, so the product fits float32's 24; it is
        0 or between 2^-24 and 2^24, within float32's range.
        """
        weights = self.q.reshape(*self.scales.shape, self.group).astype(np.float32)
        weights -= self.zero_points[:, :, None]
        weights *= self.scales[:, :, None]
        return weights.reshape(self.q.shape)


def unpack(words: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Unpack int32 [rows, words] into uint8 [rows, words * 32 / bits]; `order` as `AWQ_ORDER`, None if consecutive."""
    words = np.ascontiguousarray(words).view(np.uint32)
    values = np.empty((*words.shape, 32 // bits), np.uint8)
    for value, position in enumerate(order or range(32 // bits)):
        values[..., value] = (words >> np.uint32(bits * position)) & np.uint32((1 << bits) - 1)
    return values.reshape(len(words), -1)


class PrequantizedLayers:
    """Prequantized layers of a checkpoint, by the checkpoint's own names; reads one tensor at a time.

    Methods raise CheckpointError, with the layer's name, for a layer that is incomplete or that MNN's format cannot
    hold exactly.
    """

    def __init__(self, folder: Path, quantization: Quantization | None, tensors: dict[str, Layout]) -> None:
        self.folder, self.quantization, self.tensors = folder, quantization, tensors

    @property
    def names(self) -> list[str]:
        """Layers that have at least one tensor of a prequantized layer."""
        parts = [name.rpartition(".") for name in self.tensors]
        return sorted({layer for layer, _, tensor in parts if tensor in TENSORS})

    def _error(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.folder}: {reason}")

    def _tensor(self, name: str) -> np.ndarray:
        with safe_open(self.tensors[name].path, "np") as tensors:
            return tensors.get_tensor(name)

    def _group(self, inputs: int) -> int:
        return self.quantization.group if self.quantization.group > 0 else inputs

    def shape(self, layer: str) -> tuple[int, int]:
        """Return (outputs, inputs) from the headers of the layer's tensors, which must agree."""
        if self.quantization is None:
            raise self._error(f"{layer} is prequantized, but config.json has no quantization_config; download it again")
        headers = {tensor: self.tensors[name] for tensor in TENSORS if (name := f"{layer}.{tensor}") in self.tensors}
        bits = self.quantization.bits
        if missing := [tensor for tensor in REQUIRED if tensor not in headers]:
            raise self._error(
                f"{layer} has {next(iter(headers))} without {' and '.join(missing)}; download the checkpoint again"
            )
        if layer + WEIGHT in self.tensors:
            raise self._error(f"{layer} is stored twice, prequantized and in floating point; remove one of them")
        for tensor, dtypes in REQUIRED.items():
            if headers[tensor].dtype not in dtypes:
                raise self._error(
                    f"{layer}.{tensor} has the unsupported dtype {headers[tensor].dtype};"
                    f" supported: {' or '.join(dtypes)}"
                )
        rows, columns = (*headers["qweight"].shape, 0, 0)[:2]
        per_word, awq = 32 // bits, self.quantization.method == "awq"
        outputs, inputs = (columns * per_word, rows) if awq else (columns, rows * per_word)
        group = self._group(inputs)
        if not outputs * inputs or inputs % group or outputs % per_word:
            raise self._error(
                f"{layer} has {outputs} outputs and {inputs} inputs, which do not divide into words of {per_word} and"
                f" groups of {group}, so it cannot be converted exactly; take another checkpoint"
            )
        groups = inputs // group
        expected = {"qweight": (rows, columns), "qzeros": (groups, outputs // per_word)}
        expected |= {"scales": (groups, outputs), "g_idx": (inputs,)}
        for tensor, stored in headers.items():
            if stored.shape != expected[tensor]:
                raise self._error(
                    f"{layer}.{tensor} has shape {list(stored.shape)}, but its qweight with {bits} bits in groups of"
                    f" {group} requires {list(expected[tensor])}; weights and quantization_config are not of the same"
                    " model"
                )
        return outputs, inputs

    def _scales(self, layer: str) -> np.ndarray:
        """Return float16 [outputs, groups]; bfloat16 is accepted where float16 holds the same values."""
        stored = self._tensor(f"{layer}.scales").astype(np.float32).T
        if not np.isfinite(stored).all():
            raise self._error(f"{layer}.scales has values that are not finite; download it again, or take another")
        with np.errstate(over="ignore"):
            scales = stored.astype(np.float16, order="C")
        if (scales != stored).any():
            raise self._error(
                f"{layer}.scales has bfloat16 values that float16 cannot hold, so the layer cannot be converted"
                " exactly; take a checkpoint with float16 scales"
            )
        return scales

    def _zero_points(self, layer: str) -> np.ndarray:
        """Return uint8 [outputs, groups]."""
        bits, order = self.quantization.bits, AWQ_ORDER if self.quantization.method == "awq" else None
        zero_points = np.ascontiguousarray(unpack(self._tensor(f"{layer}.qzeros"), bits, order).T)
        if self.quantization.format != "gptq":
            return zero_points
        # 0 - 1: some writers borrow from the next value, others overwrite it; some readers get 2^bits, others 0.
        if (zero_points == (1 << bits) - 1).any():
            raise self._error(
                f"{layer}.qzeros has a zero point of 0, which programs read differently in format 'gptq'; take a"
                " symmetric checkpoint or one of format 'gptq_v2'"
            )
        return zero_points + np.uint8(1)

    def _checked(self, layer: str) -> tuple[np.ndarray, np.ndarray, int]:
        """Return scales, zero points and group of a layer, of which everything but the qweight is checked."""
        _, inputs = self.shape(layer)
        group, consecutive = self._group(inputs), not self.quantization.act_order
        if f"{layer}.g_idx" in self.tensors:
            consecutive = np.array_equal(self._tensor(f"{layer}.g_idx"), np.arange(inputs) // group)
        if not consecutive:
            raise self._error(
                f"{layer} is quantized in activation order (act-order, desc_act), but MNN's blocks are consecutive"
                " inputs; take a checkpoint with desc_act false"
            )
        return self._scales(layer), self._zero_points(layer), group

    def read(self, layer: str) -> PrequantizedLinear:
        """Read and unpack a layer."""
        scales, zero_points, group = self._checked(layer)
        bits, words = self.quantization.bits, self._tensor(layer + QWEIGHT)
        if self.quantization.method == "awq":
            q = np.ascontiguousarray(unpack(words, bits, AWQ_ORDER).T)
        else:
            q = unpack(words.T, bits)
        return PrequantizedLinear(q, scales, zero_points, bits, group)

    def check(self) -> None:
        """Check every layer as `read` does, without reading its qweight."""
        for layer in self.names:
            self._checked(layer)
