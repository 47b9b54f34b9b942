"""Verification of copies: whether a folder has the bytes that its stage wrote."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf2mnn.core.errors import ManifestError
from hf2mnn.core.files import read_sha256
from hf2mnn.core.manifest import NAME, Manifest, output_files, stage_folders

FORMER_FOLDERS = ("source", "mnn/base", "eval")  # of results/<model> in the layout before LAYOUT 2


@dataclass
class Verdict:
    """Result of the verification of a folder; stage, release and provenance are those of the manifest."""

    folder: str
    stage: str | None = None
    hf2mnn: str | None = None
    digest: str | None = None  # Manifest.digest
    files: int = 0  # number of files in the manifest
    bytes: int = 0  # their total size
    damaged: dict[str, str] = field(default_factory=dict)  # difference from the manifest, by file
    edited: dict[str, str] = field(default_factory=dict)  # "old -> new" by run-time setting, which is no damage
    unlisted: list[str] = field(default_factory=list)  # files that the manifest does not list, which is no damage
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def intact(self) -> bool:
        """Whether every listed file has the bytes that the stage wrote."""
        return not self.damaged


def file_damage(path: Path, expected: dict[str, Any], read: bool = True) -> str | None:
    """Return the difference of a file from its entry in a manifest, or None; compare the size alone unless `read`."""
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != expected["size"]:
        return f"has {size:,} bytes in place of {expected['size']:,}"
    if not read:
        return None
    try:
        digest = read_sha256(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if digest == expected["sha256"] else f"has sha256 {digest} in place of {expected['sha256']}"


def verify_folder(folder: Path) -> Verdict:
    """Compare every file of a stage folder, or of a copy of one, with its manifest."""
    try:
        manifest = Manifest.load(folder)
    except ManifestError as error:
        return Verdict(str(folder), damaged={NAME: f"is missing or unreadable: {error}"})
    outputs = manifest.outputs
    size = sum(entry["size"] for entry in outputs.values())
    verdict = Verdict(str(folder), manifest.stage, manifest.hf2mnn, manifest.digest(), len(outputs), size)
    damage = {name: file_damage(folder / name, expected) for name, expected in sorted(outputs.items())}
    verdict.damaged = {name: difference for name, difference in damage.items() if difference}
    verdict.unlisted = sorted({*output_files(folder)} - {*outputs})
    verdict.provenance = manifest.provenance
    return verdict


def print_verdicts(verdicts: list[Verdict], as_json: bool) -> None:
    """Print verdicts as text, or as a JSON list with an object for each folder."""
    if as_json:
        print(json.dumps([{**asdict(verdict), "intact": verdict.intact} for verdict in verdicts], indent=1))
        return
    for verdict in verdicts:
        for name, difference in verdict.damaged.items():
            print(f"{verdict.folder}: {name} {difference}")
        for key, change in verdict.edited.items():
            print(f"{verdict.folder}: edited: {key} {change}")
        for name in verdict.unlisted:
            print(f"{verdict.folder}: {name} is not listed in {NAME}")
        if verdict.intact:
            but = " but for these settings" if verdict.edited else ""
            written = f"as hf2mnn {verdict.hf2mnn} wrote them{but} ({verdict.stage}, digest {verdict.digest[:12]})"
            print(f"{verdict.folder}: {verdict.files} files, {verdict.bytes:,} bytes, {written}")
        else:
            print(f"{verdict.folder}: {len(verdict.damaged)} files are damaged; copy them or run the stage again")


def damaged_stages(results: Path) -> list[str]:
    """Return a message for each stage folder below `results` with a missing file or one of another size.

    Hardly any file is read. Snakemake does not notice such damage, because it compares the times of folders.
    """
    messages = []
    for folder in stage_folders(results):
        try:
            manifest = Manifest.load(folder)
        except ManifestError as error:
            messages.append(str(error))
            continue
        manifest.accept_edits()
        for name, expected in manifest.outputs.items():
            if difference := file_damage(folder / name, expected, read=False):
                repair = f"delete {folder} and run 'snakemake --cores N {folder}'"
                messages.append(f"{folder / name} {difference}; if it is needed, {repair}")
                break
    return messages


def refuse_former_layout(results: Path) -> None:
    """Raise ManifestError for results of the layout before LAYOUT 2; nothing is deleted or overwritten."""
    for folder in sorted(results.glob("*")) if results.is_dir() else []:
        former = [name for name in FORMER_FOLDERS if (folder / name).is_dir()]
        if former:
            raise ManifestError(
                f"{folder} has the folders of an earlier version of hf2mnn ({', '.join(former)}): move it out of"
                f" {results} (mv {folder} {folder.name}.old) or delete it, and run again"
            )
