"""Checkpoints of a shape with random weights: named as transformers saves them, hard to quantize, made in little
memory.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open

from hf2mnn.checkpoint import synth
from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.checkpoint.synth import (
    LARGER,
    SHAPES,
    Shape,
    Tensor,
    draw,
    make_checkpoint_like,
    outlier_channels,
    split,
    tensors_of,
)
from hf2mnn.core.errors import CheckpointError, Hf2mnnError
from hf2mnn.core.manifest import Manifest
from hf2mnn.reference.model import load_model
from hf2mnn.stages.fetch import run as fetch_checkpoint
from support import SHAPES_VL

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
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint_like(TINY, tmp_path_factory.mktemp("synth") / "tiny", tokenizer=SHAPES_VL)


def contents(folder: Path) -> dict[str, bytes]:
    """Files but for the manifest, which says how long it took."""
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
def test_shapes_have_as_many_parameters_as_the_real_models(name: str, parameters: int) -> None:
    """The numbers that the hub shows for the -Instruct models of these names."""
    assert sum(map(prod, tensors_of(SHAPES[name].config()).values())) == parameters


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_names_are_those_that_transformers_saves(tied: bool, tmp_path: Path) -> None:
    import transformers

    shape = replace(TINY, tied=tied)
    transformers.Qwen2VLForConditionalGeneration(shape.config()).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "np") as tensors:
        saved = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    assert saved == tensors_of(shape.config())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_checkpoint_is_fetched_loaded_and_answers(tied: bool, tmp_path: Path) -> None:
    folder = make_checkpoint_like(replace(TINY, tied=tied), tmp_path / "made", tokenizer=SHAPES_VL)
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


def test_shards_and_index_agree(made: Path) -> None:
    index = json.loads((made / "model.safetensors.index.json").read_text())
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(path.name for path in made.glob("*.safetensors")) == names
    size = 0
    for name in names:
        with safe_open(made / name, "pt") as tensors:
            assert tensors.metadata() == {"format": "pt"}
            held = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
        assert set(held) == {key for key, file in index["weight_map"].items() if file == name}
        assert all(value.dtype == torch.bfloat16 for value in held.values())
        size += sum(value.nbytes for value in held.values())
    assert size == index["metadata"]["total_size"]


@pytest.mark.parametrize("shards", [1, 3, 200])
def test_no_more_shards_than_asked_and_none_empty(shards: int) -> None:
    shapes = tensors_of(TINY.config())
    files = split(shapes, shards)
    assert len(files) <= shards
    assert [tensor.name for file in files for tensor in file] == list(shapes)
    assert all(file and file[0].start == 0 for file in files)


def test_special_tokens_are_the_tokenizers_and_the_vocabulary_the_shapes(made: Path) -> None:
    config, theirs = json.loads((made / "config.json").read_text()), json.loads((SHAPES_VL / "config.json").read_text())
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        assert config[name] == theirs[name]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert config["text_config"][name] == theirs["text_config"][name]
    assert config["text_config"]["vocab_size"] == TINY.text["vocab_size"]
    assert config["dtype"] == "bfloat16"
    assert (made / "tokenizer.json").read_bytes() == (SHAPES_VL / "tokenizer.json").read_bytes()


def test_same_arguments_give_the_same_bytes(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many threads draw, and into another folder."""
    monkeypatch.setattr(synth, "THREADS", 1)
    assert contents(make_checkpoint_like(TINY, tmp_path / "again", tokenizer=SHAPES_VL)) == contents(made)
    other = contents(make_checkpoint_like(TINY, tmp_path / "other", seed=1, tokenizer=SHAPES_VL))
    assert {name for name, stored in other.items() if stored != contents(made)[name]} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }


def test_weights_do_not_depend_on_how_they_are_split(made: Path, tmp_path: Path) -> None:
    one = Checkpoint(make_checkpoint_like(TINY, tmp_path / "one", shards=1, tokenizer=SHAPES_VL))
    two = Checkpoint(made)
    assert set(one.shards) == set(two.shards)
    assert all(torch.equal(one.tensor(name), two.tensor(name)) for name in one.shards)


def test_tails_are_heavier_than_normal() -> None:
    values = draw(MATRIX, 0, MATRIX.rows, 0).astype(np.float64)
    bulk = np.delete(values, outlier_channels(MATRIX, 0), axis=1)
    spread = MATRIX.columns**-0.5
    assert bulk.std() == pytest.approx(spread, rel=0.01)
    assert abs(bulk.mean()) < 0.01 * spread
    kurtosis = ((bulk / bulk.std()) ** 4).mean() - 3
    assert 2.3 < kurtosis < 3.0  # 0 for a normal distribution, 3 for Student-t with 6 degrees of freedom
    # Quartiles and hundredths of the distribution, from its table, over its standard deviation.
    assert np.quantile(bulk, [0.75, 0.99]) / spread == pytest.approx(np.array([0.7176, 3.1427]) / 1.5**0.5, rel=0.01)


def test_outlier_channels_are_there() -> None:
    sizes = draw(MATRIX, 0, MATRIX.rows, 0).astype(np.float64).std(axis=0)
    (found,) = np.nonzero(sizes > LARGER / 2 * np.median(sizes))
    assert sorted(found) == sorted(outlier_channels(MATRIX, 0))
    assert len(found) == 4
    assert sizes[found].mean() / np.median(sizes) == pytest.approx(LARGER, rel=0.05)


def test_rows_drawn_apart_are_not_the_same() -> None:
    assert (draw(MATRIX, 0, 4, 0) != draw(MATRIX, 4, 4, 0)).any()
    assert (draw(MATRIX, 0, 4, 0) != draw(replace(MATRIX, name="other.weight"), 0, 4, 0)).any()


def test_norms_are_near_one_and_biases_small() -> None:
    norm = draw(Tensor("model.norm.weight", (4096,), 0), 0, 1, 0).astype(np.float64)
    bias = draw(Tensor("model.layers.0.self_attn.q_proj.bias", (4096,), 0), 0, 1, 0).astype(np.float64)
    assert norm.mean() == pytest.approx(1, abs=0.02)
    assert 0.05 < norm.std() < 0.15
    assert abs(bias.mean()) < 0.005
    assert bias.std() < 0.03


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """0.4 GB of weights, one tensor of them 0.2 GB, in less than 100 MB over what it takes to know their names."""
    program = rf"""
import re, sys
from dataclasses import replace
from pathlib import Path
from hf2mnn.checkpoint import synth
from hf2mnn.checkpoint.synth import SHAPES, make_checkpoint_like, tensors_of

synth.THREADS = 2

def peak():  # not ru_maxrss, which begins with that of the process that started this one
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3

shape = SHAPES["qwen2-vl-2b"]
text = {{key: value for key, value in shape.text.items() if not key.endswith("_token_id")}}
text |= {{"num_hidden_layers": 1, "vocab_size": 65536}}
shape = replace(shape, text=text, vision={{**shape.vision, "depth": 1}})
tensors_of(shape.config())
before = peak()
folder = make_checkpoint_like(shape, Path(sys.argv[1]), tokenizer=Path({str(SHAPES_VL)!r}))
size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
print(size / 1e6, peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "made")], capture_output=True, text=True, timeout=300, check=True
    )
    size, grown = map(float, done.stdout.split())
    assert size > 400
    assert grown < 100


def test_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**10, 9 * 10**9, 10**9))
    with pytest.raises(CheckpointError, match=r"would take 4\.42 GB, and its disk has 1\.00 GB free") as refused:
        make_checkpoint_like("qwen2-vl-2b", tmp_path / "made", tokenizer=SHAPES_VL)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_foreign_files_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(Hf2mnnError, match="holds files that no stage has made"):
        make_checkpoint_like(TINY, tmp_path, tokenizer=SHAPES_VL)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_what_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    small = replace(TINY, text={**TINY.text, "vocab_size": 512})
    for arguments, said in (
        ({"shape": "qwen2-vl-1b"}, "no shape 'qwen2-vl-1b'; these are: qwen2-vl-2b, qwen2-vl-7b"),
        ({"shape": TINY, "shards": 0}, "0 shards"),
        ({"shape": TINY, "tokenizer": tmp_path / "empty"}, "empty has no config.json"),
        ({"shape": small, "tokenizer": SHAPES_VL}, "image_token_id 561, outside this shape's vocabulary of 512"),
    ):
        with pytest.raises(CheckpointError, match=said) as refused:
            make_checkpoint_like(destination=tmp_path / "made", **arguments)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "made").exists()


def test_without_a_tokenizer_the_ids_are_the_models_own(tmp_path: Path) -> None:
    folder = make_checkpoint_like(TINY, tmp_path / "made")
    assert json.loads((folder / "config.json").read_text())["image_token_id"] == 151655
    with pytest.raises(CheckpointError, match=r"generation_config\.json|tokenizer\.json|preprocessor_config\.json"):
        fetch_checkpoint(tmp_path / "checkpoint", folder)


def test_weights_are_exact_bfloat16_multiples(made: Path) -> None:
    """An outlier is 8 times a value of the rest, which bfloat16 holds exactly."""
    drawn = draw(MATRIX, 0, 4, 0)
    assert drawn.dtype == ml_dtypes.bfloat16
    few = np.unique(drawn[:, outlier_channels(MATRIX, 0)].astype(np.float32) / LARGER)
    assert set(few) <= set(synth.levels(MATRIX).astype(np.float32))
