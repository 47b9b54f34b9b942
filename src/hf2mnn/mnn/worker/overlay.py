"""A bundle under other settings than its config.json has, without touching it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hf2mnn.mnn.settings import with_settings


def overlay(bundle: Path, settings: dict[str, Any]) -> Path:
    """A folder in the working directory (the child's own): links to the bundle's files, and a config.json of its own.

    The engine names the other files relative to its config.json.
    """
    folder = Path(tempfile.mkdtemp(prefix="bundle-", dir=Path.cwd()))
    for path in bundle.iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((bundle / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(with_settings(config, settings)))
    return folder
