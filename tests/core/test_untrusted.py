"""What all readers of strangers' files stand on."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from hf2mnn.config.schema import load_plan
from hf2mnn.core.errors import LONGEST, CheckpointError, ConfigError, ManifestError
from hf2mnn.core.manifest import Manifest
from hf2mnn.core.untrusted import DEPTH, at_most, inside, parse_json, read_bytes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"size": 1, "size": 2}', "'size' twice"),
        ('{"a": {"b": 1, "b": 1}}', "'b' twice"),
        ('{"size": NaN}', "NaN"),
        ("[-Infinity]", "-Infinity"),
        ("[1e999]", "1e999"),
        ("[" * 100_000, "nested"),
        ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), "nested"),
        ('{"a": ', "Expecting value"),
        ("9" * 5000, "digits"),
    ],
    ids=lambda value: value[:12],
)
def test_json_that_programs_would_read_differently_or_not_at_all(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_json(text)


def test_json_as_it_should_be() -> None:
    value = {"a": [1, 2.5, None, {"b": "c"}], "d": True}
    assert parse_json(json.dumps(value)) == value
    assert parse_json("[" * DEPTH + "]" * DEPTH)
    assert parse_json('{"kld": NaN}', finite=False).keys() == {"kld"}  # what our own manifests may say


def test_only_files_of_a_size_are_read(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"12345")
    assert read_bytes(tmp_path / "large", 5) == b"12345"
    with pytest.raises(ValueError, match="more than 4"):
        read_bytes(tmp_path / "large", 4)
    os.mkfifo(tmp_path / "pipe")  # to open one is to wait for somebody who writes
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("pipe", "endless"):
        with pytest.raises(ValueError, match="not a file"):
            read_bytes(tmp_path / name)
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="more than"):
        read_bytes(sparse)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", "a\0b", "a\nb", "..\\x", None, 1, "\ud800"])
def test_names_that_lead_elsewhere(name: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"leads out|no file name"):
        inside(tmp_path, name)


def test_links(tmp_path: Path) -> None:
    """A repository may bring a link to a person's key; a person's own links, and a hub's cache, are as they were."""
    folder, home = tmp_path / "clone", tmp_path / "home"
    for made in (folder, folder / ".git", home, tmp_path / "blobs"):
        made.mkdir()
    blob = tmp_path / "blobs" / ("ab" * 32)
    for path in (home / "id_rsa", home / "config.json", blob, folder / "weights", folder / ".git" / "config"):
        path.write_text("{}")
    good = {"config.json": home / "config.json", "tokenizer.json": blob, "model.safetensors": folder / "weights"}
    bad = {"chat_template.jinja": home / "id_rsa", "merges.txt": folder / ".git" / "config"}
    for name, target in (good | bad).items():
        (folder / name).symlink_to(target)
    for name in good:
        assert inside(folder, name) == folder / name
    for name in bad:
        with pytest.raises(ValueError, match="is a link to"):
            inside(folder, name)
    (folder / "images").symlink_to(home)
    with pytest.raises(ValueError, match="is a link to"):
        inside(folder, "images/id_rsa")


def test_time_is_bounded_in_the_main_thread() -> None:
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"0\.1 s"), at_most(0.1):
        while True:
            pass
    assert time.monotonic() - begun < 5
    with at_most(0.05):
        pass
    time.sleep(0.1)  # nothing comes after the block
    done: list[bool] = []

    def elsewhere() -> None:
        with at_most(0.01):
            time.sleep(0.05)
        done.append(True)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert done == [True]


def test_a_sentence_only_shows_what_a_strangers_file_says() -> None:
    """A terminal would obey what stands after an escape, and a log would take the second line for one of its own."""
    sentence = str(CheckpointError("there is \x1b[2J\x9b1m\u202e\ud800 here\nhf2mnn: all is well"))
    assert sentence == "there is \\x1b[2J\\x9b1m\\u202e\\ud800 here hf2mnn: all is well"
    long = str(CheckpointError("x" * 1_000_000 + "; download it again"))
    assert len(long) < LONGEST + 10
    assert long.endswith("download it again")
    assert str(CheckpointError("Größe 大小")) == "Größe 大小"


BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [(BOMB, "more than"), ("a: &a [*a]", "nested"), ("a: 2001-99-99", "month"), ("[" * 5000, "not YAML")],
)
def test_a_plan_that_is_small_and_asks_for_much(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    begun = time.process_time()
    with pytest.raises(ConfigError, match=says):
        load_plan(tmp_path / "plan.yaml")
    assert time.process_time() - begun < 2


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "link"])
def test_a_manifest_names_only_files_of_its_folder(name: str, tmp_path: Path) -> None:
    """Its sha256 would tell a stranger whether a file is the one that he guesses."""
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    stored = {"stage": "mnn", "outputs": {name: {"size": 1, "sha256": "0" * 64}}}
    (folder / "manifest.json").write_text(json.dumps(stored))
    with pytest.raises(ManifestError, match="is not a manifest"):
        Manifest.load(folder)
