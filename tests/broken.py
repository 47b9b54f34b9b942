"""A bundle that is broken in one way, beside the sound one: links to its files, but for what is changed."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import Hf2mnnError
from hf2mnn.doctor.finding import Finding
from hf2mnn.doctor.patient import Bundle
from hf2mnn.mnn.bundle import CONFIG, MODEL_CONFIG
from hf2mnn.mnn.convert import read_graph


def _edited(path: Path, changes: dict[str, Any]) -> bytes:
    """A JSON object with other values of some keys; None takes a key out."""
    merged = json.loads(path.read_text()) | changes
    return json.dumps({key: value for key, value in merged.items() if value is not None}).encode()


_graph = functools.cache(read_graph)


def broken(
    sound: Path,
    folder: Path,
    config: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    files: dict[str, bytes | None] | None = None,
    checkpoint: Path | None = None,
    reference: Path | None = None,
) -> Bundle:
    """`config` and `model`: other values of config.json and llm_config.json. files: other contents; None: not there."""
    folder.mkdir()
    changed = dict(files or {})
    for name, changes in ((CONFIG, config), (MODEL_CONFIG, model)):
        if changes:
            changed[name] = _edited(sound / name, changes)
    for path in sound.iterdir():
        if path.name not in changed:
            (folder / path.name).symlink_to(path.resolve())
    for name, content in changed.items():
        if content is not None:
            (folder / name).write_bytes(content)
    made = Bundle(folder, Checkpoint(checkpoint) if checkpoint else None, reference)
    for model in made.models.values():
        if model.path.is_symlink():
            # One run of the converter for all that share a graph.
            model.__dict__["_read"] = _graph(model.path.resolve())
    return made


def found(checks: Iterable[Callable[[Bundle], Iterator[Finding]]], bundle: Bundle) -> list[Finding]:
    """As `hf2mnn.doctor.examine` collects them: a file that cannot be read is told of by one of the checks."""
    findings = []
    for check in checks:
        with suppress(Hf2mnnError):
            findings += check(bundle)
    return findings
