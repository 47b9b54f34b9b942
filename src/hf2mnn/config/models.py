"""Models in config.yaml: sources of checkpoints, evaluation sets, and toolchains."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from hf2mnn.config.messages import FOLDER, LABELLED, REPOSITORY, Block, Local, Name

RELEASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.!+_-]*")
Dataset = Literal["textvqa", "docvqa", "chartqa", "ai2d", "mmbench", "mmmu"]
HUB_REVISION = "Commit (best), tag or branch of the repository; by default main, or master of modelscope."


def _release(value: Any) -> Any:
    if isinstance(value, float):
        raise ValueError("YAML reads this as a number and drops trailing zeros: put the release in quotes")
    if not isinstance(value, str) or not RELEASE.fullmatch(value):
        raise ValueError(f"{value!r} is not a release: give a complete one, like '3.5.0'")
    return value


def canonical(package: str) -> str:
    """Return the name of a package as an index spells it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", package).lower()


def _folder_or(block: type[Block], tag: str) -> Any:
    """Return the type of a key that is either the path of a folder or a block."""
    tagged = Annotated[Local, Tag(FOLDER)] | Annotated[block, Tag(tag)]
    return Annotated[tagged, Discriminator(lambda value: tag if isinstance(value, dict | block) else FOLDER)]


class AdapterRepository(Block):
    """A LoRA adapter on a hub."""

    hub: Literal["huggingface", "modelscope"] = Field("huggingface", description="Hub of the repository.")
    repository: str = Field(description="owner/name on the hub.")
    revision: str | None = Field(None, description=HUB_REVISION)


class PartialSource(Block):
    """Keys of a source that one revision has different from the others."""

    path: Local | None = Field(None, description="Folder with config.json, relative to Snakemake's working directory.")
    hub: Literal["huggingface", "modelscope"] = Field("huggingface", description="Hub of the repository.")
    repository: str | None = Field(None, description="owner/name on the hub.")
    revision: str | None = Field(None, description=HUB_REVISION)
    pin: Local | None = Field(
        None, description="File of 'hf2mnn pin': hub, repository, commit, and sizes and hashes of its files."
    )
    files: Local | None = Field(
        None, description="Folder of user-provided files: those that match are used and not downloaded."
    )
    adapter: _folder_or(AdapterRepository, REPOSITORY) | None = Field(
        None, description="LoRA adapter (PEFT) to merge into the checkpoint: a local folder, or a repository of a hub."
    )


class Source(PartialSource):
    """Source of a checkpoint: a local folder, a repository of a hub, or a pin."""

    @model_validator(mode="after")
    def _check_keys(self) -> Source:
        if [self.path, self.repository, self.pin].count(None) != 2:
            raise ValueError(
                "give exactly one of path (a local folder), repository (owner/name on the hub) and pin (a file)"
            )
        for key in self.model_fields_set - {"path", "pin", "repository", "adapter"}:
            if self.path is not None or (self.pin is not None and key != "files"):
                raise ValueError(f"{key} is only for a repository{' or pin' if key == 'files' else ''}: remove it")
        return self


class LabelledSet(Block):
    """Questions of a labelled data set, drawn for the evaluation."""

    dataset: Dataset = Field(description="Name of the data set.")
    samples: int = Field(100, ge=1, description="Questions to draw.")
    path: Local | None = Field(None, description="Folder with a local copy; by default it is downloaded from the hub.")
    revision: str = Field("main", description="Commit (best), tag or branch of the data set on the hub.")
    seed: int = Field(0, description="Seed of the draw.")


class Model(Block):
    """A checkpoint to convert."""

    source: Source | None = Field(None, description="Source of the checkpoint; with revisions, their common keys.")
    revisions: Annotated[dict[Name, PartialSource], Field(min_length=1)] | None = Field(
        None, description="Several checkpoints of the model by name, the oldest first: the keys of source that differ."
    )
    evaluation: _folder_or(LabelledSet, LABELLED) = Field(
        "evaluation/general",
        description="Folder with examples.jsonl and its images, or a labelled data set to draw questions from.",
    )
    calibration: Local = Field(
        "evaluation/calibration",
        description="Folder like that of evaluation, with other examples: for awq, gptq and bits: auto.",
    )
    max_new_tokens: int = Field(64, ge=1, description="Longest greedy answer in the evaluation, in tokens.")
    variants: Annotated[list[Name], Field(min_length=1)] | None = Field(
        None, description="Variants to make of this model; by default all."
    )
    toolchains: list[Name] | None = Field(
        None, description="Toolchains for this model beside the pinned one; by default all."
    )

    def source_of(self, revision: str | None) -> Source:
        """Return the source of a revision, if any; ValidationError: common and own keys together are none."""
        own = self.revisions[revision] if revision else PartialSource()
        common = self.source or PartialSource()
        return Source(**common.model_dump(exclude_unset=True) | own.model_dump(exclude_unset=True))


class Instance(Model):
    """A version of a model in a run: a revision, made with a toolchain."""

    source: Source
    toolchain: str | None = None  # None for the pinned tools
    before: str | None = None  # name of the instance to compare the results with


class Toolchain(Block):
    """Other releases of the tools, in their own Python environment."""

    pins: dict[Name, Annotated[str, BeforeValidator(_release)]] = Field(
        {}, description="Release by package, in place of the one in requirements.txt."
    )
    others: Literal["pinned", "newest"] = Field(
        "pinned",
        description="All other packages: pinned as in requirements.txt, or the newest compatible ones that pip finds.",
    )

    def release(self, package: str) -> str | None:
        """Return the requested release of a package; None for the one in requirements.txt."""
        pins = {canonical(name): release for name, release in self.pins.items()}
        return pins.get(canonical(package), None if self.others == "pinned" else self.others)
