"""LoRA adapters merged into checkpoints: compared with PEFT's own model, and errors for unsupported ones."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from hf2mnn.checkpoint.adapter import CONFIG, WEIGHTS, Adapter
from hf2mnn.checkpoint.architecture import load_config
from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.files import sha256
from hf2mnn.core.manifest import Manifest
from hf2mnn.onnx.session import OnnxModel
from hf2mnn.reference.model import load_model
from hf2mnn.stages.export import run as export_onnx
from hf2mnn.stages.fetch import run as fetch_checkpoint
from prequantized_layers import write_prequantized

DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EVERYWHERE = r".*(_proj|qkv|attn\.proj|fc1|fc2|mlp\.0|mlp\.2)"
"""Every linear layer but lm_head."""


@dataclass(frozen=True)
class Kind:
    """Settings of an adapter for PEFT, and whether the base model's lm_head is tied."""

    settings: dict[str, Any]
    tied: bool = False


KINDS = {
    "decoder": Kind({"target_modules": DECODER, "lora_alpha": 5}, tied=True),
    "every linear layer": Kind(
        {"target_modules": EVERYWHERE, "r": 6, "use_rslora": True, "init_lora_weights": "gaussian"}
    ),
    "patterns": Kind(
        {
            "target_modules": DECODER,
            "rank_pattern": {"q_proj": 3, r"layers\.1\.self_attn.*": 7},
            "alpha_pattern": {"down_proj": 1, r"model.*\.0\.mlp\.up_proj": 40},
        }
    ),
    "saved modules": Kind({"target_modules": ["qkv", "v_proj"], "modules_to_save": ["lm_head", "merger"]}),
    "DoRA": Kind({"target_modules": EVERYWHERE, "use_dora": True}),
    "biases": Kind({"target_modules": ["q_proj"], "bias": "all"}),
    "biases of its layers": Kind({"target_modules": ["q_proj", "qkv"], "bias": "lora_only"}),
    "embedding and lm_head": Kind({"target_modules": ["embed_tokens", "lm_head", "o_proj"]}),
    "embedding of a tied model": Kind({"target_modules": ["embed_tokens"]}, tied=True),
    "lm_head of a tied model": Kind({"target_modules": ["lm_head"], "use_dora": True}, tied=True),
    "saved lm_head of a tied model": Kind({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, tied=True),
    "both ends tied": Kind(
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, tied=True
    ),
}


def train(base: Path, settings: dict[str, Any], folder: Path) -> PeftModel:
    """Return PEFT's float32 model of the base with a random adapter, and save the adapter to `folder`."""
    model = load_model(Checkpoint(base))
    model.config._name_or_path = str(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(**{"r": 4, **settings}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    std = 0.2 if "lora_embedding" in name or "lora_A" in name or "lora_B" in name else 0.1
                    parameter.add_(torch.randn_like(parameter) * std)
        model.save_pretrained(folder)
    return model.eval()


def inputs(config: PreTrainedConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a prompt with an image: ids [1, tokens], pixels, grid_thw [1, 3]."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 500, (1, 20), generator=generator)
    ids[0, 3], ids[0, 4:10], ids[0, 10] = (
        config.vision_start_token_id,
        config.image_token_id,
        config.vision_end_token_id,
    )
    return ids, torch.randn(24, 1176, generator=generator), torch.tensor([[1, 4, 6]])


def compute_logits(model: torch.nn.Module) -> torch.Tensor:
    """Return logits, float32 [tokens, vocabulary]."""
    ids, pixels, grid = inputs(model.config)
    with torch.no_grad():
        return model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            pixel_values=pixels,
            image_grid_thw=grid,
        ).logits[0]


@pytest.fixture(scope="module")
def plain(bases: dict[bool, Path]) -> dict[bool, torch.Tensor]:
    """Logits of the base models."""
    return {tied: compute_logits(load_model(Checkpoint(base))) for tied, base in bases.items()}


def merged(base: Path, adapter: Path, destination: Path) -> Path:
    return fetch_checkpoint(destination, base, adapter=adapter)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_equals_peft(
    kind: str, bases: dict[bool, Path], plain: dict[bool, torch.Tensor], tmp_path: Path
) -> None:
    adapter = KINDS[kind]
    expected = compute_logits(train(bases[adapter.tied], adapter.settings, tmp_path / "adapter"))
    assert (expected - plain[adapter.tied]).abs().max() > 0.5 * plain[adapter.tied].std()
    source = merged(bases[adapter.tied], tmp_path / "adapter", tmp_path / "checkpoint")
    Manifest.load(source).verify()
    logits = compute_logits(load_model(Checkpoint(source)))
    assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.fixture(scope="module")
def trained(bases: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """An adapter of all layers of the tied base, with lm_head, and the logits of PEFT's model."""
    folder = tmp_path_factory.mktemp("adapter")
    settings = {"target_modules": EVERYWHERE, "modules_to_save": ["lm_head"], "alpha_pattern": {"layers.1.*q_proj": 9}}
    return folder, compute_logits(train(bases[True], settings, folder))


@pytest.fixture
def adapter(trained: tuple[Path, torch.Tensor], tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(trained[0], tmp_path / "adapter"))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def configure(folder: Path, **settings: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_onnx_and_mapped_weights_equal_peft(
    trained: tuple[Path, torch.Tensor], bases: dict[bool, Path], tmp_path: Path
) -> None:
    """The merged files mix bfloat16 and float32."""
    adapter, expected = trained
    source = merged(bases[True], adapter, tmp_path / "checkpoint")
    assert {str(Checkpoint(source).stored(name).dtype) for name in (NORM, QUERY)} == {"bfloat16", "float32"}
    logits = compute_logits(load_model(Checkpoint(source), "mapped"))
    assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()
    onnx = export_onnx(source, tmp_path / "onnx")
    runtime, (ids, pixels, grid) = OnnxModel(onnx, threads=1), inputs(load_config(Checkpoint(source)))
    logits = runtime.prefill(runtime.new_cache(), ids[0].numpy(), [(pixels.numpy(), grid[0].numpy())], all_logits=True)
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4, rtol=0)
    assert Manifest.load(onnx).provenance["adapter"] == Manifest.load(source).provenance["adapter"]


def test_manifest_records_adapter_and_base(
    trained: tuple[Path, torch.Tensor], bases: dict[bool, Path], tmp_path: Path
) -> None:
    adapter, base = trained[0], bases[True]
    manifest = Manifest.load(merged(base, adapter, tmp_path / "checkpoint"))
    files = {name: entry["sha256"] for name, entry in manifest.provenance["adapter"]["files"].items()}
    assert files == {name: sha256(adapter / name) for name in (CONFIG, WEIGHTS)} == manifest.inputs
    assert manifest.provenance["adapter"]["base_model"] == str(base)
    files = {name: entry["sha256"] for name, entry in manifest.provenance["merged"]["files"].items()}
    assert files == {name: sha256(base / name) for name in ("config.json", "model.safetensors")}
    assert manifest.paths == {"path": str(base), "adapter": str(adapter)}


def older(name: str) -> str:
    """Return the name of a tensor before transformers 4.52."""
    return name.replace("model.model.language_model.", "model.model.").replace("model.model.visual.", "model.visual.")


def test_names_of_older_transformers(adapter: Path, bases: dict[bool, Path], tmp_path: Path) -> None:
    new = merged(bases[True], adapter, tmp_path / "new")
    edit(adapter, lambda tensors: [tensors.update({older(name): tensors.pop(name)}) for name in list(tensors)])
    assert "base_model.model.visual.blocks.0.attn.qkv.lora_A.weight" in load_file(adapter / WEIGHTS)
    old = merged(bases[True], adapter, tmp_path / "old")
    assert sha256(old / "model.safetensors") == sha256(new / "model.safetensors")


def test_unchanged_shards_stay_links(small: Path, tmp_path: Path) -> None:
    """In a changed shard, all other tensors keep their bytes."""
    train(small, {"target_modules": r".*visual.*qkv"}, tmp_path / "adapter")
    source = merged(small, tmp_path / "adapter", tmp_path / "checkpoint")
    shards = {path.name: path.is_symlink() for path in sorted(source.glob("*.safetensors"))}
    assert sorted(shards.values()) == [False, True]
    (name,) = (name for name, linked in shards.items() if not linked)
    before, after = load_file(small / name), load_file(source / name)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"visual.blocks.0.attn.qkv.weight"}
    assert {after[name].dtype for name in before.keys() - changed} == {torch.bfloat16}


def test_untied_lm_head_of_shards_is_stored(small: Path, tmp_path: Path) -> None:
    """An index does not name it, but transformers loads all tensors of the files that it names."""
    train(small, {"target_modules": ["lm_head"]}, tmp_path / "adapter")
    source = merged(small, tmp_path / "adapter", tmp_path / "checkpoint")
    assert not Checkpoint(source).tied


# Errors --------------------------------------------------------------------------------------------------------------

QUERY, NORM = "model.language_model.layers.0.self_attn.q_proj.weight", "model.language_model.norm.weight"
KEY = f"base_model.model.{QUERY.removesuffix('.weight')}"


def merge_error(base: Path, adapter: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        Adapter(adapter).changes(Checkpoint(base))
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"peft_type": "IA3"}, "has peft_type 'IA3'"),
        ({"peft_type": None}, "has peft_type None"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "has layer_replication"),
        ({"lora_bias": True}, "has lora_bias"),
        ({"fan_in_fan_out": True}, "has fan_in_fan_out"),
        ({"trainable_token_indices": [1]}, "has trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "has alora_invocation_tokens"),
        ({"use_better_lora": True}, "has use_better_lora"),
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights 'pissa_niter_4', which changes the base model"),
        ({"init_lora_weights": ["x"]}, "has init_lora_weights ['x'], which changes the base model"),
        ({"r": 0}, "invalid r: 0"),
        ({"r": True}, "invalid r: True"),
        ({"r": 5}, "its settings give the rank 5"),
        ({"lora_alpha": "8"}, "invalid lora_alpha: '8'"),
        ({"lora_alpha": None}, "invalid lora_alpha: None"),
        ({"lora_alpha": 10**400}, "invalid lora_alpha: 1000"),
        ({"rank_pattern": {"q_proj": 4.0}}, "invalid rank_pattern"),
        ({"rank_pattern": {"q_proj": 3}}, "its settings give the rank 3"),
        ({"alpha_pattern": {"(": 3}}, "cannot be matched"),
        ({"alpha_pattern": {"(([a-z_.0-9]+)*)*X": 3}}, "cannot be matched"),
        ({"alpha_pattern": {"q_proj": 3, "self_attn.*": 4}}, "several values in alpha_pattern"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"use_rslora": 1}, "invalid use_rslora: 1"),
        ({"bias": "some"}, "invalid bias: 'some'"),
        ({"modules_to_save": ["lm_head", "score"]}, "names 'score' in modules_to_save"),
        ({"modules_to_save": "lm_head"}, "invalid modules_to_save"),
        ({"base_model_name_or_path": 3}, "invalid base_model_name_or_path: 3"),
    ],
)
def test_unsupported_setting_is_named(
    settings: dict[str, Any], part: str, adapter: Path, bases: dict[bool, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf2mnn.checkpoint.adapter.PATTERN_SECONDS", 0.2)
    configure(adapter, **settings)
    assert part in merge_error(bases[True], adapter)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda tensors: tensors.clear(), "holds no tensors"),
        (lambda tensors: tensors.pop(f"{KEY}.lora_B.weight"), "instead of lora_A.weight, lora_B.weight"),
        (lambda tensors: tensors.update({f"{KEY}.lora_B.bias": torch.ones(128)}), "has no parameter for"),
        (
            lambda tensors: tensors.update({"q.lora_A.weight": torch.ones(4, 128)}),
            "names of PEFT begin with base_model.model.",
        ),
        (lambda tensors: tensors.update({f"{KEY}.lora_A.weight": torch.ones(4, 64)}), "of shape [4, 64]"),
        (lambda tensors: tensors.update({f"{KEY}.lora_B.weight": torch.ones(128)}), "of shape [128]"),
        (lambda tensors: tensors.update({f"{KEY}.lora_A.weight": torch.tensor(1.0)}), "of shape []"),
        (
            lambda tensors: tensors.update({f"{KEY}.lora_A.weight": torch.ones(4, 128).double()}),
            "with the unsupported dtype F64",
        ),
        (lambda tensors: tensors.update({f"{KEY}.weight": torch.ones(128, 128)}), "PEFT would not load it"),
        (
            lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(700, 128)}),
            "of shape [700, 128]",
        ),
        (lambda tensors: tensors.update({older(f"{KEY}.lora_A.weight"): torch.ones(4, 128)}), "for the same weight"),
        (
            lambda tensors: tensors.update(
                {
                    "base_model.model.model.visual.patch_embed.proj.lora_A.weight": torch.ones(4, 3, 2, 14, 14),
                    "base_model.model.model.visual.patch_embed.proj.lora_B.weight": torch.ones(96, 4, 1, 1, 1),
                }
            ),
            "a Conv3d",
        ),
    ],
)
def test_unsupported_tensor_is_named(
    change: Callable[[dict[str, torch.Tensor]], object], part: str, adapter: Path, bases: dict[bool, Path]
) -> None:
    edit(adapter, change)
    assert part in merge_error(bases[True], adapter)


def test_adapter_of_another_model_is_refused(trained: tuple[Path, torch.Tensor], small: Path) -> None:
    assert "has no parameter for" in merge_error(small, trained[0])


def test_merge_to_nan_leaves_no_output(adapter: Path, bases: dict[bool, Path], tmp_path: Path) -> None:
    edit(adapter, lambda tensors: tensors[f"{KEY}.lora_B.weight"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight has NaN or infinite values after the merge"):
        merged(bases[True], adapter, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_pickled_adapter_is_refused(adapter: Path, bases: dict[bool, Path]) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    assert "only adapter_model.bin; pickled weights can run code" in merge_error(bases[True], adapter)
    (adapter / "adapter_model.bin").unlink()
    assert "give the folder of an adapter that PEFT has saved" in merge_error(bases[True], adapter)


def test_links_and_pointers_are_refused(adapter: Path, bases: dict[bool, Path], tmp_path: Path) -> None:
    secret = (adapter / WEIGHTS).rename(tmp_path / "secret")
    (adapter / WEIGHTS).symlink_to(secret)
    assert "is a link to" in merge_error(bases[True], adapter)
    (adapter / WEIGHTS).unlink()
    (adapter / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in merge_error(bases[True], adapter)


def test_adapter_for_a_prequantized_checkpoint_is_refused(
    trained: tuple[Path, torch.Tensor], bases: dict[bool, Path], tmp_path: Path
) -> None:
    write_prequantized(bases[True], tmp_path / "prequantized", kind="gptq", bits=4, group=64, symmetric=True)
    assert "is prequantized (gptq)" in merge_error(tmp_path / "prequantized", trained[0])


def test_adapter_in_place_of_a_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds an adapter, not a model"):
        fetch_checkpoint(tmp_path / "checkpoint", adapter)
