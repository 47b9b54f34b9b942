"""Checks of config.json and llm_config.json, as `llmconfig.hpp`, `llm.cpp` and `omni.cpp` of MNN 3.6.1 read them.

Settings of image processing are compared with the checkpoint, or with the bundle's own model.json.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from hf2mnn.checkpoint.model_info import model_info
from hf2mnn.core.errors import BundleError
from hf2mnn.doctor.artifacts import Bundle
from hf2mnn.doctor.findings import Finding, Findings, Severity
from hf2mnn.evaluation.causes import differing
from hf2mnn.families import get_family
from hf2mnn.mnn import engine_facts as facts
from hf2mnn.mnn.bundle import CONFIG, TOKENIZER
from hf2mnn.mnn.bundle_config import Settings, outside_paths, run_time_settings
from hf2mnn.quant.embedding import embedding_in_weights

FALLBACKS = {
    "backend_type": "the engine uses any backend that it has",
    **dict.fromkeys(("precision", "memory", "power"), "the engine uses 'normal'"),
}
SIZE_KEYS = {
    "hidden_size": (
        Severity.ERROR,
        "the engine reads embeddings of the wrong length: it crashes or its output is wrong",
    ),
    "layer_nums": (Severity.WARNING, "correct output; a prefix cache in files is read into other layers"),
    "key_value_shape": (Severity.ADVICE, "none with MNN 3.6, which does not read it; others allocate a wrong cache"),
}
"""Severity and effect of sizes that differ from the graph."""
NORMALIZATION, IDS = ("image_mean", "image_norm"), ("image_pad", "vision_start", "vision_end")
SIZES = ["patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels", "image_mean", "image_std"]
"""Keys of model.json by which `hf2mnn ask` and the evaluation resize an image."""
UNSUPPORTED = "use another MNN release: this engine cannot run this vision tower"


def config_unreadable(bundle: Bundle) -> Findings:
    """Report a configuration file that is missing or not a JSON object."""
    for path, error in bundle.config_errors.items():
        message = f"{path.name} is missing or not a JSON object"
        model_defaults = "hidden size 4096, int masks, no vision; it crashes or its output is wrong"
        defaults = "tokenizer.txt, no vision, precision low" if path.name == CONFIG else model_defaults
        effect = f"the engine uses its defaults without an error: {defaults}"
        yield Finding(path.name, message, str(error), effect, "copy the file again, or convert the checkpoint again")


def path_outside(bundle: Bundle) -> Findings:
    """Report keys that name a file outside the bundle."""
    for key, value, reason in outside_paths(bundle.folder, bundle.model):
        message = f"{key} names a path outside the bundle"
        evidence = f"{str(value)[:200]!r}: {reason}"
        remove = ", or remove it" if key == facts.BASE_DIR else ""
        cure = f"copy the file into {bundle.folder} and set {key} to its bare name{remove}"
        yield Finding(bundle.locate(key), message, evidence, "the engine opens a file of another model, or none", cure)


def file_missing(bundle: Bundle) -> Findings:
    """Report a missing file that config.json names, or that the engine opens by default.

    Weight files and vision towers have their own checks.
    """
    required = {
        "llm_model": "the engine does not load the bundle",
        "tokenizer_file": "the engine does not load the bundle: it prints 'tokenizer file not found'",
    }
    with suppress(BundleError):  # reported by tied_embedding
        if not embedding_in_weights(bundle.model):
            effect = "the engine loads the bundle, and all tokens have the same embedding: wrong output"
            required["embedding_file"] = effect
    outside = {key for key, *_ in outside_paths(bundle.folder, bundle.model)}
    for key, effect in required.items():
        path = bundle.file(key)
        if path.is_file() or bundle.config_errors or key in outside:
            continue
        cure = "copy it into the bundle, or convert the checkpoint again"
        if key == "tokenizer_file" and (bundle.folder / TOKENIZER).is_file():
            cure = f'set "tokenizer_file": "{TOKENIZER}" in {CONFIG}: that file exists'
        source = "names" if key in bundle.model else f"has no {key}, and the engine's default is"
        message = f"a required file is missing: {path.name}"
        yield Finding(bundle.locate(key), message, f"{CONFIG} {source} {path.name}", effect, cure)


def vision_missing(bundle: Bundle) -> Findings:
    """Report a configuration and a vision tower of which only one exists."""
    visual, path = bundle.model.get("is_visual") is True, bundle.file("visual_model")
    if bundle.config_errors:
        return
    if visual and not path.is_file():
        message = "the configuration declares a vision tower that is missing"
        effect = "the engine does not load the bundle, or crashes at the first image"
        cure = "convert the vision tower ('hf2mnn convert' does), or copy it with its weight file"
        yield Finding(bundle.locate("is_visual"), message, f"is_visual is true, {path.name} is missing", effect, cure)
    if not visual and path.is_file():
        message = "there is a vision tower, but the configuration does not declare it"
        evidence = f"{path.name} exists, is_visual is {json.dumps(bundle.model.get('is_visual'))}"
        cure = f'set "is_visual": true in {bundle.file("llm_config").name}, with image_mean, image_norm and the ids'
        yield Finding(bundle.locate("is_visual"), message, evidence, "the engine ignores images", cure)


def attention_mask(bundle: Bundle) -> Findings:
    """Compare the data type of the attention mask with the graph's input."""
    shape, given = bundle.decoder_shape, (facts.MODEL_DEFAULTS | bundle.model)["attention_mask"]
    if not bundle.config_errors and shape.mask and (given == "float") != (shape.mask == "DT_FLOAT"):
        expected = "float" if shape.mask == "DT_FLOAT" else "int"
        default = "" if "attention_mask" in bundle.model else " (the default)"
        message = f"the graph reads an attention mask of {expected}, and the engine feeds another type"
        evidence = f"attention_mask is {given!r}{default}, the graph's input is {shape.mask}"
        effect = "wrong logits without an error: tokens attend to later tokens, or not to earlier ones"
        cure = f'set "attention_mask": "{expected}" in {bundle.file("llm_config").name}'
        yield Finding(bundle.locate("attention_mask"), message, evidence, effect, cure)


def config_differs(bundle: Bundle) -> Findings:
    """Compare hidden_size, layer_nums and key_value_shape with the graph."""
    shape, model = bundle.decoder_shape, facts.MODEL_DEFAULTS | bundle.model
    if bundle.config_errors or "decoder" not in bundle.models:
        return
    cache = model.get("key_value_shape") or []
    keys = cache[-1] * cache[-2] if len(cache) >= 2 and all(isinstance(size, int) for size in cache) else shape.keys
    for key, given, expected in (
        ("hidden_size", model["hidden_size"], shape.hidden),
        ("layer_nums", model["layer_nums"], shape.layers),
        ("key_value_shape", keys, shape.keys),
    ):
        if expected and given != expected:
            severity, effect = SIZE_KEYS[key]
            message = f"{key} differs from the graph"
            evidence = f"the configuration has {json.dumps(model.get(key))}, the graph has {expected}"
            cure = f"set the graph's value in {bundle.file('llm_config').name}, unless it is another model's file"
            yield Finding(bundle.locate(key), message, evidence, effect, cure, severity=severity)


def mrope(bundle: Bundle) -> Findings:
    """Compare is_mrope with the rows of the graph's position ids."""
    shape, given = bundle.decoder_shape, (facts.MODEL_DEFAULTS | bundle.model)["is_mrope"]
    if not bundle.config_errors and shape.positions in (1, 3) and bool(given) != (shape.positions == 3):
        message = f"the graph reads {shape.positions} row(s) of position ids, the engine feeds {3 if given else 1}"
        evidence = f"is_mrope is {json.dumps(given)}, position_ids is [{shape.positions}, tokens]"
        effect = "the engine crashes or its output is wrong: it reads past the end of the positions, or one row only"
        cure = f'set "is_mrope": {json.dumps(shape.positions == 3)} in {bundle.file("llm_config").name}'
        yield Finding(bundle.locate("is_mrope"), message, evidence, effect, cure)


def setting_unknown(bundle: Bundle) -> Findings:
    """Report run-time settings, of the vision tower too ("mllm"), with a value that the engine does not know."""
    try:
        Settings.model_validate(run_time_settings(bundle.model))
    except ValidationError as errors:
        for error in errors.errors():
            if error["type"] == "extra_forbidden":  # the chat template of another exporter
                continue
            key, known = str(error["loc"][-1]), re.findall("'([^']*)'", error.get("ctx", {}).get("expected", ""))
            where = bundle.locate(str(error["loc"][0])).partition(":")[0]
            message = f"the engine does not know this value of {key}"
            evidence = f"{json.dumps(error['input'])}; it knows {', '.join(known) or error['msg'].partition(' be ')[2]}"
            effect = f"{FALLBACKS.get(key, 'the engine uses a default')} without an error"
            cure, path = f"set one of these values in {where}", ".".join(map(str, error["loc"]))
            yield Finding(f"{where}: {path}", message, evidence, effect, cure, severity=Severity.WARNING)


def _differences(bundle: Bundle, keys: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return (key, evidence) for keys of llm_config.json that differ from the checkpoint's values."""
    if not bundle.info or bundle.model.get("is_visual") is not True:
        return []
    expected = get_family(bundle.info["model_type"], bundle.folder).engine_config(bundle.info)
    wrong = differing(facts.IMAGE_DEFAULTS | bundle.model, {key: expected[key] for key in keys if key in expected})
    return [(key, _evidence(bundle.model, key, value, right)) for key, value, right in wrong]


def _evidence(config: dict[str, Any], key: str, value: Any, right: Any) -> str:
    return f"{key} is {value}{'' if key in config else ' (the engine default)'}, the checkpoint's is {right}"


def image_normalization(bundle: Bundle) -> Findings:
    """Compare image_mean and image_norm with the checkpoint."""
    for key, evidence in _differences(bundle, NORMALIZATION):
        meaning = "mean x 255" if key == "image_mean" else "1 / (standard deviation x 255)"
        effect = "worse answers about every image: its colours and contrasts are not those of the training"
        cure = f"set the checkpoint's value in {bundle.file('llm_config').name}"
        yield Finding(bundle.locate(key), f"{key} ({meaning}) differs from the checkpoint's", evidence, effect, cure)


def vision_ids(bundle: Bundle) -> Findings:
    """Compare the ids of the tokens that mark an image with the checkpoint."""
    for key, evidence in _differences(bundle, IDS):
        message = f"the engine marks images with another token than the checkpoint ({key})"
        effect = "the model does not find the image, or reads it as text"
        cure = f"set the checkpoint's id in {bundle.file('llm_config').name}"
        yield Finding(bundle.locate(key), message, evidence, effect, cure)


def image_sizes(bundle: Bundle) -> Findings:
    """Compare sizes in the bundle's model.json with the checkpoint, and those of the tower with the engine's."""
    own, file = bundle.model.get("hf2mnn"), bundle.file("llm_config").name
    if bundle.checkpoint and isinstance(own, dict):
        expected = model_info(bundle.checkpoint)
        for key, value, right in differing(own, {key: expected[key] for key in SIZES if key in expected}):
            message, evidence = f"{key} differs from the checkpoint's", _evidence(own, key, value, right)
            effect = "worse answers: images are resized or cut otherwise than in training"
            yield Finding(f"{file}: hf2mnn.{key}", message, evidence, effect, "convert the checkpoint again")
    if "vision" not in bundle.models:
        return
    tower, info = bundle.models["vision"], bundle.info or {}
    inputs = {op["name"]: op["main"].get("dims") or [0] for op in tower.graph.of_type("Input")}
    # The engine cuts larger patches for a tower with an input idx_tensor (`Omni::qwen2VisionProcess`).
    side = facts.QWEN3_VL_PATCH_SIZE if "idx_tensor" in inputs else facts.PATCH_SIZE
    fed, reads = 3 * facts.TEMPORAL_PATCH_SIZE * side**2, inputs.get("patches", [0])[-1]
    if reads > 0 and reads != fed:
        message = "the vision tower reads patches of another size than the engine feeds"
        evidence = f"it reads {reads} values per patch, the engine feeds {fed} ({side} x {side} pixels, 2 frames)"
        effect = "the engine crashes at the first image, or its output is wrong"
        yield Finding(f"{tower.path.name}: patches", message, evidence, effect, UNSUPPORTED)
    built_in = {"temporal_patch_size": facts.TEMPORAL_PATCH_SIZE, "merge_size": facts.MERGE_SIZE, "patch_size": side}
    for key, value in built_in.items():
        if info.get(key, value) != value:
            message = f"the checkpoint's {key} differs from the value built into the engine"
            effect = "wrong output about every image: it is cut into other patches, or patches are merged otherwise"
            yield Finding(file, message, f"{key} is {info[key]}, the engine's is {value}", effect, UNSUPPORTED)


FILE_CHECKS = (config_unreadable, path_outside, file_missing, vision_missing)
DECODER_CHECKS = (attention_mask, config_differs, mrope)
IMAGE_CHECKS = (image_normalization, vision_ids, image_sizes)
CHECKS = (*FILE_CHECKS, *DECODER_CHECKS, setting_unknown, *IMAGE_CHECKS)
