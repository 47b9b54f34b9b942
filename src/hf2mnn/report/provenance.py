"""What everything in the report was made of, by what, and by which commands, as the manifests tell."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from hf2mnn.manifest import Manifest
from hf2mnn.report.cells import Cell, Table
from hf2mnn.report.evidence import EXAMPLES, Evidence

UNKNOWN = "EVALUATION"
"""Stands in a command for the folder of the evaluation set where its manifest does not name it."""


@dataclass(frozen=True)
class Stage:
    """One folder of the model's results: `place` is its path there, `command` what makes it again."""

    place: str
    manifest: Manifest
    command: list[str]

    @property
    def line(self) -> str:
        return shlex.join(self.command)


def _portable(path: str) -> str:
    """A path as it was given, but of an absolute one only the name: the rest is another machine's."""
    return PurePath(path).name if PurePath(path).is_absolute() else path


def _options(settings: dict[str, Any], *names: str) -> list[str]:
    """--name value for those of `names` that the manifest holds."""
    return [word for name in names if name in settings for word in (f"--{name.replace('_', '-')}", str(settings[name]))]


def _source(root: str, manifest: Manifest) -> list[str]:
    settings, path = manifest.settings, manifest.places.get("path")
    where = ["--path", _portable(path)] if path else _options(settings, "hub", "repository")
    # ModelScope does not give files by commit.
    revision = settings.get("revision" if settings.get("hub") == "modelscope" else "commit", settings.get("revision"))
    adapter, folder = settings.get("adapter", {}), manifest.places.get("adapter")
    merged = ["--adapter", _portable(folder)] if folder else []
    for name in ("hub", "repository"):
        merged += [f"--adapter-{name}", adapter[name]] if name in adapter else []
    if adapter:
        merged += ["--adapter-revision", adapter["revision" if adapter["hub"] == "modelscope" else "commit"]]
    return ["source", *where, *(["--revision", revision] if revision else []), *merged]


def _examples(root: str, manifest: Manifest) -> list[str]:
    settings, places = manifest.settings, manifest.places
    if manifest.stage == "examples":
        return ["evaluation", "--examples", _portable(places["examples"])]
    where = ["--path", _portable(places["path"])] if "path" in places else _options(settings, "revision")
    return ["evaluation", *_options(settings, "dataset", "samples", "seed"), *where]


def _reference(root: str, manifest: Manifest) -> list[str]:
    evaluation = _portable(manifest.places.get("evaluation", UNKNOWN))
    options = _options(manifest.settings, "max_new_tokens", "threads")
    return ["reference", f"{root}/source", "--evaluation", evaluation, *options]


def _activations(root: str, manifest: Manifest) -> list[str]:
    folders = ["--calibration", f"{root}/calibration"]
    folders += ["--evaluation", f"{root}/reference"] if "evaluation" in manifest.inputs else []
    return ["activations", f"{root}/source", *folders, *_options(manifest.settings, "rows", "threads")]


def _sensitivity(root: str, manifest: Manifest) -> list[str]:
    bits = [word for bits in manifest.settings.get("bits", []) for word in ("--bits", str(bits))]
    options = _options(manifest.settings, "examples", "threads")
    return ["sensitivity", f"{root}/source", "--calibration", f"{root}/calibration", *bits, *options]


def _plan(root: str, manifest: Manifest) -> list[str]:
    folders = ["--onnx", f"{root}/onnx", "--base", f"{root}/mnn/base"]
    budget = manifest.settings["budget"]
    size = f"{budget['bundle_bytes']}B" if budget["bundle_bytes"] else str(budget["bits_per_weight"])
    return ["plan", f"{root}/sensitivity", *folders, "--budget", size, *_options(manifest.settings, "embedding")]


def _quantize(root: str, manifest: Manifest) -> list[str]:
    described = [
        word
        for name in ("decoder", "vision", "engine")
        if name in manifest.settings
        for word in (f"--{name}", json.dumps(manifest.settings[name], sort_keys=True))
    ]
    for name in ("activations", "source"):
        described += [f"--{name}", f"{root}/{name}"] if name in manifest.inputs else []
    if "plan" in manifest.places:
        described += ["--plan", _portable(manifest.places["plan"])]
    return ["quantize", f"{root}/onnx", f"{root}/mnn/base", *described, *_options(manifest.settings, "embedding")]


def _evaluate(root: str, name: str, manifest: Manifest) -> list[str]:
    bundle = ["--bundle", f"{root}/mnn/{name}"] if "bundle" in manifest.inputs else []
    folders = ["--reference", f"{root}/reference", "--onnx", f"{root}/onnx", *bundle]
    return ["evaluate", *folders, *_options(manifest.settings, "threads")]


def _diagnose(root: str, name: str, manifest: Manifest) -> list[str]:
    folders = ["--reference", f"{root}/reference", "--onnx", f"{root}/onnx", "--base", f"{root}/mnn/base"]
    return ["diagnose", *folders, "--bundle", f"{root}/mnn/{name}", *_options(manifest.settings, "threads")]


def _speed(root: str, manifest: Manifest) -> list[str]:
    bundles = [word for name in manifest.inputs for word in ("--bundle", f"{name}={root}/mnn/{name}")]
    names = ("baseline", "repeats", "prompt_tokens", "answer_tokens", "picture_side", "threads")
    lengths = [word for length in manifest.settings.get("lengths", []) for word in ("--length", str(length))]
    return ["speed", *bundles, *_options(manifest.settings, *names), *lengths]


def stages(evidence: Evidence) -> list[Stage]:
    """In the order in which they are made."""
    root, known, made = f"results/{evidence.model}", evidence.manifests, []

    def add(place: str, manifest: Manifest | None, command: list[str]) -> None:
        if manifest is not None:
            made.append(Stage(place, manifest, ["hf2mnn", *command, "--out", f"{root}/{place}"]))

    if "source" in known:
        add("source", known["source"], _source(root, known["source"]))
    for place in EXAMPLES:
        if place in known:
            add(place, known[place], _examples(root, known[place]))
    add("reference", known["reference"], _reference(root, known["reference"]))
    add("onnx", known.get("onnx"), ["onnx", f"{root}/source"])
    add("mnn/base", known.get("base"), ["mnn", f"{root}/onnx"])
    if "calibration" in known:
        add("calibration", known["calibration"], _reference(root, known["calibration"]))
    if "activations" in known:
        add("activations", known["activations"], _activations(root, known["activations"]))
    if "sensitivity" in known:
        add("sensitivity", known["sensitivity"], _sensitivity(root, known["sensitivity"]))
    for row in evidence.rows:
        if "plan" in row.manifests:
            add(f"plans/{row.name}", row.manifests["plan"], _plan(root, row.manifests["plan"]))
        if "bundle" in row.manifests:
            add(f"mnn/{row.name}", row.manifests["bundle"], _quantize(root, row.manifests["bundle"]))
    for row in evidence.rows:
        add(f"eval/{row.name}", row.manifests["evaluate"], _evaluate(root, row.name, row.manifests["evaluate"]))
    for row in evidence.rows:
        if "diagnose" in row.manifests:
            add(
                f"diagnosis/{row.name}", row.manifests["diagnose"], _diagnose(root, row.name, row.manifests["diagnose"])
            )
    if "speed" in known:
        add("speed", known["speed"], _speed(root, known["speed"]))
    return made


def checkpoint(evidence: Evidence) -> str:
    """Where the checkpoint came from, in a sentence."""
    if "source" not in evidence.manifests:
        return "Where the checkpoint came from is not known: its manifest is not there."
    settings, places = evidence.manifests["source"].settings, evidence.manifests["source"].places
    told = f"The checkpoint is {_origin(settings, places.get('path'))}."
    if "adapter" in settings or "adapter" in places:
        told += f" Merged into it is the adapter {_origin(settings.get('adapter', {}), places.get('adapter'))}."
    return told


def _origin(settings: dict[str, Any], path: str | None) -> str:
    if path:
        return f"the local folder {_portable(path)}"
    hub = "ModelScope" if settings.get("hub") == "modelscope" else "the Hugging Face hub"
    told = f"{settings['repository']} on {hub}, revision {settings['revision']}"
    return told + (f", commit {settings['commit']}" if "commit" in settings else "")


def missing(evidence: Evidence) -> list[str]:
    """What the manifests do not hold, so that nobody takes the commands for more than they are."""
    told, reference = [], evidence.manifests["reference"]
    if "evaluation" not in reference.places:
        told.append(
            f"The reference does not name the folder of its evaluation set ({UNKNOWN} in its command); the sha256 of"
            " its examples.jsonl and of each picture are below."
        )
    if "threads" not in reference.settings:
        told.append(
            "The reference does not say with how many threads PyTorch ran; sums in another order differ by 1e-6."
        )
    source = evidence.manifests.get("source")
    if source and "repository" in source.settings and "commit" not in source.settings:
        told.append("The source names a revision but no commit; the sha256 of its files say what it was.")
    return told


def _text(settings: Any) -> str:
    if isinstance(settings, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_text(value)}" for key, value in settings.items())
    if isinstance(settings, list):
        return " ".join(map(str, settings))
    return _portable(settings) if isinstance(settings, str) else json.dumps(settings)


def _weights(manifest: Manifest, part: str) -> str:
    """How a part's weights are stored; a plan names each operator's own settings."""
    described = dict(manifest.settings.get(part, {}))
    if "plan" in manifest.places:
        described = {"plan": manifest.places["plan"], "method": described.get("method", "")}
    return _text(described)


def variants(evidence: Evidence) -> Table | None:
    """Settings of each bundle, and what they come to."""
    rows = []
    for row in evidence.rows:
        if (manifest := row.manifests.get("bundle")) is None:
            continue
        bits, embedding = (manifest.results.get(name) for name in ("bits_per_weight", "embedding_bytes"))
        cells = [Cell(_weights(manifest, part)) for part in ("decoder", "vision")]
        cells.append(Cell(_text(manifest.settings.get("engine", {}))))
        cells.append(Cell("32" if bits is None else f"{bits:.3f}"))
        cells.append(Cell("in lm_head" if embedding == 0 else f"{embedding / 1e6:.1f} MB" if embedding else ""))
        rows.append((row.name, cells))
    columns = ["variant", "decoder", "vision", "engine", "bits a weight", "embedding"]
    return Table("Settings of each variant", columns, rows, wraps=True) if rows else None


def resources(made: list[Stage]) -> Table:
    """What each stage took, and the tools that it ran with."""
    rows = []
    for stage in made:
        manifest = stage.manifest
        tools = ", ".join(
            f"{tool} {release}" for tool, release in {"hf2mnn": manifest.hf2mnn, **manifest.tools}.items()
        )
        took = [Cell(f"{manifest.seconds:.1f}"), Cell(f"{manifest.peak_rss_mb:.0f}")]
        rows.append((stage.place, [*took, Cell(manifest.digest()[:12]), Cell(tools)]))
    return Table("Stages", ["folder", "seconds", "peak MB", "digest", "tools"], rows, wraps=True)


def files(made: list[Stage]) -> Table:
    """sha256 and size of each file that a later stage or a device reads, and of what came from outside."""
    rows: list[tuple[str, list[Cell]]] = []
    for stage in made:
        outside = {name: digest for name, digest in stage.manifest.inputs.items() if "/" in name or name == "examples"}
        wanted = stage.manifest.outputs if stage.place.split("/")[0] in ("source", "onnx", "mnn", "reference") else {}
        if not outside and not wanted:
            continue
        rows.append((stage.place, []))
        named = {"examples": "examples.jsonl (read)"}
        rows += [(named.get(name, f"{name} (read)"), [Cell(""), Cell(digest)]) for name, digest in outside.items()]
        rows += [(name, [Cell(f"{entry['size']:,}"), Cell(entry["sha256"])]) for name, entry in wanted.items()]
    return Table("Files", ["file", "bytes", "sha256"], rows)
