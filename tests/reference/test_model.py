"""Loading of checkpoints: problems that transformers only warns of are errors; mapped weights give the same bits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import CheckpointError
from hf2mnn.reference import model as reference_model
from hf2mnn.reference.model import MappedEmbedding, MappedLinear, choose_weight_storage, load_model, override_weight
from hf2mnn.reference.pytorch import ReferenceModel
from support import SHAPES_VL, TEXT, VISION

MLP = "model.language_model.layers.1.mlp.up_proj"
EMBEDDING = "model.language_model.embed_tokens"
WEIGHT = "model.layers.2.mlp.up_proj.weight"
Pair = tuple[ReferenceModel, ReferenceModel]


def stored_as(folder: Path, dtype: torch.dtype) -> Path:
    """Cast every second tensor of a checkpoint to another dtype."""
    tensors = load_file(folder / "model.safetensors")
    changed = {name: value.to(dtype) if index % 2 else value for index, (name, value) in enumerate(tensors.items())}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=["shapes-vl", "untied", "float16", "float32"])
def pair(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path]) -> Pair:
    """Reference models of one checkpoint with resident and with mapped weights."""
    folder = SHAPES_VL
    if request.param != "shapes-vl":
        folder = make_checkpoint(text=TEXT, vision=VISION, tied=False)
    if request.param.startswith("float"):
        stored_as(folder, getattr(torch, request.param))
    resident, mapped = (ReferenceModel(Checkpoint(folder), 8, weights) for weights in ("resident", "mapped"))
    return resident, mapped


@pytest.fixture(scope="module")
def tied() -> torch.nn.Module:
    return load_model(Checkpoint(SHAPES_VL), "mapped")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_answers_logits_images_and_tap_points_are_bit_identical(pair: Pair) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (84, 112, 3), dtype=np.uint8)
    outputs = []
    for reference in pair:
        image = reference.preprocessor.process_image(Image.fromarray(noise))
        parts = [{"type": "image", "image": "x"}, {"type": "text", "text": "How many are there?"}]
        ids = reference.preprocessor.input_ids([{"role": "user", "content": parts}], [image])
        answer = reference.generate(ids, [image])
        tensors = reference.forward_with_taps(answer["input_ids"], [image])
        outputs.append(answer | {"embeds": reference.embed_image(image)} | tensors)
    same(*outputs)
    assert {MLP, "lm_head", "model.visual.blocks.0.attn.qkv", "model.visual.patch_embed.proj"} <= set(outputs[0])


def test_every_matrix_is_mapped_and_dtypes_are_unchanged(pair: Pair) -> None:
    """Transformers casts an image to the dtype of the vision tower's first parameter."""
    resident, mapped = (reference.model for reference in pair)
    for (name, one), (_, other) in zip(resident.named_modules(), mapped.named_modules(), strict=True):
        if isinstance(one, torch.nn.Linear | torch.nn.Embedding):
            assert isinstance(other, MappedLinear | MappedEmbedding), name
            assert torch.equal(other.weight, one.weight)
        assert getattr(one, "dtype", None) == getattr(other, "dtype", None)
    assert {value.dtype for value in mapped.state_dict().values()} == {torch.float32}
    assert not any(value.is_meta for value in mapped.state_dict().values())
    same(dict(resident.named_buffers()), dict(mapped.named_buffers()))


def test_a_mapped_weight_is_the_memory_of_its_file(tied: torch.nn.Module) -> None:
    stored = tied.get_submodule(MLP).stored
    assert stored.dtype == torch.bfloat16
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "model.safetensors" in line]
    ranges = [[int(side, 16) for side in line[0].split("-")] for line in maps]
    assert any(begin <= stored.data_ptr() < end for begin, end in ranges)


def test_tied_weights_are_one_mapping(tied: torch.nn.Module) -> None:
    assert tied.lm_head.stored.data_ptr() == tied.get_submodule(EMBEDDING).stored.data_ptr()


def test_an_embedding_casts_only_its_rows(tied: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    cast, shapes = torch.Tensor.float, []
    monkeypatch.setattr(torch.Tensor, "float", lambda value: shapes.append(value.shape) or cast(value))
    tied.get_submodule(EMBEDDING)(torch.tensor([[3, 4]]))
    assert [shape[:2] for shape in shapes] == [(1, 2)]


@pytest.mark.parametrize("weights", ["resident", "mapped"])
def test_an_overridden_weight_is_of_one_module_and_is_restored(weights: str) -> None:
    """Also for lm_head, which shares its weight with the embedding."""
    model = load_model(Checkpoint(SHAPES_VL), weights)
    embedding, ids = model.get_submodule(EMBEDDING), torch.tensor([[3, 4]])
    hidden = torch.randn(1, embedding.embedding_dim)
    with torch.inference_mode():
        before = model.lm_head(hidden), embedding(ids)
        with override_weight(model.lm_head, torch.zeros(model.lm_head.weight.numel())):
            assert not model.lm_head(hidden).any()
            assert torch.equal(embedding(ids), before[1])
        with pytest.raises(RuntimeError, match="inside"), override_weight(embedding, torch.ones_like(embedding.weight)):
            assert (embedding(ids) == 1).all()
            raise RuntimeError("inside")
        assert torch.equal(model.lm_head(hidden), before[0])
        assert torch.equal(embedding(ids), before[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(name), "has no weight for"),
        (lambda tensors, name: tensors.update({name: tensors[name][:100].clone()}), "are not of the same model"),
    ],
    ids=["missing", "shape"],
)
@pytest.mark.parametrize("name", [f"{MLP}.weight", "model.language_model.norm.weight"])
def test_weights_that_do_not_fit_the_config_are_refused(
    make_checkpoint: Callable[..., Path], name: str, change: Callable[[dict, str], object], message: str
) -> None:
    folder = make_checkpoint(text=TEXT, vision=VISION)
    tensors = load_file(folder / "model.safetensors")
    change(tensors, next(stored for stored in tensors if stored.endswith(name.removeprefix("model.language_model."))))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load_model(Checkpoint(folder), "mapped")


def test_loading_restores_torch(tied: torch.nn.Module) -> None:
    assert not torch.nn.Linear(2, 2).weight.is_meta
    assert type(torch.nn.Linear(2, 2)) is torch.nn.Linear


@pytest.mark.parametrize(("spare", "chosen"), [(1, "resident"), (-1, "mapped")])
def test_weights_are_mapped_if_float32_would_not_fit(monkeypatch: pytest.MonkeyPatch, spare: int, chosen: str) -> None:
    checkpoint = Checkpoint(SHAPES_VL)
    numbers = sum(value.numel() for value in load_file(SHAPES_VL / "model.safetensors").values())
    reserved = 2_000_000_000
    free = 4 * numbers + reference_model.OVERHEAD + reserved + spare
    monkeypatch.setattr(reference_model, "available_memory", lambda: free)
    reason = "float32 weights need 3.5 GB, 3.5 GB are free"
    assert choose_weight_storage(checkpoint, "auto", reserved) == (chosen, reason)
    assert choose_weight_storage(checkpoint, "auto")[0] == "resident"
    assert choose_weight_storage(checkpoint, "resident")[0] == "resident"
    assert choose_weight_storage(checkpoint, "mapped")[0] == "mapped"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHAPES_VL, tmp_path / "checkpoint"))


def edit_weights(folder: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_complete_checkpoint_loads(folder: Path) -> None:
    assert not load_model(Checkpoint(folder)).training


def test_a_missing_weight_is_named(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop(WEIGHT))
    with pytest.raises(CheckpointError, match=r"has no weight for model\.language_model\.layers\.2\.mlp\."):
        load_model(Checkpoint(folder))


def test_a_weight_of_another_shape_is_refused(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT][:100].clone()}))
    with pytest.raises(CheckpointError, match=r"of shape \[100, 256\], but its config\.json requires \[768, 256\]"):
        load_model(Checkpoint(folder))
