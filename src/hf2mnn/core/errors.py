"""Typed errors for expected failures. Each message is one line: what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

MAX_MESSAGE = 2000
"""Characters of a message, which may quote an untrusted file."""


def suggest(name: object, valid: Sequence[str], former: Mapping[str, str] | None = None, listed: bool = False) -> str:
    """Return a hint for an unknown name: its present name (by `former`), the nearest, or all unless `listed` before."""
    present = (former or {}).get(str(name))
    if present in valid:
        return f"; it is called {present!r} now"
    nearest = get_close_matches(str(name), valid, 1, cutoff=0.5)
    if nearest:
        return f"; did you mean {nearest[0]!r}?"
    return f"; valid are {', '.join(valid)}" if valid and not listed else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Hf2mnnError(Exception):
    """Base class of failures caused by the input or the machine; the command line prints the message, exit code 1."""

    def __str__(self) -> str:
        """Return the message as one printable line, because names in untrusted files may hold control characters."""
        line = " ".join(super().__str__().splitlines())
        if len(line) > MAX_MESSAGE:  # keep the end, which says what to do
            line = f"{line[: MAX_MESSAGE * 3 // 4]} ... {line[-MAX_MESSAGE // 4 :]}"
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class MachineError(Hf2mnnError):
    """The machine has no disk space or memory left, denies access to a path, or lacks a Python package."""


class ConfigError(Hf2mnnError):
    """A configuration, a plan, or an option of the command line is invalid."""


class ToolchainError(Hf2mnnError):
    """A Python environment with other tool releases cannot be created."""


class CheckpointError(Hf2mnnError):
    """A checkpoint is missing, incomplete, inconsistent, or of an unsupported family."""


class EvaluationSetError(Hf2mnnError):
    """An evaluation set cannot be read: invalid record, unreadable image, missing file."""


class ExportError(Hf2mnnError):
    """An ONNX graph cannot be exported, or the exported graph is invalid."""


class ConversionError(Hf2mnnError):
    """MNN's converter failed, or wrote an unexpected graph (it reports success in both cases)."""


class BundleError(Hf2mnnError):
    """A bundle is missing, incomplete, or changed since it was written."""


class EngineError(Hf2mnnError):
    """MNN's engine failed for a reason other than the bundle."""


class EngineStopped(EngineError):
    """The engine exceeded its time limit, or was killed."""


class BundleFault(EngineError):
    """The engine rejected a bundle, crashed on it, or returned garbage: a result, which the table shows."""

    def __init__(self, message: str, kind: str = "crash", ended: str = "", output: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.kind = kind  # "load", "garbage", "image_tokens", "vocabulary" or "crash"
        self.ended = ended  # how the process of a crash ended: "signal 11", "exit code 3"
        self.output = list(output)  # lines that the engine printed


class ManifestError(Hf2mnnError):
    """The files of a stage folder differ from its manifest, or the folder belongs to another stage."""


class GateError(Hf2mnnError):
    """A required variant misses a gate."""


class QuantizationError(Hf2mnnError):
    """Weights cannot be quantized as requested: non-finite values, invalid blocks, an unreachable budget."""
