"""Whether a folder holds the very bytes that a stage has written: asked of one that was copied, sent or kept."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf2mnn.core.errors import ManifestError
from hf2mnn.core.files import read_sha256
from hf2mnn.core.manifest import NAME, Manifest, files_of, stages_below


@dataclass
class Verdict:
    """Of a folder. changed: what is wrong, by file; unnamed: files of which its manifest does not know, which are no
    fault of those that it names. digest: `Manifest.digest`; provenance: `Manifest.provenance`.
    """

    folder: str
    stage: str | None = None
    hf2mnn: str | None = None
    digest: str | None = None
    files: int = 0
    bytes: int = 0
    changed: dict[str, str] = field(default_factory=dict)
    unnamed: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return not self.changed


def changed(path: Path, expected: dict[str, Any], read: bool = True) -> str | None:
    """What is wrong with a file that a manifest's `expected` vouches for; None where it is the one that was made. Every
    byte is read, unless not to `read` is asked for.
    """
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != expected["size"]:
        return f"has {size:,} bytes in place of {expected['size']:,}"
    if not read:
        return None
    try:
        found = read_sha256(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if found == expected["sha256"] else f"has other bytes: sha256 {found} in place of {expected['sha256']}"


def verify_folder(folder: Path) -> Verdict:
    """Hold every file of a stage's folder, or of a copy of one, to its manifest."""
    verdict = Verdict(str(folder))
    try:
        manifest = Manifest.load(folder)
    except ManifestError as error:
        verdict.changed[NAME] = f"is missing or unreadable: {error}"
        return verdict
    verdict.stage, verdict.hf2mnn, verdict.digest = manifest.stage, manifest.hf2mnn, manifest.digest()
    verdict.provenance = manifest.provenance
    verdict.files, verdict.bytes = len(manifest.outputs), sum(entry["size"] for entry in manifest.outputs.values())
    wrong = {name: changed(folder / name, expected) for name, expected in sorted(manifest.outputs.items())}
    verdict.changed = {name: said for name, said in wrong.items() if said}
    verdict.unnamed = sorted({*files_of(folder)} - {*manifest.outputs})
    return verdict


def damaged_below(results: Path) -> list[str]:
    """A sentence for each stage's folder below `results` in which a file is missing, or is of another size, as a
    glance at the names and sizes tells.

    Who goes by a folder's time, as Snakemake does, does not see that.
    """
    said = []
    for folder in stages_below(results):
        try:
            outputs = Manifest.load(folder).outputs
        except ManifestError as error:
            said.append(str(error))
            continue
        for name, expected in outputs.items():
            if wrong := changed(folder / name, expected, read=False):
                cure = f"delete {folder} and run 'snakemake --cores N {folder}'"
                said.append(f"{folder / name} {wrong}; where it is needed, {cure}")
                break
    return said


def print_verdicts(verdicts: list[Verdict], as_json: bool) -> None:
    """For a person, or for a program: a list with an object for each folder."""
    if as_json:
        print(json.dumps([{**asdict(verdict), "whole": verdict.whole} for verdict in verdicts], indent=1))
        return
    for verdict in verdicts:
        for name, said in verdict.changed.items():
            print(f"{verdict.folder}: {name} {said}")
        for name in verdict.unnamed:
            print(f"{verdict.folder}: {name} is not named by {NAME}")
        if verdict.whole:
            made = f"as hf2mnn {verdict.hf2mnn} made them ({verdict.stage}, digest {verdict.digest[:12]})"
            print(f"{verdict.folder}: {verdict.files} files, {verdict.bytes:,} bytes, {made}")
        else:
            print(f"{verdict.folder}: {len(verdict.changed)} files are not those that were made; take or make it again")


FORMER = ("source", "mnn/base", "eval")
"""Folders of results/<model> in the layout before LAYOUT 2."""


def refuse_former_layout(results: Path) -> None:
    """Refuse results whose folders have the names of an earlier version.

    Raises:
        ManifestError: With what to do; nothing is deleted or overwritten.
    """
    for folder in sorted(results.glob("*")) if results.is_dir() else []:
        found = [name for name in FORMER if (folder / name).is_dir()]
        if found:
            raise ManifestError(
                f"{folder} has the folders of an earlier version of hf2mnn ({', '.join(found)}): move it away (mv"
                f" {folder} {folder}.old outside {results}) or delete it, and run again"
            )
