"""The weight file beside a graph, and the files that a manifest vouches for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from hf2mnn.core.errors import Hf2mnnError
from hf2mnn.core.verify import changed
from hf2mnn.doctor.checks.graph import FETCH, is_pointer
from hf2mnn.doctor.finding import Finding, Severity
from hf2mnn.doctor.patient import Bundle, Model
from hf2mnn.mnn.graph import LINEAR

GARBAGE = "the engine says that it has loaded it, and answers finite garbage (about -3.4e38)"
REMAKE = "copy or download the file again, or make the bundle again with 'hf2mnn quantize'"


def weight_file_missing(model: Model) -> Iterator[Finding]:
    size = model.graph.external_size()
    if size and not model.weights.is_file():
        yield Finding(
            "weight_file_missing",
            Severity.ERROR,
            model.weights.name,
            f"the weights of {model.path.name} are not there",
            f"the graph reads {size:,} bytes of it",
            GARBAGE,
            REMAKE,
        )


def weight_file_pointer(model: Model) -> Iterator[Finding]:
    if model.graph.external_size() and model.weights.is_file() and is_pointer(model.weights):
        yield Finding(
            "weight_file_pointer",
            Severity.ERROR,
            model.weights.name,
            "it is a Git LFS pointer, not the weights",
            f"{model.weights.stat().st_size} bytes that begin with 'version https://git-lfs'",
            GARBAGE,
            FETCH,
        )


def _cut(model: Model) -> bool:
    return model.weights.is_file() and model.weights.stat().st_size < model.graph.external_size()


def weight_file_truncated(model: Model) -> Iterator[Finding]:
    if _cut(model) and not is_pointer(model.weights):
        size, ends = model.weights.stat().st_size, model.graph.external_ends()
        beyond = [name.removesuffix(LINEAR) for name, end in sorted(ends.items(), key=lambda e: e[1]) if end > size]
        yield Finding(
            "weight_file_truncated",
            Severity.ERROR,
            model.weights.name,
            "it was cut short",
            f"{size:,} of {max(ends.values()):,} bytes; {len(beyond)} of {len(ends)} operators are not whole, the first"
            f" is {beyond[0]}",
            GARBAGE,
            REMAKE,
        )


def weight_file_longer(model: Model) -> Iterator[Finding]:
    """Nothing writes a byte that the graph does not read, so it was written for another graph."""
    size, read = model.weights.stat().st_size, model.graph.external_size()
    if read and size > read and not model.foreign:
        yield Finding(
            "weight_file_longer",
            Severity.WARNING,
            model.weights.name,
            f"it has more bytes than {model.path.name} reads: it may be another model's",
            f"{size:,} bytes, {read:,} are read",
            "if it is another's, every answer is nonsense; floating-point weights do not say whose they are",
            "put graph and weight file of one conversion together; with --checkpoint the weights are compared",
        )


def weights_absent(model: Model) -> Iterator[Finding]:
    """A bundle with a graph of the `mnn` stage in it."""
    linear = [op for op in model.graph.of_type("Convolution") if op["main"].get("external")]
    empty = [op for op in linear if not sum(op["main"]["external"][1:2] + op["main"]["external"][4:])]
    if model.whole and empty:
        yield Finding(
            "weights_absent",
            Severity.ERROR,
            model.path.name,
            "linear layers have no weights",
            f"{len(empty)} of {len(linear)}, the first is {empty[0]['name'].removesuffix(LINEAR)}",
            GARBAGE,
            "this is a graph of the mnn stage; 'hf2mnn quantize' makes a bundle of it",
        )


def _settings(name: str) -> bool:
    return PurePosixPath(name).suffix in (".json", ".csv")


def file_changed(bundle: Bundle) -> Iterator[Finding]:
    """Every file that manifest.json vouches for, byte by byte; a weight file that is not whole has its own check."""
    if bundle.manifest is None:
        return
    broken = [m.weights for m in bundle.models.values() if not m.weights.is_file() or _is_cut(m)]
    for name, expected in sorted(bundle.manifest.outputs.items()):
        path = bundle.folder / name
        if path in broken:
            continue
        if change := changed(path, expected):
            yield Finding(
                "file_changed",
                Severity.WARNING if _settings(name) else Severity.ERROR,
                name,
                "it is not the file that was made",
                f"it {change} (manifest.json)",
                "settings were edited since: what was measured of the bundle need not hold, and hf2mnn refuses it"
                if _settings(name)
                else "one wrong byte can be one wrong weight or every wrong answer",
                REMAKE,
            )


def _is_cut(model: Model) -> bool:
    """Nothing can be said where the graph is no graph."""
    try:
        return _cut(model)
    except Hf2mnnError:
        return False
