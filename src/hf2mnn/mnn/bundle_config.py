"""config.json and llm_config.json of a bundle: reading them, the files that they name, and run-time settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf2mnn.core.errors import BundleError
from hf2mnn.core.untrusted import path_inside, read_json
from hf2mnn.mnn.engine_facts import BASE_DIR, PATH_KEYS, SETTING_DEFAULTS, VISION_SETTINGS


def read_config(bundle: Path, name: str) -> dict[str, Any]:
    """Return config.json or llm_config.json of an untrusted bundle; raise BundleError if it holds no JSON object."""
    path = bundle / name
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise BundleError(f"{bundle} has no {name}: the bundle is incomplete") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} is not valid JSON ({error}); make the bundle again") from None
    if not isinstance(content, dict):
        raise BundleError(f"{path} holds no JSON object; make the bundle again")
    return content


def outside_paths(bundle: Path, config: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Yield key, value and reason of each path in a configuration ("mllm" included) that is not inside the bundle."""
    for key, value in sorted(config.items()):
        if (key in PATH_KEYS or key == BASE_DIR) and value not in ("", None):
            try:
                if key == BASE_DIR:
                    raise ValueError("it replaces the folder of all files")
                path_inside(bundle, value)
            except ValueError as error:
                yield key, value, str(error)
        elif isinstance(value, dict):
            yield from outside_paths(bundle, value)


def check_paths(bundle: Path, names: tuple[str, ...]) -> None:
    """Raise BundleError if one of these configuration files refers to a path outside the bundle."""
    for name in names:
        for key, value, reason in outside_paths(bundle, read_config(bundle, name)) if (bundle / name).exists() else ():
            raise BundleError(
                f"{bundle / name}: {key} is {str(value)[:200]!r} ({reason}); remove the key, or put the file into the"
                " bundle"
            )


def with_settings(config: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of config.json's content with `settings` for the decoder and the vision tower ("mllm").

    Without "mllm" the vision tower has the settings of the decoder.
    """
    changed = {**config, **settings}
    if changed.get("mllm") is not None:
        vision = {key: value for key, value in settings.items() if key in VISION_SETTINGS}
        changed["mllm"] = {**changed["mllm"], **vision}
    return changed


def decoder_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the run-time settings of the decoder, defaults included."""
    return {key: config.get(key, default) for key, default in SETTING_DEFAULTS.items()}


def vision_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the run-time settings of the vision tower, defaults included."""
    own = config if config.get("mllm") is None else config["mllm"]
    return decoder_settings(config) | {key: own.get(key, SETTING_DEFAULTS[key]) for key in VISION_SETTINGS}
