# Shared by all stages: the checked configuration, the names that a wildcard may take, and what a stage depends on.
import json
import os
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

# The tools stand beside the Python that runs Snakemake, whether or not its environment is active.
os.environ.update(PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]))

from hf2mnn.config import parse_config
from hf2mnn.errors import Hf2mnnError
from hf2mnn.fingerprint import fingerprint
from hf2mnn.source.checkpoint import checkpoint_files, checkpoint_mb

try:
    CONFIG = parse_config(config)
except Hf2mnnError as error:
    raise WorkflowError(str(error)) from None


def names(values):
    """A wildcard constraint that takes these names and nothing else."""
    return "|".join(name.replace(".", r"\.") for name in values)


wildcard_constraints:
    model=names(CONFIG.models),
    variant=names(CONFIG.variants),


def source_files(wildcards):
    """Files of a local checkpoint, so that a changed one is noticed; a hub's revision stands in the params."""
    return checkpoint_files(CONFIG.models[wildcards.model].source.path)


def source_options(wildcards):
    source = CONFIG.models[wildcards.model].source
    if source.path:
        return shlex.join(["--path", source.path])
    return shlex.join(["--repository", source.repository, "--revision", source.revision])


def evaluation_files(wildcards):
    folder = Path(CONFIG.models[wildcards.model].evaluation)
    return sorted(str(path) for path in folder.rglob("*") if path.is_file())


def weights(part):
    """JSON of the weight settings of a variant's decoder or vision tower."""
    chosen = {"decoder": CONFIG.decoder_weights, "vision": CONFIG.vision_weights}[part]

    def of(wildcards):
        described = chosen(wildcards.variant).model_dump(include={"bits", "block", "symmetric", "scale_bits", "method"})
        return json.dumps(described, sort_keys=True)

    return of


def engine(wildcards):
    return json.dumps(CONFIG.engine(wildcards.variant).model_dump(), sort_keys=True)


def rows_of(model):
    return ["onnxruntime", *CONFIG.variants_of(model)]


def evaluations(wildcards):
    return [f"results/{wildcards.model}/eval/{row}/manifest.json" for row in rows_of(wildcards.model)]


def rows(wildcards):
    """JSON of the table's rows, with their gates."""
    described = [
        {"name": row, "required": CONFIG.required(row), "gates": CONFIG.row_gates(row)}
        for row in rows_of(wildcards.model)
    ]
    return json.dumps(described, sort_keys=True)


def memory(base, per_weight):
    """mem_mb of a stage: a base, and a multiple of the checkpoint's weights (2.2 times its bf16 bytes is fp32)."""

    def of(wildcards):
        return int(base + per_weight * checkpoint_mb(CONFIG.models[wildcards.model].source.path))

    return of
