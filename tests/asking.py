"""Small evaluation sets: conversations with names of images, and random images."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def turn(images: Collection[str], *parts: str) -> dict[str, Any]:
    """Return a message of the user: parts that are names of `images` are images, others are text."""
    content = [
        {"type": "image", "image": f"{part}.png"} if part in images else {"type": "text", "text": part}
        for part in parts
    ]
    return {"role": "user", "content": content}


def write_set(folder: Path, sizes: dict[str, tuple[int, int]], examples: dict[str, list[dict[str, Any]]]) -> Path:
    """Write examples.jsonl with `examples` (messages by id), and an image for each of `sizes` (width, height)."""
    random = np.random.default_rng(5)
    for name, (width, height) in sizes.items():
        coarse = Image.fromarray(random.integers(0, 256, (height // 14, width // 14, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    lines = [json.dumps({"id": name, "messages": messages}) for name, messages in examples.items()]
    (folder / "examples.jsonl").write_text("\n".join(lines))
    return folder
