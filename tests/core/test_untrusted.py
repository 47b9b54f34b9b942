"""Reading of untrusted files: bounds on size, depth, time and paths."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hf2mnn.config.plan import load_plan
from hf2mnn.core.errors import MAX_MESSAGE, CheckpointError, ConfigError, ManifestError
from hf2mnn.core.manifest import LAYOUT, Manifest
from hf2mnn.core.untrusted import MAX_DEPTH, parse_json, parse_yaml, path_inside, read_bytes, time_limited


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"size": 1, "size": 2}', "'size' twice"),
        ('{"a": {"b": 1, "b": 1}}', "'b' twice"),
        ('{"size": NaN}', "NaN"),
        ("[-Infinity]", "-Infinity"),
        ("[1e999]", "1e999"),
        ("[" * 100_000, "nested"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested"),
        ('{"a": ', "Expecting value"),
        ("9" * 5000, "digits"),
    ],
    ids=lambda value: value[:12],
)
def test_ambiguous_or_invalid_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_valid_json_is_parsed() -> None:
    value = {"a": [1, 2.5, None, {"b": "c"}], "d": True}
    assert parse_json(json.dumps(value)) == value
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert parse_json('{"kld": NaN}', finite=False).keys() == {"kld"}  # our own manifests may hold NaN


def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"12345")
    assert read_bytes(tmp_path / "large", 5) == b"12345"
    with pytest.raises(ValueError, match="more than 4"):
        read_bytes(tmp_path / "large", 4)
    os.mkfifo(tmp_path / "pipe")  # opening it would block
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
def test_paths_out_of_the_folder_are_refused(name: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"leads out|not a file name"):
        path_inside(tmp_path, name)


def test_links(tmp_path: Path) -> None:
    """A repository may contain a link to a private key; links of the user and of a hub's cache are valid."""
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
        assert path_inside(folder, name) == folder / name
    for name in bad:
        with pytest.raises(ValueError, match="is a link to"):
            path_inside(folder, name)
    (folder / "images").symlink_to(home)
    with pytest.raises(ValueError, match="is a link to"):
        path_inside(folder, "images/id_rsa")


def test_time_is_bounded_in_the_main_thread() -> None:
    with pytest.raises(TimeoutError, match=r"0\.1 s"), time_limited(0.1):
        while True:  # without the limit, this test does not end
            pass
    with time_limited(0.05):
        pass
    time.sleep(0.1)  # no signal after the block
    finished: list[bool] = []

    def in_thread() -> None:
        with time_limited(0.01):
            time.sleep(0.05)
        finished.append(True)

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert finished == [True]


def test_message_is_printable_and_one_bounded_line() -> None:
    """A terminal would interpret an escape sequence, and a log would show a second line as its own."""
    message = str(CheckpointError("there is \x1b[2J\x9b1m\u202e\ud800 here\nerror: none"))
    assert message == "there is \\x1b[2J\\x9b1m\\u202e\\ud800 here error: none"
    long = str(CheckpointError("x" * 1_000_000 + "; download it again"))
    assert len(long) < MAX_MESSAGE + 10
    assert long.endswith("download it again")
    assert str(CheckpointError("Größe 大小")) == "Größe 大小"


BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than"),
        ("a: &a [*a]", "nested"),
        ("a: 2001-99-99", "month"),
        ("a: !!python/object:os.system x", "not valid YAML"),
        ("[" * 5000, "nested"),
        ("- " * 5000, "nested"),
        ("{a: " * 5000, "nested"),
    ],
    ids=lambda value: value[:12],
)
def test_small_plan_that_expands_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_plan(tmp_path / "plan.yaml")


@pytest.mark.parametrize("text", ["[" * 5000, "- " * 5000, "{a: " * 5000], ids=["list", "items", "mapping"])
def test_deep_yaml_is_refused_before_it_is_parsed(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scan stops at the first event that is too deep, and the recursive parser does not run."""
    events: list[yaml.Event] = []
    parse = yaml.parse

    def counted(*arguments: object) -> Iterator[yaml.Event]:
        for event in parse(*arguments):
            events.append(event)
            yield event

    monkeypatch.setattr(yaml, "parse", counted)
    monkeypatch.setattr(yaml, "safe_load", lambda _: pytest.fail("parsed"))
    with pytest.raises(ValueError, match="nested"):
        parse_yaml(text.encode())
    assert len(events) <= 2 * MAX_DEPTH + 4


@pytest.mark.parametrize("text", ["[" * 5000, '{"a": ' * 5000, '"[[" ' + "[" * 5000])
def test_deep_json_is_refused_before_it_is_parsed(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(ValueError, match="nested"):
        parse_json(text)


def test_brackets_in_strings_are_no_nesting() -> None:
    value = {"[" * 100: '\\"' + "{[" * 100, "a": ["\\", "]"]}
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "link"])
def test_a_manifest_names_only_files_of_its_folder(name: str, tmp_path: Path) -> None:
    """Its sha256 would reveal whether a file has guessed contents."""
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    stored = {"stage": "convert", "layout": LAYOUT, "outputs": {name: {"size": 1, "sha256": "0" * 64}}}
    (folder / "manifest.json").write_text(json.dumps(stored))
    with pytest.raises(ManifestError, match=r"is not a manifest \(.*(leads out|is a link)"):
        Manifest.load(folder)


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("a: 1\nb: 2\na: 3", "a", "lines 1 and 3"),
        ("x:\n  a: 1\n  'a': 2", "a", "lines 2 and 3"),
        ("x: {a: 1, a: 2}", "a", "line 1"),
        ('{"x": 1,\n "y": {"b": "}{\\"a\\":", "a": [{"a": 1}],\n\n "a": 2}}', "a", "lines 2 and 4"),
        ('{"a": 1,\n "\\u0061": 2}', "a", "lines 1 and 2"),
    ],
)
def test_duplicate_keys_are_refused_with_their_lines(text: str, key: str, lines: str) -> None:
    with pytest.raises(ValueError, match=f"key '{key}' twice, in {lines}: remove one"):
        parse_yaml(text.encode())
    if text.startswith("{"):
        with pytest.raises(ValueError, match=f"key '{key}' twice, in {lines}: remove one"):
            parse_json(text)


@given(st.dictionaries(st.text(), st.integers(), min_size=1), st.data())
def test_any_duplicate_key_of_json_is_refused(value: dict[str, int], data: st.DataObject) -> None:
    """Whatever the keys are: brackets, quotes, escapes."""
    repeated = data.draw(st.sampled_from(sorted(value)))
    lines = [f"{json.dumps(key)}: {number}," for key, number in value.items()]
    first = list(value).index(repeated) + 2
    text = "\n".join(["{", *lines, f"{json.dumps(repeated)}: 0", "}"])
    with pytest.raises(ValueError, match=f"twice, in lines {first} and {len(value) + 2}: remove one"):
        parse_json(text)


def test_keys_that_a_merge_overrides_are_no_duplicates() -> None:
    text = "a: &a {x: 1}\nb: &b\n  <<: *a\n  x: 2\nc:\n  <<: *b\n  x: 3"
    assert parse_yaml(text.encode()) == {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 3}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nbits: 8: 3", "at line 2, column 8: bits: 8: 3"),
        ("a:\n\tb: 1", "character '\\t' that cannot start any token at line 2, column 1"),
        ("a: [1\nb: 2", "expected ',' or ']', but got ':' at line 2, column 2: b: 2"),
        ("a: *x", "undefined alias 'x' at line 1, column 4: a: *x"),
        ("a: 1\nb: \x01", "special characters are not allowed at line 2, column 4"),
    ],
)
def test_errors_of_yaml_have_line_column_and_text(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_yaml(text.encode())


def test_a_byte_order_mark_is_accepted() -> None:
    assert parse_yaml(b"\xef\xbb\xbfa: 1") == parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
