"""Stage manifest: inputs, outputs, settings, tool versions and command line of a stage folder."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hf2mnn import __version__
from hf2mnn.core import files
from hf2mnn.core.errors import Hf2mnnError, ManifestError
from hf2mnn.core.untrusted import path_inside, read_json
from hf2mnn.machine.usage import cpu_seconds, peak_mb

NAME = "manifest.json"
LAYOUT = 2  # version of the names of stages, folders and manifest entries; others are refused
EDITABLE = {"quantize": "config.json"}  # file with settings that users may edit, by stage
SCRATCH = ".scratch"  # folder for temporary files in the folder of a running stage
DIGESTED = ("stage", "inputs", "settings", "tools", "outputs", "hf2mnn")  # entries that `Manifest.digest` covers
MARKER = ".hf2mnn"
"""File in every stage folder: the state of its large files when they were hashed, by name, JSON."""


def tool_versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of packages that change the results of a stage."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


@dataclass
class Manifest:
    """Contents of manifest.json."""

    stage: str
    command: list[str] = field(default_factory=list)  # empty for a call from Python
    inputs: dict[str, str] = field(default_factory=dict)  # `digest` of a folder's manifest, or sha256 of a file
    settings: dict[str, Any] = field(default_factory=dict)  # settings that change the results
    tools: dict[str, str] = field(default_factory=dict)  # releases of the packages that change the results
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)  # size in bytes and sha256 by name
    results: dict[str, Any] = field(default_factory=dict)  # figures to report
    paths: dict[str, str] = field(default_factory=dict)  # inputs that no stage wrote; they differ between machines
    provenance: dict[str, Any] = field(default_factory=dict)  # first files of the chain with their sha256
    seconds: float = 0.0  # wall time, hashing included
    cpu_seconds: float = 0.0  # of the stage and of its child processes
    peak_rss_mb: float = 0.0  # of the largest of these processes, in MB of 1e6 bytes
    hf2mnn: str = __version__
    layout: int = LAYOUT
    folder: Path | None = None  # not stored

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read `folder`/manifest.json; raise ManifestError if it is missing, no manifest, or of another layout."""
        path = Path(folder) / NAME
        try:
            content = read_json(path, finite=False)
            if "stage" in content and content.get("layout") != LAYOUT:
                raise ManifestError(
                    f"{folder} was written by an earlier version of hf2mnn with other names of stages and folders; move"
                    " it away and run its stages again"
                )
            manifest = cls(**content, folder=Path(folder))
            manifest._check()
            return manifest
        except FileNotFoundError:
            raise ManifestError(f"{folder} has no {NAME}: its stage has not finished; run that stage first") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ManifestError(
                f"{path} is not a manifest ({error}); delete {folder} and run its stage again"
            ) from None

    def _check(self) -> None:
        """Raise ValueError if an entry has another type, or if an output is outside of the folder."""
        maps = (self.inputs, self.settings, self.tools, self.outputs, self.results, self.paths, self.provenance)
        texts = (self.stage, self.hf2mnn, *self.command, *self.inputs.values(), *self.tools.values())
        numbers = (self.seconds, self.cpu_seconds, self.peak_rss_mb)
        if not all(isinstance(value, dict) for value in maps) or not all(isinstance(value, str) for value in texts):
            raise ValueError("an entry has another type")
        if not all(type(number) in (int, float) for number in numbers):
            raise ValueError("a time or the memory is not a number")
        for name, entry in self.outputs.items():
            if type(entry["size"]) is not int or not isinstance(entry["sha256"], str):
                raise ValueError(f"the output {name[:80]!r} has no size and sha256")
            path_inside(self.folder, name)

    def verify(self) -> Path:
        """Return the folder; raise ManifestError with the first output that is missing or was changed.

        A large file whose state is that of its hashing (`files.file_state`) is not read again: four stages verify the
        manifest of a checkpoint.
        """
        hashed, paths = self._marker(), {name: self.folder / name for name in sorted(self.outputs)}
        for name, path in paths.items():
            if not path.is_file():
                raise ManifestError(
                    f"{path} is missing, and {NAME} lists it; delete {self.folder} and run its stage again"
                )
            if hashed.get(name) == files.file_state(path):
                files.remember_sha256(path, self.outputs[name]["sha256"])
        digests = files.sha256_of(paths.values())
        for name, path in paths.items():
            size, expected = path.stat().st_size, self.outputs[name]
            if size != expected["size"] or digests[path] != expected["sha256"]:
                raise ManifestError(
                    f"{path} differs from its entry in {NAME} ({size} bytes of {expected['size']}, or another sha256);"
                    f" delete {self.folder} and run its stage again"
                )
        return self.folder

    @property
    def settings_file(self) -> Path | None:
        """File with settings that users may edit (`hf2mnn.mnn.bundle_config`), if the folder has one."""
        name = EDITABLE.get(self.stage)
        return self.folder / name if name in self.outputs and (self.folder / name).is_file() else None

    def accept_edits(self) -> None:
        """Let the entry of the settings file be that of the present file, so that the digest changes with edits."""
        if path := self.settings_file:
            self.outputs[path.name] = {"size": path.stat().st_size, "sha256": files.sha256(path)}

    def _marker(self) -> dict[str, list[int]]:
        """Return the contents of MARKER; empty where it is missing or invalid."""
        try:
            return dict(read_json(self.folder / MARKER))
        except (OSError, ValueError, TypeError):
            return {}

    def digest(self) -> str:
        """Return the sha256 that identifies this folder's contents in manifests of later stages.

        It covers inputs and outputs. Entries that depend on the run or the machine (times, memory, `paths`, `command`)
        and those that follow from the rest (`results`, `provenance`) are left out: equal work has equal digests.
        """
        entries = {name: getattr(self, name) for name in DIGESTED}
        return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()

    def hash_outputs(self, folder: Path) -> None:
        """Set `outputs` to size and sha256 of the files of `folder` (`output_files`)."""
        digests = files.sha256_of(folder / name for name in output_files(folder))
        self.outputs = {
            path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
            for path, digest in digests.items()
        }

    def write(self, folder: Path) -> None:
        """Write manifest.json with the present entries."""
        entries = {name: value for name, value in asdict(self).items() if name != "folder"}
        with files.atomic_file(folder / NAME) as path:
            path.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")

    def save(self, folder: Path) -> None:
        """Hash the outputs in `folder` and write the manifest there."""
        self.hash_outputs(folder)
        self.write(folder)


def _hidden(path: Path) -> bool:
    """Return whether a part of a relative path has a hidden name."""
    return any(part.startswith(".") for part in path.parts)


def output_files(folder: Path) -> list[str]:
    """Return sorted names of the files in a stage folder but the manifest and hidden ones of tools (Snakemake's)."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return sorted(name.as_posix() for name in names if name.name != NAME and not _hidden(name))


def stage_folders(folder: Path) -> list[Path]:
    """Return sorted folders below `folder` that have a manifest, without the hidden ones of running stages."""
    folders = (path.parent for path in folder.rglob(NAME))
    return sorted(path for path in folders if not _hidden(path.relative_to(folder)))


@contextmanager
def stage_folder(destination: Path, manifest: Manifest) -> Iterator[Path]:
    """Yield a folder for the files of a stage; when the block succeeds, write `manifest` and publish the folder."""
    started, cpu_before = time.monotonic(), cpu_seconds()
    # The marker decides, not the manifest, because Snakemake deletes known files before it runs a rule again.
    if destination.is_dir() and any(destination.iterdir()) and not (destination / MARKER).exists():
        raise Hf2mnnError(f"{destination} holds files that no stage wrote; give --out a new folder")
    with files.atomic_folder(destination) as folder:
        with files.temporary_files_in(folder / SCRATCH):
            yield folder
        manifest.hash_outputs(folder)
        manifest.seconds = round(time.monotonic() - started, 2)
        manifest.cpu_seconds = round(cpu_seconds() - cpu_before, 2)
        manifest.peak_rss_mb = round(peak_mb(), 1)
        manifest.write(folder)
        large = sorted(name for name, entry in manifest.outputs.items() if entry["size"] >= files.LARGE)
        (folder / MARKER).write_text(json.dumps({name: files.file_state(folder / name) for name in large}))


@contextmanager
def updated_folder(manifest: Manifest) -> Iterator[Path]:
    """Yield a copy of a stage folder, of hard links if possible; when the block succeeds, it replaces the folder.

    Write new files under the old names, never into an old file, which other folders may share. The replacement gives
    the folder a new time, by which Snakemake notices the change.
    """
    marker = [MARKER] if (manifest.folder / MARKER).exists() else []
    with files.atomic_folder(manifest.folder) as folder:
        for name in [*output_files(manifest.folder), *marker]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            files.link_or_copy(manifest.folder / name, folder / name)
        yield folder
        manifest.save(folder)
