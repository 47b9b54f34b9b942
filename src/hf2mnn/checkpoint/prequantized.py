"""Linear layers that a checkpoint holds quantized and packed into 32-bit words, as AWQ and GPTQ write them.

    AWQ     qweight int32 [inputs, outputs / 8]          a word holds 8 outputs, from its lowest bits on 0 2 4 6 1 3 5 7
            qzeros  int32 [groups, outputs / 8]          likewise
            scales  float16 [groups, outputs]
    GPTQ    qweight int32 [inputs * bits / 32, outputs]  a word holds neighbouring inputs, from its lowest bits on
            qzeros  int32 [groups, outputs * bits / 32]  outputs likewise; less 1 in format "gptq", not in "gptq_v2"
            scales  float16 [groups, outputs]
            g_idx   int32 [inputs]                       the group of each input; may be left out

A weight is (level - zero) * scale. Sources: `WQLinear_GEMM` of AutoAWQ (version "gemm"), `QuantLinear` of AutoGPTQ, and
`convert_gptq_v1_to_v2_format_module` of GPTQModel. Which layers are packed is told by the tensors alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  by it numpy knows bfloat16
import numpy as np
from safetensors import safe_open

from hf2mnn.core.errors import CheckpointError

BITS = {"awq": (4,), "gptq": (4, 8)}
FORMATS = {"awq": ("gemm",), "gptq": ("gptq", "gptq_v2")}
GROUP_UNIT = 16
"""MNN's blocks are multiples of this many inputs."""
WEIGHT, PACKED = ".weight", ".qweight"
NEEDED = {"qweight": ("I32",), "qzeros": ("I32",), "scales": ("F16", "BF16")}
"""Tensors of every packed layer, and the types that safetensors gives them."""
TENSORS = (*NEEDED, "g_idx")
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place in a word, counted from its lowest bits, of each of AWQ's 8 outputs."""


@dataclass(frozen=True)
class Quantization:
    """What config.json says in `quantization_config`.

    method "awq" or "gptq"; format "gemm", "gptq" or "gptq_v2"; group in inputs, -1 for one a row. symmetric and
    act_order are claims: what counts is the zero points, and g_idx where there is one.
    """

    method: str
    format: str
    bits: int
    group: int
    symmetric: bool
    act_order: bool


@dataclass(frozen=True)
class PackedLinear:
    """A linear layer's weight: levels uint8 [outputs, inputs] and zeros uint8 [outputs, groups], both in [0, 2^bits);
    scales float16 [outputs, groups], as stored. `group` neighbouring inputs share a scale and a zero.
    """

    levels: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    bits: int
    group: int

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is the middle level, 2^(bits-1)."""
        return bool((self.zeros == 1 << self.bits - 1).all())

    def dequantize(self) -> np.ndarray:
        """float32 [outputs, inputs], (level - zero) * scale.

        Exact: the difference has at most 8 significant bits and the scale 11, their product fits float32's 24; and it
        is 0 or between 2^-24 and 2^24, far inside float32's range.
        """
        weights = self.levels.reshape(*self.scales.shape, self.group).astype(np.float32)
        weights -= self.zeros[:, :, None]
        weights *= self.scales[:, :, None]
        return weights.reshape(self.levels.shape)


def parse_quantization(stored: Any, where: Path) -> Quantization | None:
    """The settings in a `quantization_config`, None where there is none; `where` is the file that says so.

    Raises:
        CheckpointError: a method, format, number of bits or size of groups that is not read.
    """
    if not stored:
        return None
    method = stored.get("quant_method") if isinstance(stored, dict) else stored
    if not isinstance(method, str) or method not in BITS:
        raise CheckpointError(
            f"{where} says quant_method {method!r}, which is not read; these are: {', '.join(BITS)}; or give the model"
            " in float16 or bfloat16"
        )
    says = f"{where} says {method} weights"
    keys = ("version", "format", "checkpoint_format") if method == "awq" else ("checkpoint_format", "format")
    names = [stored[key] for key in keys if stored.get(key)]
    if not isinstance(stored, dict):
        raise CheckpointError(f"{says} without bits and groups; download it again")
    if stored.get("backend") == "llm-awq":  # transformers' name for an order of MIT's own
        names = ["llm-awq"]
    layout = str(names[0]).lower() if names else FORMATS[method][0]
    if layout not in FORMATS[method]:
        raise CheckpointError(
            f"{says} of format {layout!r}, which is not read; these are: {', '.join(FORMATS[method])}"
        )
    bits, group = stored.get("bits"), stored.get("group_size")
    if type(bits) is not int or bits not in BITS[method]:
        raise CheckpointError(
            f"{says} of {bits!r} bits, which are not read; these are: {', '.join(map(str, BITS[method]))}"
        )
    if type(group) is not int or (group != -1 and (group <= 0 or group % GROUP_UNIT)):
        raise CheckpointError(
            f"{says} in groups of {group!r}, which MNN's format cannot hold; multiples of {GROUP_UNIT} it can, and one"
            " group a row (-1)"
        )
    symmetric = not stored.get("zero_point", True) if method == "awq" else bool(stored.get("sym", True))
    return Quantization(method, layout, bits, group, symmetric, bool(stored.get("desc_act")))


def unpack(words: np.ndarray, bits: int, places: tuple[int, ...] | None = None) -> np.ndarray:
    """uint8 [rows, words * 32 / bits] of int32 [rows, words]; `places` of the values in a word, counted from its lowest
    bits, None for one after the other.
    """
    words = np.ascontiguousarray(words).view(np.uint32)
    values = np.empty((*words.shape, 32 // bits), np.uint8)
    for value, place in enumerate(places or range(32 // bits)):
        values[..., value] = (words >> np.uint32(bits * place)) & np.uint32((1 << bits) - 1)
    return values.reshape(len(words), -1)


def packed_name(name: str) -> str:
    """What a packed layer holds in place of `name`, a weight's."""
    return name.removesuffix(WEIGHT) + PACKED if name.endswith(WEIGHT) else name


def bytes_at_16_bits(path: Path, bits: int) -> int:
    """Size of a safetensors file if its packed weights took 16 bits each."""
    with safe_open(path, "np") as tensors:
        packed = [name for name in list(tensors.keys()) if name.endswith(PACKED)]
        words = sum(prod(tensors.get_slice(name).get_shape()) for name in packed)
    return path.stat().st_size + words * 4 * (16 - bits) // bits


class PackedLayers:
    """The packed layers of a checkpoint, by the checkpoint's own names; one tensor is read at a time.

    `shards` tells which file holds a tensor. Methods that take a layer raise CheckpointError, with its name, for one that
    is not whole, or that MNN's format cannot hold exactly.
    """

    def __init__(self, folder: Path, quantization: Quantization | None, shards: dict[str, Path]) -> None:
        self.folder, self.quantization, self.shards = folder, quantization, shards

    @property
    def names(self) -> list[str]:
        """Layers with any tensor of a packed layer."""
        owners = [name.rpartition(".") for name in self.shards]
        return sorted({layer for layer, _, tensor in owners if tensor in TENSORS})

    def _wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.folder} holds {what}")

    def _tensor(self, name: str) -> np.ndarray:
        with safe_open(self.shards[name], "np") as tensors:
            return tensors.get_tensor(name)

    def _headers(self, layer: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of each tensor of a layer."""
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
        """(outputs, inputs), from the headers of the layer's tensors, which must agree."""
        if self.quantization is None:
            raise self._wrong(
                f"{layer} packed, but its config.json has no quantization_config that says how; download it again"
            )
        headers, bits = self._headers(layer), self.quantization.bits
        missing = [tensor for tensor in NEEDED if tensor not in headers]
        if missing:
            raise self._wrong(
                f"{layer}.{next(iter(headers))} without {' and '.join(missing)}: the layer is not whole, download the"
                " checkpoint again"
            )
        if layer + WEIGHT in self.shards:
            raise self._wrong(f"{layer} twice, packed and in floating point; leave one of them")
        for tensor, kinds in NEEDED.items():
            if headers[tensor][0] not in kinds:
                raise self._wrong(
                    f"{layer}.{tensor} as {headers[tensor][0]}, which is not read; {' or '.join(kinds)} is"
                )
        rows, columns = (*headers["qweight"][1], 0, 0)[:2]
        count = 32 // bits
        outputs, inputs = (columns * count, rows) if self.quantization.method == "awq" else (columns, rows * count)
        group = self._group(inputs)
        if not outputs * inputs or inputs % group or outputs % count:
            raise self._wrong(
                f"{layer} with {outputs} outputs and {inputs} inputs, which do not divide into words of {count} and"
                f" groups of {group}: it cannot be kept exactly"
            )
        groups = inputs // group
        words, scales = (groups, outputs // count), (groups, outputs)
        wanted = {"qweight": (rows, columns), "qzeros": words, "scales": scales, "g_idx": (inputs,)}
        for tensor, (_, stored) in headers.items():
            if stored != wanted[tensor]:
                raise self._wrong(
                    f"{layer}.{tensor} as {list(stored)}, but its qweight with {bits} bits in groups of {group} asks"
                    f" for {list(wanted[tensor])}: weights and quantization_config are not of one model"
                )
        return outputs, inputs

    def _check_order(self, layer: str, inputs: int) -> None:
        if f"{layer}.g_idx" in self.shards:
            stored = self._tensor(f"{layer}.g_idx")
            neighbours = np.array_equal(stored, np.arange(inputs) // self._group(inputs))
        else:
            neighbours = not self.quantization.act_order
        if not neighbours:
            raise self._wrong(
                f"{layer} quantized in the order of activations (act-order, desc_act): its groups are not of"
                " neighbouring inputs, as MNN's blocks are; take a checkpoint made with desc_act false"
            )

    def _scales(self, layer: str) -> np.ndarray:
        """float16 [outputs, groups]; bfloat16 is taken where float16 has the same values."""
        stored = self._tensor(f"{layer}.scales").astype(np.float32).T
        if not np.isfinite(stored).all():
            raise self._wrong(f"{layer}.scales with values that are not finite; download it again, or take another")
        with np.errstate(over="ignore"):
            scales = stored.astype(np.float16, order="C")
        if (scales != stored).any():
            raise self._wrong(
                f"{layer}.scales in bfloat16 with values that float16 does not have: the layer cannot be kept exactly;"
                " take a checkpoint with float16 scales"
            )
        return scales

    def _zeros(self, layer: str) -> np.ndarray:
        """uint8 [outputs, groups]."""
        bits, places = self.quantization.bits, AWQ_PLACES if self.quantization.method == "awq" else None
        zeros = np.ascontiguousarray(unpack(self._tensor(f"{layer}.qzeros"), bits, places).T)
        if self.quantization.format != "gptq":
            return zeros
        # 0 less 1: some writers borrow it from the neighbour, some overwrite that; some readers make it 2^bits, some 0.
        if (zeros == (1 << bits) - 1).any():
            raise self._wrong(
                f"{layer}.qzeros with a zero point of 0, which format 'gptq' has no place for, so that programs read it"
                " differently; take a symmetric checkpoint or one of format 'gptq_v2'"
            )
        return zeros + np.uint8(1)

    def read(self, layer: str) -> PackedLinear:
        _, inputs = self.shape(layer)
        self._check_order(layer, inputs)
        scales, zeros, bits = self._scales(layer), self._zeros(layer), self.quantization.bits
        words = self._tensor(layer + PACKED)
        if self.quantization.method == "awq":
            levels = np.ascontiguousarray(unpack(words, bits, AWQ_PLACES).T)
        else:
            levels = unpack(words.T, bits)
        return PackedLinear(levels, scales, zeros, bits, self._group(inputs))

    def check(self) -> None:
        """Everything that `read` would refuse, of every layer; all but the levels are read."""
        for layer in self.names:
            _, inputs = self.shape(layer)
            self._check_order(layer, inputs)
            self._scales(layer)
            self._zeros(layer)

    def check_biases(self, taken: set[str]) -> None:
        """AutoGPTQ writes a bias for every packed layer, zeros where the model has none. One that is neither in `taken`
        nor zero would be lost.

        Raises:
            CheckpointError: for the first such bias.
        """
        for layer in self.names:
            bias = f"{layer}.bias"
            if bias in self.shards and bias not in taken and np.count_nonzero(self._tensor(bias)):
                raise self._wrong(
                    f"{bias}, which is not zero, though its config.json describes a layer without bias: config and"
                    " weights are not of one model"
                )
