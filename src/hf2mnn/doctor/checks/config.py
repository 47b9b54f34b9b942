"""config.json and llm_config.json: what the engine reads of them (`llmconfig.hpp`, `llm.cpp` and `omni.cpp` of MNN
3.6.1), and whether it is so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from hf2mnn.core.errors import BundleError
from hf2mnn.core.untrusted import read_json
from hf2mnn.doctor.decoder import decoder_sizes
from hf2mnn.doctor.finding import Finding, Severity
from hf2mnn.doctor.patient import DEFAULTS, Bundle
from hf2mnn.mnn.bundle import CONFIG, TOKENIZER
from hf2mnn.mnn.paths import BASE, leading_out
from hf2mnn.quant.embedding import embedding_in_weights

BACKENDS = ("cpu", "metal", "cuda", "opencl", "opengl", "vulkan", "hexagon", "npu", "auto")
LEVELS = ("low", "normal", "high")
SAMPLERS = ("greedy", "temperature", "topK", "topP", "minP", "min_p", "tfs", "typical", "penalty", "mixed")
SETTINGS = {
    "backend_type": (BACKENDS, "it takes whichever backend it finds"),
    "precision": (LEVELS, "it takes it for 'normal'"),
    "memory": (LEVELS, "it takes it for 'normal'"),
    "power": (LEVELS, "it takes it for 'normal'"),
    "sampler_type": (SAMPLERS, "it samples by defaults of its own"),
}
"""Values that the engine knows, and what it does with any other, without a word."""
FOR_BOTH = ("backend_type", "precision", "memory", "power")
"""Settings that "mllm" has for the vision tower."""


def place(bundle: Bundle, key: str) -> str:
    """The file in which a key stands, or should, and the key."""
    own = key in bundle.runtime or key in DEFAULTS or key in SETTINGS
    return f"{CONFIG if own else bundle.file('llm_config').name}: {key}"


def _unreadable(path: Path) -> str | None:
    try:
        found = read_json(path)
    except FileNotFoundError:
        return "it is not there"
    except (OSError, ValueError) as error:
        return str(error)
    return None if isinstance(found, dict) else f"it holds no object but {type(found).__name__}"


def _whole(bundle: Bundle) -> bool:
    """Whether there are settings to be judged; without one of the files all are the engine's defaults."""
    return not any(map(_unreadable, (bundle.folder / CONFIG, bundle.file("llm_config"))))


def config_unreadable(bundle: Bundle) -> Iterator[Finding]:
    for path, effect in (
        (bundle.folder / CONFIG, "the engine goes by its defaults: another tokenizer file, no vision, precision low"),
        (
            bundle.file("llm_config"),
            "the engine says that it has loaded, with a hidden size of 4096, integer masks and no vision: it crashes or"
            " answers nonsense",
        ),
    ):
        if reason := _unreadable(path):
            yield Finding(
                "config_unreadable",
                Severity.ERROR,
                path.name,
                f"{path.name} cannot be read as a JSON object",
                reason,
                effect,
                "copy it from where the bundle comes from, or convert the checkpoint again",
            )


def path_outside(bundle: Bundle) -> Iterator[Finding]:
    for key, named, why in leading_out(bundle.folder, bundle.model):
        yield Finding(
            "path_outside",
            Severity.ERROR,
            place(bundle, key),
            f"{key} does not name a file in the bundle's own folder",
            f"{str(named)[:200]!r}: {why}",
            "the engine opens whatever lies there: another model's file, or none",
            f"put the file into {bundle.folder} and write its bare name" + (" (or leave base_dir out)" * (key == BASE)),
        )


def _asked_files(bundle: Bundle) -> dict[str, str]:
    """Keys of the files that the engine opens, and what happens without one; weight files, and vision, have checks of
    their own.
    """
    inside = True
    asked = {
        "llm_model": "the engine does not load the bundle",
        "tokenizer_file": "the engine does not load the bundle: it says 'tokenizer file not found'",
    }
    with suppress(BundleError):  # checks.embedding says that it does not say where the embedding is
        inside = embedding_in_weights(bundle.model)
    if not inside:
        asked["embedding_file"] = "the engine says that it has loaded, and every token has the same embedding: nonsense"
    return asked


def file_missing(bundle: Bundle) -> Iterator[Finding]:
    led_out = {key for key, *_ in leading_out(bundle.folder, bundle.model)}
    for key, effect in _asked_files(bundle).items():
        path = bundle.file(key)
        if path.is_file() or not _whole(bundle) or key in led_out:
            continue
        cure = "copy it into the bundle, or convert the checkpoint again"
        if key == "tokenizer_file" and (bundle.folder / TOKENIZER).is_file():
            cure = f'write "tokenizer_file": "{TOKENIZER}" into {CONFIG}: that file is there'
        how = "names" if key in bundle.model else "does not say where it is, and the engine's default is"
        yield Finding(
            "file_missing",
            Severity.ERROR,
            place(bundle, key),
            f"a file that the bundle needs is not there: {path.name}",
            f"{CONFIG} {how} {path.name}",
            effect,
            cure,
        )


def vision_missing(bundle: Bundle) -> Iterator[Finding]:
    visual, path = bundle.model.get("is_visual") is True, bundle.file("visual_model")
    if not _whole(bundle):
        return
    if visual and not path.is_file():
        yield Finding(
            "vision_missing",
            Severity.ERROR,
            place(bundle, "is_visual"),
            "the config says that the model sees, but there is no vision tower",
            f"is_visual is true, {path.name} is not there",
            "the engine does not load the bundle, or crashes at the first image",
            "convert the vision tower too ('hf2mnn mnn' does), or copy it with its weight file",
        )
    if not visual and path.is_file():
        yield Finding(
            "vision_missing",
            Severity.ERROR,
            place(bundle, "is_visual"),
            "there is a vision tower, but the config does not say that the model sees",
            f"{path.name} is there, is_visual is {json.dumps(bundle.model.get('is_visual'))}",
            "images are ignored: the model answers as if it had seen none",
            f'write "is_visual": true into {bundle.file("llm_config").name}, with image_mean, image_norm and the ids',
        )


def attention_mask(bundle: Bundle) -> Iterator[Finding]:
    sizes, given = decoder_sizes(bundle), bundle.model.get("attention_mask", "int")
    if _whole(bundle) and sizes and sizes.mask and (given == "float") != (sizes.mask == "DT_FLOAT"):
        wanted = "float" if sizes.mask == "DT_FLOAT" else "int"
        yield Finding(
            "attention_mask",
            Severity.ERROR,
            place(bundle, "attention_mask"),
            f"the engine makes an attention mask of {'floats' if given == 'float' else 'integers'}, the graph reads"
            f" {'floats' if wanted == 'float' else 'integers'}",
            f"attention_mask is {given!r}{'' if 'attention_mask' in bundle.model else ' (the default)'}, the graph's"
            f" input is {sizes.mask}",
            "it runs, and the logits are wrong: tokens see what comes after them, or not what came before",
            f'write "attention_mask": "{wanted}" into {bundle.file("llm_config").name}',
        )


def config_differs(bundle: Bundle) -> Iterator[Finding]:
    sizes, model = decoder_sizes(bundle), bundle.model
    if sizes is None or not _whole(bundle):
        return
    shape = model.get("key_value_shape") or []
    width = shape[-1] * shape[-2] if len(shape) >= 2 and all(isinstance(side, int) for side in shape) else sizes.keys
    for key, given, right, severity, effect in (
        (
            "hidden_size",
            model.get("hidden_size", 4096),
            sizes.hidden,
            Severity.ERROR,
            "the engine reads embeddings of the wrong length: it crashes, or every token is read as others",
        ),
        (
            "layer_nums",
            model.get("layer_nums", 32),
            sizes.layers,
            Severity.WARNING,
            "answers are right; a prefix cache that the engine keeps in files is read into other layers",
        ),
        (
            "key_value_shape",
            width,
            sizes.keys,
            Severity.ADVICE,
            "none with MNN 3.6, which does not read it; engines that do make a cache of the wrong size",
        ),
    ):
        if right and given != right:
            yield Finding(
                "config_differs",
                severity,
                place(bundle, key),
                f"{key} is not the graph's",
                f"the config says {json.dumps(model.get(key, given))}, the graph has {right}",
                effect,
                f"write what the graph has into {bundle.file('llm_config').name}; if other keys are wrong too, the file"
                " is another model's",
            )


def mrope(bundle: Bundle) -> Iterator[Finding]:
    sizes, given = decoder_sizes(bundle), bundle.model.get("is_mrope", False)
    if _whole(bundle) and sizes and sizes.positions in (1, 3) and bool(given) != (sizes.positions == 3):
        yield Finding(
            "mrope",
            Severity.ERROR,
            place(bundle, "is_mrope"),
            f"the graph reads {sizes.positions} row(s) of positions, the engine makes {3 if given else 1}",
            f"is_mrope is {json.dumps(given)}, position_ids is [{sizes.positions}, tokens]",
            "positions are read past their end, or only their first row: it crashes, or the answers are wrong",
            f'write "is_mrope": {json.dumps(sizes.positions == 3)} into {bundle.file("llm_config").name}',
        )


def _settings(bundle: Bundle) -> Iterator[tuple[str, str, Any]]:
    """Where a setting stands, its name and its value."""
    own = bundle.model.get("mllm")
    for key in SETTINGS:
        if key in bundle.model:
            yield place(bundle, key), key, bundle.model[key]
        if key in FOR_BOTH and isinstance(own, dict) and key in own:
            yield f"{CONFIG}: mllm.{key}", key, own[key]


def setting_unknown(bundle: Bundle) -> Iterator[Finding]:
    for where, key, value in _settings(bundle):
        known, instead = SETTINGS[key]
        if value not in known:
            yield Finding(
                "setting_unknown",
                Severity.WARNING,
                where,
                f"the engine knows no {key} of this value",
                f"{json.dumps(value)}; it knows {', '.join(known)}",
                f"{instead}, and says nothing",
                f"write one of them into {where.partition(':')[0]}",
            )


CHECKS = (
    config_unreadable,
    path_outside,
    file_missing,
    vision_missing,
    attention_mask,
    config_differs,
    mrope,
    setting_unknown,
)
