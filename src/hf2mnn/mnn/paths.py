"""Files that a bundle's configuration makes the engine read or write, which must be the bundle's own.

Keys are those that `llmconfig.hpp` of MNN 3.6.1 adds to the folder of config.json, or takes as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf2mnn.core.errors import BundleError
from hf2mnn.core.untrusted import inside, read_json

PATHS = (
    *("llm_config", "llm_model", "llm_weight", "block_model", "lm_model", "embedding_model", "embedding_file"),
    *("tokenizer_file", "visual_model", "npu_model_dir", "audio_model", "context_file", "talker_model"),
    *("talker_weight", "talker_embedding_file", "predit_model", "dit_model", "bigvgan_model", "spk_dict"),
    *("ple_embed_file", "lookup_file", "draft_model", "mtp_model", "eagle_model", "eagle_fc", "eagle_d2t"),
    *("dflash_model", "dflash_fc", "dflash_lmhead", "tmp_path", "prefix_cache_path"),
)
BASE = "base_dir"
"""What the engine takes for the bundle's folder, instead of where config.json is."""


def read_config(bundle: Path, name: str) -> dict[str, Any]:
    """config.json or llm_config.json of a bundle that anyone may have made.

    Raises:
        BundleError: it is missing, or no JSON object.
    """
    path = bundle / name
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise BundleError(f"{bundle} has no {name}: it is not a whole bundle") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read as JSON ({error}); make the bundle again") from None
    if not isinstance(content, dict):
        raise BundleError(f"{path} holds no JSON object; make the bundle again")
    return content


def _named(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys that name files, with what they name; also those under "mllm"."""
    for key, value in sorted(config.items()):
        if key in PATHS or key == BASE:
            yield key, value
        elif isinstance(value, dict):
            yield from _named(value)


def leading_out(bundle: Path, config: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Key, value, and why, of each key of a bundle's configuration that makes the engine open what is not its own."""
    for key, value in _named(config):
        if value in ("", None):
            continue
        try:
            if key == BASE:
                raise ValueError("the engine would look for all files there")
            inside(bundle, value)
        except ValueError as error:
            yield key, value, str(error)


def check_files(bundle: Path, names: tuple[str, ...]) -> None:
    """Nothing that the configuration files `names`, of those that are there, make the engine open is elsewhere.

    Raises:
        BundleError: naming the file and the key.
    """
    for name in names:
        for key, value, why in leading_out(bundle, read_config(bundle, name)) if (bundle / name).exists() else ():
            raise BundleError(
                f"{bundle / name} says {key} {str(value)[:200]!r} ({why}); take {key} out, or put the file into the"
                " bundle"
            )
