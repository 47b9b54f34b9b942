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
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np
from safetensors import safe_open

from hf2mnn.core.errors import CheckpointError

BITS = {"awq": (4,), "gptq": (4, 8)}
FORMATS = {"awq": ("gemm",), "gptq": ("gptq", "gptq_v2")}
GROUP_UNIT = 16
"""MNN's blocks are multiples of this many inputs."""
WEIGHT, QWEIGHT = ".weight", ".qweight"
REQUIRED = {"qweight": ("I32",), "qzeros": ("I32",), "scales": ("F16", "BF16")}
"""Tensors of every prequantized layer, and their supported dtypes in safetensors."""
TENSORS = (*REQUIRED, "g_idx")
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Position in a word, from the lowest bits, of each of AWQ's 8 outputs."""


@dataclass(frozen=True)
class Quantization:
    """Contents of `quantization_config` in config.json.

    Attributes:
        method: "awq" or "gptq".
        format: "gemm", "gptq" or "gptq_v2".
        bits: Bits per weight.
        group: Inputs per group; -1 for one group per row.
        symmetric: Claim of the file; the stored zero points decide.
        act_order: Claim of the file; g_idx decides where it is stored.
    """

    method: str
    format: str
    bits: int
    group: int
    symmetric: bool
    act_order: bool


@dataclass(frozen=True)
class PrequantizedLinear:
    """Weight of a prequantized linear layer.

    Attributes:
        q: Quantized values, uint8 [outputs, inputs] in [0, 2^bits).
        scales: float16 [outputs, groups], as stored.
        zero_points: uint8 [outputs, groups] in [0, 2^bits).
        bits: Bits per weight.
        group: Consecutive inputs that share a scale and a zero point.
    """

    q: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray
    bits: int
    group: int

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


def parse_quantization(stored: Any, path: Path) -> Quantization | None:
    """Parse a `quantization_config`; return None for an empty one. `path` is the file that holds it.

    Raises:
        CheckpointError: Unsupported method, format, number of bits or group size.
    """
    if not stored:
        return None
    method = stored.get("quant_method") if isinstance(stored, dict) else stored
    if not isinstance(method, str) or method not in BITS:
        raise CheckpointError(
            f"{path} has the unsupported quant_method {method!r}; supported are: {', '.join(BITS)}; or give the model"
            " in float16 or bfloat16"
        )
    prefix = f"{path} has {method} weights"
    keys = ("version", "format", "checkpoint_format") if method == "awq" else ("checkpoint_format", "format")
    names = [stored[key] for key in keys if stored.get(key)]
    if not isinstance(stored, dict):
        raise CheckpointError(f"{prefix} without bits and group_size; download it again")
    if stored.get("backend") == "llm-awq":  # transformers' name for MIT's own order
        names = ["llm-awq"]
    layout = str(names[0]).lower() if names else FORMATS[method][0]
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
    symmetric = not stored.get("zero_point", True) if method == "awq" else bool(stored.get("sym", True))
    return Quantization(method, layout, bits, group, symmetric, bool(stored.get("desc_act")))


def unpack(words: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Unpack int32 [rows, words] into uint8 [rows, words * 32 / bits].

    Args:
        words: Bit-packed values.
        bits: Bits per value.
        order: Position in a word, from the lowest bits, of each value; None for consecutive values.
    """
    words = np.ascontiguousarray(words).view(np.uint32)
    values = np.empty((*words.shape, 32 // bits), np.uint8)
    for value, position in enumerate(order or range(32 // bits)):
        values[..., value] = (words >> np.uint32(bits * position)) & np.uint32((1 << bits) - 1)
    return values.reshape(len(words), -1)


def qweight_name(name: str) -> str:
    """Return the name of the qweight that a prequantized layer stores in place of the weight `name`."""
    return name.removesuffix(WEIGHT) + QWEIGHT if name.endswith(WEIGHT) else name


def bytes_at_16_bits(path: Path, bits: int) -> int:
    """Return the size of a safetensors file if its prequantized weights had 16 bits each."""
    with safe_open(path, "np") as tensors:
        names = [name for name in list(tensors.keys()) if name.endswith(QWEIGHT)]
        words = sum(prod(tensors.get_slice(name).get_shape()) for name in names)
    return path.stat().st_size + words * 4 * (16 - bits) // bits


class PrequantizedLayers:
    """Prequantized layers of a checkpoint, by the checkpoint's own names; reads one tensor at a time.

    Methods raise CheckpointError, with the layer's name, for a layer that is incomplete or that MNN's format cannot
    hold exactly.

    Args:
        folder: Checkpoint folder.
        quantization: Contents of `quantization_config`.
        shards: File of each tensor.
    """

    def __init__(self, folder: Path, quantization: Quantization | None, shards: dict[str, Path]) -> None:
        self.folder, self.quantization, self.shards = folder, quantization, shards

    @property
    def names(self) -> list[str]:
        """Layers that have at least one tensor of a prequantized layer."""
        parts = [name.rpartition(".") for name in self.shards]
        return sorted({layer for layer, _, tensor in parts if tensor in TENSORS})

    def _error(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.folder}: {reason}")

    def _tensor(self, name: str) -> np.ndarray:
        with safe_open(self.shards[name], "np") as tensors:
            return tensors.get_tensor(name)

    def _headers(self, layer: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype and shape of each tensor of a layer."""
        headers = {}
        for tensor in TENSORS:
            if path := self.shards.get(f"{layer}.{tensor}"):
                with safe_open(path, "pt") as tensors:
                    stored = tensors.get_slice(f"{layer}.{tensor}")
                    headers[tensor] = stored.get_dtype(), tuple(stored.get_shape())
        return headers

    def _group(self, inputs: int) -> int:
        return self.quantization.group if self.quantization.group > 0 else inputs

    def shape(self, layer: str) -> tuple[int, int]:
        """Return (outputs, inputs) from the headers of the layer's tensors, which must agree."""
        if self.quantization is None:
            raise self._error(f"{layer} is prequantized, but config.json has no quantization_config; download it again")
        headers, bits = self._headers(layer), self.quantization.bits
        missing = [tensor for tensor in REQUIRED if tensor not in headers]
        if missing:
            raise self._error(
                f"{layer} has {next(iter(headers))} without {' and '.join(missing)}; download the checkpoint again"
            )
        if layer + WEIGHT in self.shards:
            raise self._error(f"{layer} is stored twice, prequantized and in floating point; remove one of them")
        for tensor, dtypes in REQUIRED.items():
            if headers[tensor][0] not in dtypes:
                raise self._error(
                    f"{layer}.{tensor} has the unsupported dtype {headers[tensor][0]}; supported: {' or '.join(dtypes)}"
                )
        rows, columns = (*headers["qweight"][1], 0, 0)[:2]
        per_word = 32 // bits
        outputs, inputs = (
            (columns * per_word, rows) if self.quantization.method == "awq" else (columns, rows * per_word)
        )
        group = self._group(inputs)
        if not outputs * inputs or inputs % group or outputs % per_word:
            raise self._error(
                f"{layer} has {outputs} outputs and {inputs} inputs, which do not divide into words of {per_word} and"
                f" groups of {group}, so it cannot be converted exactly; take another checkpoint"
            )
        groups = inputs // group
        words, scales = (groups, outputs // per_word), (groups, outputs)
        expected = {"qweight": (rows, columns), "qzeros": words, "scales": scales, "g_idx": (inputs,)}
        for tensor, (_, stored) in headers.items():
            if stored != expected[tensor]:
                raise self._error(
                    f"{layer}.{tensor} has shape {list(stored)}, but its qweight with {bits} bits in groups of {group}"
                    f" requires {list(expected[tensor])}; weights and quantization_config are not of the same model"
                )
        return outputs, inputs

    def _check_order(self, layer: str, inputs: int) -> None:
        if f"{layer}.g_idx" in self.shards:
            stored = self._tensor(f"{layer}.g_idx")
            consecutive = np.array_equal(stored, np.arange(inputs) // self._group(inputs))
        else:
            consecutive = not self.quantization.act_order
        if not consecutive:
            raise self._error(
                f"{layer} is quantized in activation order (act-order, desc_act), but MNN's blocks are consecutive"
                " inputs; take a checkpoint with desc_act false"
            )

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

    def read(self, layer: str) -> PrequantizedLinear:
        """Read and unpack a layer."""
        _, inputs = self.shape(layer)
        self._check_order(layer, inputs)
        scales, zero_points, bits = self._scales(layer), self._zero_points(layer), self.quantization.bits
        words = self._tensor(layer + QWEIGHT)
        if self.quantization.method == "awq":
            q = np.ascontiguousarray(unpack(words, bits, AWQ_ORDER).T)
        else:
            q = unpack(words.T, bits)
        return PrequantizedLinear(q, scales, zero_points, bits, self._group(inputs))

    def check(self) -> None:
        """Check every layer as `read` does, without reading its qweight."""
        for layer in self.names:
            _, inputs = self.shape(layer)
            self._check_order(layer, inputs)
            self._scales(layer)
            self._zero_points(layer)

    def check_biases(self, used: set[str]) -> None:
        """Check that no bias is lost: AutoGPTQ stores one for every layer, zeros where the model has none.

        Args:
            used: Names of the tensors that the model uses.

        Raises:
            CheckpointError: A bias is neither used nor zero.
        """
        for layer in self.names:
            bias = f"{layer}.bias"
            if bias in self.shards and bias not in used and np.count_nonzero(self._tensor(bias)):
                raise self._error(
                    f"{bias} is not zero, but the model of config.json has no bias there; config and weights are not of"
                    " the same model"
                )
