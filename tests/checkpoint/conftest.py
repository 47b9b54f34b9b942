"""A small complete checkpoint in two shards, copies of it to damage, and a server with the API of both hubs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hub_server import Served, serving
from support import SHAPES_VL, TEXT, VISION
from synth import Shape, make_checkpoint_like

SMALL = Shape(
    "qwen2_vl",
    text={
        "hidden_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "vocab_size": 640,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
    },
    vision={"depth": 1, "embed_dim": 64, "num_heads": 2, "hidden_size": 128},
    tied=True,
)


@pytest.fixture(scope="session")
def small_shape() -> Shape:
    return SMALL


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The complete checkpoint. Tests only read it."""
    folder = make_checkpoint_like(SMALL, tmp_path_factory.mktemp("small") / "checkpoint", tokenizer=SHAPES_VL)
    for name in ("manifest.json", ".hf2mnn"):
        (folder / name).unlink()
    return folder


@pytest.fixture(scope="session")
def bases(make_checkpoint: Callable[..., Path]) -> dict[bool, Path]:
    """bfloat16 checkpoints with an untied (False) and a tied (True) lm_head. Tests only read them."""
    return {tied: make_checkpoint(text=TEXT, vision=VISION, tied=tied) for tied in (False, True)}


@pytest.fixture
def checkpoint(small: Path, tmp_path: Path) -> Path:
    """A copy of it to damage, with files that no stage may read."""
    folder = Path(shutil.copytree(small, tmp_path / "original"))
    (folder / "modeling_x.py").write_text("raise SystemExit('untrusted code')\n")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (folder / "README.md").write_text("# A model\n")
    return folder


@pytest.fixture
def hub(checkpoint: Path) -> Iterator[Served]:
    """A server with the API of both hubs, which serves the checkpoint as owner/name."""
    with serving({path.name: path.read_bytes() for path in checkpoint.iterdir()}) as served:
        yield served
