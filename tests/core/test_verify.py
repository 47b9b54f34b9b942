"""A copy of a bundle is held to its manifest, by reading it: nothing else, and no network, is needed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from hf2mnn.core.files import sha256
from hf2mnn.core.manifest import NAME, Manifest, stage_folder
from hf2mnn.core.verify import damaged_below, verify_folder
from support import run_cli

FILES = {"llm.mnn": b"graph", "llm.mnn.weight": bytes(range(256)) * 9, "sub/config.json": b"{}"}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    with stage_folder(
        tmp_path / "made", Manifest("quantize", provenance={"checkpoint": {"commit": "c" * 40}})
    ) as folder:
        (folder / "sub").mkdir()
        for name, content in FILES.items():
            (folder / name).write_bytes(content)
    return tmp_path / "made"


def test_a_copy_elsewhere_is_whole_and_says_what_it_is_of(made: Path, tmp_path: Path) -> None:
    copied = Path(shutil.move(made, tmp_path / "elsewhere"))
    verdict = verify_folder(copied)
    assert verdict.whole and not verdict.unnamed
    assert (verdict.files, verdict.bytes) == (3, sum(map(len, FILES.values())))
    assert verdict.provenance == {"checkpoint": {"commit": "c" * 40}}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("llm.mnn", None, "is missing"),
        ("llm.mnn.weight", FILES["llm.mnn.weight"][:-1], "has 2,303 bytes in place of 2,304"),
        ("llm.mnn.weight", b"\xff" + FILES["llm.mnn.weight"][1:], "has other bytes"),
        ("sub/config.json", b"[]", "has other bytes"),
        (NAME, b"{", "is missing or unreadable"),
        (NAME, None, "is missing or unreadable"),
    ],
)
def test_each_harm_is_told_by_file(made: Path, name: str, content: bytes | None, says: str) -> None:
    if content is None:
        (made / name).unlink()
    else:
        (made / name).write_bytes(content)
    verdict = verify_folder(made)
    assert list(verdict.changed) == [name] and verdict.changed[name].startswith(says)
    assert not verdict.whole


def test_every_byte_is_read_whatever_time_and_size_say(made: Path) -> None:
    """A bad disk, or one that means harm, changes neither."""
    path = made / "llm.mnn.weight"
    before = path.stat()
    sha256(path)
    path.write_bytes(FILES["llm.mnn.weight"][::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert list(verify_folder(made).changed) == ["llm.mnn.weight"]


def test_files_that_nobody_vouches_for_are_told(made: Path) -> None:
    """A hub adds a README: no harm, yet a person should know that it was not made by us."""
    (made / "README.md").touch()
    (made / "link").symlink_to(made / "llm.mnn")
    verdict = verify_folder(made)
    assert verdict.unnamed == ["README.md", "link"] and verdict.whole


def test_command_judges_several_folders(made: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(made, tmp_path / "other"))
    assert run_cli("verify", made, other).returncode == 0
    (other / "llm.mnn").write_bytes(b"hparg")
    done = run_cli("verify", made, other, "--json")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert [(Path(one["folder"]).name, one["whole"]) for one in told] == [("made", True), ("other", False)]
    done = run_cli("verify", other)
    assert done.returncode == 1 and f"{other}: llm.mnn has other bytes" in done.stdout and not done.stderr


def test_a_glance_sees_what_is_missing_or_cut_off(made: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    for name in ("whole", "missing", "cut", "none"):
        shutil.copytree(made, results / "model" / "bundles" / name)
    shutil.copytree(made, results / "model" / "bundles" / ".whole.partial")
    (results / "model" / "bundles" / ".whole.partial" / "llm.mnn").unlink()
    folder = results / "model" / "mnn"
    (folder / "missing" / "sub" / "config.json").unlink()
    (folder / "cut" / "llm.mnn.weight").write_bytes(b"")
    (folder / "none" / NAME).write_text("{")
    cut, missing, none = damaged_below(results)
    assert cut.startswith(f"{folder}/cut/llm.mnn.weight has 0 bytes in place of 2,304; where it is needed, delete ")
    assert missing.startswith(f"{folder}/missing/sub/config.json is missing; ") and missing.endswith(
        f"{folder}/missing'"
    )
    assert none.startswith(f"{folder}/none/{NAME} is not a manifest")


def test_what_tools_leave_in_a_folder_is_nobodys_business(made: Path) -> None:
    """Snakemake keeps the time of a folder in a hidden file of it."""
    (made / ".snakemake_timestamp").touch()
    assert not verify_folder(made).unnamed
    manifest = Manifest.load(made)
    named = set(manifest.outputs)
    manifest.hash_outputs(made)
    assert set(manifest.outputs) == named
