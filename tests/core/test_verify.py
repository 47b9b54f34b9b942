"""Verification of copies of a bundle, which needs the bundle alone and no network."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from hf2mnn.core.errors import ManifestError
from hf2mnn.core.files import sha256
from hf2mnn.core.manifest import NAME, Manifest, stage_folder
from hf2mnn.core.verify import FORMER_FOLDERS, damaged_stages, refuse_former_layout, verify_folder
from hf2mnn.mnn.bundle_config import EngineSettings, written_config
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


def test_moved_bundle_is_intact_and_has_its_provenance(made: Path, tmp_path: Path) -> None:
    copied = Path(shutil.move(made, tmp_path / "elsewhere"))
    verdict = verify_folder(copied)
    assert verdict.intact and not verdict.unlisted
    assert (verdict.files, verdict.bytes) == (3, sum(map(len, FILES.values())))
    assert verdict.provenance == {"checkpoint": {"commit": "c" * 40}}


@pytest.mark.parametrize(
    ("name", "content", "difference"),
    [
        ("llm.mnn", None, "is missing"),
        ("llm.mnn.weight", FILES["llm.mnn.weight"][:-1], "has 2,303 bytes in place of 2,304"),
        ("llm.mnn.weight", b"\xff" + FILES["llm.mnn.weight"][1:], "has sha256"),
        ("sub/config.json", b"[]", "has sha256"),
        (NAME, b"{", "is missing or unreadable"),
        (NAME, None, "is missing or unreadable"),
    ],
)
def test_damage_is_reported_by_file(made: Path, name: str, content: bytes | None, difference: str) -> None:
    if content is None:
        (made / name).unlink()
    else:
        (made / name).write_bytes(content)
    verdict = verify_folder(made)
    assert list(verdict.damaged) == [name] and verdict.damaged[name].startswith(difference)
    assert not verdict.intact


def test_every_byte_is_read_for_unchanged_time_and_size(made: Path) -> None:
    """Neither a defective disk nor an attacker changes them."""
    path = made / "llm.mnn.weight"
    before = path.stat()
    sha256(path)
    path.write_bytes(FILES["llm.mnn.weight"][::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert list(verify_folder(made).damaged) == ["llm.mnn.weight"]


def test_edited_settings_are_printed_and_are_no_failure(tmp_path: Path) -> None:
    folder, engine = tmp_path / "bundle", {"precision": "low", "memory": "low", "threads": 4}
    folder.mkdir()
    config = written_config(EngineSettings(**engine), vision=False, embedding=False)
    (folder / "config.json").write_text(json.dumps(config))
    Manifest("quantize", settings={"engine": engine}).save(folder)
    (folder / "config.json").write_text(json.dumps(config | {"thread_num": 1}))
    done = run_cli("verify", folder)
    assert (done.returncode, done.stderr) == (0, "")
    edited, summary = done.stdout.splitlines()
    assert edited == f"{folder}: edited: thread_num 4 -> 1" and "but for these settings" in summary
    assert damaged_stages(tmp_path) == [], "Snakemake takes it for no damage either"


def test_unlisted_files_are_reported(made: Path) -> None:
    """A README of a hub is no damage, but it is not an output of the stage."""
    (made / "README.md").touch()
    (made / "link").symlink_to(made / "llm.mnn")
    verdict = verify_folder(made)
    assert verdict.unlisted == ["README.md", "link"] and verdict.intact


def test_command_verifies_several_folders(made: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(made, tmp_path / "other"))
    assert run_cli("verify", made, other).returncode == 0
    (other / "llm.mnn").write_bytes(b"hparg")
    done = run_cli("verify", made, other, "--json")
    assert done.returncode == 1
    verdicts = json.loads(done.stdout)
    assert [(Path(verdict["folder"]).name, verdict["intact"]) for verdict in verdicts] == [
        ("made", True),
        ("other", False),
    ]
    done = run_cli("verify", other)
    assert done.returncode == 1 and f"{other}: llm.mnn has sha256 " in done.stdout and not done.stderr


def test_missing_and_truncated_files_are_reported_without_reading(made: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    for name in ("whole", "missing", "cut", "none"):
        shutil.copytree(made, results / "model" / "bundles" / name)
    shutil.copytree(made, results / "model" / "bundles" / ".whole.partial")
    (results / "model" / "bundles" / ".whole.partial" / "llm.mnn").unlink()
    folder = results / "model" / "bundles"
    (folder / "missing" / "sub" / "config.json").unlink()
    (folder / "cut" / "llm.mnn.weight").write_bytes(b"")
    (folder / "none" / NAME).write_text("{")
    cut, missing, none = damaged_stages(results)
    assert cut.startswith(f"{folder}/cut/llm.mnn.weight has 0 bytes in place of 2,304; if it is needed, delete ")
    assert missing.startswith(f"{folder}/missing/sub/config.json is missing; ") and missing.endswith(
        f"{folder}/missing'"
    )
    assert none.startswith(f"{folder}/none/{NAME} is not a manifest")


def test_hidden_files_of_tools_are_ignored(made: Path) -> None:
    """Snakemake stores the time of a folder in a hidden file there."""
    (made / ".snakemake_timestamp").touch()
    assert not verify_folder(made).unlisted
    manifest = Manifest.load(made)
    named = set(manifest.outputs)
    manifest.hash_outputs(made)
    assert set(manifest.outputs) == named


@pytest.mark.parametrize("former", FORMER_FOLDERS)
def test_results_of_the_former_layout_are_refused_and_kept(former: str, tmp_path: Path) -> None:
    """One message has the folder and the command that moves it; nothing is deleted or overwritten."""
    results = tmp_path / "results"
    manifest = results / "shapes-vl" / former / NAME
    manifest.parent.mkdir(parents=True)
    manifest.write_text('{"stage": "source"}')
    with pytest.raises(ManifestError) as refused:
        refuse_former_layout(results)
    message = str(refused.value)
    assert message.startswith(f"{results / 'shapes-vl'} has the folders of an earlier version of hf2mnn ({former}): ")
    assert f"mv {results / 'shapes-vl'} shapes-vl.old" in message and "run again" in message
    assert manifest.read_text() == '{"stage": "source"}'


def test_results_of_the_present_layout_pass(made: Path, tmp_path: Path) -> None:
    refuse_former_layout(tmp_path / "nowhere")
    (tmp_path / "results" / "model" / "bundles").mkdir(parents=True)
    shutil.copytree(made, tmp_path / "results" / "model" / "bundles" / "int4")
    (tmp_path / "results" / "summary.csv").touch()
    refuse_former_layout(tmp_path / "results")


def test_former_manifest_is_refused_in_one_line(made: Path) -> None:
    """It has no layout; its entries may have other meanings."""
    stored = json.loads((made / NAME).read_text())
    del stored["layout"]
    (made / NAME).write_text(json.dumps(stored))
    with pytest.raises(ManifestError, match="move it away and run its stages again") as refused:
        Manifest.load(made)
    message = str(refused.value)
    assert message.startswith(f"{made} was written by an earlier version of hf2mnn") and "\n" not in message
