"""Synthetic checkpoints: names and shapes of real models, heavy-tailed weights, bounded memory."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections import namedtuple
from dataclasses import replace
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open

import synth
from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import CheckpointError, Hf2mnnError
from hf2mnn.core.manifest import Manifest
from hf2mnn.reference.model import load_model
from hf2mnn.stages.fetch import run as fetch_checkpoint
from support import SHAPES_VL
from synth import (
    OUTLIER_FACTOR,
    SHAPES,
    Shape,
    Tensor,
    draw,
    make_checkpoint_like,
    outlier_channels,
    split,
    tensor_shapes,
)

TINY = Shape(
    "qwen2_vl",
    text={
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 768,
        "vocab_size": 640,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
    },
    vision={"depth": 1, "embed_dim": 192, "num_heads": 4, "hidden_size": 256},
    tied=True,
)
MATRIX = Tensor("model.layers.0.mlp.up_proj.weight", (2048, 1024), 0)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint_like(TINY, tmp_path_factory.mktemp("synth") / "tiny", tokenizer=SHAPES_VL)


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files except the manifest, which holds the run time."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen2-vl-2b", 2_208_985_600),
        ("qwen2-vl-7b", 8_291_375_616),
        ("qwen2.5-vl-3b", 3_754_622_976),
        ("qwen3-vl-2b", 2_127_532_032),
        ("qwen3-0.6b", 596_049_920),
        ("llama-3.2-1b", 1_235_814_400),
    ],
)
def test_parameter_counts_are_those_of_the_real_models(name: str, parameters: int) -> None:
    """The hub shows these counts for the -Instruct models."""
    assert sum(map(prod, tensor_shapes(SHAPES[name].config()).values())) == parameters


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_names_equal_those_of_save_pretrained(tied: bool, tmp_path: Path) -> None:
    import transformers

    shape = replace(TINY, tied=tied)
    transformers.Qwen2VLForConditionalGeneration(shape.config()).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "np") as tensors:
        saved = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    assert saved == tensor_shapes(shape.config())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_synthetic_checkpoint_is_fetched_and_runs(tied: bool, tmp_path: Path) -> None:
    folder = make_checkpoint_like(replace(TINY, tied=tied), tmp_path / "synthetic", tokenizer=SHAPES_VL)
    source = fetch_checkpoint(tmp_path / "checkpoint", folder)
    model = load_model(Checkpoint(Manifest.load(source).verify()))
    with torch.no_grad():
        logits = model(torch.arange(32)[None]).logits
    assert logits.shape == (1, 32, 640)
    assert torch.isfinite(logits).all()
    assert 0.3 < logits.std() < 10
    with torch.no_grad():
        pixels, grid = torch.randn(24, 1176), torch.tensor([[1, 4, 6]])
        assert torch.isfinite(model.model.visual(pixels, grid).pooler_output).all()


def test_shards_and_index_agree(synthetic: Path) -> None:
    index = json.loads((synthetic / "model.safetensors.index.json").read_text())
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(path.name for path in synthetic.glob("*.safetensors")) == names
    size = 0
    for name in names:
        with safe_open(synthetic / name, "pt") as tensors:
            assert tensors.metadata() == {"format": "pt"}
            stored = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
        assert set(stored) == {key for key, file in index["weight_map"].items() if file == name}
        assert all(value.dtype == torch.bfloat16 for value in stored.values())
        size += sum(value.nbytes for value in stored.values())
    assert size == index["metadata"]["total_size"]


@pytest.mark.parametrize("shards", [1, 3, 200])
def test_shards_are_limited_and_not_empty(shards: int) -> None:
    shapes = tensor_shapes(TINY.config())
    files = split(shapes, shards)
    assert len(files) <= shards
    assert [tensor.name for file in files for tensor in file] == list(shapes)
    assert all(file and file[0].start == 0 for file in files)


def test_special_tokens_come_from_the_tokenizer_and_vocabulary_from_the_shape(synthetic: Path) -> None:
    config = json.loads((synthetic / "config.json").read_text())
    original = json.loads((SHAPES_VL / "config.json").read_text())
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        assert config[name] == original[name]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert config["text_config"][name] == original["text_config"][name]
    assert config["text_config"]["vocab_size"] == TINY.text["vocab_size"]
    assert config["dtype"] == "bfloat16"
    assert (synthetic / "tokenizer.json").read_bytes() == (SHAPES_VL / "tokenizer.json").read_bytes()


def test_equal_arguments_give_equal_bytes(synthetic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of threads and the folder do not matter."""
    monkeypatch.setattr(synth, "THREADS", 1)
    assert contents(make_checkpoint_like(TINY, tmp_path / "again", tokenizer=SHAPES_VL)) == contents(synthetic)
    other = contents(make_checkpoint_like(TINY, tmp_path / "other", seed=1, tokenizer=SHAPES_VL))
    assert {name for name, stored in other.items() if stored != contents(synthetic)[name]} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }


def test_weights_do_not_depend_on_the_shards(synthetic: Path, tmp_path: Path) -> None:
    one = Checkpoint(make_checkpoint_like(TINY, tmp_path / "one", shards=1, tokenizer=SHAPES_VL))
    two = Checkpoint(synthetic)
    assert set(one.headers) == set(two.headers)
    assert all(torch.equal(one.read(name), two.read(name)) for name in one.headers)


def test_tails_are_heavier_than_normal() -> None:
    values = draw(MATRIX, 0, MATRIX.rows, 0).astype(np.float64)
    bulk = np.delete(values, outlier_channels(MATRIX, 0), axis=1)
    std = MATRIX.columns**-0.5
    assert bulk.std() == pytest.approx(std, rel=0.01)
    assert abs(bulk.mean()) < 0.01 * std
    kurtosis = ((bulk / bulk.std()) ** 4).mean() - 3
    assert 2.3 < kurtosis < 3.0  # 0 for a normal distribution, 3 for Student-t with 6 degrees of freedom
    # Quantiles from the table of Student's t, divided by its standard deviation.
    assert np.quantile(bulk, [0.75, 0.99]) / std == pytest.approx(np.array([0.7176, 3.1427]) / 1.5**0.5, rel=0.01)


def test_outlier_channels_are_larger() -> None:
    sizes = draw(MATRIX, 0, MATRIX.rows, 0).astype(np.float64).std(axis=0)
    (outliers,) = np.nonzero(sizes > OUTLIER_FACTOR / 2 * np.median(sizes))
    assert sorted(outliers) == sorted(outlier_channels(MATRIX, 0))
    assert len(outliers) == 4
    assert sizes[outliers].mean() / np.median(sizes) == pytest.approx(OUTLIER_FACTOR, rel=0.05)


def test_rows_and_tensors_are_drawn_independently() -> None:
    assert (draw(MATRIX, 0, 4, 0) != draw(MATRIX, 4, 4, 0)).any()
    assert (draw(MATRIX, 0, 4, 0) != draw(replace(MATRIX, name="other.weight"), 0, 4, 0)).any()


def test_norms_are_near_one_and_biases_small() -> None:
    norm = draw(Tensor("model.norm.weight", (4096,), 0), 0, 1, 0).astype(np.float64)
    bias = draw(Tensor("model.layers.0.self_attn.q_proj.bias", (4096,), 0), 0, 1, 0).astype(np.float64)
    assert norm.mean() == pytest.approx(1, abs=0.02)
    assert 0.05 < norm.std() < 0.15
    assert abs(bias.mean()) < 0.005
    assert bias.std() < 0.03


def test_memory_does_not_grow_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing 0.4 GB of weights, with one tensor of 0.2 GB, allocates less than 100 MB."""
    monkeypatch.setattr(synth, "THREADS", 2)
    shape = SHAPES["qwen2-vl-2b"]
    text = {key: value for key, value in shape.text.items() if not key.endswith("_token_id")}
    text |= {"num_hidden_layers": 1, "vocab_size": 65536}
    shape = replace(shape, text=text, vision={**shape.vision, "depth": 1})
    tensor_shapes(shape.config())  # loads torch and transformers
    tracemalloc.start()  # counts numpy's arrays as well
    try:
        folder = make_checkpoint_like(shape, tmp_path / "synthetic", tokenizer=SHAPES_VL)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) > 400e6
    assert peak < 100e6


def test_full_disk_is_detected_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**10, 9 * 10**9, 10**9))
    with pytest.raises(
        CheckpointError, match=r"the checkpoint needs 4\.46 GB in .*/synthetic, and its disk has 1\.00 GB free"
    ) as error:
        make_checkpoint_like("qwen2-vl-2b", tmp_path / "synthetic", tokenizer=SHAPES_VL)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_other_files_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(Hf2mnnError, match="holds files that no stage wrote"):
        make_checkpoint_like(TINY, tmp_path, tokenizer=SHAPES_VL)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_invalid_argument_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    small = replace(TINY, text={**TINY.text, "vocab_size": 512})
    for arguments, message in (
        ({"shape": "qwen2-vl-1b"}, "unknown shape 'qwen2-vl-1b'; choose one of: qwen2-vl-2b, qwen2-vl-7b"),
        ({"shape": TINY, "shards": 0}, "0 shards"),
        ({"shape": TINY, "tokenizer": tmp_path / "empty"}, "empty has no config.json"),
        ({"shape": small, "tokenizer": SHAPES_VL}, "image_token_id 561, outside this shape's vocabulary of 512"),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            make_checkpoint_like(destination=tmp_path / "synthetic", **arguments)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "synthetic").exists()


def test_ids_without_a_tokenizer_are_those_of_the_family(tmp_path: Path) -> None:
    folder = make_checkpoint_like(TINY, tmp_path / "synthetic")
    assert json.loads((folder / "config.json").read_text())["image_token_id"] == 151655
    with pytest.raises(CheckpointError, match=r"generation_config\.json|tokenizer\.json|preprocessor_config\.json"):
        fetch_checkpoint(tmp_path / "checkpoint", folder)


def test_outliers_are_exact_multiples() -> None:
    """An outlier is 8 times an ordinary value, which is exact in bfloat16."""
    drawn = draw(MATRIX, 0, 4, 0)
    assert drawn.dtype == ml_dtypes.bfloat16
    values = np.unique(drawn[:, outlier_channels(MATRIX, 0)].astype(np.float32) / OUTLIER_FACTOR)
    assert set(values) <= set(synth.quantiles(MATRIX).astype(np.float32))


def test_script_has_its_options_and_one_line_errors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exited:
        synth.main(["--help"])
    printed = capsys.readouterr().out
    assert exited.value.code == 0
    assert all(part in printed for part in ("--like", "--tokenizer", "--out", "--shards", "--seed", *SHAPES))
    with pytest.raises(SystemExit, match=r"^bench/synth\.py: unknown shape 'qwen2-vl-1b'; choose one of: qwen2-vl-2b"):
        synth.main(["--like", "qwen2-vl-1b", "--out", str(tmp_path / "synthetic")])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="is a file; give the name of a folder"):
        synth.main(["--like", "qwen3-0.6b", "--out", str(tmp_path / "file")])
