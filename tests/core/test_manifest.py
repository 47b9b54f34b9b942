"""Stage manifests: they detect every file that differs from the one that the stage wrote."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf2mnn.core import files
from hf2mnn.core.errors import Hf2mnnError, ManifestError
from hf2mnn.core.manifest import MARKER, NAME, Manifest, stage_folder, tool_versions

FILES = {"b.bin": bytes(range(256)), "a.txt": b"words", "sub/c.bin": b"\0" * 100}


def make(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    manifest = Manifest("test", inputs={"in": "0" * 64}, settings={"bits": 4}, tools={"tool": "1"})
    with stage_folder(folder, manifest) as partial:
        for name, stored in files.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(stored)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(ManifestError) as refused:
        Manifest.load(folder).verify()
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


def test_unchanged_folder_passes(tmp_path: Path) -> None:
    folder = make(tmp_path / "made")
    manifest = Manifest.load(folder)
    assert manifest.verify() == folder
    assert {name: entry["size"] for name, entry in manifest.outputs.items()} == {k: len(v) for k, v in FILES.items()}
    assert (manifest.stage, manifest.inputs, manifest.settings) == ("test", {"in": "0" * 64}, {"bits": 4})


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("damage", [remove, cut, grow, to_folder])
def test_changed_file_is_in_the_message(damage: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "made")
    damage(folder / name)
    assert str(folder / name) in refusal(folder)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_one_flipped_bit_is_detected(data: st.DataObject) -> None:
    """The size is the same, and a model with one wrong byte gives fluent, wrong answers."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = make(Path(scratch, "made"))
        name = data.draw(st.sampled_from(sorted(FILES)))
        stored = bytearray(FILES[name])
        stored[data.draw(st.integers(0, len(stored) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        (folder / name).write_bytes(stored)
        assert str(folder / name) in refusal(folder)


@pytest.mark.parametrize(
    "stored",
    [
        *("", "{", "[]", "3", "{}", "\udcff"),
        '{"stage": "x"}',
        '{"stage": "x", "layout": 2, "colour": 1}',
        '{"stage": "x", "layout": 2, "folder": "y"}',
        '{"stage": "x", "layout": 2, "outputs": []}',
        '{"stage": "x", "layout": 2, "outputs": {"a.txt": 5}}',
        '{"stage": "x", "layout": 2, "outputs": {"a.txt": {}}}',
        '{"stage": "x", "layout": 2, "command": [1]}',
    ],
)
def test_invalid_manifest_is_refused(stored: str, tmp_path: Path) -> None:
    """Edited, of another version, or truncated: the message has the folder to make again."""
    folder = make(tmp_path / "made")
    (folder / NAME).write_bytes(stored.encode("utf-8", "surrogateescape"))
    assert str(folder) in refusal(folder)


def test_missing_manifest_means_that_the_stage_has_not_finished(tmp_path: Path) -> None:
    assert "has not finished" in refusal(tmp_path)
    assert "has not finished" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refusal(tmp_path / "file")


def test_manifests_of_equal_folders_are_equal_but_for_time(tmp_path: Path) -> None:
    """The order of writing does not count: the digest identifies the contents in later manifests."""
    one = json.loads((make(tmp_path / "one") / NAME).read_text())
    two = json.loads((make(tmp_path / "two", dict(reversed(FILES.items()))) / NAME).read_text())
    assert list(one) == sorted(one)
    assert list(one["outputs"]) == sorted(FILES)
    for stored in (one, two):
        del stored["seconds"], stored["cpu_seconds"], stored["peak_rss_mb"]
    assert json.dumps(one) == json.dumps(two)


def test_digest_covers_the_contents_only(tmp_path: Path) -> None:
    """Equal work on another machine, at other paths and with other times, has the same digest."""
    one = Manifest.load(make(tmp_path / "made"))
    run = {"seconds": 9.0, "cpu_seconds": 9.0, "peak_rss_mb": 9.0, "command": ["hf2mnn", "x"]}
    for other in (run, {"paths": {"path": "/elsewhere"}}):
        assert replace(one, **other).digest() == one.digest()
    changes = [{"stage": "x"}, {"inputs": {"in": "1" * 64}}, {"settings": {"bits": 3}}, {"tools": {"tool": "2"}}]
    changed = Manifest.load(make(tmp_path / "changed", {**FILES, "a.txt": b"other"}))
    digests = {replace(one, **change).digest() for change in changes} | {changed.digest()}
    assert len(digests | {one.digest(), replace(one, hf2mnn="9").digest()}) == len(changes) + 3


def test_temporary_files_of_a_stage_go_with_its_folder(tmp_path: Path) -> None:
    """A killed process removes nothing: its files in TMPDIR would stay forever."""
    before = tempfile.gettempdir()
    with stage_folder(tmp_path / "made", Manifest("test")) as folder:
        (folder / "a.txt").touch()
        with tempfile.TemporaryDirectory() as scratch:
            assert folder in Path(scratch).parents
        Path(tempfile.mkdtemp(), "left").touch()
    assert tempfile.gettempdir() == before
    assert [path.name for path in (tmp_path / "made").rglob("*") if path.name not in (NAME, MARKER)] == ["a.txt"]


def test_stage_that_fails_leaves_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), stage_folder(tmp_path / "made", Manifest("test")) as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_folder_with_user_files_is_not_replaced(tmp_path: Path) -> None:
    """`--out .` or `--out ~` must not delete files that no stage wrote."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(Hf2mnnError, match="home"):
        make(tmp_path / "home")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("leftover", [(), ("a.txt",), ("a.txt", "sub/c.bin")])
def test_folder_that_snakemake_prepared_is_replaced(leftover: tuple[str, ...], tmp_path: Path) -> None:
    """Before a job Snakemake removes the outputs that a rule names, with the manifest, and keeps all other files."""
    folder = make(tmp_path / "made")
    for name in {*FILES, NAME} - set(leftover):
        (folder / name).unlink()
    make(folder)
    Manifest.load(folder).verify()


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose bytes are read; all files count as large, and none is remembered."""
    names: list[str] = []
    digest = files.read_sha256

    def counted(path: Path) -> str:
        names.append(path.name)
        return digest(path)

    monkeypatch.setattr(files, "read_sha256", counted)
    monkeypatch.setattr(files, "_remembered", {})
    monkeypatch.setattr(files, "LARGE", 1)
    return names


def test_unchanged_large_file_is_read_once(hashed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is in the folders of two stages, and four stages verify them."""
    folder = make(tmp_path / "made")
    assert sorted(hashed) == ["a.txt", "b.bin", "c.bin"]
    hashed.clear()
    monkeypatch.setattr(files, "_remembered", {})
    with stage_folder(tmp_path / "next", Manifest("next")) as partial:
        Manifest.load(folder).verify()
        files.link_or_copy(folder / "b.bin", partial / "linked.bin")
    assert hashed == []
    monkeypatch.setattr(files, "_remembered", {})
    Manifest.load(tmp_path / "next").verify()
    assert "linked.bin" not in hashed


@pytest.mark.parametrize("change", ["written", "replaced", "touched"])
def test_changed_large_file_is_read_again(
    change: str, hashed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "made")
    monkeypatch.setattr(files, "_remembered", {})
    hashed.clear()
    path, stored = folder / "b.bin", FILES["b.bin"]
    if change == "written":
        with path.open("r+b") as file:
            file.write(b"\1")
    elif change == "replaced":
        # With the same size and time, as after rsync or cp -p.
        path.rename(tmp_path / "old")
        path.write_bytes(stored[::-1])
        os.utime(path, ns=(0, (tmp_path / "old").stat().st_mtime_ns))
    else:
        os.utime(path)
    if change == "touched":
        Manifest.load(folder).verify()
    else:
        assert "b.bin differs from its entry" in refusal(folder)
    assert hashed == ["b.bin"]


def test_missing_tool_is_recorded() -> None:
    assert tool_versions("no-such-package") == {"no-such-package": "not installed"}
