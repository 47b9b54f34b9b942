"""Expected failures. Each is one sentence for a person: what happened, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 2000
"""Letters of a sentence: it may quote what a stranger's file holds."""


class Hf2mnnError(Exception):
    """Base of every failure that is the input's or the machine's fault. The CLI prints it bare, exit code 1."""

    def __str__(self) -> str:
        """One line of what a terminal only shows: a name in a stranger's file may hold anything."""
        line = " ".join(super().__str__().splitlines())
        if len(line) > LONGEST:  # what to do stands at the end
            line = f"{line[: LONGEST * 3 // 4]} ... {line[-LONGEST // 4 :]}"
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class MachineError(Hf2mnnError):
    """The machine has no room or no memory left, or does not let a stage write."""


class ConfigError(Hf2mnnError):
    """config.yaml asks for something that cannot be."""


class ToolchainError(Hf2mnnError):
    """An environment with other releases of the tools cannot be made."""


class CheckpointError(Hf2mnnError):
    """A checkpoint is missing, incomplete, or of a kind that is not converted."""


class EvaluationSetError(Hf2mnnError):
    """An evaluation set cannot be read: bad record, image that is not one, missing file."""


class ExportError(Hf2mnnError):
    """The ONNX graph could not be made, or is not what it must be."""


class ConversionError(Hf2mnnError):
    """MNN's converter failed, or wrote something other than what was asked (it prints success either way)."""


class BundleError(Hf2mnnError):
    """A bundle is missing, incomplete, or changed since it was made."""


class EngineError(Hf2mnnError):
    """MNN's engine was stopped, or did not do what it was asked."""


class EngineStopped(EngineError):
    """The engine took longer than it was given, or was killed."""


class BundleFault(EngineError):
    """The engine refused a bundle, crashed on it, or answered garbage: that is a result, and goes into the table.
    `words`: all that the engine printed.
    """

    def __init__(self, message: str, words: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.words = list(words)


class ManifestError(Hf2mnnError):
    """Files of a stage are not the ones that its manifest vouches for."""


class GateError(Hf2mnnError):
    """A required variant missed a gate."""


class QuantizationError(Hf2mnnError):
    """Weights cannot be quantized as asked: bad numbers, blocks that do not fit, a plan or a budget that cannot be."""
