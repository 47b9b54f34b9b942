"""Stages: the declaration of a stage, and the common way from its input folders to its output folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf2mnn.core.errors import ManifestError
from hf2mnn.core.files import sha256
from hf2mnn.core.manifest import Manifest, stage_folder, tool_versions
from hf2mnn.machine.footprint import Footprint

_command: list[str] = []


def set_command(words: Sequence[str]) -> None:
    """Set the command line of this process, which `open_stage` records in manifests."""
    _command[:] = words


@dataclass(frozen=True)
class Stage:
    """Declaration of a stage."""

    name: str  # of the stage, of its command, and of its module in `hf2mnn.stages`
    tools: tuple[str, ...]  # packages whose release changes the results
    footprint: Footprint
    inputs: Mapping[str, str] = field(default_factory=dict)  # stages that write the input folders, by name of the input
    exceptions: Mapping[str, Footprint] = field(default_factory=dict)  # other footprints by variant

    def footprint_of(self, variant: str | None) -> Footprint:
        """Return the footprint for a variant, or for a run without one."""
        return self.exceptions.get(variant or "", self.footprint)


@dataclass
class StageRun:
    """A running stage."""

    folder: Path  # to write to; it gets its final name when the stage succeeds
    inputs: dict[str, Manifest]  # verified manifests of the input folders, by name
    manifest: Manifest  # of this stage; `results` and `provenance` may still be set

    @property
    def results(self) -> dict[str, Any]:
        """Figures that the manifest reports."""
        return self.manifest.results


@contextmanager
def open_stage(
    stage: Stage,
    destination: Path,
    inputs: Mapping[str, Path | Manifest | None] | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    files: Mapping[str, Path] | None = None,
    paths: Mapping[str, Path | str] | None = None,
    tools: Sequence[str] | None = None,
) -> Iterator[StageRun]:
    """Verify a stage's inputs, yield a folder to write to, and publish it with a manifest when the block succeeds.

    When the block fails, nothing is left, and an existing `destination` stays as it was. Raise ManifestError if an
    input differs from its manifest or is of another stage, Hf2mnnError if `destination` has files that no stage wrote.

    Args:
        stage: Declaration of the stage.
        destination: Output folder; replaced as a whole.
        inputs: Folders of other stages by name, or their verified manifests; None for an input that is not used.
        settings: Settings that change the results, for the manifest.
        files: User-provided files by name; their sha256 counts as an input.
        paths: Locations of inputs that no stage wrote, for the reader of a report.
        tools: Packages to record in place of `stage.tools`.
    """
    given = {name: folder for name, folder in (inputs or {}).items() if folder is not None}
    manifests = {name: one if isinstance(one, Manifest) else Manifest.load(one) for name, one in given.items()}
    for name, read in manifests.items():
        expected = stage.inputs.get(name)
        if expected and read.stage != expected:
            raise ManifestError(
                f"{read.folder} is a folder of the stage '{read.stage}', but 'hf2mnn {stage.name}' needs one of"
                f" '{expected}' as {name}: give that folder"
            )
        if read is not given[name]:
            read.verify()
    digests = {name: manifest.digest() for name, manifest in manifests.items()}
    digests |= {name: sha256(path) for name, path in (files or {}).items()}
    provenance = {name: origin for read in manifests.values() for name, origin in read.provenance.items()}
    manifest = Manifest(
        stage=stage.name,
        command=list(_command),
        inputs=digests,
        settings=dict(settings or {}),
        tools=tool_versions(*(stage.tools if tools is None else tools)),
        paths={name: str(path) for name, path in (paths or {}).items()},
        provenance=provenance,
    )
    with stage_folder(destination, manifest) as folder:
        yield StageRun(folder, manifests, manifest)
