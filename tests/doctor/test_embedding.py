"""Embeddings whose file or position differs from what the engine reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from faulty_bundles import changed_bundle, run_checks
from hf2mnn.checkpoint.folder import LFS_POINTER
from hf2mnn.doctor.artifacts import Bundle
from hf2mnn.doctor.checks.embedding import CHECKS
from hf2mnn.mnn.bundle import EMBEDDING
from hf2mnn.mnn.convert import read_graph
from hf2mnn.quant.embedding import tied_settings
from hf2mnn.quant.weights import operators
from support import SHAPES_VL

HIDDEN = 256
WRONG: dict[str, tuple[Callable[[np.ndarray], bytes], str, str]] = {
    "float16": (lambda rows: rows.astype(np.float16).tobytes(), "embedding_values", "is float16"),
    "float32": (lambda rows: rows.tobytes(), "embedding_size", "is float32"),
    "cut short": (lambda rows: bfloat16(rows)[:-4096], "embedding_size", "too short"),
    "of another hidden size": (
        lambda rows: bfloat16(rows) + bytes(2 * HIDDEN - 2),
        "embedding_size",
        "not a whole number of rows",
    ),
    "zero": (lambda rows: bytes(2 * rows.size), "embedding_values", "is zero"),
    "constant": (lambda rows: bfloat16(np.ones_like(rows)), "embedding_values", "the same row for all tokens"),
    "noise": (lambda rows: np.random.default_rng(0).bytes(2 * rows.size), "embedding_values", "does not hold weights"),
    "an LFS pointer": (lambda rows: LFS_POINTER + b"/spec/v1\noid sha256:0\n", "embedding_size", "Git LFS pointer"),
    "shifted by a row": (
        lambda rows: bfloat16(np.roll(rows, -1, axis=0)),
        "embedding_differs",
        "differs from the checkpoint's",
    ),
}


def bfloat16(rows: np.ndarray) -> bytes:
    return rows.astype(ml_dtypes.bfloat16).tobytes()


@pytest.fixture
def rows(bundle: Path) -> np.ndarray:
    stored = np.fromfile(bundle / EMBEDDING, ml_dtypes.bfloat16)
    return stored.astype(np.float32).reshape(-1, HIDDEN)


@pytest.mark.parametrize(("encode", "check", "message"), WRONG.values(), ids=WRONG)
def test_wrong_embedding_files(
    encode: Callable, check: str, message: str, rows: np.ndarray, bundle: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    changed = changed_bundle(
        bundle, tmp_path / "changed", files={EMBEDDING: encode(rows)}, checkpoint=checkpoint_folder
    )
    (finding,) = run_checks(CHECKS, changed)
    assert finding.check == check
    assert message in finding.message


def test_a_shift_of_rows_is_reported(rows: np.ndarray, bundle: Path, checkpoint_folder: Path, tmp_path: Path) -> None:
    shifted = {EMBEDDING: bfloat16(np.roll(rows, -1, axis=0))}
    (finding,) = run_checks(
        CHECKS, changed_bundle(bundle, tmp_path / "changed", files=shifted, checkpoint=checkpoint_folder)
    )
    assert "row i holds token i+1's" in finding.evidence


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e4])
def test_weights_of_any_magnitude_have_no_finding(size: float, rows: np.ndarray, bundle: Path, tmp_path: Path) -> None:
    """Unused rows are zero in many checkpoints."""
    scaled = (rows * size).astype(np.float32)
    scaled[-50:] = 0
    assert run_checks(CHECKS, changed_bundle(bundle, tmp_path / "valid", files={EMBEDDING: bfloat16(scaled)})) == []


@pytest.fixture(scope="module")
def tied(results: Path) -> dict[str, Any]:
    """`tie_embeddings` of the int4 bundle, if its lm_head were the embedding: the checkpoint is tied."""
    return tied_settings(operators(read_graph(results / "bundles" / "int4" / "llm.mnn"))[-1])


def in_head(results: Path, folder: Path, tied: Any, checkpoint: Path | None = SHAPES_VL) -> Bundle:
    model = {"tie_embeddings": tied}
    return changed_bundle(
        results / "bundles" / "int4", folder, model=model, files={EMBEDDING: None}, checkpoint=checkpoint
    )


def as_list(tied: dict[str, Any]) -> list[int]:
    """Return `tie_embeddings` as llmexport writes it."""
    keys = ("weight_offset", "alpha_offset", "alpha_size", "quant_bit", "quant_block")
    return [*(tied[key] for key in keys), int(tied["alpha_dtype"] == "fp16")]


def test_an_embedding_in_lm_head_has_no_finding(results: Path, tied: dict[str, Any], tmp_path: Path) -> None:
    for name, stored in {"keys": tied, "list": as_list(tied)}.items():
        assert run_checks(CHECKS, in_head(results, tmp_path / name, stored)) == []


@pytest.mark.parametrize(
    ("change", "evidence"),
    [
        ({"weight_offset": 10**9}, "weights end at byte 1000081920, the file has"),
        ({"alpha_offset": 10**9}, "scales end at byte 1000010240, the file has"),
        ({"weight_offset": -256}, "weight_offset is "),
        ({"alpha_offset": -256}, "alpha_offset is "),
        ({"quant_bit": 8}, "weights end at byte "),
        ({"quant_bit": 2}, "quant_bit is 2, the graph's is 4"),
        ({"quant_block": 32}, "quant_block is 32, the graph's is 64"),
        ({"alpha_dtype": "fp32"}, "alpha_dtype is fp32, the graph's is fp16"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_offsets_or_formats_of_lm_head(
    change: dict[str, Any], evidence: str, results: Path, tied: dict[str, Any], tmp_path: Path
) -> None:
    """A negative number is relative to the right offset."""
    moved = {k: tied[k] + v if isinstance(v, int) and v < 0 else v for k, v in change.items()}
    for known in (SHAPES_VL, None):
        (finding,) = run_checks(CHECKS, in_head(results, tmp_path / str(bool(known)), tied | moved, known))
        assert finding.check == "tied_embedding"
        assert evidence in finding.evidence


@pytest.mark.parametrize("stored", [[1, 2], "here", {"weight_offset": -1}, {}, [1, 2, 3, "4", 5]])
def test_tie_embeddings_without_a_position(stored: Any, results: Path, tmp_path: Path) -> None:
    (finding,) = run_checks(CHECKS, in_head(results, tmp_path / "changed", stored))
    assert (finding.check, finding.where) == ("tied_embedding", "llm_config.json: tie_embeddings")


def test_lm_head_of_an_untied_model(bundle: Path, tmp_path: Path) -> None:
    head = operators(read_graph(bundle / "llm.mnn"))[-1]
    stored = {"weight_offset": head.parts[0][0], "alpha_offset": 0, "alpha_size": 0, "quant_bit": 8, "quant_block": 0}
    info = json.loads((bundle / "llm_config.json").read_text())["hf2mnn"] | {"tie_word_embeddings": False}
    untied = changed_bundle(bundle, tmp_path / "changed", model={"tie_embeddings": stored, "hf2mnn": info})
    messages = [finding.message for finding in run_checks(CHECKS, untied)]
    assert "another weight" in messages[0]
    assert "cannot read as an embedding" in messages[1]
