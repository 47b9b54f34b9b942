"""The reference is the model's own greedy answer, whatever a checkpoint would have its users do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hf2mnn.reference.run import Reference
from hf2mnn.source.checkpoint import Checkpoint


@pytest.mark.parametrize(
    "setting", [{}, {"repetition_penalty": 5.0}, {"do_sample": True, "temperature": 9.0, "top_k": 5}]
)
def test_each_token_is_the_most_likely_one(make_checkpoint: Callable[..., Path], tmp_path: Path, setting: dict) -> None:
    """transformers takes what a caller leaves open from generation_config.json: a penalty, or a temperature."""
    folder = shutil.copytree(
        make_checkpoint(text={"num_hidden_layers": 1, "layer_types": ["full_attention"]}), tmp_path / "c"
    )
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    made = Reference(Checkpoint(folder), max_new_tokens=12).answer(np.array([5, 6, 7, 5, 6, 7]), [])
    np.testing.assert_array_equal(made["answer_ids"], made["logits"].argmax(-1))
