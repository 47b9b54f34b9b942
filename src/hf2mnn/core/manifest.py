"""Stage manifest: inputs, outputs, settings, tool versions and command line of a stage folder.

Stages read their inputs through `hf2mnn.core.stage.open_stage`, which trusts the manifest and not the folder.
"""

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
from hf2mnn.core.errors import Hf2mnnError, ManifestError
from hf2mnn.core.files import (
    LARGE,
    condition,
    link_or_copy,
    recall,
    sha256_of,
    temporary_files_in,
    whole_file,
    whole_folder,
)
from hf2mnn.core.untrusted import inside, read_json
from hf2mnn.machine.usage import cpu_seconds, peak_mb

NAME = "manifest.json"
LAYOUT = 2
"""Version of the names of stages, folders and manifest entries; results of another one are refused."""
SCRATCH = ".scratch"
"""A stage's temporary files are below its folder while it runs."""
NAMED = ("stage", "inputs", "settings", "tools", "outputs", "hf2mnn")
"""What a manifest's digest is over."""
MARK = ".hf2mnn"
"""A file in every folder that a stage has made: the condition in which its large files were hashed, by name, JSON."""


def tool_versions(*packages: str) -> dict[str, str]:
    """Installed versions of the packages that shape a stage's result."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@dataclass
class Manifest:
    """Contents of manifest.json.

    Attributes:
        stage: Name of the stage.
        command: Command line that made the folder; empty where a program called the stage.
        inputs: sha256 of each input: of the manifest of a folder (`digest`), or of a file.
        settings: Settings that change the results.
        tools: Releases of the packages that change the results.
        outputs: Size in bytes and sha256 of each file of the folder.
        results: Figures to report.
        paths: Locations of inputs that no stage has made, for the reader; other machines have others.
        provenance: Files at the start of the chain with their sha256, so that a folder documents its own origin.
        seconds: Wall time, hashing included.
        cpu_seconds: CPU time of the stage and of its child processes.
        peak_rss_mb: Peak resident memory of the largest of these processes, in MB of 1e6 bytes.
        hf2mnn: Release of this package.
        layout: Version of the layout of results folders (LAYOUT).
    """

    stage: str
    command: list[str] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    tools: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_rss_mb: float = 0.0
    hf2mnn: str = __version__
    layout: int = LAYOUT
    folder: Path | None = None

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read `folder`/manifest.json.

        Raises:
            ManifestError: there is none, or it is not a manifest.
        """
        path = Path(folder) / NAME
        try:
            content = read_json(path, finite=False)
            if "stage" in content and content.get("layout") != LAYOUT:
                raise ManifestError(
                    f"{folder} was written by another version of hf2mnn, whose results have other names; move it away"
                    " and run its stages again"
                )
            manifest = cls(**content, folder=Path(folder))
            manifest._check()
            return manifest
        except FileNotFoundError:
            raise ManifestError(
                f"{folder} has no {NAME}: the stage that makes it has not finished; run it first"
            ) from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ManifestError(f"{path} is not a manifest ({error}); delete {folder} and make it again") from None

    def _check(self) -> None:
        """Raises ValueError where it is not laid out as one, or an output is not in the folder."""
        maps = (self.inputs, self.settings, self.tools, self.outputs, self.results, self.paths, self.provenance)
        texts = (self.stage, self.hf2mnn, *self.command, *self.inputs.values(), *self.tools.values())
        numbers = (self.seconds, self.cpu_seconds, self.peak_rss_mb)
        if not all(isinstance(found, dict) for found in maps) or not all(isinstance(found, str) for found in texts):
            raise ValueError("its entries are of other kinds")
        if not all(type(number) in (int, float) for number in numbers):
            raise ValueError("its figures are no numbers")
        for name, entry in self.outputs.items():
            if type(entry["size"]) is not int or not isinstance(entry["sha256"], str):
                raise ValueError("its outputs have no size and sha256")
            inside(self.folder, name)

    def verify(self) -> Path:
        """The folder, once every file that the manifest names is there with its size and sha256.

        Of a large file that is in the condition in which it was hashed (`files.condition`) the bytes are not read
        again: four stages read a checkpoint's manifest.

        Raises:
            ManifestError: naming the first file that is missing or was changed.
        """
        hashed, paths = _conditions(self.folder), {name: self.folder / name for name in sorted(self.outputs)}
        for name, path in paths.items():
            if not path.is_file():
                raise ManifestError(f"{path} is missing though {NAME} names it; delete {self.folder} and make it again")
            if hashed.get(name) == condition(path):
                recall(path, self.outputs[name]["sha256"])
        digests = sha256_of(paths.values())
        for name, path in paths.items():
            size, expected = path.stat().st_size, self.outputs[name]
            if size != expected["size"] or digests[path] != expected["sha256"]:
                raise ManifestError(
                    f"{path} is not the file that was made ({size} bytes, {NAME} says {expected['size']}, or another"
                    f" sha256); delete {self.folder} and make it again"
                )
        return self.folder

    def digest(self) -> str:
        """Names this folder's contents in the manifests of what is made from it: sha256 over what went in and came out.

        What another run or another machine may have otherwise (times, memory, `paths`, `command`) is no part of it, nor is what
        follows from the rest (`results`, `provenance`): the same work has the same digest anywhere.
        """
        named = {name: getattr(self, name) for name in NAMED}
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()

    def hash_outputs(self, folder: Path) -> None:
        """Note size and sha256 of every file of `folder` (`files_of`)."""
        files = [folder / name for name in files_of(folder)]
        digests = sha256_of(files)
        self.outputs = {
            path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digests[path]}
            for path in files
        }

    def write(self, folder: Path) -> None:
        """Write manifest.json as it is."""
        stored = asdict(self)
        del stored["folder"]
        with whole_file(folder / NAME) as path:
            path.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")

    def save(self, folder: Path) -> None:
        """Hash every file under `folder` and write the manifest there."""
        self.hash_outputs(folder)
        self.write(folder)


def _hidden(place: Path) -> bool:
    """Whether a part of a path in a folder has a hidden name."""
    return any(part.startswith(".") for part in place.parts)


def files_of(folder: Path) -> list[str]:
    """Sorted names of what is a stage's in its folder: all files but the manifest and hidden ones, which
    belong to tools (MARK, Snakemake's time stamp).
    """
    names = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return sorted(name.as_posix() for name in names if name.name != NAME and not _hidden(name))


def stages_below(folder: Path) -> list[Path]:
    """Folders in `folder` that have a manifest, sorted; not the hidden one of a stage that is being made."""
    found = (path.parent for path in folder.rglob(NAME))
    return sorted(path for path in found if not _hidden(path.relative_to(folder)))


def _conditions(folder: Path) -> dict[str, list[int]]:
    """What MARK says; nothing where it is not there or says nothing."""
    try:
        return dict(read_json(folder / MARK))
    except (OSError, ValueError, TypeError):
        return {}


def _refuse_foreign(destination: Path) -> None:
    """Raises Hf2mnnError for a folder with files in it that is not a stage's: replacing it would delete them.

    A mark tells, not the manifest, because Snakemake deletes the files that it knows before it runs a rule again.
    """
    if destination.is_dir() and any(destination.iterdir()) and not (destination / MARK).exists():
        raise Hf2mnnError(f"{destination} holds files that no stage has made; give --out a folder of its own")


@contextmanager
def stage_folder(destination: Path, manifest: Manifest) -> Iterator[Path]:
    """A folder for a stage's files; when the block ends, `manifest` is written into it and it takes its name.

    Raises:
        Hf2mnnError: `destination` holds files that are not a stage's.
    """
    started, cpu_before = time.monotonic(), cpu_seconds()
    _refuse_foreign(destination)
    with whole_folder(destination) as folder:
        with temporary_files_in(folder / SCRATCH):
            yield folder
        manifest.hash_outputs(folder)
        manifest.seconds = round(time.monotonic() - started, 2)
        manifest.cpu_seconds = round(cpu_seconds() - cpu_before, 2)
        manifest.peak_rss_mb = round(peak_mb(), 1)
        manifest.write(folder)
        large = sorted(name for name, stored in manifest.outputs.items() if stored["size"] >= LARGE)
        (folder / MARK).write_text(json.dumps({name: condition(folder / name) for name in large}))


@contextmanager
def changed_folder(manifest: Manifest) -> Iterator[Path]:
    """A copy of a stage's folder, of links where they can be, to put other files into (new ones under the old names,
    since others may share the old ones). When the block ends, `manifest` is written into it, and it takes the folder's
    place: who goes by a folder's time, as Snakemake does, sees that it is another.
    """
    marked = [MARK] if (manifest.folder / MARK).exists() else []
    with whole_folder(manifest.folder) as folder:
        for name in [*files_of(manifest.folder), *marked]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(manifest.folder / name, folder / name)
        yield folder
        manifest.save(folder)
