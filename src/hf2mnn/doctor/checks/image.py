"""Checks of image processing: the bundle's settings against the checkpoint, or against the bundle's own model.json."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hf2mnn.checkpoint.model_info import model_info
from hf2mnn.doctor.artifacts import Bundle
from hf2mnn.doctor.findings import Finding
from hf2mnn.evaluation.causes import differing
from hf2mnn.families import get_family
from hf2mnn.mnn.engine_facts import IMAGE_DEFAULTS, MERGE_SIZE, PATCH_SIZE, QWEN3_VL_PATCH_SIZE, TEMPORAL_PATCH_SIZE

NORMALIZATION, IDS = ("image_mean", "image_norm"), ("image_pad", "vision_start", "vision_end")
SIZES = ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels", "image_mean", "image_std")
"""Keys of model.json by which `hf2mnn ask` and the evaluation resize an image."""
BUILT_IN = {"temporal_patch_size": TEMPORAL_PATCH_SIZE, "merge_size": MERGE_SIZE}
UNSUPPORTED = "use another MNN release: this engine cannot run this vision tower"


def _differences(bundle: Bundle, keys: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return (key, evidence) for keys of llm_config.json that differ from the checkpoint's values."""
    if not bundle.info or bundle.model.get("is_visual") is not True:
        return []
    expected = get_family(bundle.info["model_type"], bundle.folder).engine_config(bundle.info)
    wrong = differing(IMAGE_DEFAULTS | bundle.model, {key: expected[key] for key in keys if key in expected})
    return [(key, _evidence(bundle.model, key, value, right)) for key, value, right in wrong]


def _evidence(config: dict[str, Any], key: str, value: Any, right: Any) -> str:
    return f"{key} is {value}{'' if key in config else ' (the engine default)'}, the checkpoint's is {right}"


def image_normalization(bundle: Bundle) -> Iterator[Finding]:
    """Compare image_mean and image_norm with the checkpoint."""
    for key, evidence in _differences(bundle, NORMALIZATION):
        meaning = "mean x 255" if key == "image_mean" else "1 / (standard deviation x 255)"
        message = f"{key} ({meaning}) differs from the checkpoint's"
        effect = "worse answers about every image: its colours and contrasts are not those of the training"
        cure = f"set the checkpoint's value in {bundle.file('llm_config').name}"
        yield Finding(where=bundle.locate(key), message=message, evidence=evidence, effect=effect, cure=cure)


def vision_ids(bundle: Bundle) -> Iterator[Finding]:
    """Compare the ids of the tokens that mark an image with the checkpoint."""
    for key, evidence in _differences(bundle, IDS):
        message = f"the engine marks images with another token than the checkpoint ({key})"
        effect = "the model does not find the image, or reads it as text"
        cure = f"set the checkpoint's id in {bundle.file('llm_config').name}"
        yield Finding(where=bundle.locate(key), message=message, evidence=evidence, effect=effect, cure=cure)


def image_sizes(bundle: Bundle) -> Iterator[Finding]:
    """Compare sizes in the bundle's model.json with the checkpoint, and those of the tower with the engine's."""
    own = bundle.model.get("hf2mnn")
    if bundle.checkpoint and isinstance(own, dict):
        expected = model_info(bundle.checkpoint)
        for key, value, right in differing(own, {key: expected[key] for key in SIZES if key in expected}):
            yield Finding(
                where=f"{bundle.file('llm_config').name}: hf2mnn.{key}",
                message=f"{key} differs from the checkpoint's",
                evidence=_evidence(own, key, value, right),
                effect="worse answers: images are resized or cut otherwise than in training",
                cure="convert the checkpoint again",
            )
    yield from _tower_sizes(bundle)


def _tower_sizes(bundle: Bundle) -> Iterator[Finding]:
    """Compare the vision tower with the sizes that are built into the engine."""
    if "vision" not in bundle.models:
        return
    inputs = {op["name"]: op["main"].get("dims") or [0] for op in bundle.models["vision"].graph.of_type("Input")}
    # The engine cuts larger patches for a tower with an input idx_tensor (`Omni::qwen2VisionProcess`).
    side = QWEN3_VL_PATCH_SIZE if "idx_tensor" in inputs else PATCH_SIZE
    fed, reads = 3 * TEMPORAL_PATCH_SIZE * side**2, inputs.get("patches", [0])[-1]
    if reads > 0 and reads != fed:
        yield Finding(
            where=f"{bundle.models['vision'].path.name}: patches",
            message="the vision tower reads patches of another size than the engine feeds",
            evidence=f"it reads {reads} values per patch, the engine feeds {fed} ({side} x {side} pixels, 2 frames)",
            effect="the engine crashes at the first image, or its output is wrong",
            cure=UNSUPPORTED,
        )
    info = bundle.info or {}
    for key, built_in in {**BUILT_IN, "patch_size": side}.items():
        if info.get(key, built_in) != built_in:
            yield Finding(
                where=bundle.file("llm_config").name,
                message=f"the checkpoint's {key} differs from the value built into the engine",
                evidence=f"{key} is {info[key]}, the engine's is {built_in}",
                effect="wrong output about every image: it is cut into other patches, or patches are merged otherwise",
                cure=UNSUPPORTED,
            )


CHECKS = (image_normalization, vision_ids, image_sizes)
