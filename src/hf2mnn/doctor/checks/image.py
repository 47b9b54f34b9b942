"""What happens to an image before the vision tower sees it: the bundle's settings against the checkpoint's, or against
what hf2mnn has noted of it in the bundle.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hf2mnn.checkpoint.facts import model_facts
from hf2mnn.doctor.checks.config import place
from hf2mnn.doctor.finding import Finding, Severity
from hf2mnn.doctor.patient import Bundle
from hf2mnn.evaluation.causes import differing
from hf2mnn.families import family_named
from hf2mnn.families.vision import BUILT_IN

ENGINE = {
    "image_mean": [122.7709383, 116.7460125, 104.09373615],
    "image_norm": [0.01459843, 0.01500777, 0.01422007],
    "vision_start": 151857,
    "vision_end": 151858,
    "image_pad": 151859,
}
"""What the engine takes where a key is left out (`omni.hpp` of MNN 3.6.1)."""
NORMALIZATION, IDS = ("image_mean", "image_norm"), ("image_pad", "vision_start", "vision_end")
NOTED = ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels", "image_mean", "image_std")
"""Of the "hf2mnn" key, by which `hf2mnn ask` and the evaluation resize an image."""
SMALL, LARGE = 14, 16
"""Sides of the engine's patches; the larger for a tower that asks for `idx_tensor` (`Omni::qwen2VisionProcess`)."""


def _wrong(bundle: Bundle, keys: tuple[str, ...]) -> list[tuple[str, Any, Any]]:
    """(key, value, right value) of llm_config.json's keys that the checkpoint would have otherwise."""
    if not bundle.facts or bundle.model.get("is_visual") is not True:
        return []
    right = family_named(bundle.facts["model_type"], bundle.folder).engine_config(bundle.facts)
    return differing(ENGINE | bundle.model, {key: right[key] for key in keys if key in right})


def _said(bundle: Bundle, key: str, value: Any, wanted: Any) -> str:
    default = "" if key in bundle.model else " (the engine's default)"
    return f"{key} is {value}{default}, the checkpoint's is {wanted}"


def image_normalization(bundle: Bundle) -> Iterator[Finding]:
    for key, value, wanted in _wrong(bundle, NORMALIZATION):
        meaning = "mean x 255" if key == "image_mean" else "1 / (standard deviation x 255)"
        yield Finding(
            "image_normalization",
            Severity.ERROR,
            place(bundle, key),
            f"images are normalized by another {key} than the checkpoint's ({meaning})",
            _said(bundle, key, value, wanted),
            "the model sees colours and contrasts that it was not trained on: worse answers about every image",
            f"write the checkpoint's value into {bundle.file('llm_config').name}",
        )


def vision_ids(bundle: Bundle) -> Iterator[Finding]:
    for key, value, wanted in _wrong(bundle, IDS):
        yield Finding(
            "vision_ids",
            Severity.ERROR,
            place(bundle, key),
            f"the engine marks an image by another token than the model was trained with ({key})",
            _said(bundle, key, value, wanted),
            "the model does not find the image, or takes it for text",
            f"write the checkpoint's id into {bundle.file('llm_config').name}",
        )


def image_sizes(bundle: Bundle) -> Iterator[Finding]:
    own = bundle.model.get("hf2mnn")
    if bundle.checkpoint and isinstance(own, dict):
        right = model_facts(bundle.checkpoint)
        for key, value, wanted in differing(own, {key: right[key] for key in NOTED if key in right}):
            yield Finding(
                "image_sizes",
                Severity.ERROR,
                f"{bundle.file('llm_config').name}: hf2mnn.{key}",
                f"images are resized or cut by another {key} than the checkpoint's",
                f"{key} is {value}, the checkpoint's is {wanted}",
                "images reach the model at another size than it was trained for: worse answers",
                "convert the checkpoint again",
            )
    yield from _tower_sizes(bundle)


def _tower_sizes(bundle: Bundle) -> Iterator[Finding]:
    """Against what the engine has built in: none of it can be set."""
    if "vision" not in bundle.models:
        return
    inputs = {op["name"]: op["main"].get("dims") or [0] for op in bundle.models["vision"].graph.of_type("Input")}
    side = LARGE if "idx_tensor" in inputs else SMALL
    fed, reads = 3 * BUILT_IN["temporal_patch_size"] * side**2, inputs.get("patches", [0])[-1]
    if reads > 0 and reads != fed:
        yield Finding(
            "image_sizes",
            Severity.ERROR,
            f"{bundle.models['vision'].path.name}: patches",
            "the vision tower reads patches of another size than the engine cuts",
            f"it reads {reads} values a patch, the engine gives {fed} (patches of {side} x {side}, two frames)",
            "the engine crashes at the first image, or answers nonsense about it",
            "this engine cannot run this vision tower; see whether a later MNN does",
        )
    facts = bundle.facts or {}
    for key, built_in in {**BUILT_IN, "patch_size": side}.items():
        if facts.get(key, built_in) != built_in:
            yield Finding(
                "image_sizes",
                Severity.ERROR,
                bundle.file("llm_config").name,
                f"the checkpoint's {key} is another than the engine has built in",
                f"{key} is {facts[key]}, the engine's is {built_in}",
                "images are cut into other patches, or patches are merged otherwise: nonsense about every image",
                "this engine cannot run this vision tower; see whether a later MNN does",
            )


CHECKS = (image_normalization, vision_ids, image_sizes)
