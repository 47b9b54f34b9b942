"""Write prequantized checkpoints as hubs have them, one value and one shift at a time, independent of the reader."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Outputs of a word, from its lowest bits."""


@dataclass(frozen=True)
class Quantized:
    """A quantized weight: q int [outputs, inputs]; zero_points int and scales float16 [outputs, groups]."""

    q: np.ndarray
    zero_points: np.ndarray
    scales: np.ndarray
    bits: int
    group: int

    @property
    def weight(self) -> np.ndarray:
        """Dequantized weight, float64 [outputs, inputs]."""
        groups = np.arange(self.q.shape[1]) // self.group
        zero_points, scales = self.zero_points.astype(np.float64), self.scales.astype(np.float64)
        return (self.q.astype(np.float64) - zero_points[:, groups]) * scales[:, groups]


def quantize(weight: np.ndarray, bits: int, group: int, symmetric: bool, low: int = 0, seed: int = 0) -> Quantized:
    """Round to nearest in groups of inputs (-1: one group per row).

    Where it is not symmetric, some zero points are drawn from all of [`low`, 2^bits), so that the ends occur.
    """
    outputs, inputs = weight.shape
    group, top = inputs if group == -1 else group, 2**bits - 1
    grouped = weight.astype(np.float64).reshape(outputs, inputs // group, group)
    minimum, maximum = np.minimum(grouped.min(2), 0), np.maximum(grouped.max(2), 0)
    if symmetric:
        scales = np.abs(grouped).max(2) / (top // 2)
        zero_points = np.full(scales.shape, (top + 1) // 2)
    else:
        scales = (maximum - minimum) / top
        random = np.random.default_rng(seed)
        drawn = random.integers(low, top + 1, scales.shape)
        fitting = np.clip(np.rint(-minimum / scales), low, top).astype(int)
        zero_points = np.where(random.random(scales.shape) < 0.1, drawn, fitting)
    scales = scales.astype(np.float16)
    q = np.clip(np.rint(grouped / scales[:, :, None].astype(np.float64)) + zero_points[:, :, None], 0, top)
    return Quantized(q.reshape(outputs, inputs).astype(int), zero_points, scales, bits, group)


def word(values: list[int], bits: int) -> int:
    """Pack values into one word, the first one in the lowest bits."""
    total = 0
    for position, value in enumerate(values):
        assert 0 <= value < 2**bits
        total |= value << (bits * position)
    return total


def int32(rows: list[list[int]]) -> torch.Tensor:
    return torch.from_numpy(np.array(rows, np.uint32).view(np.int32))


def pack_awq(layer: Quantized) -> dict[str, torch.Tensor]:
    def pack_rows(rows: list[list[int]]) -> torch.Tensor:
        """Pack eight outputs of a row into each word."""
        starts = range(0, len(rows[0]), 8)
        return int32([[word([row[start + output] for output in AWQ_ORDER], 4) for start in starts] for row in rows])

    return {
        "qweight": pack_rows(layer.q.T.tolist()),
        "qzeros": pack_rows(layer.zero_points.T.tolist()),
        "scales": torch.from_numpy(layer.scales.T.copy()),
    }


def pack_gptq(layer: Quantized, offset: int) -> dict[str, torch.Tensor]:
    """`offset` is subtracted from zero points before they are stored: 1 in format gptq, 0 in gptq_v2."""
    q, bits, count = layer.q.tolist(), layer.bits, 32 // layer.bits
    outputs, inputs = layer.q.shape
    zero_points = layer.zero_points.T.tolist()
    return {
        "qweight": int32(
            [
                [word([q[output][start + i] for i in range(count)], bits) for output in range(outputs)]
                for start in range(0, inputs, count)
            ]
        ),
        "qzeros": int32(
            [
                [word([row[start + i] - offset for i in range(count)], bits) for start in range(0, outputs, count)]
                for row in zero_points
            ]
        ),
        "scales": torch.from_numpy(layer.scales.T.copy()),
        "g_idx": torch.tensor([i // layer.group for i in range(inputs)], dtype=torch.int32),
    }


def pack(layer: Quantized, kind: str) -> dict[str, torch.Tensor]:
    """`kind` is "awq", "gptq" or "gptq_v2"."""
    return pack_awq(layer) if kind == "awq" else pack_gptq(layer, offset=int(kind == "gptq"))


def settings(kind: str, bits: int, group: int, symmetric: bool) -> dict[str, Any]:
    """Return quantization_config as AutoAWQ and AutoGPTQ write it."""
    common = {"bits": bits, "group_size": group}
    if kind == "awq":
        skipped = {"modules_to_not_convert": ["visual"]}
        return common | {"quant_method": "awq", "version": "gemm", "zero_point": not symmetric} | skipped
    return common | {
        "quant_method": "gptq",
        "checkpoint_format": kind,
        "desc_act": False,
        "sym": symmetric,
        "static_groups": False,
        "true_sequential": True,
        "damp_percent": 0.1,
    }


def write_prequantized(
    checkpoint: Path, folder: Path, kind: str, bits: int = 4, group: int = 32, symmetric: bool = False, old: bool = True
) -> dict[str, Quantized]:
    """Quantize every linear layer of the decoder, and store the rest in float16.

    Args:
        checkpoint: Floating-point checkpoint.
        folder: Output folder.
        kind: "awq", "gptq" or "gptq_v2".
        bits: Bits per weight.
        group: Inputs per group.
        symmetric: Whether all zero points are in the middle.
        old: Names and config.json as before transformers 4.52, as on hubs.

    Returns:
        The quantized layers, by the names of their parameters in transformers.
    """
    shutil.copytree(checkpoint, folder)
    layers, stored = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        parameter = "model.language_model." + name.removeprefix("model.") if name.startswith("model.") else name
        parameter = f"model.{parameter}" if parameter.startswith("visual.") else parameter
        layer = (name if old else parameter).removesuffix(".weight")
        if ".layers." not in name or not name.endswith("_proj.weight"):
            stored[name if old else parameter] = tensor.half().contiguous()
            continue
        low = int(kind == "gptq")
        layers[parameter] = quantize(tensor.float().numpy(), bits, group, symmetric, low, seed=len(layers))
        tensors = pack(layers[parameter], kind)
        stored |= {f"{layer}.{suffix}": value.contiguous() for suffix, value in tensors.items()}
        if kind != "awq" and name.endswith(("o_proj.weight", "mlp.down_proj.weight")):
            # AutoGPTQ's layers always have a bias.
            stored[f"{layer}.bias"] = torch.zeros(tensor.shape[0], dtype=torch.float16)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if old:
        config = config.pop("text_config") | config
        config["rope_scaling"] = config.pop("rope_parameters") | {"type": "mrope"}
        config["rope_theta"] = config["rope_scaling"].pop("rope_theta")
        del config["rope_scaling"]["rope_type"]
    config["quantization_config"] = settings(kind, bits, group, symmetric)
    (folder / "config.json").write_text(json.dumps(config))
    return layers
