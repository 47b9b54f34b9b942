"""Recorded inputs of linear layers: values, even sampling, and refusal of calibration on the evaluation set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from transformers import Qwen2VLForConditionalGeneration

from hf2mnn.core.errors import EvaluationSetError, ManifestError, QuantizationError
from hf2mnn.core.manifest import Manifest
from hf2mnn.quant.layer_inputs import Activations
from hf2mnn.reference.golden import ACTIVATIONS, Golden
from hf2mnn.reference.record_inputs import Sample, record_linear_inputs
from hf2mnn.stages.calibrate import run as record_calibration
from hf2mnn.stages.fetch import run as fetch_checkpoint
from hf2mnn.stages.reference import run as run_reference
from support import TEXT as SMALL
from support import VISION

TEXT = SMALL | {"intermediate_size": 208}
LAYER, BLOCK = "model.language_model.layers.1", "model.visual.blocks.0"
MERGER = "model.visual.merger.mlp.0"
ALL_ROWS = 100_000
"""More rows than any set here has."""
IMAGES = {"a.png": (84, 56), "b.png": (112, 84)}


def user(*images: str, text: str) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": name} for name in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


EXAMPLES = {
    "text": user(text="How many things are there, and which of them is at the bottom left?"),
    "imaged": user("a.png", text="Which?"),
    "short": user(text="Why?"),
    "two": user("a.png", "b.png", text="?"),
}


def write_set(folder: Path, examples: dict[str, list], seed: int = 0) -> Path:
    folder.mkdir()
    lines = [json.dumps({"id": name, "messages": messages}) for name, messages in examples.items()]
    (folder / "examples.jsonl").write_text("\n".join(lines))
    noise = np.random.default_rng(seed)
    for name, size in IMAGES.items():
        Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(text=TEXT, vision=VISION)


@pytest.fixture(scope="module")
def source(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fetch_checkpoint(tmp_path_factory.mktemp("source") / "source", checkpoint)


@pytest.fixture(scope="module")
def answer(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Function that runs the reference stage on examples, with random images."""

    def run(examples: dict[str, list], seed: int = 0) -> Path:
        folder = tmp_path_factory.mktemp("answered")
        return run_reference(source, write_set(folder / "set", examples, seed), folder / "reference", 5, threads=1)

    return run


@pytest.fixture(scope="module")
def calibration(answer: Callable[..., Path]) -> Path:
    return answer(EXAMPLES)


@pytest.fixture(scope="module")
def whole(source: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration stage with all rows."""
    folder = tmp_path_factory.mktemp("whole") / "activations"
    return record_calibration(source, calibration, folder, rows=ALL_ROWS, threads=1)


@pytest.fixture(scope="module")
def hooked(checkpoint: Path, calibration: Path) -> dict[str, np.ndarray]:
    """Inputs of each linear layer by independent hooks, rounded to bfloat16: float32 [rows, in_features]."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    kept: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            kept[name] = []
            module.register_forward_hook(lambda _, inputs, __, name=name: kept[name].append(inputs[0].flatten(0, -2)))
    golden = Golden(calibration)
    for example in golden.examples():
        ids = torch.from_numpy(np.concatenate([example.input_ids, example.answer_ids[:-1]]))[None]
        arguments = {"input_ids": ids, "mm_token_type_ids": (ids == 561).int()}
        if example.images:
            images = [golden.image(name) for name in example.images]
            arguments["pixel_values"] = torch.from_numpy(np.concatenate([image.pixel_values for image in images]))
            arguments["image_grid_thw"] = torch.from_numpy(np.stack([image.grid_thw for image in images]))
        with torch.inference_mode():
            model(**arguments)
    return {name: torch.cat(values).bfloat16().float().numpy() for name, values in kept.items()}


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    """Compare up to the last bit of bfloat16: another attention function may sum in another order."""
    np.testing.assert_allclose(actual, expected, rtol=2**-7, atol=1e-5)


def test_rows_of_every_linear_layer_equal_those_of_independent_hooks(
    whole: Path, hooked: dict[str, np.ndarray]
) -> None:
    """Text and images, prompts and answers, decoder and vision tower, in the order of the set."""
    activations = Activations(whole)
    assert activations.modules == sorted(hooked)
    assert {"lm_head", f"{LAYER}.mlp.down_proj", f"{BLOCK}.attn.qkv", MERGER} <= set(hooked)
    for name, rows in hooked.items():
        assert_close(activations.rows(name), rows)


def test_tokens_and_patches_are_all_counted(whole: Path, calibration: Path) -> None:
    golden, activations = Golden(calibration), Activations(whole)
    examples = list(golden.examples())
    tokens = sum(len(example.input_ids) + len(example.answer_ids) - 1 for example in examples)
    patches = sum(len(golden.image(name).pixel_values) for example in examples for name in example.images)
    assert len(activations.rows("lm_head")) == tokens
    assert len(activations.rows(f"{BLOCK}.mlp.fc1")) == patches
    assert len(activations.rows(MERGER)) == patches // 4
    assert Manifest.load(whole).results["max_rows_per_tensor"] == max(tokens, patches)


def test_layers_with_the_same_input_share_one_tensor(whole: Path) -> None:
    activations = Activations(whole)
    attention = {activations.tensor(f"{LAYER}.self_attn.{part}_proj") for part in "qkv"}
    mlp = {activations.tensor(f"{LAYER}.mlp.{part}_proj") for part in ("gate", "up")}
    assert (attention, mlp) == ({f"{LAYER}.self_attn.q_proj"}, {f"{LAYER}.mlp.gate_proj"})
    alone = [f"{LAYER}.self_attn.o_proj", f"{LAYER}.mlp.down_proj", "lm_head", f"{BLOCK}.attn.proj"]
    assert [activations.tensor(name) for name in alone] == alone
    assert len(activations._file.keys()) == len({activations.tensor(name) for name in activations.modules})


def test_a_sample_has_rows_of_text_and_of_images(source: Path, calibration: Path, whole: Path, tmp_path: Path) -> None:
    """The rows whose multiple of the golden ratio, modulo 1, is smallest, in the order of the set."""
    limit = 24
    sampled = Activations(record_calibration(source, calibration, tmp_path / "few", rows=limit, threads=1))
    every = Activations(whole)
    for name in sampled.modules:
        rows = every.rows(name)
        kept = np.sort(np.argsort(np.arange(len(rows)) * (5**0.5 - 1) / 2 % 1)[:limit])
        np.testing.assert_array_equal(sampled.rows(name), rows[kept])
    golden = Golden(calibration)
    ids = np.concatenate([np.concatenate([e.input_ids, e.answer_ids[:-1]]) for e in golden.examples()])
    kept = np.argsort(np.arange(len(ids)) * (5**0.5 - 1) / 2 % 1)[:limit]
    assert set(ids[kept] == 561) == {True, False}


@pytest.mark.parametrize("total", [1, 63, 64, 65, 129, 1000, 4097])
@pytest.mark.parametrize("step", [1, 7, 500])
def test_a_sample_is_even_for_any_length_and_split(total: int, step: int) -> None:
    """Gaps have at most three lengths, none much longer than in a sample of known length."""
    limit = 64
    values, sample = torch.arange(float(total))[:, None] % 256, Sample(limit, 1)
    for begin in range(0, total, step):
        sample.add(values[begin : begin + step])
        assert len(sample.positions) <= limit
    positions = np.sort(sample.positions).astype(int)
    assert len(positions) == min(limit, total)
    assert sample.in_order()[:, 0].tolist() == (positions % 256).tolist()
    assert len(set(np.diff(positions))) <= 3
    assert np.diff([-1, *positions, total]).max() <= max(1, 3 * total / limit)
    again = Sample(limit, 1)
    again.add(values)
    np.testing.assert_array_equal(np.sort(again.positions), np.sort(sample.positions))


def test_recording_leaves_no_hooks(checkpoint: Path) -> None:
    model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.arange(5)[None] + 10
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        with record_linear_inputs(model, 8) as inputs:
            assert torch.equal(model(input_ids=ids).logits, before)
    assert set(inputs.readers) >= {"lm_head"}
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="inside"), record_linear_inputs(model, 8):
        raise ValueError("inside")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_recording_is_deterministic(source: Path, calibration: Path, whole: Path, tmp_path: Path) -> None:
    again = record_calibration(source, calibration, tmp_path / "again", rows=ALL_ROWS, threads=1)
    assert (again / ACTIVATIONS).read_bytes() == (whole / ACTIVATIONS).read_bytes()


def test_mapped_weights_give_the_same_bytes(source: Path, calibration: Path, whole: Path, tmp_path: Path) -> None:
    mapped = record_calibration(source, calibration, tmp_path / "mapped", rows=ALL_ROWS, threads=1, weights="mapped")
    assert Manifest.load(mapped).outputs == Manifest.load(whole).outputs
    assert [Manifest.load(folder).results["weights"] for folder in (mapped, whole)] == ["mapped", "resident"]


def test_the_manifest_has_inputs_and_settings(
    source: Path, calibration: Path, answer: Callable[..., Path], tmp_path: Path
) -> None:
    evaluation = answer({"other": user(text="And then?")})
    manifest = Manifest.load(
        record_calibration(source, calibration, tmp_path / "activations", evaluation, rows=8, threads=1)
    )
    assert manifest.stage == "calibrate"
    assert manifest.settings == {"rows": 8, "threads": 1}
    inputs = {"checkpoint": source, "calibration": calibration, "evaluation": evaluation}
    assert manifest.inputs == {name: Manifest.load(folder).digest() for name, folder in inputs.items()}
    assert manifest.verify() == tmp_path / "activations"


@pytest.mark.parametrize("shared", ["short", "two"])
def test_an_example_in_both_sets_is_refused_by_name(
    source: Path, calibration: Path, answer: Callable[..., Path], tmp_path: Path, shared: str
) -> None:
    evaluation = answer({"first": user(text="And then?"), "evaluated": EXAMPLES[shared]})
    with pytest.raises(EvaluationSetError, match=rf"example {shared} of .* example evaluated of the evaluation set"):
        record_calibration(source, calibration, tmp_path / "activations", evaluation, rows=8, threads=1)
    assert not (tmp_path / "activations").exists()


def test_a_question_about_another_image_is_not_refused(
    source: Path, calibration: Path, answer: Callable[..., Path], tmp_path: Path
) -> None:
    """Nor is another order of the same two images."""
    other = answer({"imaged": EXAMPLES["imaged"]}, seed=1)
    swapped = answer({"swapped": user("b.png", "a.png", text="?")})
    for number, evaluation in enumerate((other, swapped)):
        assert record_calibration(source, calibration, tmp_path / str(number), evaluation, rows=8, threads=1).is_dir()


def test_answers_of_another_model_are_refused(
    make_checkpoint: Callable[..., Path], calibration: Path, tmp_path: Path
) -> None:
    other = fetch_checkpoint(tmp_path / "checkpoint", make_checkpoint(text=TEXT, vision=VISION, seed=1))
    with pytest.raises(ManifestError, match="has answers of another model"):
        record_calibration(other, calibration, tmp_path / "activations", rows=8, threads=1)


def test_a_layer_without_rows_is_named(source: Path, answer: Callable[..., Path], tmp_path: Path) -> None:
    """A set without images has no rows for the vision tower."""
    folder = record_calibration(source, answer({"text": EXAMPLES["text"]}), tmp_path / "activations", rows=8, threads=1)
    activations = Activations(folder)
    assert "lm_head" in activations.modules
    assert f"{BLOCK}.attn.qkv" not in activations.modules
    for read in (activations.rows, activations.second_moment):
        with pytest.raises(QuantizationError, match=rf"no activations of {BLOCK}\.attn\.qkv"):
            read(f"{BLOCK}.attn.qkv")


READ = """
import hashlib, sys
from pathlib import Path
from hf2mnn.quant.layer_inputs import Activations
activations = Activations(Path(sys.argv[1]))
for name in activations.modules:
    rows, moment = activations.rows(name), activations.second_moment(name)
    assert rows.dtype == moment.dtype == "float32"
    print(name, rows.shape, moment.shape, hashlib.sha256(moment.tobytes()).hexdigest())
assert "torch" not in sys.modules
"""


def run_reader(folder: Path, threads: int) -> str:
    env = {**os.environ, **{f"{name}_NUM_THREADS": str(threads) for name in ("OPENBLAS", "OMP", "MKL")}}
    done = subprocess.run([sys.executable, "-c", READ, folder], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_rows_are_read_without_torch(whole: Path) -> None:
    assert len(run_reader(whole, 1).splitlines()) == len(Activations(whole).modules)


def write_rows(folder: Path, rows: np.ndarray) -> Activations:
    folder.mkdir()
    stored = {"layer": rows.astype(ml_dtypes.bfloat16)}
    save_file(stored, folder / ACTIVATIONS, metadata={"readers": json.dumps({"layer": "layer"})})
    return Activations(folder)


@pytest.fixture(scope="module")
def wild() -> np.ndarray:
    """Rows with columns of very different scale, a heavy tail, and one zero column."""
    rng = np.random.default_rng(5)
    rows = rng.standard_t(2, (3000, 300)) * np.exp(rng.uniform(-12, 12, 300))
    rows[:, 17] = 0
    return rows


def test_second_moment_is_the_mean_of_outer_products(wild: np.ndarray, tmp_path: Path) -> None:
    activations = write_rows(tmp_path / "activations", wild)
    rows = activations.rows("layer").astype(np.float64)
    np.testing.assert_array_equal(rows, wild.astype(ml_dtypes.bfloat16).astype(np.float64))
    expected, moment = rows.T @ rows / len(rows), activations.second_moment("layer")
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert (np.abs(moment - expected) <= 1e-6 * scale).all()
    np.testing.assert_array_equal(moment, moment.T)
    assert not moment[17].any()


def test_second_moment_does_not_depend_on_threads(wild: np.ndarray, tmp_path: Path) -> None:
    """A plain float32 matrix product does."""
    write_rows(tmp_path / "activations", wild)
    assert run_reader(tmp_path / "activations", 1) == run_reader(tmp_path / "activations", 2)
