"""How large a model is, as far as that can be known before it is fetched."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError

from hf2mnn.checkpoint.folder import Checkpoint, checkpoint_files
from hf2mnn.checkpoint.hub.pin import load_pin
from hf2mnn.checkpoint.prequantized import bytes_at_16_bits
from hf2mnn.core.errors import CheckpointError
from hf2mnn.machine.footprint import TYPICAL


@dataclass(frozen=True)
class Size:
    """Numbers of weights: all of them, and the embedding's. Whether they are `known`, or those of a typical model."""

    weights: float
    embedding: float
    known: bool = True


UNKNOWN = Size(TYPICAL, TYPICAL / 10, known=False)


def _of_files(folder: Path) -> Size:
    checkpoint = Checkpoint(folder)
    packed, text = checkpoint.quantization, checkpoint.text_config
    if packed:
        files = [Path(path) for path in checkpoint_files(folder) if path.endswith(".safetensors")]
        weights = sum(bytes_at_16_bits(path, packed.bits) / 2 for path in files)
    else:
        weights = float(sum(map(prod, checkpoint.shapes())))
    return Size(weights, float(text["vocab_size"] * text["hidden_size"]))


def model_size(path: str | None, pin: str | None) -> Size:
    """Of a local checkpoint by its files' headers, of a pinned one by its files' sizes; what is wrong with either is
    said by the source stage.
    """
    try:
        if path and Path(path).is_dir():
            return _of_files(Path(path))
        if pin:
            shards = [
                digest.size for name, digest in load_pin(Path(pin)).files.items() if name.endswith(".safetensors")
            ]
            return Size(sum(shards) / 2, 0.0) if shards else UNKNOWN
    except (CheckpointError, SafetensorError, OSError, ValueError, KeyError, TypeError):
        pass
    return UNKNOWN
